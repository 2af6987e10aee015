"""From a schedule to kernel arguments: which lists of blocks the samples of one forward attend, per layer.

Layers that read the schedule alike form a *group*; per token grid a group has one set of block lists per *segment* of sigma
(the stretch between two phase borders). Where all segments of a group share one kernel class (precision, granularity), the
lists are stacked and the segment of each sample picks its own by ``index_select`` on the device: the host never learns
the level. Otherwise the host reads the segments, and every kernel class of a batch is launched once, on its samples; inside a
compiled graph, where nothing can be read, each class becomes a branch that runs where some sample wants it.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import ConfigError
from ..layout.exact import frames, with_exact
from ..layout.masks import BlockMask, Lists, sliding_tile_mask
from ..layout.plain import constant, plain_tensors
from ..layout.tiles import TileLayout, plan
from ..schedule import Level, Schedule, Window
from .graph import Packed, flag, pack

Grid = tuple[int, int, int]
CACHED_GRIDS = 8  # per transformer: multi-resolution training meets a handful of grids; a grid's lists are about 1 MB


class Tokens(NamedTuple):
    """The sequence of a self-attention: a video grid, in "raster" or "tile" order, and text tokens after or before it."""

    grid: Grid
    text_len: int = 0
    text_position: str = "suffix"
    exact: tuple[int, ...] = ()  # frames that are dense in both directions
    order: str = "raster"

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
    """One kernel launch: the samples that share a kernel class.

    Attributes:
        lists: their tables on the device; None: the model's own attention.
        samples: int64 indices into the batch; None: all samples.
        chosen: inside a compiled graph, bool ``[B]``: whose output this launch is. It is made for all samples then ...
        wanted: ... if any of them wants it: a bool scalar, on the CPU where the host knows.
    """

    lists: Lists | Packed | None
    granularity: str = ""
    samples: Tensor | None = None
    chosen: Tensor | None = None
    wanted: Tensor | None = None


@dataclass(frozen=True)
class Call:
    """What one layer does in one forward: its launches, and the index that puts their outputs back into batch order."""

    slot_of_token: Tensor  # its length is the number of tokens
    parts: tuple[Part, ...]
    order: Tensor | None = None
    text_first: bool = False  # the tokens beyond the grid come before it


class TokenTables:
    """Everything that depends on the tokens: the layout, and the masks of each group and segment. Built when first wanted."""

    def __init__(self, tokens: Tokens, schedule: Schedule, windows: Sequence[Sequence[tuple[Window, ...] | None]]):
        position = tokens.text_position if tokens.text_len else "suffix"
        layout = plan(tokens.grid, tile=schedule.tile, text_len=tokens.text_len, text_position=position)
        self.layout = layout.in_tile_order() if tokens.order == "tile" else layout
        self._raster = layout
        self._exact = tokens.exact
        self._windows = windows  # group -> segment -> window(s) of the heads, None where the level is bf16
        self._masks: dict[tuple[Grid, ...], BlockMask] = {}
        self._stacked: dict[int, BlockMask] = {}
        self._densities: dict[tuple[Grid, ...], float] = {}
        self.on_device: dict[tuple[int, int | None, torch.device, bool], BlockMask] = {}
        self.packed: dict[tuple[int, int | None, torch.device, bool], Packed] = {}
        self._orders: dict[torch.device, tuple[Tensor, Tensor]] = {}
        self._to_tile = layout.to_tile_order()

    def order_on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Indices that take the video tokens from raster to tile order, and back."""
        if device not in self._orders:
            with plain_tensors():
                self._orders[device] = (self._to_tile.to(device), self._to_tile.argsort().to(device))
        return self._orders[device]

    def on(self, device: torch.device) -> TileLayout:
        """The layout on a device."""
        if device == self.layout.device:
            return self.layout
        with plain_tensors():
            return self.layout.to(device)

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
            self._masks[windows] = with_exact(mask, frames(self._exact, self._raster), self._raster)
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

    def __init__(self, schedule: Schedule, num_layers: int, num_heads: int | None):
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
        self.mixed = [len({level.kernel_class for level in levels}) > 1 for levels in self.group_levels]
        self._tables: OrderedDict[Tokens, TokenTables] = OrderedDict()
        self._edge_tensors: dict[tuple[tuple[float, ...], torch.device], Tensor] = {}
        self._prepare()

    def _prepare(self) -> None:
        self._lock = threading.RLock()

        # Dynamo calls such functions while it traces and keeps the result; it knows no such methods.
        @constant
        def tables_on(
            grid: Grid,
            text_len: int,
            text_position: str,
            exact: tuple[int, ...],
            order: str,
            group: int,
            segment: int | None,
            device: torch.device,
        ) -> tuple[Tensor, ...]:
            tokens = Tokens(grid, text_len, text_position, exact, order)
            dense = all(level.precision == "bf16" for level in self.group_levels[group])
            lists = () if dense else self._mask(tokens, group, segment, device, backward=True).lists(transposed=True)
            return (self.tables(tokens).on(device).slot_of_token, *lists)  # type: ignore[arg-type]  # with the transpose

        @constant
        def order_on(
            grid: Grid, text_len: int, text_position: str, exact: tuple[int, ...], order: str, device: torch.device
        ) -> tuple[Tensor, ...]:
            return self.tables(Tokens(grid, text_len, text_position, exact, order)).order_on(device)

        @constant
        def edges_on(device: torch.device) -> Tensor:
            return self._edges_on(self.edges, device)

        self._constant, self._constant_edges, self._constant_order = tables_on, edges_on, order_on

    def __getstate__(self) -> dict[str, object]:
        dropped = dict.fromkeys(("_lock", "_constant", "_constant_edges", "_constant_order"))
        return {**self.__dict__, **dropped, "_tables": OrderedDict(), "_edge_tensors": {}}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._prepare()

    @property
    def needs_host(self) -> bool:
        """Some layer mixes kernel classes, or linears: outside of compiled graphs the host must know the level before it launches."""
        return any(self.mixed) or any(len({level.linears for level in levels}) > 1 for levels in self.group_levels)

    def all_fp8(self, segments: Tensor | Sequence[int]) -> bool:
        """Whether every attention of these samples is FP8. ``segments`` on the device: whether that holds at all levels."""
        if isinstance(segments, Tensor):
            return all(level.precision == "fp8" for levels in self.group_levels for level in levels)
        return all(levels[segment].precision == "fp8" for levels in self.group_levels for segment in segments)

    def linears(self, segments: Tensor | Sequence[int], device: torch.device) -> tuple[bool | Tensor, ...]:
        """Of each group: whether all samples run FP8 linears, or none does; else bool ``[B]`` on the device. Empty: nowhere any."""
        modes: list[bool | Tensor] = []
        for levels in self.group_levels:
            fp8 = tuple(level.linears == "fp8" for level in levels)
            if len(set(fp8)) == 1:
                modes.append(fp8[0])
            elif isinstance(segments, Tensor):  # a graph that is being traced
                chosen = [segments == segment for segment, wanted in enumerate(fp8) if wanted]
                modes.append(torch.stack(chosen).any(0))
            else:
                samples = tuple(fp8[segment] for segment in segments)
                modes.append(samples[0] if len(set(samples)) == 1 else mask_of(samples, device))
        return tuple(modes) if any(mode is not False for mode in modes) else ()

    def segments_on_device(self, sigma: Tensor, edges: tuple[float, ...]) -> Tensor:
        """Segment of every sample, ``[B]`` int64, from FP64 ``sigma [B]``, without a host sync."""
        if torch.compiler.is_compiling():
            return torch.bucketize(sigma, self._constant_edges(sigma.device))
        return torch.bucketize(sigma, self._edges_on(edges, sigma.device))

    def _edges_on(self, edges: tuple[float, ...], device: torch.device) -> Tensor:
        with self._lock:
            if (edges, device) not in self._edge_tensors:
                if len(self._edge_tensors) > 64:  # one per trajectory: a server may see many
                    self._edge_tensors.clear()
                with plain_tensors():
                    self._edge_tensors[edges, device] = torch.tensor(edges, dtype=torch.float64).to(device)
            return self._edge_tensors[edges, device]

    def tables(self, tokens: Tokens) -> TokenTables:
        """Tables of a token grid, from a bounded cache."""
        with self._lock:
            if tokens not in self._tables:
                with plain_tensors():
                    self._tables[tokens] = TokenTables(tokens, self.schedule, self._windows)
                while len(self._tables) > CACHED_GRIDS:
                    self._tables.popitem(last=False)
            self._tables.move_to_end(tokens)
            return self._tables[tokens]

    def _mask(self, tokens: Tokens, group: int, segment: int | None, device: torch.device, backward: bool) -> BlockMask:
        """A mask on the device: of one segment, or (None) of all, stacked."""
        tables = self.tables(tokens)
        key = (group, segment, device, backward)
        mask = tables.on_device.get(key)
        if mask is None:
            with self._lock, plain_tensors():
                mask = tables.stacked(group) if segment is None else tables.mask(group, segment)
                if backward:
                    mask.transpose()  # on the CPU, where it is compact; it travels with the mask
                mask = tables.on_device[key] = mask.to(device)
        return mask

    def _packed(
        self, tokens: Tokens, group: int, segment: int | None, device: torch.device, backward: bool
    ) -> tuple[BlockMask, Packed]:
        mask, tables = self._mask(tokens, group, segment, device, backward), self.tables(tokens)
        key = (group, segment, device, backward)
        if key not in tables.packed:
            with self._lock, plain_tensors():
                tables.packed[key] = pack(mask, backward, per_sample=False)
        return mask, tables.packed[key]

    def order_on(self, tokens: Tokens, device: torch.device) -> tuple[Tensor, Tensor]:
        """:meth:`TokenTables.order_on` of a grid; in a traced graph, constants of it."""
        if torch.compiler.is_compiling():
            to_tile, to_raster = self._constant_order(*tokens, device)
            return to_tile, to_raster
        return self.tables(tokens).order_on(device)

    def traced_calls(self, tokens: Tokens, device: torch.device, segments: Tensor) -> tuple[Call, ...]:
        """:meth:`calls` while the transformer's hooks are being traced: tables are constants of the graph, nothing is read."""
        calls = []
        for group, levels in enumerate(self.group_levels):
            switched = len(levels) > 1
            slot_of_token, *tables = self._constant(*tokens, group, None if switched else 0, device)
            if tables and switched:  # the lists are stacked: every sample takes those of its segment
                tables[3:] = [table.index_select(0, segments) for table in tables[3:]]
            lists = Lists(*tables) if tables else None
            parts = _branches(levels, lists, segments, None)
            calls.append(Call(slot_of_token, parts, text_first=tokens.text_position == "prefix"))
        return tuple(calls)

    def graph_calls(
        self, tokens: Tokens, device: torch.device, segments: Tensor | Sequence[int], backward: bool
    ) -> tuple[Call, ...]:
        """:meth:`calls` for compiled layers under hooks that are not: one graph for all levels, and for all grids."""
        slot_of_token = self.tables(tokens).on(device).slot_of_token
        index, known = segments, None
        if not isinstance(index, Tensor):
            known, index = tuple(segments), index_of(tuple(segments), device)
        calls = []
        for group, levels in enumerate(self.group_levels):
            packed = None
            if any(level.precision == "fp8" for level in levels):
                switched = len(levels) > 1
                mask, packed = self._packed(tokens, group, None if switched else 0, device, backward)
                if switched:
                    packed = pack(mask.select(index), backward, per_sample=True, layout=packed)
            parts = _branches(levels, packed, index, known)
            calls.append(Call(slot_of_token, parts, text_first=tokens.text_position == "prefix"))
        return tuple(calls)

    def calls(
        self, tokens: Tokens, device: torch.device, segments: Tensor | Sequence[int], backward: bool
    ) -> tuple[Call, ...]:
        """The :class:`Call` of each group.

        Args:
            segments: segment of every sample, ``[B]``: on the device, or on the host where ``needs_host``.
            backward: a backward may follow; also provide the transposed lists of the masks.
        """
        slot_of_token = self.tables(tokens).on(device).slot_of_token
        calls = []
        for group, levels in enumerate(self.group_levels):
            order = None
            if not isinstance(segments, Tensor):
                parts, order = self._host_parts(tokens, group, segments, device, backward)
            elif levels[0].precision == "bf16":  # and so are all: only such groups are switched on the device
                parts = (Part(None),)
            else:
                mask = self._mask(tokens, group, None if len(levels) > 1 else 0, device, backward)
                mask = mask.select(segments) if len(levels) > 1 else mask
                parts = (Part(mask.lists(backward), levels[0].granularity),)
            calls.append(Call(slot_of_token, parts, order, tokens.text_position == "prefix"))
        return tuple(calls)

    def _host_parts(
        self, tokens: Tokens, group: int, segments: Sequence[int], device: torch.device, backward: bool
    ) -> tuple[tuple[Part, ...], Tensor | None]:
        levels = self.group_levels[group]
        by_class: dict[tuple[str, str], list[int]] = {}
        for sample, segment in enumerate(segments):
            by_class.setdefault(levels[segment].kernel_class, []).append(sample)
        parts = []
        for (precision, granularity), samples in by_class.items():
            lists = None
            if precision == "fp8":
                wanted = [segments[sample] for sample in samples]
                if len(set(wanted)) == 1:
                    mask = self._mask(tokens, group, wanted[0], device, backward)
                else:
                    mask = self._mask(tokens, group, None, device, backward).select(index_of(tuple(wanted), device))
                lists = mask.lists(backward)
            parts.append(Part(lists, granularity, None if len(by_class) == 1 else index_of(tuple(samples), device)))
        if len(parts) == 1:
            return tuple(parts), None
        flat = [sample for samples in by_class.values() for sample in samples]
        return tuple(parts), index_of(tuple(flat.index(sample) for sample in range(len(flat))), device)


