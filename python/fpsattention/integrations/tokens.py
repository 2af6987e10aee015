"""The tokens of a self-attention, and the masks of a schedule over them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import ConfigError
from ..layout.exact import frames, held_blocks, with_exact
from ..layout.masks import BlockMask, sliding_tile_mask
from ..layout.plain import Cache, plain_tensors
from ..layout.tiles import TileLayout, plan
from ..ops.selection import sizes_of
from ..patterns import BoundPattern
from ..schedule import Schedule, Window

Grid = tuple[int, int, int]
#: What the heads of a layer visit at a level: one window for all, a window each, or a pattern that depends on the layout only.
Rules = tuple[Window | BoundPattern, ...]


class Tokens(NamedTuple):
    """The sequence of a self-attention: a video grid, in "raster" or "tile" order, and text tokens after or before it."""

    grid: Grid
    text_len: int = 0
    text_position: str = "suffix"
    exact: tuple[int, ...] = ()  # frames that are dense in both directions
    order: str = "raster"
    alone: int = 0  # text tokens that are keys only, the last ones of a text after the video

    @property
    def video_tokens(self) -> int:
        """Tokens of the grid."""
        return self.grid[0] * self.grid[1] * self.grid[2]


def resolve_window(window: Window, layout: TileLayout) -> Grid:
    """A concrete window in tiles for this grid.

    None is every tile, a triple is itself (ConfigError where it exceeds the tile grid). A density ``d`` becomes the largest window of at
    most ``d`` of all tiles that is as close to a cube of tokens as possible: from one tile, the axis with the least extent in
    tokens grows by a tile, again and again, as long as the window keeps to ``d``.
    """
    tile, tiles = layout.tile, layout.tile_grid
    if window is None:
        return tiles
    if not isinstance(window, float):
        if any(w > n for w, n in zip(window, tiles, strict=True)):
            raise ConfigError(
                f"fpsattention.Schedule: window {tuple(window)} exceeds the {tiles} tiles of grid {tuple(layout.grid)}, "
                'expected at most the tile grid: use {"density": d}, which fits any grid'
            )
        return window
    budget = window * tiles[0] * tiles[1] * tiles[2] * (1 + 1e-9)  # 0.3 * 10 tiles is 3 tiles
    size = [1, 1, 1]
    while True:
        product = size[0] * size[1] * size[2]
        fits = [a for a in range(3) if size[a] < tiles[a] and product // size[a] * (size[a] + 1) <= budget]
        if not fits:
            return (size[0], size[1], size[2])
        size[min(fits, key=lambda a: (size[a] * tile[a], -a))] += 1


class TokenTables:
    """Everything that depends on the tokens: the layout, and the masks of each group and segment. Built when first wanted, once."""

    def __init__(
        self, tokens: Tokens, schedule: Schedule, rules: Sequence[Sequence[Rules | None]], num_heads: int | None
    ):
        position = tokens.text_position if tokens.text_len else "suffix"
        layout = plan(tokens.grid, tile=schedule.tile, text_len=tokens.text_len, text_position=position)
        self.layout = layout.in_tile_order() if tokens.order == "tile" else layout
        self._raster = layout
        self._exact = tokens.exact
        self._alone = tokens.alone
        self._rules = rules
        self._num_heads = num_heads
        self.made = Cache()  # by what was asked

    def order_on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Indices that take the video tokens from raster to tile order, and back."""

        def make() -> tuple[Tensor, Tensor]:
            to_tile = self._raster.to_tile_order()
            return to_tile.to(device), to_tile.argsort().to(device)

        return self.made.get(("order", device), make)

    def exact_blocks(self) -> Tensor | None:
        """Blocks that hold a token of the exact frames, bool ``[num_blocks]`` on the CPU; None: no frame is exact."""
        return held_blocks(self.layout, frames(self._exact, self._raster), self._raster) if self._exact else None

    def on(self, device: torch.device) -> TileLayout:
        """The layout on a device."""
        if device == self.layout.device:
            return self.layout
        with plain_tensors():
            return self.layout.to(device)

    def windows(self, group: int, segment: int) -> tuple[Grid, ...]:
        """Concrete windows: one for all heads, or one per head; none where a pattern says what is visited."""
        return tuple(rule for rule in self._concrete(group, segment) if not isinstance(rule, BoundPattern))

    def _concrete(self, group: int, segment: int) -> tuple[Grid | BoundPattern, ...]:
        rules = self._rules[group][segment] or (None,)
        return tuple(r if isinstance(r, BoundPattern) else resolve_window(r, self.layout) for r in rules)

    def mask(self, group: int, segment: int) -> BlockMask:
        """The block mask of one segment, on the CPU: ``Bm = 1``, ``Hm`` 1 or H. Tiles that have no queries visit nothing."""
        rules, mask = self._concrete(group, segment), self._square(group, segment)
        if not self._alone:
            return mask
        return self.made.get(("rows", rules), lambda: with_rows(mask, self.layout.num_tokens - self._alone))

    def _square(self, group: int, segment: int) -> BlockMask:
        """:meth:`mask` if every token had a query."""
        rules = self._concrete(group, segment)

        def make() -> BlockMask:
            mask = head_masks(self.layout, rules)
            if self._num_heads is not None and mask.shape[1] not in (1, self._num_heads):
                raise ConfigError(
                    f"fpsattention.Schedule: pattern {rules[0].name} makes lists of {mask.shape[1]} heads, expected 1 or "  # type: ignore[union-attr]
                    f"{self._num_heads}, as this transformer has"
                )
            return with_exact(mask, frames(self._exact, self._raster), self._raster)

        return self.made.get(("mask", rules), make)

    def stacked(self, group: int) -> BlockMask:
        """The masks of all segments as one batch, on the CPU; a segment without lists is filled with any other, and never selected."""

        def make() -> BlockMask:
            listed = [s for s, rules in enumerate(self._rules[group]) if rules is not None]
            segments = [s if s in listed else listed[0] for s in range(len(self._rules[group]))]
            return BlockMask.stack([self.mask(group, s) for s in segments])

        return self.made.get(("stacked", group), make)

    def mask_on(self, device: torch.device, group: int, segment: int | None, backward: bool) -> BlockMask:
        """A mask on the device, of one segment, or (None) of all, stacked; for a ``backward`` with its transpose."""

        def make() -> BlockMask:
            mask = self.stacked(group) if segment is None else self.mask(group, segment)
            if backward:
                mask.transpose()  # on the CPU, where it is compact; it travels with the mask
            return mask.to(device)

        return self.made.get(("mask on", device, group, segment, backward), make)

    def sizes(self, pattern: BoundPattern) -> Tensor:
        """What a graph is told of the lists of a pattern that reads q and k."""
        return sizes_of(self.layout, pattern.list_width(self.layout), self.exact_blocks())

    def density(self, group: int, segment: int) -> float:
        """Attended share of the (query, key) pairs, mean over heads, of a segment that has lists; else 1."""
        if self._rules[group][segment] is None:
            return 1.0
        return self.made.get(("density", self._concrete(group, segment)), lambda: self._square(group, segment).density)


def with_rows(mask: BlockMask, count: int) -> BlockMask:
    """``mask``, on the CPU, whose tiles without one of the first ``count`` tokens visit nothing."""
    layout = mask.layout
    with plain_tensors():
        tiles = torch.zeros(layout.num_tiles, dtype=torch.bool)
        tiles[layout.tile_of_block[held_blocks(layout, [(0, count)])].long()] = True
        return BlockMask(layout, mask.kv_num_blocks * tiles, mask.kv_indices)


def head_masks(layout: TileLayout, rules: Sequence[Grid | BoundPattern]) -> BlockMask:
    """One mask from the windows of the heads (one: of all heads), or from a static pattern."""
    per_head = [r(None, None, layout) if isinstance(r, BoundPattern) else sliding_tile_mask(layout, r) for r in rules]
    if len(per_head) == 1:
        return per_head[0]
    stacked = BlockMask.stack(per_head)  # heads of one sample are laid out as samples of one head are
    return BlockMask(layout, stacked.kv_num_blocks.transpose(0, 1), stacked.kv_indices.transpose(0, 1))
