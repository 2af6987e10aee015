"""Ranges of tokens that attend everything and are attended by everything, whatever the pattern: first frames, references, audio."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch

from ..errors import ConfigError
from .plain import plain_tensors
from .tiles import BLOCK, TileLayout, shown

if TYPE_CHECKING:
    from .masks import BlockMask

Range = tuple[int, int]


def token_ranges(value: Any, num_tokens: int, what: str) -> tuple[Range, ...]:
    """``(start, stop)`` pairs of tokens, as in slices but none negative, checked.

    Raises:
        ConfigError: not such pairs, or outside of the sequence.
    """
    pairs = value if isinstance(value, (list, tuple)) else None
    if pairs is None or not all(
        isinstance(pair, (list, tuple)) and len(pair) == 2 and all(type(end) is int for end in pair) for pair in pairs
    ):
        raise ConfigError(f"fpsattention.{what}: exact {shown(value)}, expected pairs (start, stop) of tokens")
    for start, stop in pairs:
        if not 0 <= start < stop <= num_tokens:
            raise ConfigError(
                f"fpsattention.{what}: exact holds ({start}, {stop}), expected 0 <= start < stop <= {num_tokens} tokens"
            )
    return tuple((start, stop) for start, stop in pairs)


def frames(exact: Sequence[int], layout: TileLayout) -> tuple[Range, ...]:
    """The tokens of frames of the grid; negative frames count from the end."""
    t, h, w = layout.grid
    if any(not -t <= frame < t for frame in exact):
        raise ConfigError(f"fpsattention.apply: exact {tuple(exact)}, expected frames of the {t} of grid {layout.grid}")
    first = layout.text_len if layout.text_position == "prefix" else 0
    return tuple((first + frame % t * h * w, first + (frame % t + 1) * h * w) for frame in exact)


def held_blocks(layout: TileLayout, ranges: Sequence[Range], numbering: TileLayout | None = None) -> torch.Tensor:
    """The blocks that hold a token of ``ranges``, bool ``[num_blocks]`` on the CPU. ``numbering``: the same tiles with the tokens in the
    order that ranges number; None: the layout's own."""
    with plain_tensors():
        chosen = torch.zeros(layout.num_tokens, dtype=torch.bool)
        for start, stop in ranges:
            chosen[start:stop] = True
        held = ((numbering or layout).cpu().slot_of_token.long()[chosen] // BLOCK).unique()
        blocks = torch.zeros(layout.num_blocks, dtype=torch.bool)
        blocks[held] = True
        return blocks


def exact_keep(layout: TileLayout, blocks: torch.Tensor) -> torch.Tensor:
    """Every row of a tile that has one of ``blocks``, and every column of one of them: bool ``[num_tiles, num_blocks]`` on their device,
    without waiting for it."""
    tile_of_block = layout.tile_of_block.to(blocks.device).long()
    tiles = torch.zeros(layout.num_tiles, dtype=torch.int32, device=blocks.device)
    tiles = tiles.scatter_reduce(0, tile_of_block, blocks.to(torch.int32), "amax").bool()
    return blocks | tiles[:, None]


def with_exact(mask: BlockMask, ranges: Sequence[Range], numbering: TileLayout | None = None) -> BlockMask:
    """``mask`` and, for the tiles and blocks that hold a token of ``ranges``, every block and every tile. On the device of the mask,
    which waits for it unless that is the CPU. ``numbering``: as of :func:`held_blocks`."""
    from .masks import BlockMask

    layout = mask.layout
    if not ranges:
        return mask
    with plain_tensors():
        blocks = held_blocks(layout, ranges, numbering).to(mask.device)
        keep = mask.to_blocks() | exact_keep(layout, blocks)
        return BlockMask.from_keep(layout, keep, int(keep.sum(-1).max())).with_transpose()


@lru_cache(maxsize=64)
def cached_exact(layout: TileLayout, window: tuple[int, int, int], ranges: tuple[Range, ...]) -> BlockMask:
    """:func:`with_exact` of a sliding window."""
    from .masks import cached_mask

    return with_exact(cached_mask(layout, window), ranges)
