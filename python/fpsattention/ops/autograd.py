"""Autograd of ``fpsattn::attention``: straight-through gradients from the saved FP8 operands.

Saved are the quantized tensors and their scales, the output, the row maxima and sums, and the block lists: no copies of
q, k, v. Gradients pass the quantizers and the K smoothing as identity (``docs/numerics.md``, section 8). Only ``out`` is
differentiable. The other ops raise when a gradient is asked of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, UnsupportedError


def _setup_attention(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: tuple[Tensor, ...]
) -> None:
    token_of_slot, tile_of_block = inputs[3:5]
    kv_num_blocks, kv_indices, q_num_blocks, q_indices = inputs[6:10]
    if q_num_blocks is None or q_indices is None:
        raise ConfigError(
            "fpsattention.attention: q_num_blocks and q_indices are missing, but q, k or v requires grad: the backward walks "
            "the transposed block lists; pass those of block_mask.transpose(), or call under torch.no_grad()"
        )
    out, lse, q8, k8, v8t, q_scale, k_scale, v_scale, row_max, row_sum = output
    ctx.mark_non_differentiable(lse, q8, k8, v8t, q_scale, k_scale, v_scale, row_max, row_sum)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(
        out, q8, k8, v8t, q_scale, k_scale, v_scale, row_max, row_sum,
        token_of_slot, tile_of_block, kv_num_blocks, kv_indices, q_num_blocks, q_indices,
    )  # fmt: skip
    ctx.softmax_scale = keyword_only_inputs["softmax_scale"]
    ctx.deterministic = keyword_only_inputs["deterministic"]


def _attention_backward(namespace: str) -> Any:
    def backward(ctx: Any, grad_out: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad_out is None:
            return (None,) * 12
        out, *saved = ctx.saved_tensors
        grad_out = grad_out.to(out.dtype)
        if grad_out.stride(3) != 1:  # an expanded or transposed gradient, e.g. that of sum()
            grad_out = grad_out.contiguous()
        gradients = getattr(torch.ops, namespace).backward(
            grad_out, out, *saved, softmax_scale=ctx.softmax_scale, deterministic=ctx.deterministic
        )
        needed = (g if n else None for g, n in zip(gradients, ctx.needs_input_grad[:3], strict=True))
        return (*needed, *(None,) * 9)

    return backward


def _raise_double_backward(ctx: Any, *_: Any) -> None:
    raise UnsupportedError(
        "fpsattention.backward: double backward was asked for, only first derivatives are supported: the gradients of "
        "fpsattention.attention are not differentiable (drop create_graph=True)"
    )


def _raise_not_differentiable(op: str) -> Any:
    def backward(ctx: Any, *_: Any) -> None:
        raise UnsupportedError(
            f"fpsattention.{op}: a gradient was asked through torch.ops.fpsattn.{op}, which has none: "
            "torch.ops.fpsattn.attention and fpsattention.attention are differentiable"
        )

    return backward


def register(namespace: str) -> None:
    """Autograd formulas of the four ops of ``namespace``."""
    torch.library.register_autograd(
        f"{namespace}::attention", _attention_backward(namespace), setup_context=_setup_attention
    )
    torch.library.register_autograd(f"{namespace}::backward", _raise_double_backward)
    for op in ("quantize", "forward"):
        torch.library.register_autograd(f"{namespace}::{op}", _raise_not_differentiable(op))
