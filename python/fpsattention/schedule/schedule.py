"""Schedules: which attention runs at which noise level, in which layer and head.

A schedule maps sigma (timestep / num_train_timesteps, 1 = pure noise, 0 = clean) to a named *level*: a precision, a scale
granularity and a window. Sigma, and not the step index, is what training, few-step models and classifier-free guidance
have in common. ``docs/schedule.md`` describes the file format and the presets.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .level import LINEARS, Level, Window, fault, window_to_json

FORMAT = "fpsattn-schedule/3"
#: Read. Version 2 added the axis "steps", version 3 levels with a pattern.
FORMATS = ("fpsattn-schedule/1", "fpsattn-schedule/2", FORMAT)
AXES = ("sigma", "steps")
DEFAULT_FLOW_SHIFT = 5.0  # Wan at 720p
OWN_LINEARS = (0, -1)  # the layers nearest to the latents, whose activations have the widest range


@dataclass(frozen=True)
class Phase:
    """Positions in ``(low, high]`` run at ``level``; the last phase includes 0.

    On the axis "sigma" a position is a sigma. On "steps" it is the fraction of the denoising steps that remain: 1 at the first step.
    """

    high: float
    low: float
    level: str


@dataclass(frozen=True)
class Schedule:
    """A validated schedule. Build one with ``preset``, ``load``, ``from_dict`` or ``from_steps``.

    Attributes:
        levels: name to :class:`Level`.
        phases: cover the axis from 1.0 down to 0.0 without gaps or overlaps, highest first.
        own_linears: layers whose linear layers are the model's own at every level; -1 is the last. By default the first and the last.
        axis: "sigma", or "steps": phases are fractions of the denoising steps, and their sigmas follow the scheduler that
            takes these steps. Where there is none (training), ``model["flow_shift"]`` says how sigma falls, by default 5.
        model: what the schedule was made for: any of ``class``, ``num_layers``, ``num_heads``, ``flow_shift``.
        tile: explicit tile ``(t, h, w)`` in tokens, or None: the planner picks one per grid.
        layers: layer index to phases of its own.
        heads: ``(layer or None for all, head)`` to a window, or to a mapping from level name to a window.
        required: the weights were trained with this schedule and are meant to run with it only.
        provenance: free-form; who or what made the schedule.
    """

    levels: Mapping[str, Level]
    phases: tuple[Phase, ...]
    model: Mapping[str, Any] = field(default_factory=dict)
    tile: tuple[int, int, int] | None = None
    layers: Mapping[int, tuple[Phase, ...]] = field(default_factory=dict)
    heads: Mapping[tuple[int | None, int], Window | Mapping[str, Window]] = field(default_factory=dict)
    required: bool = False
    provenance: Mapping[str, Any] = field(default_factory=dict)
    axis: str = "sigma"
    own_linears: tuple[int, ...] = OWN_LINEARS

    def __post_init__(self) -> None:
        if self.axis not in AXES:
            raise fault("axis", f"is {self.axis!r}", "'sigma' or 'steps'")
        if not self.levels:
            raise fault("levels", "is empty", "at least one level")
        for name, level in self.levels.items():
            _check_scale_group(level.scale_group, self.tile, f'levels["{name}"].granularity')
        _check_phases(self.phases, self.levels, "phases", self.axis)
        for layer, phases in self.layers.items():
            _check_phases(phases, self.levels, f'layers["{layer}"]', self.axis)
        for (of_layer, head), windows in self.heads.items():
            path = f'heads["{"*" if of_layer is None else of_layer}"]["{head}"]'
            for name in windows if isinstance(windows, Mapping) else ():
                _check_level_name(name, self.levels, f'{path}["{name}"]')
            named = windows if isinstance(windows, Mapping) else self.levels
            for name in (name for name in named if self.levels[name].pattern is not None):
                raise fault(
                    path, f"is a window for level {name!r}, which has a pattern", "windows for levels with windows"
                )
        self.check_model(num_layers=self.model.get("num_layers"), num_heads=self.model.get("num_heads"))

    # Reading a schedule --------------------------------------------------------------------------------------------------

    @property
    def _borders(self) -> tuple[float, ...]:
        """Inner phase borders of all layers, ascending, on the axis of the schedule."""
        tables = (self.phases, *self.layers.values())
        return tuple(sorted({phase.low for phases in tables for phase in phases} - {0.0}))

    @property
    def edges(self) -> tuple[float, ...]:
        """Inner phase borders of all layers as sigmas, ascending: they cut (0, 1] into ``len(edges) + 1`` segments."""
        return self._borders if self.axis == "sigma" else tuple(self._sigma_at(u) for u in self._borders)

    @property
    def flow_shift(self) -> float:
        """``model["flow_shift"]``, by default 5: of flow matching's shifted line ``sigma = s u / (1 + (s - 1) u)``."""
        return float(self.model.get("flow_shift", DEFAULT_FLOW_SHIFT))

    def with_flow_shift(self, flow_shift: float) -> Schedule:
        """On the axis "steps", the schedule with its phases where ``flow_shift`` puts them; other schedules are as they are."""
        if self.axis == "sigma":
            return self
        return dataclasses.replace(self, model={**self.model, "flow_shift": flow_shift})

    def in_sigma(self) -> Schedule:
        """The same on the axis "sigma": with the phases where ``flow_shift`` puts them."""
        if self.axis == "sigma":
            return self

        def placed(phases: tuple[Phase, ...]) -> tuple[Phase, ...]:
            return tuple(Phase(self._sigma_at(p.high), self._sigma_at(p.low), p.level) for p in phases)

        layers = {layer: placed(phases) for layer, phases in self.layers.items()}
        return dataclasses.replace(self, axis="sigma", phases=placed(self.phases), layers=layers)

    def _sigma_at(self, u: float) -> float:
        """Sigma where the fraction ``u`` of the steps remains: ``s u / (1 + (s - 1) u)``."""
        return self.flow_shift * u / (1.0 + (self.flow_shift - 1.0) * u)

    def edges_of(self, sigmas: Sequence[float]) -> tuple[float, ...]:
        """``edges`` for a scheduler that visits ``sigmas``, noisiest first.

        On the axis "steps" a border after the fraction p of n steps lies midway between the sigmas of the steps before and after
        ``round(p n)``, so that the phases get their shares of the steps whatever the curve is.
        """
        if self.axis == "sigma":
            return self._borders
        n, edges = len(sigmas), []
        for u in self._borders:
            k = math.floor((1.0 - u) * n + 0.5)  # steps before the border
            edges.append(1.0 if k == 0 else -1.0 if k == n else (sigmas[k - 1] + sigmas[k]) / 2)
        return tuple(edges)

    def segment(self, sigma: float, edges: Sequence[float] | None = None) -> int:
        """Index of the segment (0 = lowest sigmas) that holds ``sigma``: the number of ``edges`` below it."""
        if not 0.0 <= sigma <= 1.0:  # also NaN
            raise ConfigError(
                f"fpsattention.Schedule: sigma {sigma}, expected a number in [0, 1]: timestep / num_train_timesteps"
            )
        return sum(edge < sigma for edge in (self.edges if edges is None else edges))

    def segment_levels(self, layer: int | None = None) -> tuple[Level, ...]:
        """The level of every segment, lowest sigmas first, in ``layer`` (None: a layer without an override)."""
        phases = self.layers.get(layer, self.phases) if layer is not None else self.phases
        uppers = (*self._borders, 1.0)
        return tuple(next(self.levels[p.level] for p in phases if p.low < upper <= p.high) for upper in uppers)

    def at(self, sigma: float, layer: int | None = None) -> Level:
        """The level at ``sigma`` in [0, 1]. A border belongs to the phase below it: ``(low, high]``."""
        return self.segment_levels(layer)[self.segment(sigma)]

    def with_linears(self, precision: str) -> Schedule:
        """The schedule with the linear layers of all its levels of precision "fp8" in ``precision``, "fp8" or "bf16"."""
        if precision not in LINEARS:
            raise ConfigError(f"fpsattention.Schedule: linears {precision!r}, expected one of {', '.join(LINEARS)}")
        if not any(level.precision == "fp8" for level in self.levels.values()):
            came = " and ".join(sorted({repr(level.precision) for level in self.levels.values()}))
            raise ConfigError(
                f"fpsattention.Schedule: linears {precision!r} for levels of precision {came} only, expected an 'fp8' level: write "
                '"linears" into a level to have it with other attention'
            )
        levels = {
            name: dataclasses.replace(level, linears=precision) if level.precision == "fp8" else level
            for name, level in self.levels.items()
        }
        return dataclasses.replace(self, levels=levels)

    def windows(self, level: Level, layer: int | None = None, num_heads: int | None = None) -> tuple[Window, ...]:
        """Windows of ``level`` in ``layer``: one for all heads, or ``num_heads`` of them where heads have their own."""
        special: dict[int, Window] = {}
        for (at_layer, head), windows in sorted(self.heads.items(), key=lambda item: item[0][0] is not None):
            if at_layer is None or at_layer == layer:  # an entry for the layer itself comes after, and wins over, "*"
                if not isinstance(windows, Mapping):
                    special[head] = windows
                elif level.name in windows:
                    special[head] = windows[level.name]
        if level.precision == "bf16" or level.pattern is not None or not special:
            return (level.window,)
        if num_heads is None:
            raise ConfigError(
                "fpsattention.Schedule.windows: num_heads is None, expected a count: this schedule has windows per head"
            )
        return tuple(special.get(head, level.window) for head in range(num_heads))

    def check_model(
        self, class_name: str | None = None, num_layers: int | None = None, num_heads: int | None = None
    ) -> None:
        """Raise ConfigError, naming the JSON path, where the schedule was not made for such a model (None: unknown)."""
        for key, value in (("class", class_name), ("num_layers", num_layers), ("num_heads", num_heads)):
            wanted = self.model.get(key)
            if value is not None and wanted is not None and value != wanted:
                raise fault(f"model.{key}", f"is {wanted!r}", f"{value!r}, as in this transformer")
        layer_paths = [(layer, f'layers["{layer}"]') for layer in self.layers]
        layer_paths += [(layer, f'heads["{layer}"]') for layer, _ in self.heads if layer is not None]
        for layer, path in layer_paths:
            if num_layers is not None and layer >= num_layers:
                raise fault(path, f"names layer {layer}", f"a layer below num_layers = {num_layers}")
        for of_layer, head in self.heads:
            if num_heads is not None and head >= num_heads:
                path = f'heads["{"*" if of_layer is None else of_layer}"]["{head}"]'
                raise fault(path, f"names head {head}", f"a head below num_heads = {num_heads}")

    # Files ---------------------------------------------------------------------------------------------------------------

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Schedule:
        """Parse and validate the JSON object of a schedule file; errors name the JSON path."""
        from .serialization import parse

        return parse(data)

    def to_dict(self) -> dict[str, Any]:
        """The JSON object; ``from_dict`` of it equals this schedule."""
        data: dict[str, Any] = {"format": FORMAT, "axis": self.axis}
        if self.model:
            data["model"] = copy.deepcopy(dict(self.model))
        data["tile"] = None if self.tile is None else list(self.tile)
        data["levels"] = {name: level.to_dict() for name, level in self.levels.items()}
        data["phases"] = [_phase_to_json(phase, self.axis) for phase in self.phases]
        data["layers"] = {
            str(layer): [_phase_to_json(p, self.axis) for p in phases] for layer, phases in self.layers.items()
        }
        heads: dict[str, dict[str, Any]] = {}
        for (layer, head), windows in self.heads.items():
            entry = (
                {n: window_to_json(w) for n, w in windows.items()}
                if isinstance(windows, Mapping)
                else window_to_json(windows)
            )
            heads.setdefault("*" if layer is None else str(layer), {})[str(head)] = entry
        data["heads"] = heads
        if self.own_linears != OWN_LINEARS:
            data["own_linears"] = list(self.own_linears)
        data["required"] = self.required
        data["provenance"] = copy.deepcopy(dict(self.provenance))
        return data

    @classmethod
    def load(cls, path: str | Path) -> Schedule:
        """Read a schedule file."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ConfigError(
                f"fpsattention.Schedule.load: {path} is not JSON ({error}), expected an {FORMAT} object"
            ) from error
        except OSError as error:
            raise ConfigError(
                f"fpsattention.Schedule.load: {path} cannot be read ({error.strerror}), expected a schedule file"
            ) from error
        return cls.from_dict(data)

    def save(self, path: str | Path) -> None:
        """Write the schedule file, and the folder it is in where there is none; ``load`` of it equals this schedule."""
        path = Path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError(
                f"fpsattention.Schedule.save: {path} cannot be written ({error.strerror}), expected the path of a new or old file"
            ) from error

    # Presets and step lists ----------------------------------------------------------------------------------------------

    @classmethod
    def preset(cls, name: str, flow_shift: float | None = None) -> Schedule:
        """``"paper"``, ``"training_free"``, ``"fp8"`` or ``"dense"`` (docs/schedule.md says when to use which).

        The borders of presets are fractions of the denoising steps: applied to a pipeline, they follow its scheduler. ``flow_shift``
        says where these fractions lie in sigma without one (None: 5.0, Wan at 720p; 3.0: Wan at 480p).
        """
        from .presets import preset

        return preset(name, flow_shift)

    @classmethod
    def resolve(cls, schedule: Schedule | str | Path | Mapping[str, Any]) -> Schedule:
        """A schedule from any way to name one: itself, a preset's name, a file's path, a JSON object."""
        from .presets import PRESETS

        if isinstance(schedule, Schedule):
            return schedule
        if isinstance(schedule, Mapping):
            return cls.from_dict(schedule)
        if isinstance(schedule, str) and schedule in PRESETS:
            return cls.preset(schedule)
        if isinstance(schedule, (str, Path)) and Path(schedule).is_file():
            return cls.load(schedule)
        raise ConfigError(
            f"fpsattention.Schedule: {schedule!r}, expected a Schedule, a preset ({', '.join(PRESETS)}), a file or a JSON object"
        )

    @classmethod
    def from_steps(
        cls, steps: Sequence[str | Level], scheduler: Any, levels: Mapping[str, Level] | None = None, **fields: Any
    ) -> Schedule:
        """A schedule from one level per denoising step, for the sigmas that ``scheduler`` visits in ``len(steps)`` steps.

        Args:
            steps: level names, or :class:`Level` objects, first (noisiest) step first.
            scheduler: a diffusers scheduler; a copy of it is asked for ``len(steps)`` timesteps.
            levels: definitions of the names; default: the levels of the presets (``presets.LEVELS``).
            fields: any of ``model``, ``tile``, ``layers``, ``heads``, ``required``, ``provenance``.
        """
        from .presets import LEVELS

        known = dict(LEVELS if levels is None else levels)
        known.update({step.name: step for step in steps if isinstance(step, Level)})
        names = [step.name if isinstance(step, Level) else step for step in steps]
        for index, name in enumerate(names):
            _check_level_name(name, known, f"steps[{index}]")
        from .scheduler import step_sigmas

        sigmas = step_sigmas(scheduler, len(steps))
        phases, high = [], 1.0
        for i, name in enumerate(names):
            if i + 1 < len(names) and names[i + 1] == name:
                continue
            low = 0.0 if i + 1 == len(names) else (sigmas[i] + sigmas[i + 1]) / 2
            phases.append(Phase(high, low, name))
            high = low
        fields.setdefault("provenance", {"imported_from": "steps", "num_steps": len(steps)})
        return cls(levels={name: known[name] for name in dict.fromkeys(names)}, phases=tuple(phases), **fields)

    def to_steps(self, scheduler: Any, num_steps: int, layer: int | None = None) -> list[str]:
        """Level names step by step, for the ``num_steps`` steps that ``scheduler`` takes."""
        from .scheduler import step_sigmas

        if self.axis == "steps" and num_steps >= 1:  # whatever the sigmas are: here each step stands for its place
            sigmas = [1.0 - step / num_steps for step in range(num_steps)]
        else:
            sigmas = step_sigmas(scheduler, num_steps)
        edges, levels = self.edges_of(sigmas), self.segment_levels(layer)
        return [levels[self.segment(sigma, edges)].name for sigma in sigmas]


def _phase_to_json(phase: Phase, axis: str) -> dict[str, Any]:
    if axis == "sigma":
        return {"sigma": [phase.high, phase.low], "level": phase.level}
    return {"steps": [round(1.0 - phase.high, 12), round(1.0 - phase.low, 12)], "level": phase.level}


def _check_scale_group(size: tuple[int, int, int] | None, tile: tuple[int, int, int] | None, path: str) -> None:
    if size is not None and tile is None:
        raise fault(
            path,
            f"is {list(size)} without a tile",
            '"tile" [t, h, w] in the schedule, of which it is a multiple on each axis',
        )
    if size is not None and tile is not None and any(s % t for s, t in zip(size, tile, strict=True)):
        raise fault(path, f"is {list(size)}", f"multiples of the tile {list(tile)} on each axis")


def _check_level_name(name: Any, levels: Mapping[str, Level], path: str) -> None:
    if name not in levels:
        raise fault(path, f"is the unknown level {name!r}", f"one of {', '.join(sorted(levels))}")


def _check_phases(phases: Sequence[Phase], levels: Mapping[str, Level], path: str, axis: str) -> None:
    """Phases must run from 1.0 down to 0.0, each starting where the one before ended. Errors speak as the file does."""
    steps = axis == "steps"
    first, last, order = (
        ("first", "last", "0 <= first < last <= 1") if steps else ("high", "low", "1 >= high > low >= 0")
    )

    def shown(position: float) -> float:
        return round(1.0 - position, 12) if steps else position

    if not phases:
        raise fault(path, "is empty", f"phases that cover {axis} from {shown(1.0)} to {shown(0.0)}")
    expected, before = 1.0, f"{axis} start{'' if steps else 's'} at {shown(1.0)}"
    for i, phase in enumerate(phases):
        here = f"{path}[{i}]"
        _check_level_name(phase.level, levels, f"{here}.level")
        came = f"is [{shown(phase.high)}, {shown(phase.low)}]"
        if not (math.isfinite(phase.high) and math.isfinite(phase.low) and phase.high > phase.low >= 0.0):
            raise fault(f"{here}.{axis}", came, f"[{first}, {last}] with {order}")
        if phase.high != expected:
            how = "leaves a gap" if phase.high < expected else "overlaps"
            raise fault(f"{here}.{axis}", f"{came} and {how}", f"{first} = {shown(expected)}, because {before}")
        expected, before = phase.low, f"{here} ended there"
    if expected != 0.0:
        here, ends = f"{path}[{len(phases) - 1}].{axis}", shown(0.0)
        raise fault(
            here,
            f"ends at {shown(expected)}",
            f"{last} = {ends} in the last phase: {axis} end{'' if steps else 's'} at {ends}",
        )
