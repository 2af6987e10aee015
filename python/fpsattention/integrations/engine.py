"""What runs a schedule for the attention layers of one transformer: block lists, sites, counters.

:class:`~.installation.Installation` puts it into a model whose code is swapped, :class:`~.hosted.Hosted` into a framework that calls
one layer after the other.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..layout.plain import plain_tensors
from ..schedule import Schedule
from .forward import Forward
from .levels import LevelTables, quantizes_alone
from .record import Recorder
from .report import Row
from .selection import Selections
from .site import Site
from .tokens import Tokens

#: Runs of each layer's core in one forward; None: compiled, so not counted, and every layer is taken to have run once.
Executed = tuple[int, ...] | None


class Engine:
    """A schedule on some attention layers.

    Attributes:
        transformer: whose layers they are; None: a framework calls them.
        recorder: of a recording that is on.
        paused: forwards run the model's own attention, uncounted (``Handle.disabled``).
        own_norms: why norms and RoPE of no layer run in the quantizer, though that was asked for.
        prepared_in_graphs: compiled layers whose norms and RoPE run in the quantizer, at levels that allow it.
        selections: what patterns made from the content.

    Args:
        name: of the transformer, for messages and reports.
        schedule: checked against the model.
        paths: names of the layers, in their order.
        heads: of all layers; None: unknown, or not the same.
        cores: name of the function that each layer calls.
        on_unsupported: ``"raise"`` or ``"dense"``.
        per_sample: layers see one sample after the other.
        text_mask: masks that layers get say which keys count.
        causal_text: layers also make a causal call, which stays their own, and have keys without queries (:class:`.adapters.Adapter`).
    """

    places = 0  # where the transformer moves its tokens to tile order and back
    tables_seen = False  # the rotary tables of its model hold what ``Preparation`` says
    own_norms = ""
    prepared_in_graphs: frozenset[int] = frozenset()

    def __init__(
        self,
        name: str,
        schedule: Schedule,
        paths: Sequence[str],
        heads: int | None,
        cores: Sequence[str],
        on_unsupported: str,
        per_sample: bool = False,
        text_mask: bool = False,
        causal_text: bool = False,
    ):
        self.name = name
        self.transformer: Any = None
        self.recorder: Recorder | None = None
        self.paused = False
        self.selections = Selections()
        self.on_unsupported = on_unsupported
        self.per_sample = per_sample
        self.text_mask = text_mask
        self.causal_text = causal_text
        self.tables = LevelTables(schedule, len(paths), heads)
        self.sites = [
            Site(self, f"{name}.{path}", layer, self.tables.group_of_layer[layer], core, on_unsupported)
            for layer, (path, core) in enumerate(zip(paths, cores, strict=True))
        ]
        self._lock = threading.Lock()
        self._clear()

    def _clear(self) -> None:
        self.nonfinite: Counter[str] = Counter()
        self.refused_linears: Counter[str] = Counter()  # that ran as the model's own, and why, to the number of times
        self._host_counts: Counter[tuple[Tokens, int, Executed]] = Counter()  # (tokens, segment, executed) -> samples
        self._device_counts: dict[tuple[Tokens, torch.device, Executed], Tensor] = {}  # int64 [segments]
        self._prepared: Counter[int] = Counter()  # layer to samples whose norm and RoPE ran in the quantizer

    def __getstate__(self) -> dict[str, Any]:
        dropped = dict.fromkeys(
            ("_lock", "nonfinite", "refused_linears", "_host_counts", "_device_counts", "_prepared")
        )
        return {**self.__dict__, **dropped}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())
        self._clear()

    def count(self, forward: Forward) -> None:
        """Add a forward that has ended."""
        if forward.tokens is None:  # no attention ran
            return
        executed = None if forward.graph_calls and forward.refused is None else tuple(forward.executed)
        with self._lock:
            self._prepared.update(forward.prepared)
            if isinstance(forward.segments, Tensor):
                self._count_on_device(forward.tokens, forward.segments, executed)
            else:
                self._host_counts.update((forward.tokens, segment, executed) for segment in forward.segments)

    def _count_on_device(self, tokens: Tokens, segments: Tensor, executed: Executed) -> None:
        key = (tokens, segments.device, executed)
        if key not in self._device_counts:
            with plain_tensors():
                zeros = torch.zeros(len(self.tables.edges) + 1, dtype=torch.int64)
                self._device_counts[key] = zeros.to(segments.device)
        self._device_counts[key].index_add_(0, segments, torch.ones_like(segments))

    def counts(self) -> Counter[tuple[Tokens, int, Executed]]:
        """Samples by (tokens, segment, executed). Reads the device's counters, so it waits for the device."""
        with self._lock:
            counts = Counter(self._host_counts)
            for (tokens, _, executed), tensor in self._device_counts.items():
                counts.update({(tokens, segment, executed): n for segment, n in enumerate(tensor.tolist()) if n})
        return counts

    def reset(self) -> None:
        """Forget all counts."""
        with self._lock:
            self._clear()
        self.selections.clear()
        for site in self.sites:
            site.fallbacks.clear()

    def rows(self) -> list[Row]:
        """Report rows of all layers; segments of one level are put together."""
        counts = self.counts()
        seen = list(dict.fromkeys(tokens for tokens, _, _ in counts))
        rows = []
        for layer, group in enumerate(self.tables.group_of_layer):
            runs: Counter[tuple[Tokens, int]] = Counter()
            for (tokens, segment, executed), n in counts.items():
                runs[tokens, segment] += n * (1 if executed is None else executed[layer])
            levels = self.tables.group_levels[group]
            for level in dict.fromkeys(reversed(levels)):  # falling sigma
                of_level = [segment for segment, other in enumerate(levels) if other == level]
                calls, attended = 0, 0.0
                for tokens in seen:
                    for segment in of_level:
                        n = runs[tokens, segment]
                        calls += n
                        attended += n * self.tables.tables(tokens).density(group, segment) if n else 0.0
                windows: tuple[tuple[int, int, int], ...] = ()
                density = 1.0 if level.precision == "bf16" else float("nan")
                selected = None
                if level.dynamic:
                    measured = self.selections.densities(layer, level.name)
                    selected, density = measured or (float("nan"), float("nan"))
                elif seen:
                    table = self.tables.tables(seen[-1])
                    density = attended / calls if calls else table.density(group, of_level[-1])
                    if level.precision != "bf16" and table.windows(group, of_level[-1]) != (table.layout.tile_grid,):
                        windows = tuple(dict.fromkeys(table.windows(group, of_level[-1])))
                granularity = level.scales if level.precision != "bf16" else ""
                linears = self.num_linears(layer) if level.linears == "fp8" else 0
                pattern = None if level.pattern is None else level.pattern.to_dict()
                what = (level.name, level.precision, granularity, windows, density, calls, linears, pattern, selected)
                rows.append(Row(self.name, layer, *what))
        return rows

    def executions(self) -> list[int] | None:
        """Runs of each layer's core, in samples; None where some ran compiled."""
        counts = self.counts()
        if any(executed is None for _, _, executed in counts):
            return None
        totals = [0] * len(self.sites)
        for (_, _, executed), n in counts.items():
            totals = [total + n * runs for total, runs in zip(totals, executed or (), strict=True)]
        return totals

    def prepared(self) -> list[int]:
        """Of each layer, samples whose norm and RoPE ran in the quantizer; compiled layers are taken to run in every forward."""
        totals = [self._prepared[layer] for layer in range(len(self.sites))]
        for (_, segment, executed), n in self.counts().items():
            for layer in self.prepared_in_graphs if executed is None else ():
                level = self.tables.group_levels[self.sites[layer].group][segment]
                totals[layer] += n * quantizes_alone(level)
        return totals

    def own_linears(self) -> Mapping[str, str]:
        """Linear layers that stay the model's own under FP8 linears, and why."""
        return {}

    def num_linears(self, layer: int) -> int:
        """FP8 linear layers of the block of an attention."""
        return 0

    def replaced(self) -> dict[str, str]:
        """Layers whose code somebody replaced since: name to what is there now."""
        return {}

    def host_reads(self) -> int:
        """Reads of a noise level from the device."""
        return 0

    def forwards(self) -> int:
        """Samples of the forwards seen."""
        return sum(self.counts().values())
