"""How far a right kernel may be from ``reference.forward``: an interval for every output, from a model of the tensor core.

FP8 WGMMA adds 32 products and its accumulator at a time. Model (what is known of Hopper; an emulator can compute it): all of them
are aligned to the largest and cut 13 bits below its leading bit, and so is the result. So a step loses at most one such unit
for each of its 34 numbers. A device that keeps more bits loses less; an exact one only rounds its FP32 sums.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fpsattention.ops.reference import BLOCK, LOG2E, P_SHIFT, Quantized, _dequantized_v, _per_slot, probabilities

STEP = 32  # products of an instruction
FRACTION_BITS = 13
FP32 = 2.0**-24  # relative error of a rounding


class Bounds(NamedTuple):
    """In slot order: largest difference from the reference that the arithmetic explains."""

    out: Tensor  # (B, H, num_slots, D), before the output's own rounding
    row_sum: Tensor  # (B, H, num_slots): of row_sum * 2^(row_max - its own row_max)
    relative_sum: Tensor  # the same relative to what is left of row_sum: bounds log(row_sum)
    sure_max: Tensor  # (B, H, num_slots) bool: row_max cannot be another integer


def _lost(largest: Tensor, absolute_sum: Tensor, terms: int, cuts: bool) -> Tensor:
    """Loss of a chain of steps; ``largest [steps, ...]`` addend of each, ``absolute_sum`` of the ``terms`` products."""
    if not cuts:
        return terms * FP32 * absolute_sum
    _, exponent = torch.frexp(largest * 1.01)  # the device's accumulator is not exactly ours
    unit = torch.ldexp(torch.ones_like(largest), exponent - 1 - FRACTION_BITS)
    return (STEP + 2) * torch.where(largest > 0, unit, 0.0).sum(0) + terms * FP32 * absolute_sum


def _scores(q: Tensor, k: Tensor, cuts: bool) -> tuple[Tensor, Tensor]:
    """``q k^T`` of raw values, and how much of it may be lost. q [rows, D], k [keys, D]."""
    q_steps, k_steps = (x.unflatten(-1, (-1, STEP)).transpose(0, 1) for x in (q, k))  # [D / 32, ., 32]
    sums = (q_steps @ k_steps.transpose(1, 2)).cumsum(0)
    products = q_steps.abs().amax(-1).unsqueeze(-1) * k_steps.abs().amax(-1).unsqueeze(-2)
    before = torch.cat([torch.zeros_like(sums[:1]), sums[:-1]])
    largest = torch.maximum(products, torch.maximum(before.abs(), sums.abs()))
    return sums[-1], _lost(largest, q.abs() @ k.abs().T, q.shape[-1], cuts)


def _weighted_sum(p: Tensor, v: Tensor, cuts: bool) -> tuple[Tensor, Tensor]:
    """``p v``, and how much of it may be lost, wherever it is promoted to FP32. p [rows, keys], v [keys, columns]."""
    p_steps, v_steps = p.unflatten(-1, (-1, STEP)).transpose(0, 1), v.unflatten(0, (-1, STEP))
    sums = (p_steps @ v_steps).cumsum(0)
    products = p_steps.amax(-1).unsqueeze(-1) * v_steps.abs().amax(1).unsqueeze(1)
    with_start = torch.cat([torch.zeros_like(sums[:1]), sums])  # an accumulator is the difference of two of these
    reach = (with_start.cummax(0).values - with_start.cummin(0).values)[1:]
    return sums[-1], _lost(torch.maximum(products, reach), p @ v.abs(), p.shape[-1], cuts)


def forward_bounds(
    z: Quantized,
    tile_of_block: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    *,
    softmax_scale: float,
    cuts: bool,
) -> Bounds:
    """Bounds for ``forward`` on the quantized operands ``z``; ``cuts``: the device may lose bits as the model says."""
    q8, k8 = z.q8.double(), z.k8.double()
    batch, heads, num_blocks, _, dim = q8.shape
    v_raw, ones = _dequantized_v(z.v8t)
    columns = torch.cat([v_raw, ones.unsqueeze(-1)], -1).double()  # the last one sums P
    q_scale, k_scale = _per_slot(z.q_scale).double(), _per_slot(z.k_scale).double()
    out = torch.zeros(batch, heads, num_blocks, BLOCK, dim, dtype=torch.double)
    row_sum, relative = (torch.zeros(batch, heads, num_blocks, BLOCK, dtype=torch.double) for _ in range(2))
    sure = torch.ones(batch, heads, num_blocks, BLOCK, dtype=torch.bool)
    for b in range(batch):
        for h in range(heads):
            counts = kv_num_blocks[b % kv_num_blocks.shape[0], h % kv_num_blocks.shape[1]]
            lists = kv_indices[b % kv_indices.shape[0], h % kv_indices.shape[1]]
            for i in range(num_blocks):
                tile = int(tile_of_block[i])
                blocks = lists[tile, : counts[tile]].long()
                if blocks.numel() == 0:
                    continue
                raw, lost = _scores(q8[b, h, i], k8[b, h, blocks].flatten(0, 1), cuts)
                factor = q_scale[b, h, i, :, None] * k_scale[b, h, blocks].flatten() * (softmax_scale * LOG2E)
                x, doubt = raw * factor, lost * factor
                # The maximum that is running when a block is visited, and whether it could be another integer.
                by_block = x.unflatten(1, (-1, BLOCK)).amax(-1)
                doubt = doubt + 8 * FP32 * (x.abs() + by_block.abs().amax(1, keepdim=True) + P_SHIFT + 1)
                worst = doubt.unflatten(1, (-1, BLOCK)).amax(-1)
                unsure = ((by_block + worst).ceil() != (by_block - worst).ceil()).any(1)
                running = by_block.ceil().cummax(1).values
                m = running[:, -1:]
                shift = torch.exp2(running - m).repeat_interleave(BLOCK, 1)
                y = x - running.repeat_interleave(BLOCK, 1) + P_SHIFT
                p, low, high = (
                    probabilities(e.float().unflatten(1, (-1, BLOCK)), dim).flatten(1).double()
                    for e in (y, y - doubt, y + doubt)
                )
                # Another maximum means other subnormals of e4m3: half a step of 2^-9 on either side, at twice the scale.
                flips = (torch.maximum(high - p, p - low) + unsure[:, None] * 2.0**-8) * shift
                v = columns[b, h, blocks].flatten(0, 1)
                sums, sums_lost = _weighted_sum(p * shift, v, cuts)
                off = flips @ v.abs() + sums_lost
                l, l_off = sums[:, -1:], off[:, -1:]
                left = (l - l_off).clamp_min(torch.finfo(torch.double).tiny)
                o = sums[:, :-1] / l
                out[b, h, i] = z.v_scale[b, h].double() * ((off[:, :-1] + o.abs() * l_off) / left + 8 * FP32 * o.abs())
                row_sum[b, h, i], relative[b, h, i] = l_off[:, 0], (l_off / left)[:, 0]
                sure[b, h, i] = ~unsure
    return Bounds(out.flatten(2, 3), row_sum.flatten(2), relative.flatten(2), sure.flatten(2))
