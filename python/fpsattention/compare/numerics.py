"""Published low-precision attentions, bit for bit as far as their papers define them, on any device in plain torch operations.

One blockwise loop with an online softmax serves them all: queries in blocks of 128, keys block by block in the order of a block mask's lists.
What differs is a :class:`Numerics`: how q and k are rounded and over which tokens a scale is shared, how P and V are. Products of INT8 and of
E4M3 values are exact in FP32 at these sizes, so integer operands are multiplied as they are and scaled afterwards, as the kernels do.
These are models of accuracy. They are slow, and their time says nothing about the kernels they stand for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import ConfigError
from ..layout.masks import BlockMask
from ..layout.scale_groups import group_of_tile
from ..layout.tiles import BLOCK
from ..ops.reference import E4M3_MAX, to_e4m3
from ..patterns.blocks import check_tensors, gather_blocks, tables

PRECISIONS = ("exact", "bf16", "int8", "fp8")
VALUES = ("exact", "bf16", "channel", "head")
GROUPS = ("head", "tile", "block", "half")  # tokens that share a scale of q and k
Group = str | tuple[int, int, int]
_LOG2E = math.log2(math.e)
_BYTES_AT_ONCE = 1 << 28  # scores of a step; about ten such tensors live at once


@dataclass(frozen=True)
class Numerics:
    """How an attention rounds.

    Attributes:
        qk: "exact" (FP32), "bf16", "int8" (``round(x / s)``, ``s = absmax / 127``) or "fp8" (``e4m3(x / s)``, ``s = absmax / 448``).
        q_group, k_group: tokens that share a scale: "head" (all), "tile", a box of tiles ``(t, h, w)`` in tokens, "block" (128 slots), "half" (64).
        smooth_k: subtract the mean of K over all tokens first.
        v: "exact", "bf16", "channel" (E4M3, a scale per channel) or "head" (one per head).
        p_scale: P is rounded to ``e4m3(p_scale * exp(x - m))`` with the running row maximum m; None: as V is "bf16", or not rounded.
        round_sum: the normaliser is the sum of the rounded P, not of the exact one.
    """

    qk: str = "exact"
    q_group: Group = "block"
    k_group: Group = "block"
    smooth_k: bool = False
    v: str = "exact"
    p_scale: float | None = None
    round_sum: bool = False

    def __post_init__(self) -> None:
        if self.qk not in PRECISIONS or self.v not in VALUES:
            raise ConfigError(
                f"fpsattention.compare.Numerics: qk {self.qk!r}, v {self.v!r}, expected one of {PRECISIONS}; {VALUES}"
            )
        if any(isinstance(group, str) and group not in GROUPS for group in (self.q_group, self.k_group)):
            raise ConfigError(
                f"fpsattention.compare.Numerics: groups {self.q_group!r}, {self.k_group!r}, expected of {GROUPS}"
            )


EXACT = Numerics()
#: Operands of both products in BF16, sums in FP32, the exact P in the normaliser: FlashAttention (arXiv 2307.08691) in 16 bits.
BF16 = Numerics("bf16", v="bf16")
#: SageAttention 2 (arXiv 2411.10958; thu-ml/SageAttention): INT8 Q per 128 and K per 64 tokens, K smoothed; P times 448 and V per channel in E4M3.
SAGE = Numerics("int8", "block", "half", True, "channel", 448.0)
#: One scale per head for each of Q, K, V and P, nothing else: what FP8 attention is without care.
NAIVE_FP8 = Numerics("fp8", "head", "head", False, "head", 448.0)
#: FPSAttention as published (arXiv 2506.04648, Eq. 4 and 5): Q and K per 3D tile, V per channel, P with the fixed scale 1/448; no K smoothing.
PAPER = Numerics("fp8", "tile", "tile", False, "channel", 448.0)


def blockwise_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    numerics: Numerics = EXACT,
    *,
    scale: float | None = None,
    pv_threshold: float | None = None,
    warp_rows: int = 32,
) -> tuple[Tensor, float]:
    """Attention under a block mask.

    Args:
        q, k, v: ``(B, H, S, D)``.
        pv_threshold: SpargeAttn's second filter, inside the online softmax: the PV product of a block is left out for ``warp_rows`` rows if
            their scores of that block all lie more than this below their running maxima (natural-log units). The normaliser counts them.

    Returns:
        ``out`` ``(B, H, S, D)`` in the dtype of q, and the share of (warp, block) PV products that were computed.
    """
    layout = mask.layout
    check_tensors("blockwise_attention", layout, q=q, k=k, v=v)
    mask = mask.to(q.device)
    layout = mask.layout
    t = tables(layout, q.device)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if numerics.smooth_k:
        k = k.float() - k.float().mean(2, keepdim=True)
    q8, q_scale = _rounded(gather_blocks(q.float(), layout), numerics.qk, numerics.q_group, mask)
    k8, k_scale = _rounded(gather_blocks(k.float(), layout), numerics.qk, numerics.k_group, mask)
    v8, v_scale = _rounded_v(gather_blocks(v.float(), layout), numerics.v)
    padding = torch.where(t.valid, 0.0, -math.inf)  # [NB, 128]: what padding keys add to their scores
    tile_of_block = layout.tile_of_block.long()
    batch, heads, blocks = q.shape[0], q.shape[1], layout.num_blocks
    shape = (batch, heads, blocks)
    counts = mask.kv_num_blocks[:, :, tile_of_block].expand(shape).flatten(0, 1)
    indices = mask.kv_indices[:, :, tile_of_block].long().expand(*shape, -1).flatten(0, 1)
    operands = [x.flatten(0, 1) for x in (q8, q_scale, k8, k_scale, v8, v_scale)]  # in _Operands' order
    out = torch.empty(batch * heads, blocks, BLOCK, q.shape[-1], device=q.device)
    computed = total = 0
    at_once = max(1, _BYTES_AT_ONCE // (blocks * BLOCK * BLOCK * 4))
    for first in range(0, batch * heads, at_once):
        some = slice(first, first + at_once)
        out[some], done, of = _heads(
            _Operands(*(x[some] for x in operands)), counts[some], indices[some], padding, scale, numerics, pv_threshold,
            warp_rows,
        )  # fmt: skip
        computed, total = computed + done, total + of
    place = layout.slot_of_token.long()
    return out.view(batch, heads, -1, q.shape[-1])[:, :, place].to(q.dtype), computed / max(total, 1)


class _Operands(NamedTuple):
    """Values and scales of some heads, by block."""

    q8: Tensor  # [heads, NB, 128, D]
    q_scale: Tensor  # [heads, NB, 128]
    k8: Tensor
    k_scale: Tensor
    v8: Tensor
    v_scale: Tensor  # [heads, D]


def _heads(
    operands: _Operands,
    counts: Tensor,
    indices: Tensor,
    padding: Tensor,
    scale: float,
    numerics: Numerics,
    pv_threshold: float | None,
    warp_rows: int,
) -> tuple[Tensor, int, int]:
    """Some heads ``[heads, NB, 128, ...]``, all query blocks at once: step j visits the j-th block of every list."""
    heads, num_blocks, rows, dim = operands.q8.shape
    blocks = heads * num_blocks
    q8, q_scale, k8, k_scale, v8 = (x.flatten(0, 1) for x in operands[:5])
    offset = torch.arange(heads, device=q8.device).repeat_interleave(num_blocks) * num_blocks
    counts, indices = counts.flatten(), indices.flatten(0, 1)
    key_padding = padding.repeat(heads, 1)
    m = torch.full((blocks, rows), -math.inf, device=q8.device)
    l = torch.zeros(blocks, rows, device=q8.device)
    o = torch.zeros(blocks, rows, dim, device=q8.device)
    computed = total = 0
    for step in range(int(counts.max())):
        live = (step < counts).unsqueeze(-1)
        block = offset + torch.where(live.squeeze(-1), indices[:, step], 0)
        products = q8 @ k8[block].transpose(-1, -2)
        scales = q_scale.unsqueeze(-1) * k_scale[block].unsqueeze(-2)
        scores = products * scales * scale + key_padding[block].unsqueeze(-2)
        highest = scores.amax(-1)
        m_new = torch.where(live, torch.maximum(m, highest), m)
        base = torch.where(m_new == -math.inf, 0.0, m_new)
        p = torch.where(live.unsqueeze(-1), torch.exp2((scores - base.unsqueeze(-1)) * _LOG2E), 0.0)
        exact_sum = p.sum(-1)
        if numerics.p_scale is not None:
            p = to_e4m3(p * numerics.p_scale).float() / numerics.p_scale
        elif numerics.v == "bf16":
            p = p.bfloat16().float()
        rescale = torch.where(m == m_new, 1.0, torch.exp2((m - base) * _LOG2E))
        l = l * rescale + (p.sum(-1) if numerics.round_sum else exact_sum)
        if pv_threshold is not None:
            near = (highest - m_new >= -pv_threshold).unflatten(-1, (-1, warp_rows)).any(-1) & live
            computed, total = computed + int(near.sum()), total + int(live.sum()) * (rows // warp_rows)
            p = p * near.repeat_interleave(warp_rows, -1).unsqueeze(-1)
        o = o * rescale.unsqueeze(-1) + p @ v8[block]
        m = m_new
    if pv_threshold is None:
        computed = total = 1
    o = (o / torch.where(l == 0, 1.0, l).unsqueeze(-1)).unflatten(0, (heads, num_blocks))
    return o * operands.v_scale[:, None, None], computed, total


def _rounded(blocks: Tensor, precision: str, group: Group, mask: BlockMask) -> tuple[Tensor, Tensor]:
    """Operand values ``[B, H, NB, 128, D]`` (FP32) and the scale of each slot ``[B, H, NB, 128]``; padding is zero."""
    if precision in ("exact", "bf16"):
        values = blocks if precision == "exact" else blocks.bfloat16().float()
        return values, torch.ones(blocks.shape[:-1], device=blocks.device)
    absmax = blocks.abs().amax(-1)
    if group == "half":
        absmax = absmax.unflatten(-1, (2, 64)).amax(-1, keepdim=True).expand(*absmax.shape[:-1], 2, 64).flatten(-2)
    else:
        per_block = absmax.amax(-1)
        if group == "tile":
            own = tables(mask.layout, blocks.device).own
            per_tile = per_block.unsqueeze(-2).masked_fill(~own, 0.0).amax(-1)  # [B, H, tiles]
            per_block = per_tile[:, :, mask.layout.tile_of_block.long()]
        elif group == "head":
            per_block = per_block.amax(-1, keepdim=True).expand_as(per_block)
        elif not isinstance(group, str):
            of_block = group_of_tile(mask.layout, group).to(blocks.device)[mask.layout.tile_of_block.long()]
            of_block = of_block.expand_as(per_block)
            largest = per_block.new_zeros(*per_block.shape[:-1], int(of_block.max()) + 1)
            per_block = largest.scatter_reduce(-1, of_block, per_block, "amax").gather(-1, of_block)
        absmax = per_block.unsqueeze(-1).expand_as(absmax)
    scale = torch.where(absmax == 0, 1.0, absmax / (127.0 if precision == "int8" else E4M3_MAX))
    scaled = blocks / scale.unsqueeze(-1)
    if precision == "int8":  # half away from zero, as the published kernels round
        return scaled.sign() * (scaled.abs() + 0.5).floor().clamp(max=127), scale
    return to_e4m3(scaled).float(), scale


def _rounded_v(blocks: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Values ``[B, H, NB, 128, D]`` (FP32) and scales ``[B, H, D]``."""
    if kind in ("exact", "bf16"):
        values = blocks if kind == "exact" else blocks.bfloat16().float()
        return values, torch.ones(*blocks.shape[:2], blocks.shape[-1], device=blocks.device)
    absmax = blocks.abs().amax((2, 3))
    if kind == "head":
        absmax = absmax.amax(-1, keepdim=True).expand_as(absmax)
    scale = torch.where(absmax == 0, 1.0, absmax / E4M3_MAX)
    return to_e4m3(blocks / scale[:, :, None, None]).float(), scale
