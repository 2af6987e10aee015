"""What tuning is compared with: presets, and patterns at every layer and sigma."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .. import patterns
from ..schedule import Schedule
from .settings import COST


def schedule_cost(schedule: Schedule, sigmas: Sequence[float]) -> float | None:
    """Of a schedule without windows per layer or head, in the units of :data:`COST`; None where its densities depend on the grid."""
    edges, levels, cost = schedule.edges_of(sigmas), schedule.segment_levels(), 0.0
    for sigma in sigmas:
        level = levels[schedule.segment(sigma, edges)]
        if level.precision == "bf16":
            cost += COST["bf16"]
        elif level.window is None or isinstance(level.window, float):
            cost += COST[level.granularity] * (1.0 if level.window is None else level.window)
        else:
            return None
    return cost / len(sigmas)


def pattern_methods(density: float) -> dict[str, Any]:
    """Content and static patterns of a density, with this library's FP8."""
    from ..compare.methods import Method

    found = {
        "top-k of block means": {"pattern": patterns.get("topk_mean", ratio=density)},
        "sliding tile window": {"window": density},
    }
    return {name: Method(name, name, "", None, bits="fp8", **options) for name, options in found.items()}  # type: ignore[arg-type]
