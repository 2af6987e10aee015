"""What ran: layer by layer and level by level."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

RETENTION = 1.02  #: Kernel density over selected density up to which a report says nothing more.
_WHY = {"svg2": "clusters end inside of blocks, and a block is visited whole"}
_WHY_ELSE = "the own tile is visited where the rule leaves it out"


@dataclass(frozen=True)
class Row:
    """One level of one layer.

    Attributes:
        calls: samples for which the layer's attention ran at this level (a batch of 2 counts 2). Layers that a cache skips count less than
            others; recomputation under gradient checkpointing does not count. Compiled layers are taken to run in every forward.
        granularity: what shares a scale, as text: "tile", "12x16x16"; "" at bf16.
        linears: linear layers of the block that run in FP8 at this level; the others are the model's own.
        density: attended share of the (query, key) pairs, mean over the heads, weighted with the calls of each grid.
        windows: concrete windows in tiles of the last grid seen, one per distinct head setting; empty where dense or a pattern's.
        pattern: the level's pattern as JSON, or None. Where it reads q and k, ``density`` is that of the masks it made, of all forwards that
            ran eagerly (NaN: none did), and ``selected`` what its rule alone chose, text included: the kernel visits whole blocks, and the
            own tile always.
    """

    model: str
    layer: int
    level: str
    precision: str
    granularity: str
    windows: tuple[tuple[int, int, int], ...]
    density: float
    calls: int
    linears: int = 0
    pattern: dict[str, Any] | None = None
    selected: float | None = None


@dataclass
class Report:
    """Result of ``Handle.report()``: print it (``rich.print`` draws a table), or take ``to_dict()``.

    Attributes:
        rows: by model, layer and falling sigma. Levels that never ran have calls = 0.
        executions: by model and layer, runs of the attention, in samples (None: compiled, not countable).
        prepared: by model and layer, samples whose norms and RoPE of q and k ran inside of the quantizer. Compiled layers are taken to run in
            every forward.
        forwards: by model, forwards of the transformer, in samples.
        replaced: attention modules whose processor somebody else set after ``apply``, to its class: they run without the schedule.
        fallbacks: "layer: reason" to the number of calls that ran dense, or as the model's own linear layer, because something was not
            supported; 0 where that was known at ``apply``.
        nonfinite: with ``debug=True``, what was not finite: "layer: tensor" to the number of times.
        host_reads: device-to-host reads of a timestep (at most one per forward; 0 where levels switch on the device).
        grids: token grids seen, with the tile used.
    """

    rows: list[Row]
    executions: dict[str, list[int] | None] = field(default_factory=dict)
    prepared: dict[str, list[int]] = field(default_factory=dict)
    forwards: dict[str, int] = field(default_factory=dict)
    replaced: dict[str, str] = field(default_factory=dict)
    fallbacks: dict[str, int] = field(default_factory=dict)
    nonfinite: dict[str, int] = field(default_factory=dict)
    host_reads: int = 0
    grids: dict[str, str] = field(default_factory=dict)

    @property
    def density(self) -> float:
        """Mean density over all calls whose density is known; NaN before the first."""
        known = [row for row in self.rows if row.calls and not math.isnan(row.density)]
        calls = sum(row.calls for row in known)
        return sum(row.density * row.calls for row in known) / calls if calls else float("nan")

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {**asdict(self), "density": self.density if any(row.calls for row in self.rows) else None}

    def merged(self) -> list[tuple[str, Row]]:
        """Rows with equal layers put together: (text such as ``0-29``, one of the rows)."""
        merged: list[tuple[list[int], list[Row]]] = []
        for rows in _by_layer(self.rows):
            if merged and _same(merged[-1][1], rows):
                merged[-1][0].append(rows[0].layer)
            else:
                merged.append(([rows[0].layer], rows))
        return [
            (str(layers[0]) if len(layers) == 1 else f"{layers[0]}-{layers[-1]}", row)
            for layers, rows in merged
            for row in rows
        ]

    def notes(self) -> list[str]:
        """Lines below the table."""
        notes = [f"grid {grid}: {tile}" for grid, tile in self.grids.items()]
        notes += self._patterns()
        notes += [
            f"{model}: norms and RoPE of q and k ran in the quantizer, {sum(n > 0 for n in counts)} of {len(counts)} layers"
            for model, counts in self.prepared.items()
            if any(counts)
        ]
        notes += [f"ran as the model's own, {reason} ({count} calls)" for reason, count in self.fallbacks.items()]
        notes += [f"not finite: {where} ({count} times)" for where, count in self.nonfinite.items()]
        for model, counts in self.executions.items():
            if counts is None:
                notes.append(f"{model}: compiled, so every layer is taken to have run in every forward")
                continue
            total = self.forwards.get(model, 0)
            fewer = {layer: count for layer, count in enumerate(counts) if count < total}
            if fewer:
                shown = ", ".join(f"{layer}: {count}" for layer, count in list(fewer.items())[:8])
                more = f" and {len(fewer) - 8} more" if len(fewer) > 8 else ""
                notes.append(
                    f"{model}: layers that ran for less than all {total} samples (skipped by a cache?): {shown}{more}"
                )
        notes += [
            f"{name} has the processor {kind}, set after apply: it ran without the schedule"
            for name, kind in self.replaced.items()
        ]
        if self.host_reads:
            notes.append(f"the timestep was read from the device {self.host_reads} times")
        return notes

    def _patterns(self) -> list[str]:
        """Selected and kernel density of every level with a pattern that reads q and k."""
        rows: dict[str, list[Row]] = {}
        for row in self.rows:
            if row.selected is not None and row.calls:
                rows.setdefault(row.level, []).append(row)
        notes = []
        for level, of_level in rows.items():
            calls = sum(row.calls for row in of_level)
            selected = sum((row.selected or 0.0) * row.calls for row in of_level) / calls
            kernel = sum(row.density * row.calls for row in of_level) / calls
            name = (of_level[0].pattern or {}).get("name", "")
            if math.isnan(kernel):
                notes.append(f"level {level}: {name} ran compiled, where densities are not counted")
                continue
            ratio = kernel / selected if selected else float("inf")
            why = "" if ratio <= RETENTION else f": {_WHY.get(name, _WHY_ELSE)}"
            notes.append(
                f"level {level}: {name} selected {selected:.4f} of the pairs, the kernel visited {kernel:.4f} ({ratio:.3f} times){why}"
            )
        return notes

    def __str__(self) -> str:
        head = f"{'model':<14} {'layers':<8} {'level':<12} {'precision':<10} {'scales':<8} {'windows':<20} {'density':>8} {'linears':>8} {'calls':>8}"
        lines = [head]
        for layers, row in self.merged():
            lines.append(
                f"{row.model:<14} {layers:<8} {row.level:<12} {row.precision:<10} {row.granularity:<8} "
                f"{_windows(row):<20} {row.density:>8.3f} {_linears(row):>8} {row.calls:>8}"
            )
        return "\n".join([*lines, *self.notes()])

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.table import Table

        table = Table(title="fpsattention: what ran")
        for column in ("model", "layers", "level", "precision", "scales", "windows"):
            table.add_column(column)
        table.add_column("density", justify="right")
        table.add_column("linears", justify="right")
        table.add_column("calls", justify="right")
        for layers, row in self.merged():
            style = "dim" if row.calls == 0 else None
            cells = (row.model, layers, row.level, row.precision, row.granularity, _windows(row))
            table.add_row(*cells, f"{row.density:.3f}", _linears(row), str(row.calls), style=style)
        return Group(table, *self.notes())


def _windows(row: Row) -> str:
    if row.pattern is not None:
        return str(row.pattern["name"])
    if not row.windows:
        return "all"
    shown = ["x".join(map(str, window)) for window in row.windows[:3]]
    return " ".join(shown) + (" ..." if len(row.windows) > 3 else "")


def _linears(row: Row) -> str:
    return f"{row.linears} fp8" if row.linears else "own"


def _by_layer(rows: Sequence[Row]) -> list[list[Row]]:
    grouped: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        grouped.setdefault((row.model, row.layer), []).append(row)
    return list(grouped.values())


def _same(a: Sequence[Row], b: Sequence[Row]) -> bool:
    return [{**asdict(row), "layer": 0} for row in a] == [{**asdict(row), "layer": 0} for row in b]
