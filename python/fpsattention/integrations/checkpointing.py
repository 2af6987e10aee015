"""Gradient checkpointing: a recomputed block must see the grid and sigma of its own forward, not those of the last one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .levels import Call
from .wan import FPSWanAttnProcessor


class SnapshotCheckpoint:
    """Wraps the checkpoint function of a transformer (diffusers' default or the user's own, reentrant or not).

    What it hands to ``function`` is not the block but a callable that carries the block's :class:`Call`, so the call comes back
    whenever the block is recomputed. Without it two forwards before a backward recompute the first with the state of the second.
    """

    def __init__(self, function: Callable[..., Any]):
        self.function = function

    def __call__(self, block: torch.nn.Module, *args: Any) -> Any:
        processor = getattr(getattr(block, "attn1", None), "processor", None)
        if isinstance(processor, FPSWanAttnProcessor) and processor.call is not None:
            return self.function(BlockWithCall(block, processor, processor.call), *args)
        return self.function(block, *args)


class BlockWithCall:
    """``block(*args)`` with its attention's call as it was when this object was made."""

    def __init__(self, block: torch.nn.Module, processor: FPSWanAttnProcessor, call: Call):
        self.block, self.processor, self.call = block, processor, call

    def __call__(self, *args: Any) -> Any:
        current, self.processor.call = self.processor.call, self.call
        try:
            return self.block(*args)
        finally:  # also when checkpointing stops a recomputation early, by an exception
            self.processor.call = current
