"""From a schedule to kernel arguments: which lists of blocks the samples of one forward attend, per layer.

Layers that read the schedule alike form a *group*; per token grid a group has one set of block lists per *segment* of sigma
(the stretch between two phase borders). Where all segments of a group share one kernel class (precision, granularity), the
lists are stacked and the segment of each sample picks its own by ``index_select`` on the device: the host never learns
the level. A level whose pattern reads q and k is a class of its own: its lists are made where the layer runs (``selection``).
Otherwise the host reads the segments, and every kernel class of a batch is launched once, on its samples; inside a compiled
graph, where nothing can be read, each class becomes a branch that runs where some sample wants it.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from ..layout.masks import BlockMask, Lists
from ..layout.plain import constant, plain_tensors
from ..layout.scale_groups import ScaleGroups, groups_of
from ..layout.tiles import Int3
from ..schedule import Level, Schedule
from .graph import Packed, flag, pack, pack_groups, pack_layout
from .selection import Selector, text_of
from .tokens import Grid, Rules, Tokens, TokenTables

CACHED_GRIDS = 8  # per transformer: multi-resolution training meets a handful of grids; a grid's lists are about 1 MB


@dataclass(frozen=True)
class Part:
    """One kernel launch: the samples that share a kernel class.

    Attributes:
        lists: their tables on the device; None: the model's own attention, or that of ``select``.
        select: makes the lists from q and k.
        samples: int64 indices into the batch; None: all samples.
        chosen: inside a compiled graph, bool ``[B]``: whose output this launch is. It is made for all samples then ...
        wanted: ... if any of them wants it: a bool scalar, on the CPU where the host knows.
        hadamard: rotate q and k.
        groups: what shares a scale is several tiles: how blocks are put together before the launch.
    """

    lists: Lists | Packed | None
    granularity: str = ""
    precision: str = "fp8"
    samples: Tensor | None = None
    chosen: Tensor | None = None
    wanted: Tensor | None = None
    select: Selector | None = None
    hadamard: bool = False
    groups: ScaleGroups | None = None

    @property
    def dense(self) -> bool:
        """The model's own attention."""
        return self.lists is None and self.select is None

    @property
    def keeps(self) -> bool:
        """In a graph: its lists stay for some steps."""
        return self.select is not None and self.select.fresh is not None


@dataclass(frozen=True)
class Call:
    """What one layer does in one forward: its launches, and the index that puts their outputs back into batch order.

    ``samples``: which of the forward's, where it is for some of them.
    """

    slot_of_token: Tensor  # its length is the number of tokens
    parts: tuple[Part, ...]
    order: Tensor | None = None
    text_first: bool = False  # the tokens beyond the grid come before it
    samples: tuple[int, ...] = ()


