"""Gradient checkpointing: a recomputed block must see the forward that it was part of, not the one that ran last, or none."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from .forward import Forward
from .state import CURRENT


class SnapshotCheckpoint:
    """Wraps a checkpoint function (diffusers' default, the user's own, that of torch's ``CheckpointWrapper``; reentrant or not).

    What it hands to ``function`` is not the block but a callable that carries the :class:`Forward`, so that it comes back
    whenever the block is recomputed, on whichever thread.
    """

    def __init__(self, function: Callable[..., Any]):
        self.function = function

    def __call__(self, block: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if CURRENT.forward is None or torch.compiler.is_compiling():  # a graph recomputes from its own inputs
            return self.function(block, *args, **kwargs)
        return self.function(BlockInForward(block, CURRENT.forward), *args, **kwargs)


class BlockInForward:
    """``block(*args)`` in the forward that ran when this object was made."""

    def __init__(self, block: Callable[..., Any], forward: Forward):
        self.block, self.forward = block, forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        before, CURRENT.forward = CURRENT.forward, self.forward
        try:
            return self.block(*args, **kwargs)
        finally:  # also when checkpointing stops a recomputation early, by an exception
            CURRENT.forward = before


def snapshot_checkpoints(transformer: torch.nn.Module, paths: Iterable[str]) -> None:
    """Wraps the checkpoint function of ``transformer`` and of torch's ``CheckpointWrapper`` modules on the way to ``paths``."""
    function = getattr(transformer, "_gradient_checkpointing_func", None)
    if getattr(transformer, "gradient_checkpointing", False) and not isinstance(function, SnapshotCheckpoint):
        assert function is not None
        transformer._gradient_checkpointing_func = SnapshotCheckpoint(function)  # type: ignore[assignment]
    for path in paths:
        module: Any = transformer
        for name in path.split("."):
            module = getattr(module, name, None)
            for inner in _wrapped(module):
                if "checkpoint_fn" in vars(inner) and not isinstance(inner.checkpoint_fn, SnapshotCheckpoint):
                    inner.checkpoint_fn = SnapshotCheckpoint(inner.checkpoint_fn)


def plain_checkpoints(transformer: torch.nn.Module) -> None:
    """Undoes :func:`snapshot_checkpoints`."""
    function = getattr(transformer, "_gradient_checkpointing_func", None)
    if isinstance(function, SnapshotCheckpoint):
        transformer._gradient_checkpointing_func = function.function  # type: ignore[assignment]
    for module in transformer.modules():
        function = vars(module).get("checkpoint_fn")
        if isinstance(function, SnapshotCheckpoint):
            module.checkpoint_fn = function.function  # type: ignore[assignment]


def _wrapped(module: Any) -> Iterator[Any]:
    """``module`` and what it wraps: torch.compile, FSDP, checkpointing."""
    while isinstance(module, torch.nn.Module):
        yield module
        modules = module._modules
        module = (
            modules.get("_checkpoint_wrapped_module") or modules.get("_fsdp_wrapped_module") or modules.get("_orig_mod")
        )
