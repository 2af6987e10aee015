"""CPU kernels of ``torch.ops.fpsattn.{quantize,forward,backward}``: batched FP32 matmuls over gathered blocks.

Same values as ``reference.py`` up to the order of FP32 sums, at the speed of torch's GEMM. Work is cut into *items*, one
query tile of one (batch, head); items with equal tile and list lengths are batched, and lists are walked in segments of
``SEGMENT_BLOCKS`` KV blocks with a running maximum, so that a chunk of scores stays near the caches and peak memory is
linear in the number of tokens. Shapes and layouts are those of ``core.py``.

e4m3 and INT8 values and products of two of them are exact in FP32 (sums of INT8 ones, too), so the matmuls run on raw e4m3 values; scales are applied to scores.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .norm_rope import norm_rope
from .reference import (
    BLOCK,
    CODE_ORIGIN,
    CODE_SLOPE,
    CODE_SLOTS,
    E4M3_MAX,
    INT8,
    INT8_MAX,
    LEAST_CODE_ARGUMENT,
    LOG2E,
    P_SHIFT,
    TILE,
    TOKEN,
    V_EXTRA_ROWS,
    block_sum,
    code_columns,
    code_dim,
    exponent_codes,
    scale_of,
    to_int8,
    v_slot_order,
)

CHUNK_SCORES = 1 << 21  # scores computed together: 8 MiB, what a few cores keep in their caches
SEGMENT_BLOCKS = 16  # KV blocks between two updates of the running maximum and of the output
EXPONENT_BITS = 0x7F800000
E4M3_MIN_NORMAL = 2.0**-6
EXACT_SHIFT = 2.0**16  # beyond it FP32 rounds h of `reference.exponent_codes`, and soon 8 - m too
E4M3_ULP_SHIFT = 2.0**20  # adding 2^(e + 20) to x in [2^e, 2^(e+1)) rounds x to 3 mantissa bits, nearest even
CPU = torch.device("cpu")  # said everywhere, like dtypes: torch's defaults are the user's


def _zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(*shape, dtype=dtype, device=CPU)


# Quantize ----------------------------------------------------------------------------------------------------------------


def to_e4m3(x: Tensor) -> Tensor:
    """FP32 (consumed) to e4m3: nearest even, saturating at 448, NaN stays NaN."""
    return x.clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def _gather(x: Tensor, source_token: Tensor) -> Tensor:
    """``(B, H, S, D)`` in any strides to a fresh FP32 ``(B, H, num_blocks, 128, C)``, zeros beyond D.

    ``source_token``: of every slot, ``[num_slots]`` or, a table per head, ``[B, H, num_slots]``.
    """
    if source_token.dim() == 1:
        rows = x.index_select(2, source_token)
    else:
        rows = x.gather(2, source_token[..., None].expand(*source_token.shape, x.shape[3]))
    rows = rows if rows.dtype == torch.float32 else rows.float()
    rows = rows if code_dim(rows.shape[-1]) == rows.shape[-1] else code_columns(rows)
    return rows.unflatten(2, (-1, BLOCK))


def _sources(token_of_slot: Tensor) -> tuple[Tensor, Tensor]:
    """The token that each slot reads, padding that of slot 0 of its block, and which slots are valid ``[..., num_blocks, 128]``."""
    slots = token_of_slot.long().unflatten(-1, (-1, BLOCK))
    valid = slots >= 0
    return torch.where(valid, slots, slots[..., :1]).flatten(-2), valid


def _tile_of_block(tile_block_offsets: Tensor) -> Tensor:
    sizes = tile_block_offsets.long().diff()
    return torch.repeat_interleave(torch.arange(sizes.numel(), device=CPU), sizes)


def _group_absmax(blocks: Tensor, tile_of_block: Tensor, num_tiles: int, granularity: int) -> Tensor:
    """``[B, H, num_blocks]``, per token ``[B, H, num_blocks, 128]``; a tile's maximum is replicated over its blocks."""
    low, high = torch.aminmax(blocks, dim=-1)
    per_slot = torch.maximum(-low, high)
    if granularity == TOKEN:
        return per_slot
    per_block = per_slot.amax(-1)
    if granularity == TILE:
        index = tile_of_block.expand_as(per_block)
        per_tile = per_block.new_zeros(*per_block.shape[:2], num_tiles).scatter_reduce_(2, index, per_block, "amax")
        per_block = per_tile.index_select(2, tile_of_block)
    return per_block


