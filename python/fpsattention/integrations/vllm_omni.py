"""An attention backend for vLLM-Omni's diffusion models (``vllm_omni.diffusion.attention``).

In the process of the worker, before the model is built::

    from fpsattention.integrations import vllm_omni
    vllm_omni.register("SAGE_ATTN", schedule="training_free")   # any member of DiffusionAttentionBackendEnum: select that one

Self-attention over a video runs under the schedule; cross-attention, masks, joint and paged inputs go to ``dense``, another member. The
token grid is that of the metadata (``video_layout``) or of the forward context (``latent_shape``, ``patch_size``), sigma its
``denoise_timestep``; where one is missing the call is dense, and ``report()`` says so. Checked against stubs of these interfaces only.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from vllm_omni.diffusion.attention.backends.abstract import AttentionBackend, AttentionImpl, AttentionMetadata
from vllm_omni.diffusion.attention.backends.registry import DiffusionAttentionBackendEnum, register_diffusion_backend
from vllm_omni.diffusion.forward_context import get_forward_context, is_forward_context_available

from ..errors import ConfigError
from ..schedule import Schedule
from .core_calls import CoreCall
from .handle import report as _report
from .hosted import Layers
from .report import Report

_settings: dict[str, Any] = {}


def register(
    member: str,
    schedule: Schedule | str | dict[str, Any] = "training_free",
    *,
    dense: str = "TORCH_SDPA",
    on_unsupported: str = "dense",
) -> None:
    """Take the place of the backend ``member`` in this process; ``dense`` is the one for what is not under the schedule.

    Raises:
        ConfigError: the schedule is wrong, or both backends are one.
    """
    if member == dense:
        raise ConfigError(f"fpsattention.vllm_omni: member {member!r} and dense {dense!r}, expected different backends")
    resolved = Schedule.resolve(schedule)
    original = DiffusionAttentionBackendEnum[dense].get_class()
    _settings.update(name=member, dense=original, layers=Layers("vllm_omni", resolved, on_unsupported))
    path = f"{FPSAttentionBackend.__module__}.{FPSAttentionBackend.__qualname__}"
    register_diffusion_backend(DiffusionAttentionBackendEnum[member], path)


def report() -> Report:
    """What ran so far, as of ``fps.apply``."""
    layers: Layers = _settings["layers"]
    return _report([one.hosted for one in layers.transformers if one.hosted is not None], {})


class FPSAttentionBackend(AttentionBackend):
    """What vLLM-Omni asks about the backend."""

    @staticmethod
    def get_name() -> str:
        """The member whose place it takes."""
        return str(_settings["name"])

    @staticmethod
    def get_impl_cls() -> type[FPSAttentionImpl]:
        """Its attention."""
        return FPSAttentionImpl

    @staticmethod
    def get_metadata_cls() -> type[AttentionMetadata]:
        """No metadata of its own."""
        return AttentionMetadata

    @staticmethod
    def get_builder_cls() -> None:
        """No builder."""
        return None

    @staticmethod
    def get_supported_head_sizes() -> list[int]:
        """All: those above 128 stay dense."""
        return []

    @classmethod
    def supports_attention_mask(cls, attention_spec: object | None = None) -> bool:
        """As the dense backend: masked calls go there."""
        return bool(_settings["dense"].supports_attention_mask(attention_spec))


class FPSAttentionImpl(AttentionImpl):
    """One layer."""

    def __init__(self, *args: Any, role: str = "self", prefix: str = "", **kwargs: Any) -> None:
        self.dense = _settings["dense"].get_impl_cls()(*args, prefix=prefix, **kwargs)
        names = ("num_heads", "head_size", "softmax_scale", "causal")
        told = {**dict(zip(names, args, strict=False)), **kwargs}
        self.scale, self.causal = told.get("softmax_scale"), bool(told.get("causal", False))
        self.layer = _settings["layers"].add(prefix) if role == "self" and prefix else None

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attn_metadata: AttentionMetadata | None = None
    ) -> Tensor:
        """``(B, S, H, D)`` each."""
        told = attn_metadata
        joint = told is not None and told.joint_query is not None
        if self.layer is None or joint or query.shape[:2] != key.shape[:2] or not is_forward_context_available():
            return self.dense.forward(query, key, value, told)

        def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
            return self.dense.forward(q, k, v, told)

        grid, position, refused = _tokens(told, query.shape[1])
        sigma = getattr(get_forward_context(), "denoise_timestep", None)
        if sigma is None:
            refused = refused or "was not told the denoise_timestep of this step"
        core = CoreCall(query, key, value, dense, getattr(told, "attn_mask", None), self.causal, self.scale)
        level = 1.0 if sigma is None else float(sigma)
        return self.layer.attend(core, grid, level, text_position=position, refused=refused)


def _tokens(told: AttentionMetadata | None, count: int) -> tuple[tuple[int, int, int], str, str | None]:
    """Grid, where other tokens are, and why there is no grid."""
    layout, context = getattr(told, "video_layout", None), get_forward_context()
    if getattr(told, "packed_padding", None) is not None or getattr(told, "full_attn_spans", None) is not None:
        return (1, 1, 1), "suffix", "got packed padding or spans, expected one video with all its tokens valid"
    if layout is not None and layout.latent_grid is not None and layout.prefix_len is not None:
        t, h, w = layout.latent_grid
        if layout.prefix_len + t * h * w != count:
            return (t, h, w), "prefix", f"got {count} tokens, expected no padding after the video"
        return (t, h, w), "prefix", None
    shape, patches = getattr(context, "latent_shape", None), getattr(context, "patch_size", None)
    if shape is None or patches is None:
        return (1, 1, 1), "suffix", "was not told the video's grid (video_layout, latent_shape)"
    t, h, w = (size // patch for size, patch in zip(shape, patches, strict=True))
    if t * h * w != count:
        return (t, h, w), "suffix", f"got {count} tokens, expected the {t * h * w} of grid {(t, h, w)}"
    return (t, h, w), "suffix", None
