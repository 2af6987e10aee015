"""Fake kernels of ``fpsattn::{quantize,prepare,forward,backward,jvp}``: their checks and empty outputs. For meta and fake tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .checks import E4M3
from .checks_attention import CHECKS
from .reference import BLOCK, INT8, TOKEN, V_EXTRA_ROWS, code_dim


def of(op: str) -> Callable[..., Any]:
    """The fake kernel of an op."""
    check, outputs = CHECKS[op], globals()[f"_{op}"]

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
    tile_block_offsets: Tensor,
    k_mean: Tensor | None = None,
    v_absmax: Tensor | None = None,
    kv_token_of_slot: Tensor | None = None,
    *_: Any,
    granularity: int,
    block_sums: bool = False,
    **options: Any,
) -> tuple[Tensor, ...]:
    batch, heads, tokens, dim = q.shape
    columns = code_dim(dim)
    num_blocks = token_of_slot.shape[-1] // BLOCK
    kv_heads = k.shape[1]
    kv_blocks = num_blocks if kv_token_of_slot is None else kv_token_of_slot.shape[-1] // BLOCK
    slots = (BLOCK,) if granularity == TOKEN else ()
    dtype = torch.int8 if granularity == INT8 else E4M3
    return (
        q.new_empty((batch, heads, num_blocks, BLOCK, columns), dtype=dtype),
        q.new_empty((batch, kv_heads, kv_blocks, BLOCK, columns), dtype=dtype),
        q.new_empty((batch, kv_heads, kv_blocks, columns + V_EXTRA_ROWS, BLOCK), dtype=E4M3),
        q.new_empty((batch, heads, num_blocks, *slots), dtype=torch.float32),
        q.new_empty((batch, kv_heads, kv_blocks, *slots), dtype=torch.float32),
        q.new_empty((batch, kv_heads, dim), dtype=torch.float32),
        q.new_empty((batch, kv_heads, dim), dtype=torch.float32),
        q.new_empty((batch, heads, tokens), dtype=torch.float32),
        q.new_empty((batch, heads, num_blocks if block_sums else 0, dim), dtype=torch.float32),
        q.new_empty((batch, kv_heads, kv_blocks if block_sums else 0, dim), dtype=torch.float32),
    )


def _prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    token_of_slot: Tensor,
    tile_block_offsets: Tensor,
    *_: Any,
    granularity: int,
    block_sums: bool = False,
    **options: Any,
) -> tuple[Tensor, ...]:
    return _quantize(q, k, v, token_of_slot, tile_block_offsets, granularity=granularity, block_sums=block_sums)


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
    batch, heads, num_blocks = q8.shape[:3]
    dim = v_scale.shape[2]
    return (
        _token_like(q8, (batch, heads, num_tokens, dim), out_dtype),
        q8.new_empty((batch, heads, num_tokens), dtype=torch.float32),
        q8.new_empty((batch, heads, num_blocks * BLOCK), dtype=torch.float32),
        q8.new_empty((batch, heads, num_blocks * BLOCK), dtype=torch.float32),
    )


def _backward(
    grad_out: Tensor, out: Tensor, q8: Tensor, k8: Tensor, *_: Any, num_kv_tokens: int = 0, **options: Any
) -> tuple[Tensor, ...]:
    batch, _heads, tokens, dim = out.shape
    keys = (batch, k8.shape[1], num_kv_tokens or tokens, dim)
    return tuple(_token_like(out, shape, out.dtype) for shape in (tuple(out.shape), keys, keys))


def _jvp(
    q_tangent: Tensor | None, k_tangent: Tensor | None, v_tangent: Tensor | None, out: Tensor, *_: Any, **options: Any
) -> Tensor:
    return _token_like(out, out.shape, out.dtype)
