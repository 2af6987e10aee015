"""Parser of schedule files. Older versions of the format are read: version 1 knows the axis "sigma" only, versions 1 and 2 no patterns.

Every error names the JSON path it is about.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from .level import GRANULARITIES, GRANULARITY_WANTED, LINEARS, PRECISIONS, Granularity, Level, Window
from .schedule import AXES, FORMAT, FORMATS, OWN_LINEARS, Phase, Schedule

if TYPE_CHECKING:
    from ..patterns import BoundPattern

_TOP = (
    "format",
    "axis",
    "model",
    "tile",
    "levels",
    "phases",
    "layers",
    "heads",
    "own_linears",
    "required",
    "provenance",
)
_MODEL = ("class", "num_layers", "num_heads", "flow_shift")


def parse(data: Any) -> Schedule:
    """Build a Schedule from the JSON object ``data``."""
    _object(data, "the file")
    _keys(data, "", _TOP, required=("format", "levels", "phases"))
    if data["format"] not in FORMATS:
        raise _error("format", data["format"], " or ".join(map(repr, FORMATS)))
    axis = _choice(data.get("axis", "sigma"), AXES[:1] if data["format"] == FORMATS[0] else AXES, "axis")
    required = data.get("required", False)
    if not isinstance(required, bool):
        raise _error("required", required, "true or false")
    tile = data.get("tile")
    levels = _levels(data["levels"], latest=data["format"] == FORMAT)
    return Schedule(
        levels=levels,
        phases=_phases(data["phases"], "phases", axis),
        model=_model(data.get("model", {})),
        tile=None if tile is None else _triple(tile, "tile"),
        layers=_layers(data.get("layers", {}), axis),
        heads=_heads(data.get("heads", {}), levels),
        required=required,
        provenance=dict(_object(data.get("provenance", {}), "provenance")),
        axis=axis,
        own_linears=_own_linears(data.get("own_linears", list(OWN_LINEARS))),
    )


def _own_linears(data: Any) -> tuple[int, ...]:
    if not isinstance(data, list) or not all(isinstance(x, int) and not isinstance(x, bool) for x in data):
        raise _error("own_linears", data, "a list of layers, -1 being the last")
    return tuple(data)


def _model(data: Any) -> dict[str, Any]:
    _keys(_object(data, "model"), "model", _MODEL)
    for key, value in data.items():
        if key == "class":
            valid = isinstance(value, str)
        else:
            valid = _is_number(value) and value > 0 and (key == "flow_shift" or isinstance(value, int))
        if not valid:
            raise _error(f"model.{key}", value, "a class name" if key == "class" else "a positive number")
    return dict(data)


def _levels(data: Any, latest: bool) -> dict[str, Level]:
    levels = {}
    for name, entry in _object(data, "levels").items():
        path = f'levels["{name}"]'
        if name == "density":
            raise _error(path, name, 'another name: "density" is a window')
        known: tuple[str, ...] = ("precision", "granularity", "window", "linears")
        known += ("pattern", "refresh", "hadamard") if latest else ()
        _keys(_object(entry, path), path, known, required=("precision",))
        precisions = PRECISIONS if latest else ("fp8", "bf16")
        precision = _choice(entry["precision"], precisions, f"{path}.precision")
        shared = "block" if precision == "int8" else "tile"
        granularity = _granularity(entry.get("granularity", shared), f"{path}.granularity", latest)
        window = parse_window(entry.get("window", "dense"), f"{path}.window")
        pattern = _pattern(entry["pattern"], f"{path}.pattern") if "pattern" in entry else None
        linears = _choice(entry.get("linears", "bf16"), LINEARS, f"{path}.linears")
        fp8_only = {"granularity", "hadamard"} & entry.keys()
        if precision == "bf16" and (fp8_only or window is not None or pattern is not None):
            raise _error(
                path, entry, 'only "precision" and "linears": a bf16 level is the model\'s own dense attention'
            )
        if pattern is not None and "window" in entry:
            raise _error(path, entry, '"pattern" or "window", not both')
        refresh, hadamard = entry.get("refresh", 1), entry.get("hadamard", False)
        levels[name] = Level(name, precision, granularity, window, linears, pattern, refresh, hadamard)
    return levels


def _granularity(data: Any, path: str, latest: bool) -> Granularity:
    if isinstance(data, str) or not latest:
        return _choice(data, GRANULARITIES, path)
    try:
        return _triple(data, path)
    except ConfigError:
        raise _error(path, data, GRANULARITY_WANTED) from None


def _pattern(data: Any, path: str) -> BoundPattern:
    from ..patterns import from_dict

    try:
        return from_dict(_object(data, path))
    except ConfigError as error:
        raise ConfigError(f"fpsattention.Schedule: {path}: {error}") from None


def _phases(data: Any, path: str, axis: str) -> tuple[Phase, ...]:
    bounds = "[high, low]" if axis == "sigma" else "[first, last], fractions of the steps"
    if not isinstance(data, list):
        raise _error(path, data, f'a list of {{"{axis}": {bounds}, "level": name}}')
    phases = []
    for i, entry in enumerate(data):
        here = f"{path}[{i}]"
        _keys(_object(entry, here), here, (axis, "level"), required=(axis, "level"))
        span = entry[axis]
        if not (isinstance(span, list) and len(span) == 2 and all(_is_number(x) for x in span)):
            raise _error(f"{here}.{axis}", span, f"{bounds}, two numbers")
        if not isinstance(entry["level"], str):
            raise _error(f"{here}.level", entry["level"], "a level's name")
        high, low = (float(x) if axis == "sigma" else round(1.0 - x, 12) for x in span)
        phases.append(Phase(high, low, entry["level"]))
    return tuple(phases)


def _layers(data: Any, axis: str) -> dict[int, tuple[Phase, ...]]:
    """Keys are ``"3"`` or ``"0-3"`` (inclusive); values a level's name, for all sigmas, or a list of phases."""
    layers: dict[int, tuple[Phase, ...]] = {}
    for key, entry in _object(data, "layers").items():
        path = f'layers["{key}"]'
        phases = (Phase(1.0, 0.0, entry),) if isinstance(entry, str) else _phases(entry, path, axis)
        for layer in _span(key, path):
            if layer in layers:
                raise _error(path, f"layer {layer} again", "each layer once")
            layers[layer] = phases
    return layers