class LevelTables:
    """The block lists of a schedule for one transformer.

    Args:
        schedule: checked against the model.
        num_layers, num_heads: of the transformer.
    """

    def __init__(self, schedule: Schedule, num_layers: int, num_heads: int | None):
        self.schedule = schedule
        self.edges = schedule.edges
        self.num_heads = num_heads
        self.group_of_layer: list[int] = []
        self.group_levels: list[tuple[Level, ...]] = []  # group -> segment -> level
        self._rules: list[
            tuple[Rules | None, ...]
        ] = []  # likewise; None: no lists before the layer runs, or none at all
        for layer in range(num_layers):
            levels = tuple(level.of_layer(layer) for level in schedule.segment_levels(layer))
            rules = tuple(_rules(schedule, level, layer, num_heads) for level in levels)
            known = list(zip(self.group_levels, self._rules, strict=True))
            if (levels, rules) not in known:
                self.group_levels.append(levels)
                self._rules.append(rules)
                known.append((levels, rules))
            self.group_of_layer.append(known.index((levels, rules)))
        # Read by code that is traced, so made here.
        self._classes = [tuple(level.kernel_class for level in levels) for levels in self.group_levels]
        self._texts = [tuple(map(text_of, levels)) for levels in self.group_levels]
        self._pools = [tuple(map(_pools, levels)) for levels in self.group_levels]
        self._dynamic = [[i for i, level in enumerate(levels) if level.dynamic] for levels in self.group_levels]
        self._sizes = [{x.scales: x.scale_group for x in xs if x.scale_group} for xs in self.group_levels]
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
            alone: int,
            group: int,
            segment: int | None,
            device: torch.device,
        ) -> tuple[Tensor, ...]:
            tokens = Tokens(grid, text_len, text_position, exact, order, alone)
            layout = self.tables(tokens).on(device)
            if not self._listed(group):
                return layout.slot_of_token, layout.token_of_slot, layout.tile_of_block, layout.tile_block_offsets
            lists = self.tables(tokens).mask_on(device, group, segment, backward=True).lists(transposed=True)
            return (layout.slot_of_token, *lists)  # type: ignore[return-value]  # with the transpose

        @constant
        def order_on(
            grid: Grid,
            text_len: int,
            text_position: str,
            exact: tuple[int, ...],
            order: str,
            alone: int,
            device: torch.device,
        ) -> tuple[Tensor, ...]:
            return self.tables(Tokens(grid, text_len, text_position, exact, order, alone)).order_on(device)

        @constant
        def edges_on(device: torch.device) -> Tensor:
            return self._edges_on(self.edges, device)

        @constant  # a tuple: Dynamo keeps no second result of a function that gives a tensor
        def sizes_on(
            grid: Grid, text_len: int, text_position: str, exact: tuple[int, ...], order: str, alone: int, group: int
        ) -> tuple[Tensor, ...]:
            tables = self.tables(Tokens(grid, text_len, text_position, exact, order, alone))
            patterns = [self.group_levels[group][i].pattern for i in self._dynamic[group]]
            return tuple(tables.sizes(pattern) for pattern in patterns if pattern is not None)

        @constant
        def groups_on(
            grid: Grid,
            text_len: int,
            text_position: str,
            exact: tuple[int, ...],
            order: str,
            alone: int,
            size: Int3,
            device: torch.device,
        ) -> tuple[Tensor, ...]:
            tokens = Tokens(grid, text_len, text_position, exact, order, alone)
            return tuple(groups_of(self.tables(tokens).on(device), size))

        self._constant, self._constant_edges = tables_on, edges_on
        self._constant_order, self._constant_sizes, self._constant_groups = order_on, sizes_on, groups_on

    def __getstate__(self) -> dict[str, object]:
        names = ("_constant", "_constant_edges", "_constant_order", "_constant_sizes", "_constant_groups")
        dropped = dict.fromkeys(("_lock", *names))
        return {**self.__dict__, **dropped, "_tables": OrderedDict(), "_edge_tensors": {}}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._prepare()

    @property
    def needs_steps(self) -> bool:
        """Some level's masks outlive a step of a sampling run."""
        patterns = [level for levels in self.group_levels for level in levels if level.pattern is not None]
        return any(level.refresh > 1 or level.pattern.pattern.permutes for level in patterns)  # type: ignore[union-attr]

    @property
    def refreshed(self) -> Level | None:
        """A level whose masks stay for some steps, or None."""
        return next((level for levels in self.group_levels for level in levels if level.refresh > 1), None)

    def permuting(self) -> str | None:
        """The pattern that permutes tokens, if a level has one: frames are no tiles then."""
        names = [level.pattern for levels in self.group_levels for level in levels if level.pattern is not None]
        return next((pattern.name for pattern in names if pattern.pattern.permutes), None)

    def eager_only(self) -> str | None:
        """Why compiled layers cannot run under the schedule, or None."""
        for level in (level for levels in self.group_levels for level in levels):
            if level.precision == "paper":
                return f"level {level.name!r} has precision 'paper', which runs outside of graphs only"
            if level.refresh > 1 and self.num_heads is None:
                return (
                    f"level {level.name!r} keeps a mask for {level.refresh} steps, of layers whose heads are not known"
                )
            if level.pattern is not None and level.pattern.pattern.permutes:
                return (
                    f"level {level.name!r} permutes the tokens of every head ({level.pattern.name}), outside of graphs only (cdf_mean with "
                    "by_size is its rule on tiles, also in graphs)"
                )
        return None

    def _listed(self, group: int) -> bool:
        """Some segment of the group has lists before the layer runs."""
        return any(rules is not None for rules in self._rules[group])

    @property
    def needs_host(self) -> bool:
        """Some layer mixes kernel classes, or linears: outside of compiled graphs the host must know the level before it launches."""
        return any(self.mixed) or any(len({level.linears for level in levels}) > 1 for levels in self.group_levels)

    def all_fp8(self, segments: Tensor | Sequence[int]) -> bool:
        """Whether every attention of these samples is FP8 under a window. ``segments`` on the device: whether that holds at all levels.

        Patterns know tokens by their places in the raster.
        """

        def fp8(level: Level) -> bool:
            return level.precision == "fp8" and level.pattern is None

        if isinstance(segments, Tensor):
            return all(fp8(level) for levels in self.group_levels for level in levels)
        return all(fp8(levels[segment]) for levels in self.group_levels for segment in segments)

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

    def prepares(self, segments: Tensor | Sequence[int] | None) -> tuple[bool, ...]:
        """Of each group: whether the attention of some sample quantizes q and k that nothing else reads, so that norm and RoPE can run in
        the quantizer. ``segments`` on the device, or None: at any level. Empty: nowhere."""
        known = None if segments is None or isinstance(segments, Tensor) else set(segments)
        found = tuple(
            any(quantizes_alone(level) for i, level in enumerate(levels) if known is None or i in known)
            for levels in self.group_levels
        )
        return found if any(found) else ()

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
                    self._tables[tokens] = TokenTables(tokens, self.schedule, self._rules, self.num_heads)
                while len(self._tables) > CACHED_GRIDS:
                    self._tables.popitem(last=False)
            self._tables.move_to_end(tokens)
            return self._tables[tokens]

    def _packed(
        self, tokens: Tokens, group: int, segment: int | None, device: torch.device, backward: bool
    ) -> tuple[BlockMask, Packed]:
        tables = self.tables(tokens)
        mask = tables.mask_on(device, group, segment, backward)
        key = ("packed", device, group, segment, backward)
        return mask, tables.made.get(key, lambda: pack(mask, backward, per_sample=False))

    def _packed_groups(self, tokens: Tokens, size: Int3, device: torch.device) -> ScaleGroups:
        tables = self.tables(tokens)
        return tables.made.get(("packed groups", size, device), lambda: pack_groups(groups_of(tables.on(device), size)))

    def order_on(self, tokens: Tokens, device: torch.device) -> tuple[Tensor, Tensor]:
        """:meth:`TokenTables.order_on` of a grid; in a traced graph, constants of it."""
        if torch.compiler.is_compiling():
            to_tile, to_raster = self._constant_order(*tokens, device)
            return to_tile, to_raster
        return self.tables(tokens).order_on(device)

    def _part(self, tokens: Tokens, level: Level, device: torch.device, backward: bool) -> Part:
        """Of a level without lists: the model's own attention, or a pattern's."""
        if not level.dynamic:
            return Part(None)
        select = self._selector(tokens, level, device, backward, in_graph=False)
        return replace(self._listed_part(tokens, None, level, device), select=select)

    def _listed_part(self, tokens: Tokens, lists: Lists | None, level: Level, device: torch.device) -> Part:
        """Of lists that are known, or come later."""
        groups = None if level.scale_group is None else groups_of(self.tables(tokens).on(device), level.scale_group)
        granularity = "tile" if groups else level.granularity
        return Part(lists, granularity, level.precision, hadamard=level.hadamard, groups=groups)  # type: ignore[arg-type]  # a name

    def _selector(self, tokens: Tokens, level: Level, device: torch.device, backward: bool, in_graph: bool) -> Selector:
        tables = self.tables(tokens)

        def make() -> Selector:
            layout = tables.on(device)
            assert level.pattern is not None
            sizes = tables.sizes(level.pattern)
            plain = (layout.token_of_slot, layout.tile_of_block, layout.tile_block_offsets, sizes)
            given = pack_layout(layout, sizes) if in_graph else plain
            named = (level.name, level.scales, text_of(level), level.refresh)
            pools = _pools(level)
            if in_graph:
                return Selector(*named, given, backward, pools)
            exact = tables.exact_blocks()
            exact = exact if exact is None else exact.to(device)
            return Selector(*named, given, backward, pools, level.pattern, layout, exact)

        return tables.made.get(("selector", level, device, backward, in_graph), make)

    def traced_calls(self, tokens: Tokens, device: torch.device, segments: Tensor) -> tuple[Call, ...]:
        """:meth:`calls` while the transformer's hooks are being traced: tables are constants of the graph, nothing is read."""
        calls = []
        for group, levels in enumerate(self.group_levels):
            switched = len(levels) > 1
            slot_of_token, *tables = self._constant(*tokens, group, None if switched else 0, device)
            if self._listed(group) and switched:  # the lists are stacked: every sample takes those of its segment
                tables[3:] = [table.index_select(0, segments) for table in tables[3:]]
            lists = Lists(*tables) if self._listed(group) else None
            selectors = {}
            sizes = self._constant_sizes(*tokens, group) if self._dynamic[group] else ()
            for i, of_level in zip(self._dynamic[group], sizes, strict=True):
                given = (tables[0], tables[1], tables[2], of_level)
                named = (levels[i].name, levels[i].scales, self._texts[group][i])
                selectors[self._classes[group][i]] = Selector(*named, 1, given, True, self._pools[group][i])
            groups = {
                name: ScaleGroups(*self._constant_groups(*tokens, size, device))
                for name, size in self._sizes[group].items()
            }
            parts = _branches(self._classes[group], lists, segments, None, selectors, groups)
            calls.append(Call(slot_of_token, parts, text_first=tokens.text_position == "prefix"))
        return tuple(calls)

    def graph_calls(
        self,
        tokens: Tokens,
        device: torch.device,
        segments: Tensor | Sequence[int],
        backward: bool,
        due: Callable[[int, Selector, bool], bool | None] | None = None,
    ) -> tuple[Call, ...]:
        """:meth:`calls` for compiled layers under hooks that are not: one graph for all levels, and for all grids.

        ``due``: of a step of a run, whether a group's lists that stay for some steps, and are wanted or not, are to be made. None, or its result None: made every time.
        """
        slot_of_token = self.tables(tokens).on(device).slot_of_token
        index, known = segments, None
        if not isinstance(index, Tensor):
            known, index = tuple(segments), index_of(tuple(segments), device)
        calls = []
        for group, levels in enumerate(self.group_levels):
            packed = None
            if self._listed(group):
                switched = len(levels) > 1
                mask, packed = self._packed(tokens, group, None if switched else 0, device, backward)
                if switched:
                    packed = pack(mask.select(index), backward, per_sample=True, layout=packed)
            selectors = {}
            for i in self._dynamic[group]:
                of_class = [s for s, other in enumerate(self._classes[group]) if other == self._classes[group][i]]
                if i != of_class[0]:  # asked for once: lists that are due are not at the second time
                    continue
                select = self._selector(tokens, levels[i], device, backward, in_graph=True)
                if select.refresh > 1 and due is not None:
                    wanted = known is None or any(segment in of_class for segment in known)
                    now = due(group, select, wanted)
                    select = select if now is None else replace(select, fresh=flag(now, (group, -1 - i)))
                selectors[self._classes[group][i]] = select
            groups = {name: self._packed_groups(tokens, size, device) for name, size in self._sizes[group].items()}
            parts = _branches(self._classes[group], packed, index, known, selectors, groups, group)
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
            elif not self._listed(group):  # all are of one class: only such groups are switched on the device
                parts = (self._part(tokens, levels[0], device, backward),)
            else:
                mask = self.tables(tokens).mask_on(device, group, None if len(levels) > 1 else 0, backward)
                mask = mask.select(segments) if len(levels) > 1 else mask
                parts = (self._listed_part(tokens, mask.lists(backward), levels[0], device),)
            calls.append(Call(slot_of_token, parts, order, tokens.text_position == "prefix"))
        return tuple(calls)

    def _host_parts(
        self, tokens: Tokens, group: int, segments: Sequence[int], device: torch.device, backward: bool
    ) -> tuple[tuple[Part, ...], Tensor | None]:
        levels, tables = self.group_levels[group], self.tables(tokens)
        by_class: dict[tuple[str, ...], list[int]] = {}
        for sample, segment in enumerate(segments):
            by_class.setdefault(levels[segment].kernel_class, []).append(sample)
        parts = []
        for samples in by_class.values():
            wanted = [segments[sample] for sample in samples]
            level = levels[wanted[0]]
            if self._rules[group][wanted[0]] is None:
                part = self._part(tokens, level, device, backward)
            elif len(set(wanted)) == 1:
                mask = tables.mask_on(device, group, wanted[0], backward)
                part = self._listed_part(tokens, mask.lists(backward), level, device)
            else:
                mask = tables.mask_on(device, group, None, backward).select(index_of(tuple(wanted), device))
                part = self._listed_part(tokens, mask.lists(backward), level, device)
            parts.append(part if len(by_class) == 1 else replace(part, samples=index_of(tuple(samples), device)))
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


