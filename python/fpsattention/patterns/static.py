"""Patterns that depend on the layout only: windows, radial decay, a foreground box, parts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError
from ..layout.masks import sliding_tile_mask
from ..layout.plain import Cache, plain_tensors
from ..layout.tiles import BLOCK, TileLayout, int3, plan
from .blocks import check_count, check_number, num_video_blocks, tables
from .pattern import pattern
from .token_rules import frame_share, video_offset

BORDERS = ("shift", "truncate")


def _tile_index(layout: TileLayout) -> Tensor:
    """(t, h, w) of every video tile in the tile grid, int64 ``[video tiles, 3]``."""
    if math.prod(layout.tile_grid) != layout.num_video_tiles:
        raise ConfigError("fpsattention.patterns: layout is no grid of tiles, expected one of fpsattention.plan")
    return torch.cartesian_prod(*(torch.arange(n) for n in layout.tile_grid)).view(-1, 3)


def _spread(tiles: Tensor, layout: TileLayout) -> Tensor:
    """Bool over video tiles ``[n, n]`` to ``[1, 1, num_tiles, num_blocks]``, false for text."""
    video = tiles[:, layout.cpu().tile_of_block[: num_video_blocks(layout)].long()]
    padding = (0, layout.num_blocks - video.shape[1], 0, layout.num_tiles - video.shape[0])
    return torch.nn.functional.pad(video, padding)[None, None]


@pattern()
def sliding_tile(layout: TileLayout, window: tuple[int, int, int], border: str = "shift") -> Tensor:
    """A window of tiles around the query's tile.

    Args:
        window: ``(wT, wH, wW)`` in tiles.
        border: "shift": at a border the window moves inwards, every tile attends ``wT wH wW`` tiles (Sliding Tile Attention, arXiv
            2502.04507; ``sliding_tile_mask``). "truncate": tile v is attended where ``|c_u - c_v| <= window / 2`` on every axis (FPSAttention,
            arXiv 2506.04648, Eq. 3): border tiles attend fewer, an even size reaches as far as the next odd one, and a window may be larger than
            the grid. Whether the paper's W counts tiles or tokens is not said; here it counts tiles.
    """
    if border not in BORDERS:
        raise ConfigError(f"fpsattention.patterns.sliding_tile: border {border!r}, expected one of {BORDERS}")
    if border == "shift":
        return sliding_tile_mask(layout, window).to_blocks()
    window = int3(window, "patterns.sliding_tile: window")
    if min(window) < 1:
        raise ConfigError(f"fpsattention.patterns.sliding_tile: window {window}, expected sizes of at least 1")
    index = _tile_index(layout)
    distance = (index[:, None] - index[None]).abs()
    return _spread((2 * distance <= torch.tensor(window)).all(-1), layout)


def _radial_share(
    layout: TileLayout, decay: float, neighbour: float, sink: bool, block: int, min_share: float = 0.0
) -> Tensor:
    pixels = layout.grid[1] * layout.grid[2]

    def width(a: int, b: int) -> float | None:
        distance = abs(a - b)
        if distance == 0 or (sink and b == 0):
            return pixels
        reach = 2.0 ** pixels.bit_length() / 2.0 ** distance.bit_length()
        if reach < block and distance % int(block / reach):
            return None
        return pixels * neighbour if distance == 1 else max(decay * reach, block)

    return frame_share(layout, width, ("radial", decay, neighbour, sink, block))


@pattern(share=_radial_share)
def radial(
    layout: TileLayout,
    decay: float = 0.2,
    neighbour: float = 0.5,
    sink: bool = True,
    block: int = 128,
    min_share: float = 1 / 3,
) -> Tensor:
    """Radial attention (arXiv 2506.19852; mit-han-lab/radial-attention): the width of a window halves as frame distance doubles.

    Frames a, b at distance d, N tokens per frame, F = 2^bitlen(N), reach r = F / 2^bitlen(d). Token p of a attends p' of b where
    ``|p - p'| <= max(decay r, block)``; all of its own frame; ``neighbour N`` at d = 1; and where r < block only at distances that are
    multiples of ``int(block / r)``. Frame 0 is attended by all (``sink``). The pairs of a (query tile, KV block) are counted exactly, frame by
    frame; it is visited where the rule attends more than ``min_share`` of them.

    Args:
        decay: 0.2 (Wan2.1), 0.8 (Wan2.2), 0.95 (HunyuanVideo).
        neighbour: 0.5 (Wan), 1.0 (HunyuanVideo).
        min_share: the published reduction to blocks keeps one where more than 0.6 of its attended columns have more than a third.

    Published use keeps the first 10 to 12 steps and 0 to 1 layers dense: that is the schedule's part. Tiles of one frame follow the rule best.
    """
    check_number("radial", "decay", decay, 0.0, 1.0)
    check_number("radial", "neighbour", neighbour, 0.0, 1.0)
    check_number("radial", "min_share", min_share, 0.0, 1.0)
    check_count("radial", "block", block)
    return (_radial_share(layout, decay, neighbour, sink, block) > min_share)[None, None]


@pattern()
def foreground(
    layout: TileLayout,
    box: tuple[tuple[int, int], tuple[int, int], tuple[int, int]],
    window: tuple[int, int, int] | None = None,
) -> Tensor:
    """A foreground box attends itself densely (LightningCP's foreground attention); all tiles keep a window.

    Args:
        box: half-open token ranges ``((t0, t1), (h0, h1), (w0, w1))``. A tile that it touches is foreground.
        window: sliding tile window of every tile, in tiles; None: the background is dense.

    A foreground tile attends all foreground tiles and its window, a background tile its window. With a box that ends at tile borders
    foreground rows equal dense attention over the foreground where the window adds nothing.
    """
    shape = [tuple(r) if isinstance(r, (tuple, list)) else () for r in box] if isinstance(box, (tuple, list)) else []
    good = len(shape) == 3 and all(
        len(r) == 2 and all(isinstance(x, int) for x in r) and 0 <= r[0] < r[1] <= n
        for r, n in zip(shape, layout.grid, strict=False)
    )
    if not good:
        raise ConfigError(
            f"fpsattention.patterns.foreground: box {box!r}, expected ((t0, t1), (h0, h1), (w0, w1)) within grid {layout.grid}"
        )
    index = _tile_index(layout)
    inside = torch.ones(len(index), dtype=torch.bool)
    for axis, (low, high) in enumerate(shape):
        ends = torch.tensor(layout.tile_sizes[axis]).cumsum(0)
        starts = ends - torch.tensor(layout.tile_sizes[axis])
        inside &= ((starts < high) & (ends > low))[index[:, axis]]
    keep = _spread(inside[:, None] & inside[None], layout)
    if window is None:
        background = torch.zeros(layout.num_tiles, 1, dtype=torch.bool)
        background[: len(inside), 0] = ~inside
        return keep | background
    return keep | sliding_tile_mask(layout.cpu(), window).to_blocks()


# Parts -------------------------------------------------------------------------------------------------------------------


@plain_tensors()
def part_layout(
    labels: Tensor | Sequence[int], text_len: int = 0, text_position: str = "suffix", max_tile: int = 512
) -> TileLayout:
    """Tokens grouped by label, every part in tiles of its own: a 1-D layout, grid ``(1, 1, N)``, for :func:`part` (any N tokens).

    Args:
        labels: whole numbers ``[N]``, the part of every video token (Ultra3D's part attention; windows, scenes, views ...).
        max_tile: tokens of the largest tile, a multiple of 128.

    Tokens of a part keep their order. Call ``attention(..., grid=layout.grid, block_mask=part(layout, labels=...))``.
    """
    labels = torch.as_tensor(labels)
    if labels.ndim != 1 or labels.is_floating_point() or labels.numel() == 0:
        raise ConfigError(
            f"fpsattention.patterns.part_layout: labels is {labels.dtype} {tuple(labels.shape)}, expected whole numbers [tokens]"
        )
    check_count("part_layout", "max_tile", max_tile, BLOCK)
    if max_tile % BLOCK:
        raise ConfigError(f"fpsattention.patterns.part_layout: max_tile {max_tile}, expected a multiple of {BLOCK}")
    labels = labels.cpu().long()
    order = labels.argsort(stable=True)
    sizes: list[int] = []
    for count in labels.unique(return_counts=True)[1].tolist():
        sizes += [max_tile] * (count // max_tile) + [count % max_tile] * (count % max_tile > 0)
    text = plan((1, 1, 1), text_len=text_len, text_position=text_position)  # for its text tiles
    tokens = torch.tensor(sizes + text.tile_tokens[1:].tolist(), dtype=torch.int32)
    offsets = torch.nn.functional.pad(((tokens + BLOCK - 1) // BLOCK).cumsum(0, dtype=torch.int32), (1, 0))
    first_text = 0 if text_position == "prefix" else labels.numel()
    order = torch.cat([order + (text_len if text_position == "prefix" else 0), first_text + torch.arange(text_len)])
    token_of_slot = torch.full((int(offsets[-1]) * BLOCK,), -1, dtype=torch.int32)
    within = torch.arange(len(order)) - torch.repeat_interleave(tokens.cumsum(0) - tokens, tokens.long())
    slots = torch.repeat_interleave(offsets[:-1].long() * BLOCK, tokens.long()) + within
    token_of_slot[slots] = order.int()
    slot_of_token = torch.empty(len(order), dtype=torch.int32)
    slot_of_token[order] = slots.int()
    return replace(
        text,
        grid=(1, 1, labels.numel()),
        tile=(1, 1, max(sizes)),
        tile_grid=(1, 1, len(sizes)),
        tile_sizes=((1,), (1,), tuple(sizes)),
        num_tokens=len(order),
        num_tiles=len(tokens),
        num_blocks=int(offsets[-1]),
        num_slots=int(offsets[-1]) * BLOCK,
        token_of_slot=token_of_slot,
        slot_of_token=slot_of_token,
        tile_of_block=torch.repeat_interleave(torch.arange(len(tokens), dtype=torch.int32), offsets.diff()),
        tile_block_offsets=offsets,
        tile_tokens=tokens,
        _copies=Cache(),
    )


@pattern()
def part(layout: TileLayout, labels: Any, shared: tuple[int, ...] = ()) -> Tensor:
    """Part attention (Ultra3D, arXiv 2507.17745): tokens attend the tokens of their own part.

    Args:
        layout: of :func:`part_layout` for these labels, so that no tile mixes parts. Any other layout is legal, too: then a pair of tiles
            is kept where they share a part.
        labels: whole numbers, one per video token.
        shared: parts that attend and are attended by everything (global tokens).
    """
    values = torch.as_tensor(labels).cpu().long()
    if values.shape != (layout.num_video_tokens,):
        raise ConfigError(
            f"fpsattention.patterns.part: labels has shape {tuple(values.shape)}, expected [{layout.num_video_tokens}], a part per token"
        )
    kinds, part_of = values.unique(return_inverse=True)
    t = tables(layout, torch.device("cpu"))
    first = video_offset(layout)
    video = slice(first, first + len(values))
    in_tile = torch.zeros(layout.num_tiles, len(kinds), dtype=torch.bool)
    in_tile[t.tile_of_token[video], part_of] = True
    in_block = torch.zeros(layout.num_blocks, len(kinds), dtype=torch.bool)
    in_block[t.block_of_token[video], part_of] = True
    keep = (in_tile.float() @ in_block.float().T) > 0
    everywhere = torch.isin(kinds, torch.tensor(shared, dtype=torch.long))
    keep |= in_tile[:, everywhere].any(-1, keepdim=True) | in_block[:, everywhere].any(-1)
    return keep[None, None]
