"""Attention of raw projections: norm and RoPE of q and k inside of the quantizer (``torch.ops.fpsattn.prepare``), in FP32."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..errors import ConfigError, UnsupportedError
from ..layout.masks import Lists
from .backends import reference_attention
from .norm_rope import NORMS, norm_rope

NORM_KINDS = tuple(kind for kind in NORMS if kind != "none")
ROPE_STYLES = ("pairs", "halves")


def _fail(text: str) -> NoReturn:
    raise ConfigError(f"fpsattention.attention: {text}")


@dataclass(frozen=True)
class Norm:
    """How raw queries and keys are normalized: for ``fpsattention.attention(..., norm=)``.

    Args:
        kind: "rms", RMSNorm over the D channels of a head (HunyuanVideo, Mochi, Qwen); "rms_across_heads", over all H * D channels of a
            token (Wan, LTX); "layer", LayerNorm over the D channels of a head (CogVideoX).
        q_weight, k_weight: ``(D,)``, across heads ``(H * D,)``; None: ones. A weight of two rows, ``(2, .)``, has one for a run of tokens (the
            video) and one for the others (the text of a joint model). Differentiable.
        q_bias, k_bias: likewise; None: zeros.
        eps: added to the mean of squares.
        tokens: begin and end of the run that the first of two rows is for; None: the tokens that ``Rope`` rotates. Needed where the text
            is rotated, too (Flux, Qwen-Image).
    """

    kind: str
    q_weight: Tensor | None = None
    k_weight: Tensor | None = None
    q_bias: Tensor | None = None
    k_bias: Tensor | None = None
    eps: float = 1e-6
    tokens: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.kind not in NORM_KINDS:
            _fail(f"norm.kind {self.kind!r}, expected one of {', '.join(map(repr, NORM_KINDS))}")
        if self.tokens is not None and (len(self.tokens) != 2 or self.tokens[1] < 0):
            _fail(f"norm.tokens {self.tokens}, expected begin and end of a run of tokens, or None")

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.q_weight, self.k_weight, self.q_bias, self.k_bias


@dataclass(frozen=True)
class Rope:
    """Rotary embedding of raw queries and keys: for ``fpsattention.attention(..., rope=)``.

    Args:
        cos, sin: ``(n, D/2)``, or ``(1 or B, 1 or H, n, D/2)``, one angle per pair of channels, taken as FP32. Not differentiable.
        style: which channels are a pair: "pairs", 2i and 2i + 1 (Wan, HunyuanVideo, LTX, Flux), or "halves", i and i + D/2 (Cosmos).
        first: the first rotated token; tokens before it and from ``first + n`` on are not rotated (the text of a joint model).
    """

    cos: Tensor
    sin: Tensor
    style: str = "pairs"
    first: int = 0

    def __post_init__(self) -> None:
        if self.style not in ROPE_STYLES:
            _fail(f"rope.style {self.style!r}, expected one of {', '.join(map(repr, ROPE_STYLES))}")
        for name, x in (("cos", self.cos), ("sin", self.sin)):
            if not isinstance(x, Tensor) or x.dim() not in (2, 4):
                what = f"has shape {tuple(x.shape)}" if isinstance(x, Tensor) else f"is a {type(x).__name__}"
                _fail(f"rope.{name} {what}, expected a tensor (n, D/2) or (1 or B, 1 or H, n, D/2)")

    def table(self, x: Tensor) -> Tensor:
        return (x if x.dim() == 4 else x[None, None]).detach().float()


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lists: Lists,
    norm: Norm | None,
    rope: Rope | None,
    k_mean: Tensor | None,
    v_absmax: Tensor | None,
    hidden: Tensor | None,
    *,
    backend: str,
    deterministic: bool,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """``(out, lse)`` of raw q, k, v ``(B, H, S, D)``; gradients go to the raw tensors, the weights and the biases."""
    weights = () if norm is None else norm.tensors
    q_weight, k_weight, q_bias, k_bias = (_rows(x) for x in weights or (None,) * 4)
    cos, sin = (None, None) if rope is None else (rope.table(rope.cos), rope.table(rope.sin))
    weights_begin, weights_end = (0, -1) if norm is None or norm.tokens is None else norm.tokens
    position: dict[str, Any] = {
        "norm": NORMS["none" if norm is None else norm.kind],
        "eps": 0.0 if norm is None else float(norm.eps),
        "rope_halves": rope is not None and rope.style == "halves",
        "first_rotated": 0 if rope is None else rope.first,
        "weights_begin": weights_begin,
        "weights_end": weights_end,
    }
    if backend == "reference":
        q32, k32 = (
            norm_rope(x.cpu(), *(y if y is None else y.cpu() for y in (weight, bias, cos, sin)), **position)
            for x, weight, bias in ((q, q_weight, q_bias), (k, k_weight, k_bias))
        )
        out, lse = reference_attention(
            q32, k32, v.cpu().float(), lists.to("cpu"), k_mean=k_mean, v_absmax=v_absmax, hidden=hidden, **options
        )
        return out.to(q.device, q.dtype), lse.to(q.device)
    if torch._C._are_functorch_transforms_active():
        raise UnsupportedError(
            "fpsattention.attention: norm or rope inside a transform of torch.func was asked for, which it has not: apply them "
            "before, or use torch.autograd"
        )
    out, lse, *_ = torch.ops.fpsattn.attention_prepared(
        q, k, v, *lists, q_weight, k_weight, q_bias, k_bias, cos, sin, k_mean, v_absmax, hidden,
        **position, **options, deterministic=deterministic,
    )  # fmt: skip
    return out, lse


def _rows(x: Tensor | None) -> Tensor | None:
    """A weight as FP32 ``[1 or 2, n]``."""
    return x if x is None else (x if x.dim() == 2 else x.reshape(1, -1)).float()
