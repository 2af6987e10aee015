"""``precision="paper"``: FP8 attention whose probabilities are those of FPSAttention's paper (arXiv 2506.04648, Eq. 4 and 5), on the CPU.

Q, K and V are quantized as everywhere. What differs from ``docs/numerics.md``: the row maximum is not rounded, ``P = e4m3(448 * exp(x - m))`` with
the fixed scale 1/448 and an FP32 exponential, and the normaliser sums P before it is rounded. Derivatives are straight-through, with the rounded
P over that normaliser in dV and dS. There is no kernel of it: it says what the published form costs in accuracy.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..errors import UnsupportedError
from ..layout.masks import Lists
from . import checks, cpu
from .cpu import Chunk, _chunks, _gather, _Operands, _rows, _sources, _zeros
from .hidden import hide, slots
from .reference import BLOCK, E4M3_MAX, LOG2E, V_EXTRA_ROWS, Quantized, code_columns

P_SCALE = E4M3_MAX


def attention(
    q: Tensor, k: Tensor, v: Tensor, lists: Lists, softmax_scale: float, hidden: Tensor | None = None, **options: Any
) -> tuple[Tensor, Tensor]:
    """``(out, lse)`` of q, k, v as of ``quantize``, computed on the CPU whatever their device; ``options``: those of ``quantize``.

    Raises:
        UnsupportedError: inside of a graph, which its loops over lists are not made for.
    """
    if torch.compiler.is_compiling():
        raise UnsupportedError(
            "fpsattention.attention: precision 'paper' in a compiled graph, expected precision='fp8' there, or this model eager"
        )
    checks.check_quantize(q, k, v, lists.token_of_slot, lists.tile_block_offsets, **options)
    if hidden is not None:
        checks.check_hidden(q, hidden, lists.token_of_slot)
        options["hidden"] = hidden
    options = {name: x.cpu() if isinstance(x, Tensor) else x for name, x in options.items()}
    with torch.autocast("cpu", enabled=False):
        out, lse = _Published.apply(q.cpu(), k.cpu(), v.cpu(), lists.to("cpu"), softmax_scale, options)
    return out.to(q.device), lse.to(q.device)


class _Published(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, lists: Lists, softmax_scale: float, options: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        hidden = options.pop("hidden", None)
        z = Quantized(*cpu.quantize(q, k, v, lists.token_of_slot, lists.tile_block_offsets, **options))
        if hidden is not None:
            z = hide(z, slots(hidden, lists.token_of_slot))
        tables = (lists.token_of_slot, lists.tile_of_block, lists.kv_num_blocks, lists.kv_indices)
        out, lse = forward(
            *z.operands, *tables, z.q_k_mean, num_tokens=q.shape[2], softmax_scale=softmax_scale, out_dtype=q.dtype
        )
        ctx.mark_non_differentiable(lse)
        ctx.softmax_scale, ctx.num_kv_tokens = softmax_scale, k.shape[2]
        ctx.save_for_backward(out, *z.operands, *tables, options.get("kv_token_of_slot"))
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor, *_: Any) -> tuple[Any, ...]:
        options = {"softmax_scale": ctx.softmax_scale, "num_kv_tokens": ctx.num_kv_tokens}
        gradients = backward(grad_out, *ctx.saved_tensors, **options)
        return (*gradients, None, None, None)


def _probabilities(operands: _Operands, chunk: Chunk, factor: float) -> tuple[Tensor, Tensor, Tensor]:
    """P, as the final maximum has it, ``[items, rows, n * 128]``; its sum before rounding and the maximum, ``[items, rows, 1]``.

    A block is rounded by the maximum that runs when it is visited, and scaled when that moves.
    """
    q, q_scale = _rows(operands.q8, chunk.q_blocks).float(), _rows(operands.q_scale, chunk.q_blocks)
    raw, multiplier, block_max = operands.scaled_scores(q, q_scale, chunk.kv_blocks, factor)
    running = block_max.cummax(-1).values
    row_max = running[..., -1:]
    exact = torch.exp2(raw.mul_(multiplier).sub_(running.unsqueeze(-1)))
    ones = (
        operands.v[..., -V_EXTRA_ROWS].index_select(0, chunk.kv_blocks.reshape(-1)).view(q.shape[0], 1, *raw.shape[2:])
    )
    later = torch.exp2(running - row_max).unsqueeze(-1) * ones
    row_sum = (exact * later).flatten(2).sum(-1, keepdim=True)
    rounded = cpu.to_e4m3(exact.mul_(P_SCALE)).float().div_(P_SCALE)
    return rounded.mul_(later).flatten(2), row_sum, row_max


def forward(
    q8: Tensor,
    k8: Tensor,
    v8t: Tensor,
    q_scale: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    token_of_slot: Tensor,
    tile_of_block: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    q_k_mean: Tensor | None = None,
    *,
    num_tokens: int,
    softmax_scale: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """``(out, lse)``; arguments as of ``torch.ops.fpsattn.forward``."""
    batch, heads, num_blocks, _, dim = q8.shape
    operands = _Operands(q8, k8, v8t, q_scale, k_scale)
    head_dim, v_scale = v_scale.shape[2], code_columns(v_scale, 1.0).reshape(-1, 1, dim)
    out, lse = _zeros(batch * heads * num_blocks, BLOCK, dim), _zeros(batch * heads * num_blocks, BLOCK)
    lse.fill_(-math.inf)
    for chunk in _chunks(tile_of_block, kv_num_blocks, kv_indices, q8, k8):
        p, row_sum, row_max = _probabilities(operands, chunk, softmax_scale * LOG2E)
        o = torch.bmm(p, _rows(operands.v, chunk.kv_blocks)[..., :dim]).div_(row_sum)
        rows = chunk.q_blocks.reshape(-1)
        out[rows] = o.mul_(v_scale[chunk.kv_heads]).view(-1, BLOCK, dim)
        lse[rows] = (row_max + row_sum.log2()).div_(LOG2E).view(-1, BLOCK)
    slot_of_token = cpu._slot_of_token(token_of_slot, num_tokens)
    lse = lse.view(batch, heads, -1).gather(2, slot_of_token.expand(batch, heads, -1))
    if q_k_mean is not None:
        lse += softmax_scale * q_k_mean
    out = out.view(batch, heads, -1, dim)[..., :head_dim].to(out_dtype)
    return cpu._token_order(out, slot_of_token, out_dtype), lse


def backward(
    grad_out: Tensor,
    out: Tensor,
    q8: Tensor,
    k8: Tensor,
    v8t: Tensor,
    q_scale: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    token_of_slot: Tensor,
    tile_of_block: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    kv_token_of_slot: Tensor | None = None,
    *,
    softmax_scale: float,
    num_kv_tokens: int,
) -> tuple[Tensor, ...]:
    """dq, dk, dv, each like its tensor, in the dtype of ``out``."""
    batch, heads, num_blocks, _, dim = q8.shape
    operands = _Operands(q8, k8, v8t, q_scale, k_scale)
    head_dim, v_scale = v_scale.shape[2], code_columns(v_scale, 1.0).reshape(-1, 1, dim)
    keys = operands.k * operands.k_scale.view(operands.k.shape[0], -1, 1)
    source, valid = _sources(token_of_slot)
    do = _gather(grad_out, source).masked_fill_(~valid.unsqueeze(-1), 0.0)
    delta = (_gather(out, source) * do).sum(-1, keepdim=True).view(-1, BLOCK, 1)
    do = do.view(-1, BLOCK, dim)
    dq = _zeros(batch * heads * num_blocks, BLOCK, dim)
    dk, dv = _zeros(*keys.shape), _zeros(*keys.shape)
    for chunk in _chunks(tile_of_block, kv_num_blocks, kv_indices, q8, k8):
        p, row_sum, _ = _probabilities(operands, chunk, softmax_scale * LOG2E)
        p.div_(row_sum)
        queries = _rows(operands.q8, chunk.q_blocks).float() * _rows(operands.q_scale, chunk.q_blocks).unsqueeze(-1)
        do_rows = _rows(do, chunk.q_blocks)
        do_scaled = do_rows * v_scale[chunk.kv_heads]  # dP = dO V^T = (dO * v_scale) V8^T
        values = _rows(operands.v, chunk.kv_blocks)[..., :dim]
        ds = torch.bmm(do_scaled, values.transpose(1, 2)).sub_(_rows(delta, chunk.q_blocks)).mul_(p)
        flat = chunk.kv_blocks.reshape(-1)
        dv.index_add_(0, flat, torch.bmm(p.transpose(1, 2), do_rows).view(-1, BLOCK, dim))
        dk.index_add_(0, flat, torch.bmm(ds.transpose(1, 2), queries).view(-1, BLOCK, dim))
        dq[chunk.q_blocks.reshape(-1)] = torch.bmm(ds, _rows(keys, chunk.kv_blocks)).view(-1, BLOCK, dim)
    of_queries = cpu._slot_of_token(token_of_slot, out.shape[2])
    of_keys = of_queries if kv_token_of_slot is None else cpu._slot_of_token(kv_token_of_slot, num_kv_tokens)
    return tuple(
        cpu._token_order(x.view(batch, n, -1, dim)[..., :head_dim], slots, out.dtype)
        for x, n, slots in (
            (dq.mul_(softmax_scale), heads, of_queries),
            (dk.mul_(softmax_scale), k8.shape[1], of_keys),
            (dv, k8.shape[1], of_keys),
        )
    )
