"""Built-in schedules. ``docs/schedule.md`` says when to use which, and which of their numbers come from the paper."""

from __future__ import annotations

import math
from collections.abc import Callable

from ..errors import ConfigError
from .level import Level
from .schedule import Phase, Schedule

#: The levels that the presets are made of; also the names that ``Schedule.from_steps`` knows.
LEVELS: dict[str, Level] = {
    level.name: level
    for level in (
        Level("dense", precision="bf16"),
        Level("fp8", granularity="tile", window=None),
        Level("coarse", granularity="block", window=0.12),
        Level("medium", granularity="block", window=0.18),
        Level("fine", granularity="block", window=0.24),
        Level("careful", granularity="block", window=0.35),
    )
}


def sigma_at(progress: float, flow_shift: float) -> float:
    """Sigma after a fraction ``progress`` of the denoising steps: flow matching's shifted line, three decimals.

    ``sigma = s u / (1 + (s - 1) u)`` with ``u = 1 - progress`` and ``s = flow_shift``.
    """
    u = 1.0 - progress
    return round(flow_shift * u / (1.0 + (flow_shift - 1.0) * u), 3)


def _paper(flow_shift: float | None) -> Schedule:
    """arXiv 2506.04648: early and late steps tolerate coarse scales and high sparsity, intermediate steps do not.

    The direction is the paper's, for the sparsity. Scales are per block at all steps: a tile has its own blocks, so that costs
    nothing over scales per tile, and one kernel serves all levels. The borders (20 % and 80 % of the steps) and densities
    (0.2 on average over the steps, near the paper's 0.194) are this library's.
    """
    return _build("paper", flow_shift, [(0.2, "coarse"), (0.8, "fine"), (1.0, "medium")])


def _training_free(flow_shift: float | None) -> Schedule:
    """For weights that never saw sparse attention: the first quarter of the steps, which settles the layout, stays dense."""
    return _build("training_free", flow_shift, [(0.25, "dense"), (1.0, "careful")])


def _fp8(flow_shift: float | None) -> Schedule:
    """FP8 everywhere, nothing skipped."""
    return _build("fp8", flow_shift, [(1.0, "fp8")])


def _dense(flow_shift: float | None) -> Schedule:
    """The model's own attention everywhere: the control."""
    return _build("dense", flow_shift, [(1.0, "dense")])


def _build(name: str, flow_shift: float | None, parts: list[tuple[float, str]]) -> Schedule:
    """``parts``: (fraction of the steps at which the phase ends, level)."""
    phases, high = [], 1.0
    for progress, level in parts:
        low = round(1.0 - progress, 12)
        phases.append(Phase(high, low, level))
        high = low
    levels = {level: LEVELS[level] for _, level in parts}
    return Schedule(
        levels=levels,
        phases=tuple(phases),
        axis="steps",
        model={} if flow_shift is None else {"flow_shift": flow_shift},
        provenance={"created_by": "fpsattention", "preset": name},
    )


PRESETS: dict[str, Callable[[float | None], Schedule]] = {
    "paper": _paper,
    "training_free": _training_free,
    "fp8": _fp8,
    "dense": _dense,
}


def preset(name: str, flow_shift: float | None = None) -> Schedule:
    """See :meth:`Schedule.preset`."""
    if name not in PRESETS:
        raise ConfigError(f"fpsattention.Schedule.preset: name {name!r}, expected one of {', '.join(PRESETS)}")
    if flow_shift is not None and not (math.isfinite(flow_shift) and 0.1 <= flow_shift <= 100.0):
        raise ConfigError(
            f"fpsattention.Schedule.preset: flow_shift {flow_shift}, expected a number between 0.1 and 100"
        )
    return PRESETS[name](flow_shift)