def _quantize_rows(
    blocks: Tensor, tile_of_block: Tensor, num_tiles: int, granularity: int, pow2: bool
) -> tuple[Tensor, Tensor]:
    largest = INT8_MAX if granularity == INT8 else E4M3_MAX
    scale = scale_of(_group_absmax(blocks, tile_of_block, num_tiles, granularity), pow2, largest)
    blocks.div_(scale.unsqueeze(-1) if granularity == TOKEN else scale[..., None, None])
    return to_int8(blocks) if granularity == INT8 else to_e4m3(blocks), scale


def quantize(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    token_of_slot: Tensor,
    tile_block_offsets: Tensor,
    k_mean: Tensor | None = None,
    v_absmax: Tensor | None = None,
    kv_token_of_slot: Tensor | None = None,
    kv_tile_block_offsets: Tensor | None = None,
    *,
    granularity: int,
    smooth_k: bool,
    pow2_scales: bool,
    k_mean_stride: int = 1,
    block_sums: bool = False,
) -> tuple[Tensor, ...]:
    """See ``reference.quantize``: same bits, given the same ``k_mean``."""
    kv_token_of_slot = token_of_slot if kv_token_of_slot is None else kv_token_of_slot
    kv_tile_block_offsets = tile_block_offsets if kv_tile_block_offsets is None else kv_tile_block_offsets
    source, _ = _sources(token_of_slot)
    kv_source, valid = _sources(kv_token_of_slot)
    tiles, kv_tiles = ((_tile_of_block(x), x.numel() - 1) for x in (tile_block_offsets, kv_tile_block_offsets))

    if not smooth_k:
        mean = _zeros(k.shape[0], k.shape[1], k.shape[3])
    elif k_mean is not None:
        mean = k_mean.float().contiguous()
    else:
        # In FP64, then rounded: practically exact, so it does not depend on how the tokens lie (or are dealt to processes).
        mean = k[:, :, ::k_mean_stride].double().mean(dim=2).float()

    q_blocks = _gather(q, source)
    of_query = mean.repeat_interleave(q.shape[1] // k.shape[1], 1)
    q_k_mean = torch.matmul(q.float(), of_query.unsqueeze(-1)).squeeze(-1)
    q8, q_scale = _quantize_rows(q_blocks, *tiles, granularity, pow2_scales)
    del q_blocks
    k_blocks = _gather(k, kv_source)
    k_blocks -= code_columns(mean)[:, :, None, None]
    k8, k_scale = _quantize_rows(k_blocks, *kv_tiles, granularity, pow2_scales)
    del k_blocks

    if v_absmax is None:
        low, high = torch.aminmax(v, dim=2)
        v_absmax = torch.maximum(-low.float(), high.float())
    v_scale = scale_of(v_absmax.float(), pow2_scales)
    order = v_slot_order()
    v_blocks = _gather(v, kv_source.unflatten(-1, (-1, BLOCK))[..., order].flatten(-2))
    v_blocks.masked_fill_(v_blocks.isinf(), float("nan"))  # with a given v_absmax, an Inf must not saturate
    v_blocks = to_e4m3(v_blocks.div_(code_columns(v_scale, 1.0)[:, :, None, None])).view(torch.uint8)
    valid = valid[..., order]
    columns = v_blocks.shape[-1]
    v8t = v_blocks.new_zeros(*v_blocks.shape[:3], columns + V_EXTRA_ROWS, BLOCK)
    v8t[..., :columns, :] = v_blocks.masked_fill_(~valid[..., None], 0).transpose(-1, -2)
    v8t[..., columns, :] = valid.to(torch.uint8) * 0x38  # 1.0 in e4m3
    sums = tuple(
        block_sum(x, slots) if block_sums else mean.new_empty(*x.shape[:2], 0, x.shape[3])
        for x, slots in ((q, token_of_slot), (k, kv_token_of_slot))
    )
    return q8, k8, v8t.view(torch.float8_e4m3fn), q_scale, k_scale, v_scale, mean, q_k_mean, *sums


def prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    token_of_slot: Tensor,
    tile_block_offsets: Tensor,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    q_bias: Tensor | None = None,
    k_bias: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    k_mean: Tensor | None = None,
    v_absmax: Tensor | None = None,
    *,
    norm: int,
    eps: float,
    rope_halves: bool = False,
    first_rotated: int = 0,
    weights_begin: int = 0,
    weights_end: int = -1,
    **options: Any,
) -> tuple[Tensor, ...]:
    """See ``reference.prepare``: same bits, given the same ``k_mean``."""
    position: dict[str, Any] = {"norm": norm, "eps": eps, "rope_halves": rope_halves, "first_rotated": first_rotated}
    position |= {"weights_begin": weights_begin, "weights_end": weights_end}
    q = norm_rope(q, q_weight, q_bias, cos, sin, **position)
    k = norm_rope(k, k_weight, k_bias, cos, sin, **position)
    return quantize(q, k, v, token_of_slot, tile_block_offsets, k_mean, v_absmax, **options)


