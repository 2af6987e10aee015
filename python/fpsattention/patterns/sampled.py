"""Patterns that look at tokens, not only at means: sampled rows, sampled blocks, strided antidiagonals, exact masses."""

from __future__ import annotations

import math
import random
from functools import lru_cache

import torch
from torch import Tensor

from ..errors import ConfigError
from ..layout.plain import constant
from ..layout.tiles import BLOCK, TileLayout
from .blocks import check_count, check_number, gather_blocks, num_video_blocks, tables, top_p
from .pattern import pattern
from .token_rules import band_share


@constant
def sample(population: int, count: int, seed: int, device: torch.device) -> Tensor:
    """``count`` distinct indices below ``population``, ascending, fixed by ``seed``: int64 on the device, kept there."""
    return _sample_on(population, min(count, population), seed, device)


@lru_cache(maxsize=64)
def _sample_on(population: int, count: int, seed: int, device: torch.device) -> Tensor:
    return torch.tensor(sorted(random.Random(seed).sample(range(population), count)), device=device)


def _svg_width(layout: TileLayout, share: float) -> int:
    """Band of ``|p - p'| < width`` that holds ``share`` of S^2 pairs: ``S (1 - sqrt(1 - share))``."""
    return max(int(layout.num_video_tokens * (1.0 - math.sqrt(1.0 - share))), 1)


@constant
def _svg_masks(layout: TileLayout, share: float, sink: bool, min_share: float, device: torch.device) -> Tensor:
    """Spatial and temporal mask, bool ``[2, num_tiles, num_blocks]``."""
    return _svg_masks_on(layout, share, sink, min_share, device)


@lru_cache(maxsize=32)
def _svg_masks_on(layout: TileLayout, share: float, sink: bool, min_share: float, device: torch.device) -> Tensor:
    width = _svg_width(layout, share)
    masks = [band_share(layout, order, width, sink) >= min_share for order in ("frames", "pixels")]
    return torch.stack(masks).to(device) | tables(layout, device).own  # a band holds every token itself


@pattern()
def svg(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: TileLayout,
    share: float = 0.25,
    rows: int = 64,
    sink: bool = True,
    min_share: float = 0.5,
    seed: int = 0,
) -> Tensor:
    """Sparse-VideoGen (arXiv 2502.01776; svg-project/Sparse-VideoGen): each head is spatial or temporal, as sampled rows say.

    Spatial: ``|p - p'| < w`` in raster order; temporal: in (row, column, frame) order; ``w = S (1 - sqrt(1 - share))`` with S video tokens.
    Keys of frame 0 are attended by all (``sink``). Blocks are kept where at least ``min_share`` of their token pairs are, and the own
    tile. ``rows`` random queries, the same for all heads, are computed densely and under both masks; a head takes the mask of the smaller squared error.

    Args:
        v: ``(B, H, S, D)``; the error is that of the outputs.
        share: kept share of the pairs (their "sparsity"), 0.2 to 0.3.

    The published masks round w up to whole blocks, keep the first N positions of either order (N tokens per frame: frame 0 for spatial
    heads) and sample against bands of 1.5 frames; here the masks that are compared are those that run. Tiles that are long in time suit
    temporal heads, tiles of few frames spatial ones.
    """
    for name, value in (("share", share), ("min_share", min_share)):
        check_number("svg", name, value, 0.0, 1.0)
    check_count("svg", "rows", rows)
    masks = _svg_masks(layout, share, sink, min_share, q.device)
    t = tables(layout, q.device)
    kept = masks | t.text_columns | t.text_rows
    chosen = sample(layout.num_tokens, rows, seed, q.device)
    logits = q.index_select(2, chosen).float() @ k.float().transpose(-1, -2) * q.shape[-1] ** -0.5
    dense = logits.softmax(-1) @ v.float()
    token_masks = kept[:, t.tile_of_token.index_select(0, chosen)][:, :, t.block_of_token]  # [2, rows, S]
    outputs = [logits.masked_fill(~mask, -math.inf).softmax(-1) @ v.float() for mask in token_masks]
    errors = torch.stack([(out - dense).square().sum((-1, -2)) for out in outputs], -1)  # [B, H, 2]
    return masks[errors.argmin(-1)]


