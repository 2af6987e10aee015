"""What tuning is compared with, on its held-out run: presets, and patterns at every layer and sigma, with this library's FP8."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from ..compare.methods import Method
from ..compare.running import attention_by
from ..patterns import get
from ..schedule import Schedule
from .allocate import within_cost
from .build import build

if TYPE_CHECKING:
    from .tuner import Tuner

PRESETS = ("paper", "training_free", "fp8")

#: Density, cost, distance.
Point = tuple[float, float, float]


def points(tuner: Tuner, costs: Sequence[float]) -> list[dict[str, Any]]:
    """``kind`` ("tune", "preset", "pattern"), ``name``, ``density``, ``cost`` and ``value`` (the target's distance) of each run; those that
    are known are not repeated."""
    wanted: list[tuple[str, str, Callable[[], Point]]] = []
    for cost in costs:
        found = build(tuner.space, within_cost(tuner.cells, tuner.shares, cost), {})
        wanted.append(("tune", f"tune {cost:g}", partial(_of_schedule, tuner, found)))
    for name in PRESETS:
        wanted.append(
            ("preset", name, partial(_of_schedule, tuner, replace(Schedule.preset(name), tile=tuner.space.tile)))
        )
    for cost in costs:
        for name, method in pattern_methods(cost).items():
            wanted.append(("pattern", f"{name} {cost:g}", partial(_of_method, tuner, method)))
    result = []
    for done, (kind, name, run) in enumerate(wanted):
        tuner.progress("Pareto", done, len(wanted))
        point = tuner.state.get("pareto", name)
        if point is None:
            point = {"kind": kind, "name": name, **dict(zip(("density", "cost", "value"), run(), strict=True))}
            tuner.state.put(point, "pareto", name)
        result.append(point)
    tuner.progress("Pareto", len(wanted), len(wanted))
    return result


def pattern_methods(density: float) -> dict[str, Method]:
    """One content pattern and one static one."""
    make = partial(Method, source="", numerics=None, bits="fp8")
    names = ("top-k of block means", "sliding tile window")
    return {
        names[0]: make(names[0], names[0], pattern=get("topk_mean", ratio=density)),
        names[1]: make(names[1], names[1], window=density),
    }


def _of_schedule(tuner: Tuner, schedule: Schedule) -> Point:
    with warnings.catch_warnings():  # that the preset `paper` is for weights trained with it is in every document
        warnings.filterwarnings("ignore", r"fpsattention\.apply: the preset 'paper'")
        value, ran = tuner.runner.distance(schedule, tuner.held_out)
    return ran["density"], ran["cost"], value


def _of_method(tuner: Tuner, method: Method) -> Point:
    with attention_by(tuner.pipe, method, tuner.space.tile) as counted:
        out = tuner.runner.generate(tuner.held_out)
    return counted.density, counted.density, tuner.runner.apart(out, tuner.runner.reference(tuner.held_out))
