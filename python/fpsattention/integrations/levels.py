"""From a schedule to kernel arguments: which lists of blocks the samples of one forward attend, per layer.

Layers that read the schedule alike form a *group*; per token grid a group has one set of block lists per *segment* of sigma
(the stretch between two phase borders). Where all segments of a group share one kernel class (precision, granularity), the
lists are stacked and the segment of each sample picks its own by ``index_select`` on the device: the host never learns
the level. Otherwise the host must know the segments, and every kernel class of a batch is launched once, on its samples.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ..errors import ConfigError
from ..layout.masks import BlockMask, sliding_tile_mask
from ..layout.tiles import TileLayout, plan
from ..schedule import Level, Schedule, Window

Grid = tuple[int, int, int]
CACHED_GRIDS = 8  # per transformer: multi-resolution training meets a handful of grids; a grid's lists are about 1 MB


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
                'wanted at most the tile grid: use {"density": d}, which fits any grid'
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


@dataclass(frozen=True)
class Part:
    """One kernel launch: the samples (int64 indices into the batch; None: all) that share a kernel class."""

    samples: Tensor | None
    precision: str
    granularity: str
    mask: BlockMask | None  # None: the model's own attention


@dataclass(frozen=True)
class Call:
    """What one layer does in one forward. ``levels``: the level of each sample, where the host knows it."""

    grid: Grid
    num_tokens: int
    layout: TileLayout
    parts: tuple[Part, ...]
    order: Tensor | None = None  # index that puts concatenated parts back into batch order
    levels: tuple[str, ...] | None = None


class GridTables:
    """Everything that depends on the grid: the layout, and the masks of each group and segment. Built when first wanted."""

    def __init__(self, grid: Grid, schedule: Schedule, windows: Sequence[Sequence[tuple[Window, ...] | None]]):
        self.layout = plan(grid, tile=schedule.tile)
        self._windows = windows  # group -> segment -> window(s) of the heads, None where the level is bf16
        self._masks: dict[tuple[Grid, ...], BlockMask] = {}
        self._stacked: dict[int, BlockMask] = {}
        self._densities: dict[tuple[Grid, ...], float] = {}

    def windows(self, group: int, segment: int) -> tuple[Grid, ...]:
        """Concrete windows: one for all heads, or one per head."""
        windows = self._windows[group][segment]
        return tuple(resolve_window(w, self.layout) for w in (windows or (None,)))

    def mask(self, group: int, segment: int) -> BlockMask:
        """The block mask of one segment, on the CPU: ``Bm = 1``, ``Hm`` 1 or H."""
        windows = self.windows(group, segment)
        if windows not in self._masks:
            per_head = [sliding_tile_mask(self.layout, w) for w in windows]
            mask = per_head[0]
            if len(per_head) > 1:  # heads of one sample are laid out as samples of one head are
                stacked = BlockMask.stack(per_head)
                mask = BlockMask(self.layout, stacked.kv_num_blocks.transpose(0, 1), stacked.kv_indices.transpose(0, 1))
            self._masks[windows] = mask
        return self._masks[windows]

    def stacked(self, group: int) -> BlockMask:
        """The masks of all segments as one batch, on the CPU; a bf16 segment is filled with any other, and never selected."""
        if group not in self._stacked:
            fp8 = [s for s, windows in enumerate(self._windows[group]) if windows is not None]
            segments = [s if s in fp8 else fp8[0] for s in range(len(self._windows[group]))]
            self._stacked[group] = BlockMask.stack([self.mask(group, s) for s in segments])
        return self._stacked[group]

    def density(self, group: int, segment: int) -> float:
        """Attended share of the (query, key) pairs, mean over heads."""
        if self._windows[group][segment] is None:
            return 1.0
        windows = self.windows(group, segment)
        if windows not in self._densities:
            self._densities[windows] = self.mask(group, segment).density
        return self._densities[windows]


class LevelTables:
    """The block lists of a schedule for one transformer.

    Args:
        schedule: checked against the model.
        num_layers, num_heads: of the transformer.
    """

    def __init__(self, schedule: Schedule, num_layers: int, num_heads: int):
        self.schedule = schedule
        self.edges = schedule.edges
        self.group_of_layer: list[int] = []
        self.group_levels: list[tuple[Level, ...]] = []  # group -> segment -> level
        self._windows: list[tuple[tuple[Window, ...] | None, ...]] = []  # likewise; None: bf16
        for layer in range(num_layers):
            levels = schedule.segment_levels(layer)
            windows = tuple(
                schedule.windows(level, layer, num_heads) if level.precision == "fp8" else None for level in levels
            )
            known = list(zip(self.group_levels, self._windows, strict=True))
            if (levels, windows) not in known:
                self.group_levels.append(levels)
                self._windows.append(windows)
                known.append((levels, windows))
            self.group_of_layer.append(known.index((levels, windows)))
        self.host_switched = [len({level.kernel_class for level in levels}) > 1 for levels in self.group_levels]
        self._grids: OrderedDict[Grid, GridTables] = OrderedDict()
        self._edge_tensors: dict[torch.device, Tensor] = {}

    @property
    def needs_host(self) -> bool:
        """Some layer mixes kernel classes: the host must know the level before it launches."""
        return any(self.host_switched)

    def segments_on_device(self, sigma: Tensor) -> Tensor:
        """Segment of every sample, ``[B]`` int64, from FP64 ``sigma [B]``, without a host sync."""
        edges = self._edge_tensors.get(sigma.device)
        if edges is None:
            edges = torch.tensor(self.edges, dtype=torch.float64).to(sigma.device)
            self._edge_tensors[sigma.device] = edges
        return torch.bucketize(sigma, edges)

    def tables(self, grid: Grid) -> GridTables:
        """Tables of a grid, from a bounded cache."""
        if grid not in self._grids:
            self._grids[grid] = GridTables(grid, self.schedule, self._windows)
            while len(self._grids) > CACHED_GRIDS:
                self._grids.popitem(last=False)
        self._grids.move_to_end(grid)
        return self._grids[grid]

    def calls(self, grid: Grid, device: torch.device, segments: Tensor | Sequence[int], backward: bool) -> list[Call]:
        """The :class:`Call` of each group.

        Args:
            segments: segment of every sample, ``[B]``: a device tensor (allowed unless ``needs_host``) or, on the host, a sequence.
            backward: also provide the transposed lists of the masks.
        """
        tables = self.tables(grid)
        layout = tables.layout.to(device)
        calls = []
        for group, levels in enumerate(self.group_levels):
            order = names = None
            if not isinstance(segments, Tensor):
                names = tuple(levels[segment].name for segment in segments)
                parts, order = self._host_parts(tables, group, segments, device, backward)
            elif levels[0].precision == "bf16":  # and so are all: only such groups are switched on the device
                parts = (Part(None, "bf16", "", None),)
            else:
                mask = _on(tables.stacked(group) if len(levels) > 1 else tables.mask(group, 0), device, backward)
                mask = mask.select(segments) if len(levels) > 1 else mask
                parts = (Part(None, "fp8", levels[0].granularity, mask),)
            calls.append(Call(grid, layout.num_tokens, layout, parts, order, names))
        return calls

    def _host_parts(
        self, tables: GridTables, group: int, segments: Sequence[int], device: torch.device, backward: bool
    ) -> tuple[tuple[Part, ...], Tensor | None]:
        levels = self.group_levels[group]
        by_class: dict[tuple[str, str], list[int]] = {}
        for sample, segment in enumerate(segments):
            by_class.setdefault(levels[segment].kernel_class, []).append(sample)
        parts = []
        for (precision, granularity), samples in by_class.items():
            mask = None
            if precision == "fp8":
                wanted = [segments[sample] for sample in samples]
                if len(set(wanted)) == 1:
                    mask = _on(tables.mask(group, wanted[0]), device, backward)
                else:
                    mask = _on(tables.stacked(group), device, backward).select(_index(tuple(wanted), device))
            index = None if len(by_class) == 1 else _index(tuple(samples), device)
            parts.append(Part(index, precision, granularity, mask))
        if len(parts) == 1:
            return tuple(parts), None
        flat = [sample for samples in by_class.values() for sample in samples]
        return tuple(parts), _index(tuple(flat.index(sample) for sample in range(len(flat))), device)


@lru_cache(maxsize=1024)  # a fresh tensor would be a copy to the device, and wait for it, in every forward
def _index(values: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, device=device)


def _on(mask: BlockMask, device: torch.device, backward: bool) -> BlockMask:
    if backward:
        mask.transpose()  # on the CPU, where it is compact; it travels with the mask
    return mask.to(device)