# Attention: work items ---------------------------------------------------------------------------------------------------


@dataclass
class Chunk:
    """Items computed together. Blocks are numbered through (batch, head): ``(b * H + h) * num_blocks + block``, those of K and V
    by their own heads and blocks."""

    q_blocks: Tensor  # int64 [items, blocks of a tile]
    kv_heads: Tensor  # int64 [items]: (batch, head) of K and V
    kv_blocks: Tensor  # int64 [items, list length], in list order


def _chunks(
    tile_of_block: Tensor, kv_num_blocks: Tensor, kv_indices: Tensor, q8: Tensor, k8: Tensor
) -> Iterator[Chunk]:
    """Items with a non-empty list, grouped by (blocks of the tile, list length)."""
    batch, heads, num_blocks = q8.shape[:3]
    group, num_kv_blocks = heads // k8.shape[1], k8.shape[2]
    num_tiles = kv_num_blocks.shape[2]
    tile_of_block = tile_of_block.long()
    blocks_by_tile = torch.argsort(tile_of_block, stable=True)
    tile_size = torch.bincount(tile_of_block, minlength=num_tiles)
    tile_start = tile_size.cumsum(0) - tile_size

    counts = kv_num_blocks.long().expand(batch, heads, num_tiles).reshape(-1)
    item_tile = torch.arange(num_tiles, device=CPU).repeat(batch * heads)
    item_bh = torch.arange(batch * heads, device=CPU).repeat_interleave(num_tiles)
    lists = kv_indices.expand(batch, heads, *kv_indices.shape[2:])
    kinds = tile_size[item_tile] * (num_kv_blocks + 1) + counts
    kinds[counts == 0] = 0
    for kind in torch.unique(kinds).tolist():
        size, length = divmod(kind, num_kv_blocks + 1)
        if size == 0 or length == 0:
            continue
        of_kind = torch.nonzero(kinds == kind).squeeze(1)
        step = max(1, CHUNK_SCORES // (size * BLOCK * min(length, SEGMENT_BLOCKS) * BLOCK))
        for items in of_kind.split(step):
            bh, tile = item_bh[items], item_tile[items]
            kv_heads = bh // group
            q_blocks = blocks_by_tile[tile_start[tile][:, None] + torch.arange(size, device=CPU)]
            kv_blocks = lists[bh // heads, bh % heads, tile, :length].long()
            first, first_kv = (bh * num_blocks)[:, None], (kv_heads * num_kv_blocks)[:, None]
            yield Chunk(first + q_blocks, kv_heads, first_kv + kv_blocks)


def _rows(x: Tensor, blocks: Tensor) -> Tensor:
    """Blocks ``[items, n]`` of ``x [B*H*num_blocks, 128, ...]`` as ``[items, n * 128, ...]``."""
    rows = x.index_select(0, blocks.reshape(-1))
    return rows.view(blocks.shape[0], blocks.shape[1] * BLOCK, *x.shape[2:])


class _Operands:
    """FP32 copies of the quantized operands, numbered through (batch, head)."""

    def __init__(self, q8: Tensor, k8: Tensor, v8t: Tensor, q_scale: Tensor, k_scale: Tensor):
        dim = q8.shape[-1]
        self.q8 = q8.reshape(-1, BLOCK, dim)
        self.k = k8.reshape(-1, BLOCK, dim).float()
        v_bytes = v8t.view(torch.uint8).reshape(-1, dim + V_EXTRA_ROWS, BLOCK).transpose(1, 2)
        v_bytes = v_bytes.index_select(1, v_slot_order().argsort())
        self.v = v_bytes.view(torch.float8_e4m3fn).float()  # [., 128, D + 8], column D is 1.0 in valid slots
        # One scale per row of Q; one per block of K, or per row of K.
        q_scale = q_scale if q_scale.dim() == 4 else q_scale.unsqueeze(-1).expand(*q_scale.shape, BLOCK)
        self.q_scale = q_scale.reshape(-1, BLOCK)
        self.k_scale = k_scale.reshape(-1, BLOCK) if k_scale.dim() == 4 else k_scale.reshape(-1)
        self.k_per_token = k_scale.dim() == 4

    def scaled_scores(self, q: Tensor, q_scale: Tensor, blocks: Tensor, factor: float) -> tuple[Tensor, Tensor, Tensor]:
        """Scores of one segment as ``(raw, multiplier, block maximum)``: ``x = raw * multiplier``, in log2 units.

        What a row of a block has in common is left out of ``raw``: it commutes with the maximum and can be fused into the next pass.
        """
        items, n = blocks.shape
        raw = torch.bmm(q, _rows(self.k, blocks).transpose(1, 2)).view(items, q.shape[1], n, BLOCK)
        if self.k_per_token:
            raw.mul_(self.k_scale.index_select(0, blocks.reshape(-1)).view(items, 1, n, BLOCK))
            multiplier = (q_scale * factor).view(items, -1, 1)
            return raw, multiplier.unsqueeze(-1), raw.amax(-1) * multiplier
        multiplier = q_scale.view(items, -1, 1) * self.k_scale[blocks][:, None] * factor
        return raw, multiplier.unsqueeze(-1), raw.amax(-1) * multiplier


def _exponents(raw: Tensor, multiplier: Tensor, row_max: Tensor, dim: int, running: Tensor) -> Tensor:
    """``y = x - m + 8`` in place of ``raw [items, rows, n, 128]``; ``row_max [items, rows, 1]``.

    In slots with codes ``h = CODE_ORIGIN + CODE_SLOPE * y``, of the maximum that ran when a block was visited, ``running [items, rows, n or 1]``.
    """
    coded, exact = raw[..., : CODE_SLOTS[dim]], raw[..., CODE_SLOTS[dim] :]
    row_max, running = row_max.unsqueeze(-1), running.unsqueeze(-1)
    if bool((row_max.abs() > EXACT_SHIFT).logical_and_(row_max.isfinite()).any()):
        # x is rounded as m was, and x - m exact near the maximum: the greatest P stays 2^8.
        raw.mul_(multiplier)
        exact.sub_(row_max).add_(P_SHIFT)
        coded.sub_(running).add_(P_SHIFT).mul_(CODE_SLOPE).add_(CODE_ORIGIN)
    else:
        torch.addcmul(P_SHIFT - row_max, exact, multiplier, out=exact)
        torch.addcmul((P_SHIFT - running).mul_(CODE_SLOPE).add_(CODE_ORIGIN), coded, multiplier * CODE_SLOPE, out=coded)
    return raw


def _round_to_e4m3(p: Tensor, min_normal: Tensor | float) -> Tensor:
    """``p >= 0`` in place to 3 mantissa bits, nearest even, with a fixed step below ``min_normal`` (2^-6 for e4m3).

    Adding and subtracting ``2^20`` times the power of two below ``p`` leaves exactly those bits. NaN stays NaN.
    """
    binade = torch.bitwise_and(p.view(torch.int32), EXPONENT_BITS).view(torch.float32)
    if isinstance(min_normal, float):
        binade.clamp_min_(min_normal)
    else:
        torch.maximum(binade, min_normal, out=binade)
    return p.add_(binade, alpha=E4M3_ULP_SHIFT).sub_(binade, alpha=E4M3_ULP_SHIFT)


@lru_cache(maxsize=1)
def _values_of_codes() -> Tensor:
    """P of ``exponent_codes`` by the FP16 bits of ``h``, FP32 ``[65536]``. NaN for NaN."""
    h = torch.arange(1 << 16, dtype=torch.int32, device=CPU).to(torch.int16).view(torch.float16)
    y = (h.double() - CODE_ORIGIN) / CODE_SLOPE
    return exponent_codes(y).view(torch.float8_e4m3fn).float().masked_fill_(h.isnan(), math.nan)


def _probabilities(y: Tensor, dim: int, later: Tensor | None = None) -> Tensor:
    """P of ``_exponents``, ``[items, rows, n, 128]``, in their place.

    ``later [items, rows, n, 1]``: P was taken at a maximum that is lower by so much, an integer; 0 where None.
    """
    coded, exact = y[..., : CODE_SLOTS[dim]], y[..., CODE_SLOTS[dim] :]
    min_normal: Tensor | float = E4M3_MIN_NORMAL
    scale = None
    if later is not None:
        scale = torch.exp2(-later)
        min_normal = (scale * E4M3_MIN_NORMAL).clamp_min_(torch.finfo(torch.float32).tiny)
    index = coded.clamp_(LEAST_CODE_ARGUMENT, 1.0).half().view(torch.int16).to(torch.int32)
    values = _values_of_codes()[index]
    y[..., : CODE_SLOTS[dim]] = values if scale is None else values.mul_(scale)
    exact.copy_(_round_to_e4m3(exact.exp2(), min_normal))
    return y


# Forward -----------------------------------------------------------------------------------------------------------------


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See ``reference.forward``."""
    batch, heads, num_blocks, _, dim = q8.shape
    operands = _Operands(q8, k8, v8t, q_scale, k_scale)
    head_dim, v_scale = v_scale.shape[2], code_columns(v_scale, 1.0).reshape(-1, dim)
    factor = softmax_scale * LOG2E
    valid = token_of_slot >= 0

    out = _zeros(batch * heads * num_blocks, BLOCK, dim, dtype=out_dtype)
    row_max = _zeros(batch * heads * num_blocks, BLOCK)
    row_sum = _zeros(batch * heads * num_blocks, BLOCK)
    for chunk in _chunks(tile_of_block, kv_num_blocks, kv_indices, q8, k8):
        acc, m = _forward_chunk(operands, chunk, factor)
        l = acc[..., dim]
        scale_v = v_scale[chunk.kv_heads].unsqueeze(1)
        o = (acc[..., :dim] * scale_v).div_(l.unsqueeze(-1))
        rows = chunk.q_blocks.reshape(-1)
        out[rows] = o.view(-1, BLOCK, dim).to(out_dtype)
        row_max[rows] = m.view(-1, BLOCK)
        row_sum[rows] = l.reshape(-1, BLOCK)

    row_max, row_sum = (x.view(batch, heads, -1).mul_(1.0).masked_fill_(~valid, 0.0) for x in (row_max, row_sum))
    slot_of_token = _slot_of_token(token_of_slot, num_tokens)
    lse = (row_max - P_SHIFT + torch.log2(row_sum)).div_(LOG2E).gather(2, slot_of_token.expand(batch, heads, -1))
    if q_k_mean is not None:
        lse += softmax_scale * q_k_mean
    out = _token_order(out.view(batch, heads, -1, dim)[..., :head_dim], slot_of_token, out_dtype)
    return out, lse, row_max, row_sum


def _forward_chunk(operands: _Operands, chunk: Chunk, factor: float) -> tuple[Tensor, Tensor]:
    """Unnormalized ``[items, rows, D + 8]`` (column D is the normaliser) and the row maximum ``[items, rows, 1]``."""
    q = _rows(operands.q8, chunk.q_blocks).float()
    q_scale = _rows(operands.q_scale, chunk.q_blocks)
    items, rows = q.shape[:2]
    m, acc = q.new_full((items, rows, 1), -math.inf), None
    for blocks in chunk.kv_blocks.split(SEGMENT_BLOCKS, dim=1):
        raw, multiplier, block_max = operands.scaled_scores(q, q_scale, blocks, factor)
        # The maximum that is running when a block is visited decides below which value its P are subnormal.
        running = torch.cummax(torch.cat([m, block_max.ceil_()], dim=-1), dim=-1).values
        m_old, m, running = m, running[..., -1:], running[..., 1:]
        y = _exponents(raw, multiplier, m, q.shape[-1], running)
        settled = torch.equal(running[..., 0], m[..., 0])
        p = _probabilities(y, q.shape[-1], None if settled else (m - running).unsqueeze(-1))
        p, v = p.view(items, rows, -1), _rows(operands.v, blocks)
        if acc is None:
            acc = torch.bmm(p, v)
        else:
            acc.mul_(torch.where(m == m_old, 1.0, torch.exp2(m_old - m))).baddbmm_(p, v)
    assert acc is not None  # chunks have non-empty lists
    return acc, m


def _slot_of_token(token_of_slot: Tensor, num_tokens: int) -> Tensor:
    if token_of_slot.dim() == 3:
        tables = token_of_slot.flatten(0, 1).unbind()
        return torch.stack([_slot_of_token(x, num_tokens) for x in tables]).unflatten(0, token_of_slot.shape[:2])
    slots = torch.nonzero(token_of_slot >= 0).squeeze(1)
    result = _zeros(num_tokens, dtype=torch.long)
    result[token_of_slot[slots].long()] = slots
    return result


def _token_order(slots: Tensor, slot_of_token: Tensor, dtype: torch.dtype) -> Tensor:
    """``(B, H, num_slots, D)`` to a ``(B, H, S, D)`` view of ``(B, S, H, D)`` memory."""
    batch, heads, _, dim = slots.shape
    slot_of_token = slot_of_token.expand(batch, heads, -1)
    result = slots.new_empty(batch, slot_of_token.shape[2], heads, dim, dtype=dtype)
    for b in range(batch):
        for h in range(heads):
            result[b, :, h] = slots[b, h].index_select(0, slot_of_token[b, h])
    return result.transpose(1, 2)


# Backward ----------------------------------------------------------------------------------------------------------------


def backward(
    grad_out: Tensor,
    out: Tensor,
    q8: Tensor,
    k8: Tensor,
    v8t: Tensor,
    q_scale: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    row_max: Tensor,
    row_sum: Tensor,
    token_of_slot: Tensor,
    tile_of_block: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    q_num_blocks: Tensor | None = None,
    q_indices: Tensor | None = None,
    kv_token_of_slot: Tensor | None = None,
    *,
    softmax_scale: float,
    deterministic: bool = True,
    num_kv_tokens: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``reference.backward``. Gradients in the dtype of ``grad_out``.

    One walk of the KV lists gives all three, so the transposed lists are not needed; the sums are in a fixed order (deterministic).
    """
    batch, heads, num_blocks, _, dim = q8.shape
    operands = _Operands(q8, k8, v8t, q_scale, k_scale)
    k = operands.k * operands.k_scale.view(operands.k.shape[0], -1, 1)
    source, valid = _sources(token_of_slot)

    do = _gather(grad_out, source).masked_fill_(~valid.unsqueeze(-1), 0.0)
    delta = (_gather(out, source) * do).sum(-1).view(-1, BLOCK, 1)
    do = do.view(-1, BLOCK, dim)
    head_dim, v_scale = v_scale.shape[2], code_columns(v_scale, 1.0).reshape(-1, 1, dim)
    row_max = row_max.reshape(-1, BLOCK, 1)
    row_sum = row_sum.reshape(-1, BLOCK, 1)
    # Padding rows: P = 2^-inf = 0 and P / l = 0, whatever their scores.
    row_max, row_sum = (torch.where(row_sum == 0, math.inf, x) for x in (row_max, row_sum))
    factor = softmax_scale * LOG2E

    dq = _zeros(batch * heads * num_blocks, BLOCK, dim)
    dk, dv = (_zeros(operands.k.shape[0], BLOCK, dim) for _ in range(2))
    for chunk in _chunks(tile_of_block, kv_num_blocks, kv_indices, q8, k8):
        q_rows = _rows(operands.q8, chunk.q_blocks).float()
        q_scale_rows = _rows(operands.q_scale, chunk.q_blocks)
        do_rows, m, l = (_rows(x, chunk.q_blocks) for x in (do, row_max, row_sum))
        delta_rows = _rows(delta, chunk.q_blocks)
        # dP = dO (V8 * v_scale)^T = (dO * v_scale) V8^T
        do_scaled = do_rows * v_scale[chunk.kv_heads]
        q_real = q_rows * q_scale_rows.unsqueeze(-1)
        items, rows = q_rows.shape[:2]
        dq_rows = _zeros(items, rows, dim)
        for blocks in chunk.kv_blocks.split(SEGMENT_BLOCKS, dim=1):
            raw, multiplier, _ = operands.scaled_scores(q_rows, q_scale_rows, blocks, factor)
            p = _probabilities(_exponents(raw, multiplier, m, dim, m), dim).view(items, rows, -1)
            v = _rows(operands.v, blocks)
            p.mul_(v[..., dim].unsqueeze(1)).div_(l)
            flat = blocks.reshape(-1)
            dv.index_add_(0, flat, torch.bmm(p.transpose(1, 2), do_rows).view(-1, BLOCK, dim))
            ds = torch.bmm(do_scaled, v[..., :dim].transpose(1, 2)).sub_(delta_rows).mul_(p)
            dk.index_add_(0, flat, torch.bmm(ds.transpose(1, 2), q_real).view(-1, BLOCK, dim))
            dq_rows.baddbmm_(ds, _rows(k, blocks))
        dq.index_copy_(0, chunk.q_blocks.reshape(-1), dq_rows.view(-1, BLOCK, dim))

    dq.mul_(softmax_scale)
    dk.mul_(softmax_scale)
    slot_of_token = _slot_of_token(token_of_slot, out.shape[2])
    of_keys = slot_of_token if kv_token_of_slot is None else _slot_of_token(kv_token_of_slot, num_kv_tokens)

    def in_token_order(gradient: Tensor, heads: int, slots: Tensor) -> Tensor:
        return _token_order(gradient.view(batch, heads, -1, dim)[..., :head_dim], slots, grad_out.dtype)

    dk, dv = (in_token_order(x, k8.shape[1], of_keys) for x in (dk, dv))
    return in_token_order(dq, heads, slot_of_token), dk, dv


# Forward mode ------------------------------------------------------------------------------------------------------------


def jvp(
    q_tangent: Tensor | None,
    k_tangent: Tensor | None,
    v_tangent: Tensor | None,
    out: Tensor,
    q8: Tensor,
    k8: Tensor,
    v8t: Tensor,
    q_scale: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    row_max: Tensor,
    row_sum: Tensor,
    token_of_slot: Tensor,
    tile_of_block: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    kv_token_of_slot: Tensor | None = None,
    *,
    softmax_scale: float,
) -> Tensor:
    """See ``reference.jvp``. The tangent of the output, in its dtype."""
    batch, heads, num_blocks, _, dim = q8.shape
    operands = _Operands(q8, k8, v8t, q_scale, k_scale)
    k = operands.k * operands.k_scale.view(operands.k.shape[0], -1, 1)
    source, _ = _sources(token_of_slot)
    kv_source = source if kv_token_of_slot is None else _sources(kv_token_of_slot)[0]

    def in_slots(x: Tensor | None, source: Tensor) -> Tensor | None:
        return x if x is None else _gather(x, source).view(-1, BLOCK, dim)

    q_dot, k_dot, v_dot = in_slots(q_tangent, source), in_slots(k_tangent, kv_source), in_slots(v_tangent, kv_source)
    o = _gather(out, source).view(-1, BLOCK, dim)
    head_dim, v_scale = v_scale.shape[2], code_columns(v_scale, 1.0).reshape(-1, 1, dim)
    row_max, row_sum = row_max.reshape(-1, BLOCK, 1), row_sum.reshape(-1, BLOCK, 1)
    row_max, row_sum = (torch.where(row_sum == 0, math.inf, x) for x in (row_max, row_sum))  # as in backward
    factor = softmax_scale * LOG2E

    result = _zeros(batch * heads * num_blocks, BLOCK, dim)
    for chunk in _chunks(tile_of_block, kv_num_blocks, kv_indices, q8, k8):
        q_rows = _rows(operands.q8, chunk.q_blocks).float()
        q_scale_rows = _rows(operands.q_scale, chunk.q_blocks)
        m, l = (_rows(x, chunk.q_blocks) for x in (row_max, row_sum))
        q_real = q_rows * q_scale_rows.unsqueeze(-1)
        items, rows = q_rows.shape[:2]
        of_v, of_scores, total = _zeros(items, rows, dim), _zeros(items, rows, dim), _zeros(items, rows, 1)
        for blocks in chunk.kv_blocks.split(SEGMENT_BLOCKS, dim=1):
            raw, multiplier, _ = operands.scaled_scores(q_rows, q_scale_rows, blocks, factor)
            p = _probabilities(_exponents(raw, multiplier, m, dim, m), dim).view(items, rows, -1)
            v = _rows(operands.v, blocks)
            p.mul_(v[..., dim].unsqueeze(1)).div_(l)
            if v_dot is not None:
                of_v.baddbmm_(p, _rows(v_dot, blocks))
            x_dot = _zeros(items, rows, p.shape[-1])
            if q_dot is not None:
                x_dot.baddbmm_(_rows(q_dot, chunk.q_blocks), _rows(k, blocks).transpose(1, 2))
            if k_dot is not None:
                x_dot.baddbmm_(q_real, _rows(k_dot, blocks).transpose(1, 2))
            p_dot = x_dot.mul_(p)
            of_scores.baddbmm_(p_dot, v[..., :dim])
            total += p_dot.sum(-1, keepdim=True)
        of_scores.mul_(v_scale[chunk.kv_heads]).sub_(total * _rows(o, chunk.q_blocks))
        of_v.add_(of_scores, alpha=softmax_scale)
        result.index_copy_(0, chunk.q_blocks.reshape(-1), of_v.view(-1, BLOCK, dim))
    shape = (batch, heads, num_blocks * BLOCK, dim)
    return _token_order(result.view(shape)[..., :head_dim], _slot_of_token(token_of_slot, out.shape[2]), out.dtype)
