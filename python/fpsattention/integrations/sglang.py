"""An attention backend for SGLang's diffusion models (``sglang.multimodal_gen``).

In the process of the worker, before the model is built::

    from fpsattention.integrations import sglang
    sglang.register("SLIDING_TILE_ATTN", schedule="training_free", patch_size=(1, 2, 2))   # and select that backend

The set of backends is closed there, so it takes the place of a member of ``AttentionBackendEnum``. The token grid is that of the request
(``raw_latent_shape``) under ``patch_size``, sigma its timestep of the current step. Layers without a prefix (cross-attention) and calls
whose tokens are not the grid and what follows it are dense. Checked against stubs of these interfaces only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from sglang.multimodal_gen.runtime.layers.attention.backends.attention_backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
)
from sglang.multimodal_gen.runtime.managers.forward_context import get_forward_context
from sglang.multimodal_gen.runtime.platforms import AttentionBackendEnum, current_platform
from torch import Tensor

from ..schedule import Schedule
from .adapters.adapter import read_once
from .core_calls import CoreCall
from .handle import report as _report
from .hosted import Layers
from .report import Report

_settings: dict[str, Any] = {}


def register(
    member: str,
    schedule: Schedule | str | dict[str, Any] = "training_free",
    *,
    patch_size: Sequence[int] = (1, 2, 2),
    text_position: str = "suffix",
    on_unsupported: str = "dense",
) -> None:
    """Take the place of the backend ``member`` in this process; ``text_position``: where text of joint attention is."""
    enum = AttentionBackendEnum[member]
    resolved = Schedule.resolve(schedule)
    _settings.update(enum=enum, patch_size=tuple(patch_size), text_position=text_position)
    _settings["layers"] = Layers("sglang", resolved, on_unsupported)
    original: Callable[..., str] = getattr(current_platform.get_attn_backend_cls_str, "original", None) or (
        current_platform.get_attn_backend_cls_str
    )

    def choose(selected: Any, *args: Any, **kwargs: Any) -> str:
        if selected is _settings["enum"]:
            return f"{FPSAttentionBackend.__module__}.{FPSAttentionBackend.__qualname__}"
        return original(selected, *args, **kwargs)

    choose.original = original  # type: ignore[attr-defined]
    current_platform.get_attn_backend_cls_str = choose


def report() -> Report:
    """What ran so far, as of ``fps.apply``."""
    layers: Layers = _settings["layers"]
    return _report([one.hosted for one in layers.transformers if one.hosted is not None], {})


class FPSMetadataBuilder(AttentionMetadataBuilder):
    """Nothing to prepare: layers ask the forward context."""

    def __init__(self) -> None:
        pass

    def prepare(self) -> None:
        """Nothing."""

    def build(self, current_timestep: int = 0, **kwargs: Any) -> AttentionMetadata:
        """The step, whatever else is told."""
        return AttentionMetadata(current_timestep=current_timestep)


class FPSAttentionBackend(AttentionBackend):
    """What SGLang asks about the backend."""

    @staticmethod
    def get_enum() -> AttentionBackendEnum:
        """The member whose place it takes."""
        return _settings["enum"]

    @staticmethod
    def get_impl_cls() -> type[FPSAttentionImpl]:
        """Its attention."""
        return FPSAttentionImpl

    @staticmethod
    def get_metadata_cls() -> type[AttentionMetadata]:
        """That of all backends."""
        return AttentionMetadata

    @staticmethod
    def get_builder_cls() -> type[FPSMetadataBuilder]:
        """Its builder."""
        return FPSMetadataBuilder


class FPSAttentionImpl(AttentionImpl):
    """One layer."""

    def __init__(
        self, num_heads: int, head_size: int, softmax_scale: float, causal: bool = False, num_kv_heads: int | None = None,
        prefix: str = "", **extra_impl_args: Any,
    ) -> None:  # fmt: skip
        self.scale, self.causal = softmax_scale, causal
        self.layer = _settings["layers"].add(prefix) if prefix else None

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attn_metadata: Any = None) -> Tensor:
        """``(B, S, H, D)`` each."""
        context = get_forward_context()
        batch = context.forward_batch
        if self.layer is None or query.shape[:2] != key.shape[:2] or batch is None:
            return self._dense(query, key, value)
        refused, sigma, run, grid = None, 1.0, (), (1, 1, 1)
        shape, timesteps = getattr(batch, "raw_latent_shape", None), getattr(batch, "timesteps", None)
        if shape is None or timesteps is None:
            refused = "was not told raw_latent_shape and timesteps, expected both in the request"
        else:
            run = read_once(timesteps, _sigmas)
            sigma = run[int(context.current_timestep)]
            patches = _settings["patch_size"]
            grid = tuple(size // patch for size, patch in zip(tuple(shape)[-3:], patches, strict=True))  # type: ignore[assignment]
            if (t := grid[0] * grid[1] * grid[2]) > query.shape[1]:
                refused = f"got {query.shape[1]} tokens, expected at least the {t} of grid {grid}"
        core = CoreCall(query, key, value, self._dense, None, self.causal, self.scale)
        position = _settings["text_position"]
        return self.layer.attend(core, grid, sigma, text_position=position, run=run, refused=refused)

    def _dense(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=self.causal, scale=self.scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        return out.transpose(1, 2)


def _sigmas(timesteps: Tensor) -> tuple[float, ...]:
    return tuple(timestep / 1000 for timestep in timesteps.flatten().tolist())