def quantizes_alone(level: Level) -> bool:
    """Whether q and k go to e4m3 and nothing else reads them."""
    return level.precision == "fp8" and not level.dynamic and not level.hadamard


def _pools(level: Level) -> bool:
    """Its lists are made where q and k are quantized, in the order of the tiles."""
    pools = level.pattern is not None and level.pattern.pattern.pools
    return pools and level.precision != "paper" and level.scale_group is None


def _rules(schedule: Schedule, level: Level, layer: int, num_heads: int | None) -> Rules | None:
    if level.precision == "bf16" or level.dynamic:
        return None
    return schedule.windows(level, layer, num_heads) if level.pattern is None else (level.pattern,)


def _branches(
    classes_of_segments: Sequence[tuple[str, ...]],
    lists: Lists | Packed | None,
    segments: Tensor,
    known: Sequence[int] | None,
    selectors: Mapping[tuple[str, ...], Selector],
    groups: Mapping[str, ScaleGroups],
    group: int = 0,
) -> tuple[Part, ...]:
    """A part for every kernel class of a group; ``known``: the segments, where the host knows them."""
    classes = list(dict.fromkeys(classes_of_segments))
    parts: list[Part] = []
    for kernel_class in classes:
        select = selectors.get(kernel_class)
        own = None if select is not None or kernel_class[0] == "bf16" else lists
        chosen = wanted = None
        if len(classes) > 1:
            members = [i for i, other in enumerate(classes_of_segments) if other == kernel_class]
            chosen = segments == members[0]
            for segment in members[1:]:
                chosen = chosen | (segments == segment)
            wanted = chosen.any()
            if known is not None:
                wanted = flag(any(segment in members for segment in known), (group, len(parts)))
        precision, scales, rotated = kernel_class[:3]
        of_tiles = groups.get(scales)
        granularity = "tile" if of_tiles is not None else scales
        parts.append(Part(own, granularity, precision, None, chosen, wanted, select, bool(rotated), of_tiles))
    return tuple(parts)
