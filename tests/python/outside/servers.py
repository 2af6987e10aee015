"""Stubs of the interfaces of vLLM-Omni and SGLang that attention backends see, as modules to put into ``sys.modules``.

Read at commits 02952af and 0217da5 of vllm-project/vllm-omni, 035d6e7 and 0809d0d of sgl-project/sglang. ``latent_shape`` and ``patch_size``
are in the forward context of some versions of vLLM-Omni only; without them a video needs ``video_layout``."""

import enum
import sys
import types
from dataclasses import dataclass, field
from typing import Any

import torch

from . import sdpa


def modules_of(names: dict[str, dict[str, Any]]) -> dict[str, types.ModuleType]:
    """Modules with these members, and the packages that they are in."""
    made: dict[str, types.ModuleType] = {}
    for name, members in names.items():
        parts = name.split(".")
        for i in range(1, len(parts) + 1):
            path = ".".join(parts[:i])
            module = made.setdefault(path, types.ModuleType(path))
            module.__path__ = []
        made[name].__dict__.update(members)
    return made


def resolve(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(sys.modules[module], name)


class AttentionBackend:
    pass


class AttentionImpl:
    pass


# vLLM-Omni ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class VideoTokenLayout:
    prefix_len: int | None = None
    latent_grid: tuple[int, int, int] | None = None
    used_len: int | None = None


@dataclass
class OmniMetadata:
    attn_mask: torch.Tensor | None = None
    joint_query: torch.Tensor | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    full_attn_spans: Any = None
    video_layout: VideoTokenLayout | None = None
    packed_padding: Any = None


class OmniContext:
    denoise_timestep: float | None = None


class SDPAImpl(AttentionImpl):
    calls = 0

    def __init__(self, num_heads, head_size, softmax_scale, causal=False, num_kv_heads=None, prefix="", **extra):
        self.scale = softmax_scale

    def forward(self, query, key, value, attn_metadata=None):
        SDPAImpl.calls += 1
        return sdpa(query, key, value, None if attn_metadata is None else attn_metadata.attn_mask)


class SDPABackend(AttentionBackend):
    @staticmethod
    def get_impl_cls():
        return SDPAImpl

    @classmethod
    def supports_attention_mask(cls, attention_spec=None):
        return True


class OmniEnum(enum.Enum):
    TORCH_SDPA = "sdpa"
    SAGE_ATTN = "sage"

    def get_class(self):
        return resolve(OVERRIDES[self]) if self in OVERRIDES else SDPABackend


OVERRIDES: dict[OmniEnum, str] = {}
OMNI = OmniContext()


def vllm_omni() -> dict[str, types.ModuleType]:
    at = "vllm_omni.diffusion."
    return modules_of(
        {
            at + "attention.backends.abstract": {
                "AttentionBackend": AttentionBackend, "AttentionImpl": AttentionImpl, "AttentionMetadata": OmniMetadata
            },
            at + "attention.backends.registry": {
                "DiffusionAttentionBackendEnum": OmniEnum, "register_diffusion_backend": OVERRIDES.__setitem__
            },
            at + "forward_context": {"get_forward_context": lambda: OMNI, "is_forward_context_available": lambda: True},
        }
    )  # fmt: skip


# SGLang ------------------------------------------------------------------------------------------------------------------


class SGLangEnum(enum.Enum):
    TORCH_SDPA = enum.auto()
    SLIDING_TILE_ATTN = enum.auto()


class Platform:
    def get_attn_backend_cls_str(self, selected_backend, head_size, dtype):
        return f"{__name__}.SDPABackend"


@dataclass
class StepMetadata:
    current_timestep: int


@dataclass
class SGLangContext:
    current_timestep: int = 0
    forward_batch: Any = None


SGLANG = SGLangContext()
PLATFORM = Platform()


def sglang() -> dict[str, types.ModuleType]:
    at = "sglang.multimodal_gen.runtime."
    return modules_of(
        {
            at + "layers.attention.backends.attention_backend": {
                "AttentionBackend": AttentionBackend, "AttentionImpl": AttentionImpl, "AttentionMetadata": StepMetadata,
                "AttentionMetadataBuilder": object,
            },
            at + "managers.forward_context": {"get_forward_context": lambda: SGLANG},
            at + "platforms": {"AttentionBackendEnum": SGLangEnum, "current_platform": PLATFORM},
        }
    )  # fmt: skip