@lru_cache(maxsize=1024)  # a fresh tensor would be a copy to the device, and wait for it, in every forward
def index_of(values: tuple[int, ...], device: torch.device) -> Tensor:
    """An int64 index, kept on the device."""
    with plain_tensors():
        return torch.tensor(values).to(device)


@lru_cache(maxsize=1024)
def mask_of(values: tuple[bool, ...], device: torch.device) -> Tensor:
    """A bool mask, kept on the device."""
    with plain_tensors():
        return torch.tensor(values).to(device)


def _branches(
    levels: Sequence[Level], lists: Lists | Packed | None, segments: Tensor, known: Sequence[int] | None
) -> tuple[Part, ...]:
    """A part for every kernel class of a group; ``known``: the segments, where the host knows them."""
    classes = list(dict.fromkeys(level.kernel_class for level in levels))
    if len(classes) == 1:
        return (Part(lists, classes[0][1]),)
    parts = []
    for precision, granularity in classes:
        members = [i for i, level in enumerate(levels) if level.kernel_class == (precision, granularity)]
        chosen = segments == members[0]
        for segment in members[1:]:
            chosen = chosen | (segments == segment)
        wanted = chosen.any() if known is None else flag(any(segment in members for segment in known))
        parts.append(Part(lists if precision == "fp8" else None, granularity, None, chosen, wanted))
    return tuple(parts)
