"""From rules about tokens to blocks: which share of the token pairs of a (query tile, KV block) a rule attends, counted exactly.

All on the CPU, once per layout: a rule about positions needs no q and k.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from ..layout.tiles import _CLEAR_WITH_PLANS, TileLayout
from .blocks import num_video_blocks, tables

_CACHE_SIZE = 32
_CHUNK = 64  # blocks at a time: their running sums over all positions are held at once


def _windowed(indicator: Tensor, width: int) -> Tensor:
    """``indicator [blocks, N]``: per position p the number of set positions with ``|p - p'| <= width``, ``[blocks, N]``."""
    size = indicator.shape[-1]
    sums = torch.nn.functional.pad(indicator.cumsum(-1), (1, 0))
    position = torch.arange(size)
    return sums[:, (position + width + 1).clamp_max(size)] - sums[:, (position - width).clamp_min(0)]


def _per_tile(counts: Tensor, tile: Tensor, tiles: int) -> Tensor:
    """Sums over the positions of each tile: ``[blocks, N]`` to ``[tiles, blocks]``."""
    return counts.new_zeros(counts.shape[0], tiles).index_add_(1, tile, counts).T


def _shares(counts: Tensor, layout: TileLayout) -> Tensor:
    """Counts over video tiles and blocks as shares of the pairs, f32 ``[num_tiles, num_blocks]``, 0 for text."""
    pairs = layout.tile_tokens[: counts.shape[0], None].double() * layout.block_tokens[None, : counts.shape[1]].double()
    padding = (0, layout.num_blocks - counts.shape[1], 0, layout.num_tiles - counts.shape[0])
    return torch.nn.functional.pad((counts.double() / pairs).float(), padding)


def video_offset(layout: TileLayout) -> int:
    """Index of the first video token."""
    return layout.text_len if layout.text_position == "prefix" else 0


def band_share(layout: TileLayout, order: str, width: int, sink: bool) -> Tensor:
    """Share of the pairs with ``|p_i - p_j| < width``, f32 ``[num_tiles, num_blocks]`` on the CPU.

    Args:
        order: "frames": p is the raster position (frame, row, column); "pixels": (row, column, frame).
        sink: keys of frame 0 are attended by all.
    """
    return _band_share(layout.cpu(), order, width, sink)


@lru_cache(maxsize=_CACHE_SIZE)
def _band_share(layout: TileLayout, order: str, width: int, sink: bool) -> Tensor:
    frames, pixels = layout.grid[0], layout.grid[1] * layout.grid[2]
    token = torch.arange(frames * pixels).view(frames, pixels)
    token = (token if order == "frames" else token.T).reshape(-1)  # token at each position
    t = tables(layout, torch.device("cpu"))
    block, tile = (x[token + video_offset(layout)] for x in (t.block_of_token, t.tile_of_token))
    in_band = torch.ones(token.numel(), dtype=torch.bool)
    if sink:
        in_band = token >= pixels
    columns = []
    for first in range(0, num_video_blocks(layout), _CHUNK):
        blocks = torch.arange(first, min(first + _CHUNK, num_video_blocks(layout))).unsqueeze(-1)
        members = block == blocks
        counts = _windowed((members & in_band).int(), width - 1) + (members & ~in_band).sum(-1, keepdim=True)
        columns.append(_per_tile(counts, tile, layout.num_video_tiles))
    return _shares(torch.cat(columns, -1), layout)


def frame_share(layout: TileLayout, width_of: Callable[[int, int], float | None], key: tuple[object, ...]) -> Tensor:
    """Share of the pairs in frames a, b at pixel positions with ``|p - p'| <= width_of(a, b)`` (None: no pair of these frames).

    ``key`` names the rule in the cache. f32 ``[num_tiles, num_blocks]`` on the CPU.
    """
    layout = layout.cpu()
    cached = _frame_shares.get((layout, key))
    if cached is None:
        cached = _frame_share(layout, width_of)
        while len(_frame_shares) >= _CACHE_SIZE:
            _frame_shares.pop(next(iter(_frame_shares)))
        _frame_shares[layout, key] = cached
    return cached


_frame_shares: dict[tuple[TileLayout, tuple[object, ...]], Tensor] = {}


def _frame_share(layout: TileLayout, width_of: Callable[[int, int], float | None]) -> Tensor:
    frames, pixels = layout.grid[0], layout.grid[1] * layout.grid[2]
    t = tables(layout, torch.device("cpu"))
    video = slice(video_offset(layout), video_offset(layout) + frames * pixels)
    block, tile = (x[video].view(frames, pixels) for x in (t.block_of_token, t.tile_of_token))
    counts = torch.zeros(layout.num_video_tiles, num_video_blocks(layout), dtype=torch.int64)
    for b in range(frames):
        blocks, index = block[b].unique(return_inverse=True)
        members = torch.zeros(blocks.numel(), pixels, dtype=torch.int32)
        members[index, torch.arange(pixels)] = 1
        windowed: dict[int, Tensor] = {}
        for a in range(frames):
            wide = width_of(a, b)
            if wide is None:
                continue
            width = min(int(wide), pixels)  # |p - p'| is whole
            if width not in windowed:
                windowed[width] = _windowed(members, width)
            counts[:, blocks] += _per_tile(windowed[width], tile[a], layout.num_video_tiles)
    return _shares(counts, layout)


_CLEAR_WITH_PLANS.extend([_band_share.cache_clear, _frame_shares.clear])