def _ratio_count(layout: TileLayout, ratio: float) -> int:
    return max(1, int(num_video_blocks(layout) * ratio + 1e-9))


@pattern(width=lambda layout, max_ratio, **_: _ratio_count(layout, max_ratio))
def blade(
    q: Tensor,
    k: Tensor,
    layout: TileLayout,
    samples: int = 32,
    mass: float = 0.95,
    min_ratio: float = 0.05,
    max_ratio: float = 0.17,
    seed: int = 0,
) -> Tensor:
    """Adaptive block-sparse attention of BLADE (arXiv 2508.10774): block masses from sampled tokens, a budget per row.

    ``samples`` tokens of every block, at the same places in all blocks, attend each other (softmax over all sampled video keys); ``P_ij`` is
    the mass that the sampled queries of tile i give block j. Sorted, a row keeps the blocks before the one with which the mass reaches
    ``mass`` of the total, at least ``int(min_ratio n)`` and at most ``int(max_ratio n)``; its own tile comes first. The code's defaults for Wan-1.3B are the ones here, after a
    Gilbert-curve order, whose place 3D tiles take. Its coarse branch over pooled keys is :mod:`.compensation`.
    """
    check_count("blade", "samples", samples, 1, BLOCK)
    for name, value in (("mass", mass), ("min_ratio", min_ratio), ("max_ratio", max_ratio)):
        check_number("blade", name, value, 0.0, 1.0)
    t = tables(layout, q.device)
    places = sample(BLOCK, samples, seed, q.device)
    places = (places * t.block_tokens.long().unsqueeze(-1)) // BLOCK  # [NB, samples]: valid slots, also in short blocks
    token = t.source.gather(1, places)
    video = num_video_blocks(layout)
    keys = k.index_select(2, token[:video].flatten()).float()
    masses = []
    for tile in range(layout.num_video_tiles):  # a tile at a time: the scores of all samples would not fit
        blocks = t.blocks_of_tile[tile]
        real = t.tokens_of_tile[tile] > 0
        queries = q.index_select(2, token.index_select(0, blocks).flatten()).float()
        weights = (queries @ keys.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
        weights = weights.unflatten(2, (-1, samples)).unflatten(-1, (video, samples)).sum((3, 5))  # [B, H, m, video]
        masses.append((weights * real.unsqueeze(-1)).sum(2))
    weights = torch.stack(masses, 2)
    weights = weights / weights.sum(-1, keepdim=True)
    # "Before the one that reaches": one fewer than the smallest set that holds the mass.
    smallest = top_p(weights, mass).sum(-1, keepdim=True)
    budget = (smallest - 1).clamp(_ratio_count(layout, min_ratio), _ratio_count(layout, max_ratio))
    own_first = weights.masked_fill(t.own[: layout.num_video_tiles, :video], math.inf)
    rank = own_first.argsort(dim=-1, descending=True, stable=True).argsort(-1)
    padding = (0, layout.num_blocks - video, 0, layout.num_tiles - layout.num_video_tiles)
    return torch.nn.functional.pad(rank < budget, padding)


@pattern()
def antidiagonal(q: Tensor, k: Tensor, layout: TileLayout, stride: int = 8, mass: float = 0.9) -> Tensor:
    """XAttention (arXiv 2503.16428; mit-han-lab/x-attention): sums of strided antidiagonals stand for block masses.

    Slots are taken in groups of ``stride``; a group of keys is ``[k_0 ... k_{t-1}]`` in one row, a group of queries ``[q_{t-1} ... q_0]``, so their product
    is the sum of an antidiagonal of the t x t scores. ``softmax(Q~ K~^T / (sqrt(D) t))`` over all groups of video keys, summed over the groups of a
    (query tile, KV block); a row keeps the smallest set of blocks with ``mass`` of it. Padding slots are zero; groups of padding are left out.

    Args:
        stride: divides 128. HunyuanVideo: 8 with mass 0.9 or 0.95; language models 16.
    """
    check_number("antidiagonal", "mass", mass, 0.0, 1.0)
    check_count("antidiagonal", "stride", stride, 1, BLOCK)
    if BLOCK % stride:
        raise ConfigError(f"fpsattention.patterns.antidiagonal: stride {stride}, expected a divisor of {BLOCK}")
    t = tables(layout, q.device)
    video, groups = num_video_blocks(layout), BLOCK // stride
    keys = gather_blocks(k.float(), layout)[:, :, :video].unflatten(3, (groups, stride)).flatten(-2)
    keys = keys.flatten(2, 3)  # [B, H, video * groups, stride * D]
    queries = (
        gather_blocks(q.float(), layout).unflatten(3, (groups, stride)).flip(4).flatten(-2)
    )  # [B, H, NB, groups, .]
    there = t.valid.unflatten(1, (groups, stride)).any(-1)  # [NB, groups]
    padding_key = ~there[:video].flatten()
    scale = 1.0 / (math.sqrt(q.shape[-1]) * stride)
    masses = []
    for tile in range(layout.num_video_tiles):
        blocks, real = t.blocks_of_tile[tile], t.tokens_of_tile[tile] > 0
        rows = queries.index_select(2, blocks).flatten(2, 3)
        weights = (rows @ keys.transpose(-1, -2) * scale).masked_fill(padding_key, -math.inf).softmax(-1)
        counted = (there.index_select(0, blocks) & real.unsqueeze(-1)).flatten()
        masses.append((weights * counted.unsqueeze(-1)).sum(2).unflatten(-1, (video, groups)).sum(-1))
    return _by_mass(torch.stack(masses, 2), mass, layout)


@pattern()
def exact(q: Tensor, k: Tensor, lse: Tensor, layout: TileLayout, mass: float = 0.9) -> Tensor:
    """AdaSpa (arXiv 2502.21079): exact masses of blocks from a log-sum-exp that an earlier step left behind.

    ``m_ij = sum over tokens of exp(scale q . k - lse)``, normalized per row; a row keeps the smallest set of blocks with ``mass`` of it. Costs one
    QK^T at the steps that search; ``Refresh`` keeps the mask in between.

    Args:
        lse: f32 ``(B, H, S)``, natural logarithm, of the last dense or sparse step (``attention(..., return_lse=True)``).
    """
    check_number("exact", "mass", mass, 0.0, 1.0)
    if lse.shape != q.shape[:3] or lse.device != q.device:
        raise ConfigError(
            f"fpsattention.patterns.exact: lse has shape {tuple(lse.shape)} on {lse.device}, expected {tuple(q.shape[:3])} on {q.device}"
        )
    t = tables(layout, q.device)
    video = num_video_blocks(layout)
    token = t.source[:video].flatten()
    keys = k.index_select(2, token).float()
    padding_key = ~t.valid[:video].flatten()
    masses = []
    for tile in range(layout.num_video_tiles):
        rows = t.source.index_select(0, t.blocks_of_tile[tile]).flatten()
        real = (t.valid.index_select(0, t.blocks_of_tile[tile]) & (t.tokens_of_tile[tile] > 0).unsqueeze(-1)).flatten()
        logits = q.index_select(2, rows).float() @ keys.transpose(-1, -2) * q.shape[-1] ** -0.5
        weights = (logits - lse.index_select(2, rows).unsqueeze(-1)).masked_fill(padding_key, -math.inf).exp()
        weights = torch.where(real.unsqueeze(-1), weights, 0.0)
        masses.append(weights.sum(2).unflatten(-1, (video, BLOCK)).sum(-1))
    return _by_mass(torch.stack(masses, 2), mass, layout)


def _by_mass(masses: Tensor, mass: float, layout: TileLayout) -> Tensor:
    """Top-p of block masses ``[B, H, video tiles, video blocks]``, padded to all rows and columns."""
    keep = top_p(masses / masses.sum(-1, keepdim=True), mass)
    padding = (0, layout.num_blocks - keep.shape[-1], 0, layout.num_tiles - keep.shape[-2])
    return torch.nn.functional.pad(keep, padding)
