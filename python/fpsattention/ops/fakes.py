"""Fake kernels of ``fpsattn::{quantize,prepare,forward,backward,jvp}``: the checks of ``checks.py`` and empty outputs. For meta and fake tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import checks
from .checks import E4M3
from .reference import BLOCK, INT8, TOKEN, V_EXTRA_ROWS, code_dim


def of(op: str) -> Callable[..., Any]:
    """The fake kernel of an op."""
    check, outputs = getattr(checks, f"check_{op}"), globals()[f"_{op}"]

    def fake(*args: Any, **options: Any) -> Any:
        check(*args, **options)
        return outputs(*args, **options)

    return fake


def _token_like(like: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Empty ``(B, H, S, D)`` over ``(B, S, H, D)`` memory."""
    batch, heads, tokens, dim = shape
    return like.new_empty((batch, tokens, heads, dim), dtype=dtype).transpose(1, 2)


def _quantize(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    token_of_slot: Tensor,
    *_: Any,
    granularity: int,
    block_sums: bool = False,
    **options: Any,
) -> tuple[Tensor, ...]:
    batch, heads, tokens, dim = q.shape
    columns = code_dim(dim)
    num_blocks = token_of_slot.shape[0] // BLOCK
    scale_shape = (batch, heads, num_blocks, BLOCK) if granularity == TOKEN else (batch, heads, num_blocks)
    dtype = torch.int8 if granularity == INT8 else E4M3
    return (
        q.new_empty((batch, heads, num_blocks, BLOCK, columns), dtype=dtype),
        q.new_empty((batch, heads, num_blocks, BLOCK, columns), dtype=dtype),
        q.new_empty((batch, heads, num_blocks, columns + V_EXTRA_ROWS, BLOCK), dtype=E4M3),
        q.new_empty(scale_shape, dtype=torch.float32),
        q.new_empty(scale_shape, dtype=torch.float32),
        q.new_empty((batch, heads, dim), dtype=torch.float32),
        q.new_empty((batch, heads, dim), dtype=torch.float32),
        q.new_empty((batch, heads, tokens), dtype=torch.float32),
        q.new_empty((batch, heads, num_blocks if block_sums else 0, dim), dtype=torch.float32),
        q.new_empty((batch, heads, num_blocks if block_sums else 0, dim), dtype=torch.float32),
    )


def _prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    token_of_slot: Tensor,
    *_: Any,
    granularity: int,
    block_sums: bool = False,
    **options: Any,
) -> tuple[Tensor, ...]:
    return _quantize(q, k, v, token_of_slot, granularity=granularity, block_sums=block_sums)


def _forward(
    q8: Tensor,
    k8: Tensor,
    v8t: Tensor,
    q_scale: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    *_: Any,
    num_tokens: int,
    softmax_scale: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    batch, heads, dim = v_scale.shape
    num_blocks = q8.shape[2]
    return (
        _token_like(q8, (batch, heads, num_tokens, dim), out_dtype),
        q8.new_empty((batch, heads, num_tokens), dtype=torch.float32),
        q8.new_empty((batch, heads, num_blocks * BLOCK), dtype=torch.float32),
        q8.new_empty((batch, heads, num_blocks * BLOCK), dtype=torch.float32),
    )


def _backward(grad_out: Tensor, out: Tensor, *_: Any, **options: Any) -> tuple[Tensor, ...]:
    return tuple(_token_like(out, out.shape, out.dtype) for _ in range(3))


def _jvp(
    q_tangent: Tensor | None, k_tangent: Tensor | None, v_tangent: Tensor | None, out: Tensor, *_: Any, **options: Any
) -> Tensor:
    return _token_like(out, out.shape, out.dtype)
