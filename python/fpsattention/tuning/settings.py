"""What tuning is told: the bound, the time, what is generated, and what is tried."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..schedule.level import GRANULARITIES

#: What a block pair costs, against one of FP8 with scales per block: BF16 tensor cores run at half the rate; scales per token are more
#: loads per block, taken as 2 %, as is the making of lists from q and k (both assumed, not measured).
COST = {"block": 1.0, "tile": 1.0, "token": 1.02, "bf16": 2.0}
SCORED_COST = 1.02
ROTATED = "+hadamard"  # after a granularity: q and k are rotated first


def cost_of(kind: str) -> float:
    """Per block pair: of FP8 with scales of a granularity (what a rotation takes grows with the tokens, not with the pairs), of BF16, or of the
    pattern of that name."""
    return COST.get(kind.removesuffix(ROTATED), SCORED_COST)


@dataclass(frozen=True)
class Target:
    """The bound that the schedule has to hold.

    Attributes:
        metric: ``"psnr"`` of the video against the dense run's (all frames together, values in [0, 1], decibels, at least ``value``);
            ``"rel_l1"`` of the latents, ``sum |x - y| / sum |y|``, at most ``value``; or ``"density"``: the least error at a cost of
            at most ``value`` (a density, where nothing is BF16), which bounds no error.
    """

    metric: str
    value: float

    def __post_init__(self) -> None:
        if self.metric not in ("psnr", "rel_l1", "density"):
            raise _wrong("target", self.metric, "psnr, rel_l1 or density")
        low, high = {"psnr": (0.0, 200.0), "rel_l1": (0.0, 10.0), "density": (0.0, 1.0)}[self.metric]
        if not low < self.value <= high:  # also NaN
            raise _wrong(f"target {self.metric}", self.value, f"a number above {low:g} and at most {high:g}")

    @classmethod
    def of(cls, target: Target | Mapping[str, float] | str) -> Target:
        """From itself, ``{"psnr": 30}``, or ``"psnr=30"``."""
        if isinstance(target, Target):
            return target
        if isinstance(target, str):
            metric, _, number = target.partition("=")
            try:
                return cls(metric.strip(), float(number))
            except ValueError:
                raise _wrong("target", target, "psnr=DECIBELS, rel_l1=SHARE or density=SHARE") from None
        if isinstance(target, Mapping) and len(target) == 1:
            ((metric, value),) = target.items()
            if isinstance(metric, str) and isinstance(value, (int, float)) and not isinstance(value, bool):
                return cls(metric, float(value))
        raise _wrong("target", target, "psnr=DECIBELS, rel_l1=SHARE or density=SHARE")

    @property
    def bound(self) -> float:
        """As a distance, which grows like the error: root mean square for PSNR."""
        return 10.0 ** (-self.value / 20.0) if self.metric == "psnr" else self.value

    def shown(self, distance: float) -> str:
        """A distance in the words of the metric."""
        if self.metric == "psnr":
            return "PSNR inf dB" if distance == 0 else f"PSNR {-20.0 * math.log10(distance):.2f} dB"
        return f"relative L1 {distance:.4f}"

    def wanted(self) -> str:
        """The bound in words."""
        return {"psnr": f"at least {self.value:g} dB", "rel_l1": f"at most {self.value:g}", "density": "none"}[
            self.metric
        ]


@dataclass(frozen=True)
class TuneSettings:
    """Settings beside the target.

    Attributes:
        out: folder of the schedule, the state and the report.
        budget: seconds; None: no limit. What is begun is finished, so it may be passed by one run of the pipeline.
        phases: equal shares of the denoising steps, each with windows of its own.
        granularities: FP8 scales that are tried; coarser ones win where they are as good.
        patterns: names of patterns with a ``ratio`` ("topk_mean") that are tried beside windows, for all heads of a layer, with the first of
            ``granularities``.
        hadamard: windows are tried with q and k rotated, too (``hadamard`` of a level).
        tile: tokens ``(t, h, w)``; None: the planner's.
        rows: query tokens per head at which errors are measured (whole tiles, chosen by seed).
        per_head: windows per head; False: one per layer and phase.
        sensitivity: ``"gradient"``: what an error of a head does to the model's output, from one backward pass through the dense model;
            ``"none"``: all layers count alike.
        probes: random directions of that backward pass.
        calibrate: measure how much an error in each phase moves the result, one run per phase; False: by the share of sigma.
        tries: runs of the search at most, and again of the verification.
        seed: of everything that is drawn.
    """

    out: Path = Path("fpsattn_tune")
    budget: float | None = 1200.0
    phases: int = 4
    granularities: tuple[str, ...] = ("block", "token")
    patterns: tuple[str, ...] = ()
    hadamard: bool = False
    tile: tuple[int, int, int] | None = None
    rows: int = 512
    per_head: bool = True
    sensitivity: str = "gradient"
    probes: int = 2
    calibrate: bool = True
    tries: int = 6
    seed: int = 0

    def __post_init__(self) -> None:
        if self.budget is not None and not self.budget > 0:
            raise _wrong("budget", self.budget, "a time above 0, or None")
        for name in ("phases", "rows", "probes", "tries"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise _wrong(name, getattr(self, name), "a whole number >= 1")
        if not self.granularities or set(self.granularities) - set(GRANULARITIES):
            raise _wrong("granularities", self.granularities, f"some of {', '.join(GRANULARITIES)}")
        from ..patterns import get

        for name in self.patterns:
            try:
                get(name, ratio=0.5)
            except ConfigError as error:
                raise _wrong("patterns", self.patterns, f"names of patterns that have a ratio ({error})") from error
        if self.sensitivity not in ("gradient", "none"):
            raise _wrong("sensitivity", self.sensitivity, "'gradient' or 'none'")

    @property
    def windowed(self) -> tuple[str, ...]:
        """The kinds whose options are windows."""
        return (*self.granularities, *(g + ROTATED for g in self.granularities if self.hadamard))

    def describe(self) -> dict[str, Any]:
        """What decides what is measured."""
        names = ("phases", "granularities", "patterns", "hadamard", "tile", "rows", "sensitivity", "probes", "seed")
        return {name: getattr(self, name) for name in names}


def seconds(budget: float | str | None) -> float | None:
    """``"20m"``, ``"1.5h"``, ``"90s"``, a number of seconds, or None."""
    if budget is None or (isinstance(budget, (int, float)) and not isinstance(budget, bool)):
        return None if budget is None else float(budget)
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([smh]?)\s*", str(budget))
    if not found:
        raise _wrong("budget", budget, "a time such as 20m, 1.5h or 90s")
    return float(found[1]) * {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0}[found[2]]


def _wrong(name: str, value: Any, wanted: str) -> ConfigError:
    return ConfigError(f"fpsattention.tune: {name} {value!r}, expected {wanted}")
