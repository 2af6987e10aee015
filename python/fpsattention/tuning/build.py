"""From an allocation to a schedule file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..analysis.metrics import jsonable
from ..schedule import Level, Phase, Schedule, Window
from .allocate import Allocation
from .candidates import RATIOS
from .settings import ROTATED, TuneSettings


@dataclass(frozen=True)
class Space:
    """What allocations speak of: candidate windows, the tile that they count, layers, phases; ratios of patterns, and the scales beside them."""

    windows: list[tuple[int, int, int]]
    tile: tuple[int, int, int]
    num_layers: int
    phases: int
    class_name: str
    per_head: bool
    patterns: tuple[str, ...]
    granularity: str

    @classmethod
    def of(cls, measured: Mapping[str, Any], settings: TuneSettings, num_layers: int, class_name: str) -> Space:
        """From what the state keeps."""
        found = [tuple(window) for window in measured["windows"]]
        return cls(
            found, tuple(measured["tile"]), num_layers, settings.phases, class_name, settings.per_head, settings.patterns,
            settings.granularities[0],
        )  # type: ignore[arg-type]  # fmt: skip


def build(space: Space, allocation: Allocation, provenance: Mapping[str, Any]) -> Schedule:
    """One schedule on the axis "steps": a level per phase and kind of scales, in which layers and heads have windows of their own."""
    levels: dict[str, Level] = {"dense": Level("dense", precision="bf16")}
    layers: dict[int, tuple[Phase, ...]] = {}
    heads: dict[tuple[int | None, int], dict[str, Window]] = {}
    every = space.windows[-1]
    for layer in range(space.num_layers):
        phases: list[Phase] = []
        for phase in range(space.phases):
            choice = allocation.choices[phase * space.num_layers + layer]
            name = "dense"
            if choice.kind in space.patterns:
                ratio = RATIOS[choice.options[0]]
                name = f"phase{phase}-{choice.kind}-{ratio:g}"
                pattern = {"name": choice.kind, "ratio": ratio}
                levels[name] = Level(name, granularity=space.granularity, pattern=pattern)  # type: ignore[arg-type]
            elif choice.kind is not None:
                chosen: list[Window] = [None if space.windows[w] == every else space.windows[w] for w in choice.options]
                # Heads that differ are named one by one; otherwise the level is of the layer.
                alike = len(set(chosen)) == 1
                suffix = _windows_name(chosen[0]) if alike else "heads"
                name = f"phase{phase}-{choice.kind}-{suffix}"
                granularity, window = choice.kind.removesuffix(ROTATED), chosen[0] if alike else None
                rotated = choice.kind.endswith(ROTATED)
                levels[name] = Level(name, granularity=granularity, window=window, hadamard=rotated)
                for head, window in enumerate(chosen if not alike else ()):
                    heads.setdefault((layer, head), {})[name] = window
            # Whole numbers of phases, so that the borders of all layers are the same numbers.
            high, low = (round(1.0 - i / space.phases, 12) for i in (phase, phase + 1))
            if phases and phases[-1].level == name:
                phases[-1] = Phase(phases[-1].high, low, name)
            else:
                phases.append(Phase(high, low, name))
        layers[layer] = tuple(phases)
    model = {"class": space.class_name, "num_layers": space.num_layers}
    return Schedule(
        levels=levels, phases=(Phase(1.0, 0.0, "dense"),), model=model, tile=space.tile, layers=layers, heads=heads,
        provenance=jsonable(provenance), axis="steps",
    )  # fmt: skip


def _windows_name(window: Window) -> str:
    return "all" if window is None else "x".join(map(str, window))  # type: ignore[arg-type]