def _heads(data: Any, levels: Mapping[str, Level]) -> dict[tuple[int | None, int], Window | Mapping[str, Window]]:
    """``{layer or "*": {head: window, or {level: window}}}``."""
    heads: dict[tuple[int | None, int], Window | Mapping[str, Window]] = {}
    for layer_key, entry in _object(data, "heads").items():
        layers: Sequence[int | None] = [None] if layer_key == "*" else _span(layer_key, f'heads["{layer_key}"]')
        for head_key, value in _object(entry, f'heads["{layer_key}"]').items():
            path = f'heads["{layer_key}"]["{head_key}"]'
            windows: Window | Mapping[str, Window]
            if isinstance(value, Mapping) and set(value) != {"density"}:
                for name in value:
                    if levels.get(name, Level("")).precision == "bf16":
                        raise _error(f'{path}["{name}"]', name, "an fp8 level: a bf16 level has no window")
                windows = {name: parse_window(window, f'{path}["{name}"]') for name, window in value.items()}
            else:
                windows = parse_window(value, path)
            for head in _span(head_key, path):
                for layer in layers:
                    if (layer, head) in heads:
                        raise _error(path, f"head {head} again", "each head of a layer once")
                    heads[layer, head] = windows
    return heads


def parse_window(data: Any, path: str) -> Window:
    """A window from ``"dense"``, ``[wT, wH, wW]`` in tiles, or ``{"density": d}`` with d in (0, 1]."""
    if data == "dense":
        return None
    if isinstance(data, Mapping) and set(data) == {"density"}:
        density = data["density"]
        if not _is_number(density) or not 0.0 < density <= 1.0:
            raise _error(f"{path}.density", density, "a number in (0, 1]")
        return float(density)
    if isinstance(data, (list, tuple)):
        return _triple(data, path)
    raise _error(path, data, '"dense", [wT, wH, wW] in tiles, or {"density": d}')


def _triple(data: Any, path: str) -> tuple[int, int, int]:
    values = list(data) if isinstance(data, (list, tuple)) else []
    if len(values) != 3 or not all(isinstance(x, int) and not isinstance(x, bool) and x >= 1 for x in values):
        raise _error(path, data, "three whole numbers >= 1 (time, height, width)")
    return (values[0], values[1], values[2])


def _span(key: str, path: str) -> list[int]:
    first, _, last = key.partition("-")
    last = last or first
    if not (first.isdecimal() and last.isdecimal() and int(first) <= int(last) < 10_000):
        raise _error(path, key, 'an index "3" or a range "0-3"')
    return list(range(int(first), int(last) + 1))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _choice(value: Any, choices: tuple[str, ...], path: str) -> str:
    if value not in choices:
        raise _error(path, value, f"one of {', '.join(choices)}")
    return value


def _object(data: Any, path: str) -> Mapping[str, Any]:
    if not isinstance(data, Mapping) or not all(isinstance(key, str) for key in data):
        raise _error(path, data, "a JSON object")
    return data


def _keys(data: Mapping[str, Any], path: str, known: tuple[str, ...], required: tuple[str, ...] = ()) -> None:
    prefix = f"{path}." if path else ""
    for key in data:
        if key not in known:
            raise ConfigError(
                f"fpsattention.Schedule: {prefix}{key} is an unknown key, expected one of {', '.join(known)}"
            )
    for key in required:
        if key not in data:
            raise ConfigError(f"fpsattention.Schedule: {prefix}{key} is missing, expected all of {', '.join(required)}")


def _error(path: str, came: Any, wanted: str) -> ConfigError:
    return ConfigError(f"fpsattention.Schedule: {path} is {came!r}, expected {wanted}")
