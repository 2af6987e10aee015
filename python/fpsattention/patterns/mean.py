"""Patterns from block means: ``s_ij = scale * mean(q of tile i) . mean(k of block j)``.

Published selectors pool queries over blocks of the kernel (64 or 128 tokens); here a row is a query tile, whose blocks share a list.
With tiles of up to 128 tokens that is the same thing. A rule that names ``q_means`` and ``k_means`` (f32 ``[B, H, NB, D]``, the means of q
and of k over every block) reads nothing else of q and k, so the sums that the quantizer leaves behind are enough for it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import ConfigError
from ..layout.masks import sliding_tile_mask
from ..layout.plain import constant
from ..layout.tiles import TileLayout
from .blocks import (
    Scored,
    check_count,
    check_number,
    num_video_blocks,
    pool_blocks,
    ranked,
    scores,
    scores_of_means,
    tables,
    tile_means,
    top_k,
    top_p,
    unranked,
)
from .pattern import pattern


def _count(layout: TileLayout, ratio: float) -> int:
    """``int(ratio n)`` of the n video blocks, at least one and at least the own tile."""
    blocks = num_video_blocks(layout)
    return min(max(int(ratio * blocks + 1e-9), 1, -(-math.prod(layout.tile) // 128)), blocks)


def _topk_scored(logits: Tensor, layout: TileLayout, ratio: float) -> Scored:
    check_number("topk_mean", "ratio", ratio, 0.0, 1.0)
    return Scored(logits, keep=_count(layout, ratio), own_first=True)


@pattern(width=lambda layout, ratio: _count(layout, ratio), scored=_topk_scored)
def topk_mean(q_means: Tensor, k_means: Tensor, layout: TileLayout, ratio: float = 0.2) -> Tensor:
    """The ``int(ratio n)`` KV blocks of largest ``s_ij`` per query tile, own tile first, of n video blocks.

    SLA (thu-ml/SLA; 0.2), TurboDiffusion (0.1, "0.15 better"), the list of VSA (hao-ai-lab/FastVideo: ratio = 1 - sparsity, 0.2 for 1.3B
    and 5B, 0.1 for 14B, cubes of 4x4x4). K smoothing, which SLA applies, shifts a row by a constant: the list is the same. Their second
    branches (linear attention, coarse attention) are trained parts of those models and no part of a mask.
    """
    check_number("topk_mean", "ratio", ratio, 0.0, 1.0)
    logits = scores_of_means(q_means, k_means, layout)
    return top_k(logits, _count(layout, ratio), tables(layout, logits.device).own)


@constant
def _window(layout: TileLayout, window: tuple[int, int, int], device: torch.device) -> Tensor:
    return sliding_tile_mask(layout, window).to(device).to_blocks()


def _cdf_scored(
    logits: Tensor, layout: TileLayout, mass: float, min_ratio: float, window: object, by_size: bool
) -> Scored | None:
    if window is not None:  # a union with something else
        return None
    weights, at_least = _cdf_weights(logits, layout, mass, min_ratio, by_size)
    return Scored(weights, mass=mass, min_count=at_least)


def _cdf_weights(
    logits: Tensor, layout: TileLayout, mass: float, min_ratio: float, by_size: bool
) -> tuple[Tensor, int]:
    check_number("cdf_mean", "mass", mass, 0.0, 1.0)
    check_number("cdf_mean", "min_ratio", min_ratio, 0.0, 1.0)
    if by_size:
        logits = logits + tables(layout, logits.device).block_tokens.log()
    return logits.softmax(-1), int(min_ratio * num_video_blocks(layout) + 1e-9)


@pattern(scored=_cdf_scored)
def cdf_mean(
    q_means: Tensor,
    k_means: Tensor,
    layout: TileLayout,
    mass: float = 0.9,
    min_ratio: float = 0.0,
    window: tuple[int, int, int] | None = None,
    by_size: bool = False,
) -> Tensor:
    """The smallest set of KV blocks per query tile that holds ``mass`` of ``softmax_j(s_ij)``.

    Args:
        mass: NABLA (Kandinsky 5) 0.9; Jenga (dvlab-research/Jenga) 0.8 to 0.9; the map of Sparse-VideoGen 2 0.9.
        min_ratio: keep at least ``int(min_ratio n)`` blocks: Jenga ``1 - sa_drop_rate`` (0.15 to 0.3), Sparse-VideoGen 2 0.10.
        window: keep this sliding tile window, too (NABLA's union with STA; Jenga's with spatial neighbours), in tiles.
        by_size: weight a block by its tokens, ``|j| exp(s_ij)`` (Sparse-VideoGen 2).
    """
    logits = scores_of_means(q_means, k_means, layout)
    weights, at_least = _cdf_weights(logits, layout, mass, min_ratio, by_size)
    keep = top_p(weights, mass, at_least)
    if window is not None:
        keep = keep | _window(layout, window, keep.device)
    return keep


def _similarity(x: Tensor, layout: TileLayout) -> Tensor:
    """Mean of the normalized tokens of every block, f32 ``[B, H, NB, D]``: its squared norm is the mean cosine of all pairs."""
    return pool_blocks(x.float() / x.float().norm(dim=-1, keepdim=True), layout)


@pattern()
def sparge(
    q: Tensor,
    k: Tensor,
    layout: TileLayout,
    mass: float | None = 0.98,
    ratio: float | None = None,
    similarity: float = 0.6,
    smooth_k: bool = True,
) -> Tensor:
    """SpargeAttn's first filter (thu-ml/SpargeAttn ``get_block_map_meansim``): block means, gated by self-similarity.

    ``c`` is the mean cosine over all pairs of tokens of a block (of a tile for queries). KV blocks with ``c <= similarity`` take no part in
    the softmax over j and are always kept; query tiles with ``c <= similarity`` are dense. Of the others the largest are kept
    whose running mass, *themselves included*, is at most ``mass`` (one at least), or, with ``ratio`` instead (``mass=None``), ``int(ratio n)``.

    Args:
        mass, ratio, similarity: published (0.98, None, 0.6) and (None, 0.5, -0.1). A mean cosine is a squared norm, never negative: the
            second never triggers the test.
        smooth_k: subtract the mean of K first, as their Sage variants do; it changes cosines, not scores.

    Its second filter, inside the online softmax, is no list: ``compare.numerics`` has it (``pv_threshold``).
    """
    if (mass is None) == (ratio is None):
        raise ConfigError(
            f"fpsattention.patterns.sparge: mass {mass!r} and ratio {ratio!r}, expected exactly one of them"
        )
    check_number("sparge", "mass" if ratio is None else "ratio", mass if ratio is None else ratio, 0.0, 1.0)
    check_number("sparge", "similarity", similarity, -1.0, 1.0)
    t = tables(layout, q.device)
    if smooth_k:
        k = k.float() - k.float().mean(2, keepdim=True)
    q_similar = (
        tile_means(_similarity(q, layout), layout).square().sum(-1) > similarity
    )  # NaN (a zero token): not similar
    k_similar = _similarity(k, layout).square().sum(-1) > similarity
    logits = scores(q, k, layout).masked_fill(~k_similar.unsqueeze(-2), -math.inf)
    weights = logits.softmax(-1).nan_to_num(0.0)  # no block at all is similar: every one is kept below
    values, sums, columns = ranked(weights)
    rank = torch.arange(weights.shape[-1], device=q.device)
    if mass is not None:
        chosen = (sums <= mass) | (rank == 0)
    else:
        chosen = rank < max(int(ratio * num_video_blocks(layout) + 1e-9), 1)  # type: ignore[operator]
    keep = unranked(chosen.expand_as(columns), columns)
    return (keep | ~k_similar.unsqueeze(-2) | ~q_similar.unsqueeze(-1)) & ~t.text_columns


@pattern()
def draft(q_means: Tensor, k_means: Tensor, layout: TileLayout, sparsity: float = 0.9) -> Tensor:
    """DraftAttention (arXiv 2505.14708): the ``int((1 - sparsity) n m)`` largest of all ``P_ij = softmax_j(s_ij)`` of a head.

    n video tiles, m video blocks; one budget for the whole head, of which own tiles come first. Published with patches of 8x16 tokens of a frame: ``plan(grid, (1, 8, 16))``.
    """
    check_number("draft", "sparsity", sparsity, 0.0, 1.0)
    rows, columns = layout.num_video_tiles, num_video_blocks(layout)
    weights = scores_of_means(q_means, k_means, layout)[:, :, :rows, :columns].softmax(-1)
    own = tables(layout, weights.device).own[:rows, :columns]
    budget = max(int((1.0 - sparsity) * rows * columns + 1e-9), columns)  # a block has one own tile
    keep = top_k(weights.flatten(-2), budget, own.flatten()).unflatten(-1, (rows, columns))
    return torch.nn.functional.pad(keep, (0, layout.num_blocks - columns, 0, layout.num_tiles - rows))


PARTITIONS = ("time", "space", "volume")  # VMoBA's 1-D, 2-D and 3-D, in the order of its layers


@pattern(period=3)
def vmoba(
    q_means: Tensor,
    k_means: Tensor,
    layout: TileLayout,
    layer: int = 0,
    threshold: float = 0.25,
    scope: str = "head",
    top: int | None = None,
) -> Tensor:
    """VMoBA (arXiv 2506.23858): gates to chunks of keys, whose shape changes from layer to layer.

    Layer 0, 3, 6, ... cuts the keys along time (all tiles of one temporal index are a chunk), 1, 4, ... in space (all tiles of one
    (row, column)), 2, 5, ... into tiles. The gate of query tile i and chunk j is ``g_ij = mean(q of i) . mean(k of j)`` (published: of
    each query token; rows of this library share a list per tile). Gates are scaled to [0, 1] by their minimum and maximum; own chunks are
    kept, and of the others the smallest set, largest first, that brings the kept sum to ``threshold`` of the total.

    Args:
        layer: index of the layer among those that use VMoBA.
        threshold: 0.25.
        scope: "head": minimum, maximum, total and set over all (i, j) of a head (the paper's); "query": of each i.
        top: keep so many chunks per query, own included, instead (FastVideo's Wan-1.3B: 2 in time, 6 in space, 18 in volume). Chunk
            sizes are the layout's tile: published 2 frames, 4x13 pixels, 4x4x13.
    """
    check_count("vmoba", "layer", layer, 0)
    check_number("vmoba", "threshold", threshold, 0.0, 1.0)
    if scope not in ("head", "query"):
        raise ConfigError(f"fpsattention.patterns.vmoba: scope {scope!r}, expected 'head' or 'query'")
    if math.prod(layout.tile_grid) != layout.num_video_tiles:
        raise ConfigError("fpsattention.patterns.vmoba: layout is no grid of tiles, expected one of fpsattention.plan")
    tiles, (t, h, w) = layout.num_video_tiles, layout.tile_grid
    layout = layout.to(q_means.device)
    index = torch.arange(tiles, device=q_means.device)
    chunk, chunks = ((index // (h * w), t), (index % (h * w), h * w), (index, tiles))[layer % 3]
    own = torch.nn.functional.one_hot(chunk, chunks).bool()  # [tiles, chunks]: also which tiles a chunk is made of
    tokens = layout.tile_tokens[:tiles].float()
    share = own * tokens.unsqueeze(-1) / (own * tokens.unsqueeze(-1)).sum(0)
    means = share.T @ tile_means(k_means, layout)[:, :, :tiles]  # [B, H, chunks, D]
    gates = tile_means(q_means, layout)[:, :, :tiles] @ means.transpose(-1, -2)
    if top is not None:
        check_count("vmoba", "top", top)
        keep = top_k(gates, min(top, chunks), own)
    else:
        over = (-2, -1) if scope == "head" else (-1,)
        low, high = gates.amin(over, keepdim=True), gates.amax(over, keepdim=True)
        weights = (gates - low) / torch.where(high - low <= 1e-6, 1.0, high - low)
        weights = weights / (weights.sum(over, keepdim=True) + 1e-6)
        wanted = threshold - (weights * own).sum(over, keepdim=True)
        others = weights.masked_fill(own, 0.0)
        if scope == "head":
            keep = top_p(others.flatten(-2), wanted.flatten(-2)).unflatten(-1, (tiles, chunks))
        else:
            keep = top_p(others, wanted)
        keep = keep | own
    video = keep.index_select(-1, chunk.index_select(0, layout.tile_of_block[: num_video_blocks(layout)].long()))
    padding = (0, layout.num_blocks - video.shape[-1], 0, layout.num_tiles - tiles)
    return torch.nn.functional.pad(video, padding)
