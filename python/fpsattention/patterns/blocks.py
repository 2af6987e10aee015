"""What content-dependent patterns are built from: pooled queries and keys, scores of (query tile, KV block) pairs, selections.

Every function works on the device of its input with shapes that depend on the layout only: nothing waits for the device, so a
pattern can be compiled in one graph and captured. Words: ``docs/layout.md``; a pattern's rows are query tiles, its columns KV blocks.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import ConfigError
from ..layout.masks import BlockMask, trusted_mask
from ..layout.plain import constant
from ..layout.tiles import _CLEAR_WITH_PLANS, BLOCK, TileLayout

_TABLE_CACHE_SIZE = 64


class Tables(NamedTuple):
    """What patterns need to know of a layout, on its device (n tiles, NB blocks, of which ``num_text_blocks`` are text's)."""

    own: Tensor  # bool [n, NB]: block j belongs to tile i
    text_rows: Tensor  # bool [n, 1]
    text_columns: Tensor  # bool [NB]
    source: Tensor  # int64 [NB, 128]: token of a slot; padding repeats slot 0 of its block
    valid: Tensor  # bool [NB, 128]
    block_tokens: Tensor  # f32 [NB]
    block_sizes: Tensor  # the same, int32
    blocks_of_tile: (
        Tensor  # int64 [n, m]: blocks of a tile, m = max_blocks(layout); entries beyond its own repeat its first
    )
    tokens_of_tile: Tensor  # f32 [n, m]: valid tokens of those blocks, 0 beyond its own
    block_of_token: Tensor  # int64 [S]
    tile_of_token: Tensor  # int64 [S]


def num_text_blocks(layout: TileLayout) -> int:
    """Blocks of the text tiles, the last ones: tiles of text are 512 tokens, whole blocks, but the last."""
    return -(-layout.text_len // BLOCK)


def num_video_blocks(layout: TileLayout) -> int:
    """Blocks of the video tiles, the first ones."""
    return layout.num_blocks - num_text_blocks(layout)


def max_blocks(layout: TileLayout) -> int:
    """Blocks of the largest tile."""
    return max(-(-math.prod(layout.tile) // BLOCK), min(4, num_text_blocks(layout)))


@constant
def tables(layout: TileLayout, device: torch.device) -> Tables:
    """The :class:`Tables` of a layout on a device, computed once and kept; constants of a compiled graph."""
    return _tables(layout.to(device))


@lru_cache(maxsize=_TABLE_CACHE_SIZE)
def _tables(layout: TileLayout) -> Tables:
    device = layout.device
    tile_of_block = layout.tile_of_block.long()
    rows = torch.arange(layout.num_tiles, device=device).unsqueeze(-1)
    slots = layout.token_of_slot.long().view(-1, BLOCK)
    valid = slots >= 0
    block_tokens = valid.sum(-1, dtype=torch.float32)
    first, end = layout.tile_block_offsets.long()[:-1, None], layout.tile_block_offsets.long()[1:, None]
    blocks = first + torch.arange(max_blocks(layout), device=device)
    blocks_of_tile = torch.where(blocks < end, blocks, first)
    block_of_token = layout.slot_of_token.long() // BLOCK
    return Tables(
        own=tile_of_block == rows,
        text_rows=rows >= layout.num_video_tiles,
        text_columns=torch.arange(layout.num_blocks, device=device) >= num_video_blocks(layout),
        source=torch.where(valid, slots, slots[:, :1]),
        valid=valid,
        block_tokens=block_tokens,
        block_sizes=block_tokens.int(),
        blocks_of_tile=blocks_of_tile,
        tokens_of_tile=torch.where(blocks < end, block_tokens[blocks_of_tile], 0.0),
        block_of_token=block_of_token,
        tile_of_token=tile_of_block[block_of_token],
    )


_CLEAR_WITH_PLANS.append(_tables.cache_clear)


# Arguments ---------------------------------------------------------------------------------------------------------------


def check_tensors(name: str, layout: TileLayout, *, grouped: bool = False, **tensors: Tensor) -> None:
    """``(B, H, S, D)`` floating point tensors of one shape and device, S the tokens of the layout; or ConfigError. ``grouped``: those after the
    first may have fewer heads, a divisor of its."""
    shape = device = None
    for label, x in tensors.items():
        if not isinstance(x, Tensor) or not x.is_floating_point():
            came = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise ConfigError(f"fpsattention.patterns.{name}: {label} is {came}, expected a floating point tensor")
        if x.ndim != 4 or x.shape[2] != layout.num_tokens or 0 in x.shape:
            raise ConfigError(
                f"fpsattention.patterns.{name}: {label} has shape {tuple(x.shape)}, expected (B, H, S, D) with S = "
                f"{layout.num_tokens}, the tokens of the layout: transpose (B, S, H, D) tensors"
            )
        shape, device = (x.shape, x.device) if shape is None else (shape, device)
        heads = x.shape[1] if grouped and shape[1] % x.shape[1] == 0 else shape[1]
        if x.shape != (shape[0], heads, *shape[2:]) or x.device != device:
            raise ConfigError(
                f"fpsattention.patterns.{name}: {label} has shape {tuple(x.shape)} on {x.device}, expected {tuple(shape)} on {device}"
            )


def check_number(name: str, label: str, value: Any, low: float, high: float) -> None:
    """A number in [low, high], or ConfigError."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise ConfigError(f"fpsattention.patterns.{name}: {label} {value!r}, expected a number in [{low}, {high}]")


def check_count(name: str, label: str, value: Any, low: int = 1, high: int | None = None) -> None:
    """A whole number >= low (<= high), or ConfigError."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        wanted = f"at least {low}" if high is None else f"{low} to {high}"
        raise ConfigError(f"fpsattention.patterns.{name}: {label} {value!r}, expected a whole number, {wanted}")


# Pooling and scores ------------------------------------------------------------------------------------------------------


def gather_blocks(x: Tensor, layout: TileLayout) -> Tensor:
    """``(B, H, S, D)`` in slot order, ``[B, H, NB, 128, D]``, zeros in padding."""
    t = tables(layout, x.device)
    slots = x.index_select(2, t.source.flatten()).unflatten(2, (-1, BLOCK))
    return torch.where(t.valid.unsqueeze(-1), slots, 0)


def pool_blocks(x: Tensor, layout: TileLayout) -> Tensor:
    """Mean over the valid tokens of every block: ``(B, H, S, D)`` to f32 ``[B, H, NB, D]``."""
    t = tables(layout, x.device)
    slots = x.index_select(2, t.source.flatten()).unflatten(2, (-1, BLOCK))
    count = t.block_tokens.unsqueeze(-1)
    # Padding repeats slot 0: what it added to the sum goes again, which saves a pass over all tokens.
    return (slots.sum(-2, dtype=torch.float32) - (BLOCK - count) * slots[..., 0, :].float()) / count


def tile_means(blocks: Tensor, layout: TileLayout) -> Tensor:
    """Means over tiles from means over their blocks: ``[B, H, NB, D]`` to ``[B, H, n, D]``."""
    if layout.num_tiles == layout.num_blocks:
        return blocks
    t = tables(layout, blocks.device)
    weights = t.tokens_of_tile / t.tokens_of_tile.sum(-1, keepdim=True)
    return (blocks[:, :, t.blocks_of_tile] * weights.unsqueeze(-1)).sum(-2)


def pool_tiles(x: Tensor, layout: TileLayout) -> Tensor:
    """Mean over the tokens of every tile: ``(B, H, S, D)`` to f32 ``[B, H, n, D]``."""
    return tile_means(pool_blocks(x, layout), layout)


def scores(q: Tensor, k: Tensor, layout: TileLayout, scale: float | None = None) -> Tensor:
    """``s_ij = scale * mean(q of tile i) . mean(k of block j)``, f32 ``[B, H, n, NB]``; text columns are -inf (always kept).

    Smoothing K beforehand would add a constant to every row: no selection within a row sees it.
    """
    return scores_of_means(pool_blocks(q, layout), pool_blocks(k, layout), layout, scale)


def scores_of_means(q_means: Tensor, k_means: Tensor, layout: TileLayout, scale: float | None = None) -> Tensor:
    """:func:`scores` from means over blocks, f32 ``[B, H, NB, D]``."""
    products = tile_means(q_means, layout) @ k_means.transpose(-1, -2)
    scaled = products * (q_means.shape[-1] ** -0.5 if scale is None else scale)
    return scaled.masked_fill(tables(layout, q_means.device).text_columns, -math.inf)


def of_query_heads(x: Tensor, heads: int) -> Tensor:
    """``[B, Hk, ...]`` of K or V for every query head: ``[B, H, ...]``."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def means_of_sums(sums: Tensor, layout: TileLayout) -> Tensor:
    """Means over blocks from the sums that the quantizer leaves behind (``block_sums=True``), f32 ``[B, H, NB, D]``."""
    return sums / tables(layout, sums.device).block_tokens.unsqueeze(-1)


# Selections --------------------------------------------------------------------------------------------------------------


def top_k(values: Tensor, k: int, first: Tensor | None = None) -> Tensor:
    """The k largest of every row, bool ``[..., n]``; columns of ``first`` (broadcast) come before all others."""
    if first is not None:
        values = values.masked_fill(first, math.inf)
    return torch.zeros_like(values, dtype=torch.bool).scatter(-1, values.topk(k, dim=-1).indices, True)


def ranked(weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weights of every row in falling order, their running sum, and their columns."""
    values, columns = weights.sort(dim=-1, descending=True, stable=True)
    return values, values.cumsum(-1), columns


def unranked(keep: Tensor, columns: Tensor) -> Tensor:
    """A choice made in the order of :func:`ranked`, back in the order of the columns."""
    return torch.zeros_like(keep).scatter(-1, columns, keep)


def top_p(weights: Tensor, mass: float | Tensor, at_least: int = 0, at_most: int | None = None) -> Tensor:
    """The largest entries of every row while the mass *before* an entry is below ``mass``: the smallest set that reaches it.

    ``at_least`` and ``at_most`` bound the number of entries.
    """
    values, sums, columns = ranked(weights)
    rank = torch.arange(weights.shape[-1], device=weights.device)
    keep = ((sums - values) < mass) | (rank < at_least)
    if at_most is not None:
        keep = keep & (rank < at_most)
    return unranked(keep, columns)


class Scored(NamedTuple):
    """A selection by the values of each row alone, as ``torch.ops.fpsattn.select_blocks`` makes it (``ops/blocks.py``)."""

    values: Tensor  # f32 [B, H, n, NB]
    keep: int = -1  # so many; below 0: by mass
    mass: float = 0.0
    min_count: int = 0
    own_first: bool = False


def select(layout: TileLayout, scored: Scored, video_width: int | None = None) -> tuple[BlockMask, Tensor]:
    """The mask of a selection, and its densities f64 ``[2]`` (selected, kernel): one kernel on a GPU, nothing waits."""
    from ..ops import core  # noqa: F401  registers the op

    values = scored.values
    layout, t = layout.to(values.device), tables(layout, values.device)
    counts, indices, attended = torch.ops.fpsattn.select_blocks(
        values.contiguous(), layout.tile_block_offsets, t.block_sizes, num_video_tiles=layout.num_video_tiles,
        count=scored.keep, mass=scored.mass, min_count=scored.min_count, max_count=layout.num_blocks,
        own_first=scored.own_first, width=list_width(layout, video_width),
    )  # fmt: skip
    pairs = (attended.double() * layout.tile_tokens.double().unsqueeze(-1)).sum(-2).mean((0, 1))
    return trusted_mask(layout, counts, indices), pairs / layout.num_tokens**2


def always_kept(layout: TileLayout, device: torch.device) -> Tensor:
    """Own tile, text columns, text rows: bool ``[n, NB]``. Every pattern adds them to what it selects."""
    t = tables(layout, device)
    return t.own | t.text_columns | t.text_rows


def list_width(layout: TileLayout, video_width: int | None) -> int:
    """Width of the lists of :func:`to_mask`."""
    if video_width is None or layout.text_len:
        return layout.num_blocks
    return min(max(video_width, max_blocks(layout)), layout.num_blocks)


def to_mask(layout: TileLayout, keep: Tensor, video_width: int | None = None) -> BlockMask:
    """The :class:`BlockMask` of a selection and of what is always kept.

    Args:
        keep: bool ``[Bm, Hm, n, NB]``.
        video_width: most video blocks that a row can keep, own tile included, if known: the width of the lists. With text there is no
            use for it, as rows of text attend everything.
    """
    return BlockMask.from_keep(layout, keep | always_kept(layout, keep.device), list_width(layout, video_width))
