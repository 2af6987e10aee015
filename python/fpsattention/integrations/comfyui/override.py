"""``optimized_attention_override``: what ComfyUI calls in place of its attention, with the original as first argument.

A wrapper around the diffusion model reads the grid and sigma of each forward and leaves them in ``transformer_options``, which ComfyUI
hands to every attention, so threads and clones do not meet.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from fpsattention.errors import UnsupportedError
from fpsattention.integrations.adapters.adapter import read_once
from fpsattention.integrations.core_calls import CoreCall
from fpsattention.integrations.handle import report
from fpsattention.integrations.hosted import Hosted
from fpsattention.integrations.report import Report
from fpsattention.integrations.tokens import Grid
from fpsattention.schedule import Schedule

OVERRIDE = "optimized_attention_override"
FORWARD = "fpsattention_forward"
BLOCK = "fpsattention_block"
_LOG = logging.getLogger("fpsattention")


@dataclass(frozen=True)
class Family:
    """A family of ComfyUI's models.

    Attributes:
        class_name: of the diffusion model; subclasses count.
        blocks: its lists of blocks, in the order of their layers, by what ComfyUI calls them.
        pads: latents are padded to whole patches; otherwise they have to be whole.
    """

    class_name: str
    blocks: dict[str, str]
    pads: bool = True


FAMILIES = (
    Family("WanModel", {"double": "blocks"}),
    Family("HunyuanVideo", {"double": "double_blocks", "single": "single_blocks"}, pads=False),
    Family("LTXVModel", {"double": "transformer_blocks"}, pads=False),
)


def find(diffusion_model: Any) -> Family:
    """The family of a model.

    Raises:
        UnsupportedError: none that is known.
    """
    names = [cls.__name__ for cls in type(diffusion_model).__mro__]
    for family in FAMILIES:
        if family.class_name in names:
            return family
    known = ", ".join(family.class_name for family in FAMILIES)
    raise UnsupportedError(f"fpsattention.comfyui: {names[0]} is not supported, expected a model of class {known}")


class Override:
    """The attention of a model under a schedule.

    Args:
        family: of ``diffusion_model``.
        previous: an override that was there before: the dense path, and that of all other attention. None: ComfyUI's own.
        on_unsupported: "dense" or "raise".
    """

    def __init__(
        self,
        family: Family,
        diffusion_model: Any,
        schedule: Schedule,
        previous: Callable[..., Tensor] | None,
        on_unsupported: str,
    ):
        self.family = family
        self.previous = previous
        self.first: dict[str, int] = {}
        paths: list[str] = []
        for kind, name in family.blocks.items():
            self.first[kind] = len(paths)
            paths += [f"{name}.{i}" for i in range(len(getattr(diffusion_model, name, ())))]
        heads = getattr(diffusion_model, "num_heads", getattr(diffusion_model, "num_attention_heads", None))
        self.hosted = Hosted("diffusion_model", schedule, paths, heads, on_unsupported)

    def report(self) -> Report:
        """What ran so far, as of ``fps.apply``."""
        return report([self.hosted], {})

    # Around the model ------------------------------------------------------------------------------------------------------

    def around_forward(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """The wrapper of ComfyUI's "diffusion_model": reads the arguments of its forward by name."""
        model = executor.class_obj
        arguments = inspect.signature(type(model).forward).bind_partial(model, *args, **kwargs).arguments
        arguments.update(arguments.pop("kwargs", {}))
        options = arguments.get("transformer_options")
        if not isinstance(options, dict):
            return executor(*args, **kwargs)
        options.pop(BLOCK, None)  # of an earlier forward
        latents = arguments["x"]
        grid, refused = self._grid(model, latents, arguments)
        sigmas, run = _sigmas(options, latents.shape[0])
        if refused is None and sigmas is None:
            refused = "was not told the sigma of this step, expected transformer_options['sigmas']"
        position = "prefix" if arguments.get("reference_latent") is not None else "suffix"
        self.hosted.reads += sigmas is not None
        forward = self.hosted.begin(
            grid, sigmas or [1.0] * latents.shape[0], latents.device, text_position=position, run=run, refused=refused
        )
        keys = {x.shape[-2] for x in (arguments.get("context"), arguments.get("clip_fea")) if isinstance(x, Tensor)}
        before = options.get(FORWARD)
        options[FORWARD] = (forward, keys)
        try:
            with self._blocks_tell(model):
                return executor(*args, **kwargs)
        finally:
            options[FORWARD] = before
            self.hosted.count(forward)

    @contextmanager
    def _blocks_tell(self, model: Any) -> Iterator[None]:
        """Each block writes its number to the ``transformer_options`` that it is called with. (ComfyUI's own ``block_index`` is younger
        than its overrides, and missing in LTX-Video.)"""
        hooks = []
        for kind, name in self.family.blocks.items():
            for i, block in enumerate(getattr(model, name, ())):
                tell = partial(_tell, self.first[kind] + i)
                hooks.append(block.register_forward_pre_hook(tell, with_kwargs=True))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def around_sampling(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """The wrapper of ComfyUI's "outer_sample": says in the log what ran."""
        self.hosted.reset()
        out = executor(*args, **kwargs)
        found = self.report()
        calls = sum(row.calls for row in found.rows)
        _LOG.info("FPSAttention: %d attention calls, mean density %.3f", calls, found.density)
        for reason, count in found.fallbacks.items():
            _LOG.warning("FPSAttention: dense, %d times: %s", count, reason)
        return out

    def _grid(self, model: Any, latents: Any, arguments: dict[str, Any]) -> tuple[Grid, str | None]:
        if not isinstance(latents, Tensor) or latents.ndim != 5:
            shape = tuple(latents.shape) if isinstance(latents, Tensor) else type(latents).__name__
            return (1, 1, 1), f"got latents {shape}, expected one tensor (B, C, T, H, W)"
        patches = getattr(model, "patch_size", (1, 1, 1))
        sizes = list(zip(latents.shape[2:], patches, strict=True))
        t, h, w = (-(-size // patch) for size, patch in sizes)
        for name in ("time_dim_concat", "keyframe_idxs", "context_latents"):
            if arguments.get(name) is not None:
                return (t, h, w), f"got {name}, expected a video alone (or with a reference image before it)"
        if not self.family.pads and any(size % patch for size, patch in sizes):
            return (
                t,
                h,
                w,
            ), f"got latents {tuple(latents.shape)}, expected sizes that are multiples of the patch {patches}"
        return (t, h, w), None

    # Around an attention ---------------------------------------------------------------------------------------------------

    def __call__(self, func: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """An attention of ComfyUI: ``func(q, k, v, heads, mask=None, ..., skip_reshape=False, skip_output_reshape=False)``, where
        q, k, v are ``(B, S, H D)``, or ``(B, H, S, D)`` with ``skip_reshape``; likewise the output."""
        names = ("q", "k", "v", "heads", "mask", "attn_precision", "skip_reshape", "skip_output_reshape")
        call = {**dict(zip(names, args, strict=False)), **kwargs}

        def original(*args: Any, **kwargs: Any) -> Tensor:
            return func(*args, **kwargs) if self.previous is None else self.previous(func, *args, **kwargs)

        options = call.get("transformer_options") or {}
        forward, other_keys = options.get(FORWARD) or (None, ())
        layer = self._layer(options)
        axis = 2 if call.get("skip_reshape") else 1
        if forward is None or layer is None or call["q"].shape != call["k"].shape:
            return original(*args, **kwargs)  # cross-attention, text encoders, refiners
        t, h, w = forward.video.grid
        count = call["q"].shape[axis]
        if count < t * h * w:
            return original(*args, **kwargs)
        if count in other_keys and forward.refused is None:  # cross-attention cannot be told from self-attention
            forward.refused = (
                f"attends {count} tokens, and so many keys cross-attention has, expected different numbers"
            )
        heads, reshaped, keep = call["heads"], call.get("skip_reshape"), call.get("skip_output_reshape")

        def nhd(x: Tensor) -> Tensor:
            return x.transpose(1, 2) if reshaped else x.unflatten(2, (heads, -1))

        whole_q, whole_k, whole_v = (nhd(call[name]) for name in "qkv")
        masked = call.get("mask")

        def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = masked) -> Tensor:
            if q is whole_q:  # the very call
                out = original(*args, **kwargs)
            else:
                q, k, v = ((x.transpose(1, 2) if reshaped else x.flatten(2)) for x in (q, k, v))
                rest = {name: x for name, x in call.items() if name not in ("q", "k", "v", "heads", "mask")}
                out = original(q, k, v, heads, mask=mask, **rest)
            return out.transpose(1, 2) if keep else out.unflatten(2, (heads, -1))

        core = CoreCall(whole_q, whole_k, whole_v, dense, masked, False, call.get("scale"))
        out = self.hosted.attend(layer, core, forward)
        return out.transpose(1, 2) if keep else out.flatten(2)

    def _layer(self, options: dict[str, Any]) -> int | None:
        """The layer whose block runs; None: outside of the blocks."""
        layer = options.get(BLOCK)
        return layer if layer is not None and layer < len(self.hosted.sites) else None


def _tell(layer: int, block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    options = kwargs.get("transformer_options")
    if isinstance(options, dict):
        options[BLOCK] = layer


def _falling(sigmas: Tensor) -> tuple[float, ...]:
    return tuple(sigmas.flatten().tolist())


def _sigmas(options: dict[str, Any], batch: int) -> tuple[list[float] | None, tuple[float, ...]]:
    """Sigma in [0, 1] of every sample, and of all steps where the sampler runs all of them.

    ComfyUI tells sigmas of its sampler: in [0, 1] for flow models; others go higher, where s / (s + 1) is the share of the noise.
    """
    now, steps = options.get("sigmas"), options.get("sample_sigmas")
    if not isinstance(now, Tensor):
        return None, ()
    run: tuple[float, ...] = read_once(steps, _falling) if isinstance(steps, Tensor) else ()
    values = now.flatten().tolist()
    if max((*run, *values)) > 1.0 + 1e-6:
        run, values = tuple(s / (s + 1) for s in run), [s / (s + 1) for s in values]
    whole = len(run) > 2 and run[0] > 0.95 and run[-1] == 0.0 and list(run) == sorted(run, reverse=True)
    return (values * batch if len(values) == 1 else values), run[:-1] if whole else ()
