"""Attention of raw projections: norm and RoPE of q and k inside of the quantizer (``torch.ops.fpsattn.prepare``), in FP32."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..errors import ConfigError, UnsupportedError
from ..layout.masks import Lists
from . import autograd
from .backends import reference_attention
from .norm_rope import NORMS, norm_rope, norm_rope_backward

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
        q_weight, k_weight: ``(D,)``, across heads ``(H * D,)``; None: ones. A weight of two rows, ``(2, .)``, has one for the tokens that
            ``Rope`` rotates (the video) and one for the others (the text of a joint model). Differentiable.
        q_bias, k_bias: likewise; None: zeros.
        eps: added to the mean of squares.
    """

    kind: str
    q_weight: Tensor | None = None
    k_weight: Tensor | None = None
    q_bias: Tensor | None = None
    k_bias: Tensor | None = None
    eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.kind not in NORM_KINDS:
            _fail(f"norm.kind {self.kind!r}, expected one of {', '.join(map(repr, NORM_KINDS))}")

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
    *,
    backend: str,
    deterministic: bool,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """``(out, lse)`` of raw q, k, v ``(B, H, S, D)``; gradients go to the raw tensors, the weights and the biases."""
    weights = () if norm is None else norm.tensors
    q_weight, k_weight, q_bias, k_bias = (_rows(x) for x in weights or (None,) * 4)
    cos, sin = (None, None) if rope is None else (rope.table(rope.cos), rope.table(rope.sin))
    position: dict[str, Any] = {
        "norm": NORMS["none" if norm is None else norm.kind],
        "eps": 0.0 if norm is None else float(norm.eps),
        "rope_halves": rope is not None and rope.style == "halves",
        "first_rotated": 0 if rope is None else rope.first,
    }
    if backend == "reference":
        q32, k32 = (
            norm_rope(x.cpu(), *(y if y is None else y.cpu() for y in (weight, bias, cos, sin)), **position)
            for x, weight, bias in ((q, q_weight, q_bias), (k, k_weight, k_bias))
        )
        out, lse = reference_attention(
            q32, k32, v.cpu().float(), lists.to("cpu"), k_mean=k_mean, v_absmax=v_absmax, **options
        )
        return out.to(q.device, q.dtype), lse.to(q.device)
    if torch._C._are_functorch_transforms_active():
        raise UnsupportedError(
            "fpsattention.attention: norm or rope inside a transform of torch.func was asked for, which it has not: apply them "
            "before, or use torch.autograd"
        )
    out, lse, *_ = _PreparedAttention.apply(
        q, k, v, q_weight, k_weight, q_bias, k_bias, cos, sin, k_mean, v_absmax, *lists, position,
        {**options, "deterministic": deterministic},
    )  # fmt: skip
    return out, lse


def _rows(x: Tensor | None) -> Tensor | None:
    """A weight as FP32 ``[1 or 2, n]``."""
    return x if x is None else (x if x.dim() == 2 else x.reshape(1, -1)).float()


class _PreparedAttention(torch.autograd.Function):
    """prepare, then forward. Derivatives pass the quantizers as identity, then RoPE and norm as they are (``norm_rope_backward``)."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        q, k, v, *tensors = inputs[:11]
        token_of_slot, tile_of_block, offsets, kv_num_blocks, kv_indices, *_, position, options = inputs[11:]
        softmax_scale = options["softmax_scale"]
        others = {name: x for name, x in options.items() if name not in ("softmax_scale", "deterministic")}
        ops = torch.ops.fpsattn
        z = ops.prepare(q, k, v, token_of_slot, offsets, *tensors, **position, **others)
        out, lse, row_max, row_sum = ops.forward(
            *z[:6], token_of_slot, tile_of_block, kv_num_blocks, kv_indices, z[7],
            num_tokens=q.shape[2], softmax_scale=softmax_scale, out_dtype=q.dtype,
        )  # fmt: skip
        return (out, lse, *z[:6], row_max, row_sum)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        q, k, _v, *tensors = inputs[:11]
        token_of_slot, tile_of_block, _offsets, kv_num_blocks, kv_indices, *transposed, position, options = inputs[11:]
        out, lse, *saved = output
        ctx.mark_non_differentiable(lse, *saved)
        ctx.set_materialize_grads(False)
        ctx.position, ctx.options = position, options
        lists = (token_of_slot, tile_of_block, kv_num_blocks, kv_indices, *transposed)
        ctx.save_for_backward(q, k, *tensors[:6], out, *saved, *lists)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad_out is None:
            return (None,) * len(ctx.needs_input_grad)
        q, k, q_weight, k_weight, q_bias, k_bias, cos, sin, out, *saved = ctx.saved_tensors
        d_q, d_k, d_v = autograd.call(
            "backward", autograd._like(grad_out, out), out, *saved,
            softmax_scale=ctx.options["softmax_scale"], deterministic=ctx.options["deterministic"],
        )  # fmt: skip
        d_q, d_q_weight, d_q_bias = norm_rope_backward(d_q, q, q_weight, q_bias, cos, sin, **ctx.position)
        d_k, d_k_weight, d_k_bias = norm_rope_backward(d_k, k, k_weight, k_bias, cos, sin, **ctx.position)
        gradients = (d_q.to(q.dtype), d_k.to(k.dtype), d_v, d_q_weight, d_k_weight, d_q_bias, d_k_bias)
        wanted = (g if need else None for g, need in zip(gradients, ctx.needs_input_grad[:7], strict=True))
        return (*wanted, *(None,) * (len(ctx.needs_input_grad) - 7))
