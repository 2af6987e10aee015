"""``fpsattention.tune``: measure, allocate, run, correct, verify. ``docs/tuning.md`` explains the steps."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import ConfigError
from ..layout.tiles import TileLayout, plan
from ..patterns import get
from ..schedule import Schedule
from .allocate import Allocation, Cell, Choice, frontier, within_cost, within_error
from .build import Space, build
from .candidates import RATIOS, windows
from .measure import Inputs, measure_phase, phase_starts, sensitivities
from .runs import Item, Runner, dense
from .settings import ROTATED, Target, TuneSettings, seconds
from .state import State, call_hash, model_hash, write_json

#: progress(what, done, total)
Progress = Callable[[str, int, int], None]
Say = Callable[[str], None]


REFERENCE_COST = 0.3  # of the phase that is probed, when it is measured how far its errors move the result
MARGIN = 0.97  # the search aims a little below the bound: it wants to hold it
CLOSE = 0.9  # a search that comes so near to the bound ends
PROMPTS = (
    "A red fox runs through fresh snow at sunrise, cinematic",
    "Waves break over black rocks, slow motion, overcast light",
    "A crowded street market at night, neon signs, handheld camera",
)


@dataclass
class TuneResult:
    """What tuning found; ``tune.json`` in the folder holds the same.

    Attributes:
        schedule: verified where ``reached``; also in ``schedule.json``.
        reached: the bound holds on the held-out run (of a density target: the cost was kept).
        density: attended share of the pairs, mean over calls. cost: the same with what BF16 and scales per token cost.
        held_out: the target's measure on the held-out run, in words.
        notes: what could not be reached or measured, and why.
        report: everything, as JSON data.
    """

    schedule: Schedule
    reached: bool
    density: float
    cost: float
    held_out: str
    notes: list[str] = field(default_factory=list)
    report: dict[str, Any] = field(default_factory=dict)


def tune(
    pipe: Any,
    target: Target | Mapping[str, float] | str,
    *,
    budget: float | str | None = "20m",
    out: str | Path = "fpsattn_tune",
    prompts: Sequence[str | Mapping[str, Any]] = PROMPTS,
    held_out: str | Mapping[str, Any] | None = None,
    progress: Progress = lambda what, done, total: None,
    say: Say = lambda text: None,
    settings: Mapping[str, Any] | None = None,
    **call: Any,
) -> TuneResult:
    """Find the cheapest schedule for a pipeline's model whose output keeps a bound.

    Args:
        pipe: a diffusers video pipeline that ``fpsattention.apply`` knows.
        target: ``"psnr=30"`` (of the video against dense, decibels), ``"rel_l1=0.1"`` (of the latents) or ``"density=0.2"``.
        budget: time, ``"20m"``; None: no limit. When it is spent, the best schedule so far is verified and returned.
        out: folder; a run that was interrupted goes on from there, ``schedule.json`` is the best so far.
        prompts: of the calibration runs: prompts, or arguments of the pipeline (``{"prompt_embeds": ...}``). Without ``held_out`` the last
            one is kept back for verification.
        held_out: prompt or arguments of the verification, which also has a seed of its own.
        progress: called with (what, done, total). say: with a line of text, whenever something is known.
        settings: fields of :class:`TuneSettings` beside ``out`` and ``budget``.
        call: further arguments of the pipeline, for all runs (height, width, num_frames, num_inference_steps, guidance_scale, ...).

    Returns:
        The schedule and how it was found. Two runs with the same model, arguments and enough time give the same schedule.

    Raises:
        ConfigError: arguments. UnsupportedError: a model that ``fpsattention.apply`` refuses.
    """
    chosen = TuneSettings(out=Path(out), budget=seconds(budget), **dict(settings or {}))
    return run_tune(pipe, Target.of(target), chosen, make_items(prompts, held_out, call, chosen.seed), progress, say)


def make_items(
    prompts: Sequence[str | Mapping[str, Any]],
    held_out: str | Mapping[str, Any] | None,
    call: Mapping[str, Any],
    seed: int,
) -> list[Item]:
    """Calibration items, then the held-out one."""
    listed = [prompts] if isinstance(prompts, (str, Mapping)) else list(prompts)
    if held_out is None:
        if len(listed) < 2:
            raise ConfigError(
                f"fpsattention.tune: prompts {len(listed)}, expected at least two, or held_out: one is kept back for verification"
            )
        held_out = listed.pop()
    if not listed:
        raise ConfigError("fpsattention.tune: prompts is empty, expected at least one")

    def arguments(prompt: str | Mapping[str, Any]) -> dict[str, Any]:
        return {**call, **({"prompt": prompt} if isinstance(prompt, str) else prompt)}

    items = [Item(f"calibration{i}", arguments(prompt), seed + i) for i, prompt in enumerate(listed)]
    return [*items, Item("held-out", arguments(held_out), seed + 1000)]


def run_tune(
    pipe: Any,
    target: Target,
    settings: TuneSettings,
    items: Sequence[Item],
    progress: Progress = lambda what, done, total: None,
    say: Say = lambda text: None,
    pareto: Sequence[float] = (),
) -> TuneResult:
    """:func:`tune` with its arguments checked; ``items``: calibration, and last the held-out one.

    ``pareto``: costs at which held-out runs of this tuning, of presets and of patterns are made as well.
    """
    tuner = Tuner(pipe, target, settings, items, progress, say)
    result = tuner.run()
    if pareto:
        from .pareto import points

        result.report["pareto"] = points(tuner, pareto)
        write_json(settings.out / "tune.json", result.report)
    return result


class Tuner:
    """One tuning: measures, allocates, runs, corrects, verifies; everything measured is in ``state``."""

    def __init__(
        self, pipe: Any, target: Target, settings: TuneSettings, items: Sequence[Item], progress: Progress, say: Say
    ):
        import fpsattention as fps

        self.pipe, self.target, self.settings = pipe, target, settings
        self.items, self.held_out = list(items[:-1]), items[-1]
        self.progress, self.say = progress, say
        self.notes: list[str] = []
        self.begin = time.monotonic()
        with fps.apply(pipe, dense(settings.tile), replace=True) as handle:  # what cannot run ends here
            self.model = model_hash(one.transformer for one in handle.installations)
            first = handle.installations[0]
            self.num_layers = len(first.sites)
            self.class_name = first.adapter.class_name(first.transformer)
        from .. import __version__

        described = {
            "model": self.model, "items": [[item.name, call_hash(item.call), item.seed] for item in items], "video": target.metric == "psnr",
            "settings": settings.describe(), "version": __version__,
        }  # fmt: skip
        key = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()
        self.state = State(settings.out, key)
        self.runner = Runner(pipe, target, settings.out / "runs")

    @property
    def late(self) -> bool:
        """The budget is spent, but for one more run."""
        limit = self.settings.budget
        reserve = 1.2 * float(self.state.get("seconds", "dense") or 0.0)
        return limit is not None and time.monotonic() - self.begin + reserve > limit

    def run(self) -> TuneResult:
        self._dense()
        self._errors()
        self._weights()
        if self.target.metric == "density":
            allocation = within_cost(self.cells, self.shares, self.target.value)
            reached = self._verify_density(allocation)
        else:
            reached = self._verify(self._search())
        return self._result(reached)

    # Measuring ---------------------------------------------------------------------------------------------------------------

    def _dense(self) -> None:
        """Dense runs of all items; those of calibration leave the transformer's inputs in the middle of each phase."""
        for done, item in enumerate([*self.items, self.held_out]):
            self.progress("dense runs", done, len(self.items) + 1)
            path = self.runner.folder / item.name / "dense.pt"
            if path.is_file() and (item is self.held_out or self.state.get("sigmas")):
                continue
            if item is self.held_out:
                self.runner.reference(item)
            else:
                path.unlink(missing_ok=True)
                with self._inputs(item) as inputs, inputs.recording():
                    self.runner.reference(item, during=nullcontext())
                self.state.put(list(inputs.sigmas), "sigmas")
            self.state.put(self.runner.seconds, "seconds", "dense")
        self.progress("dense runs", len(self.items) + 1, len(self.items) + 1)
        self.sigmas: list[float] = self.state.get("sigmas")
        self.starts = phase_starts(self.settings.phases, len(self.sigmas))

    @contextmanager
    def _inputs(self, item: Item) -> Iterator[Inputs]:
        """The pipeline runs dense, with hooks that see it."""
        import fpsattention as fps

        with fps.apply(self.pipe, dense(self.settings.tile), replace=True) as handle:
            yield Inputs(handle.installations, self.runner.folder / item.name, self.settings.phases)

    def _errors(self) -> None:
        """Errors of every (item, phase, layer) that is not known yet, as long as there is time."""
        settings, total = self.settings, len(self.items) * self.settings.phases
        for done, (item, phase) in enumerate((i, p) for p in range(settings.phases) for i in self.items):
            self.progress("errors of attention", done, total)
            key = f"{item.name}/{phase}"
            known: dict[str, Any] = self.state.get("errors", key) or {}
            if len(known) == self.num_layers or self.late:
                continue
            with self._inputs(item) as inputs:
                installation, _, arguments = inputs.load(phase)
                seed = settings.seed + 7919 * phase
                weights = None
                if settings.sensitivity == "gradient":
                    try:
                        weights = sensitivities(
                            installation, arguments, settings.tile, settings.rows, settings.probes, seed
                        )
                    except RuntimeError as error:
                        if "out of memory" not in str(error).lower():
                            raise
                        raise ConfigError(
                            "fpsattention.tune: the backward pass through the dense model does not fit into memory, expected "
                            "sensitivity 'none', which needs none"
                        ) from error

                def found(layer: int, errors: dict[str, Any], key: str = key) -> None:
                    self.state.put(errors, "errors", key, str(layer))

                measure_phase(
                    installation, arguments, tile=settings.tile, rows=settings.rows, seed=seed, windows_of=self._windows,
                    kinds=settings.windowed, patterns=settings.patterns, weights=weights,
                    wanted=partial(self._wanted, frozenset(known)), found=found,
                )  # fmt: skip
        self.progress("errors of attention", total, total)

    def _wanted(self, known: frozenset[str], layer: int) -> bool:
        return str(layer) not in known and not self.late

    def _windows(self, layout: TileLayout) -> list[tuple[int, int, int]]:
        found = windows(layout)
        space = {"windows": found, "tile": list(layout.tile), "grid": list(layout.grid)}
        space |= {"text_len": layout.text_len, "text_position": layout.text_position if layout.text_len else "suffix"}
        space["densities"] = [_density(layout, window) for window in found]
        if (known := self.state.get("space")) is None:
            self.state.put(space, "space")
        elif known["windows"] != [list(window) for window in found] or known["grid"] != list(layout.grid):
            raise ConfigError("fpsattention.tune: the items have different token grids, expected one size for all")
        return found

    def _shares(self, space: Mapping[str, Any]) -> dict[str, list[float]]:
        """Kind -> densities of its options. How much a ``ratio`` attends is a matter of the layout alone, so any q and k will do."""
        shares = dict.fromkeys(self.settings.windowed, space["densities"])
        if self.settings.patterns:
            layout = plan(space["grid"], space["tile"], space["text_len"], space["text_position"])
            q, k = torch.randn(2, 1, 1, layout.num_tokens, 64, generator=torch.Generator().manual_seed(0))
            for name in self.settings.patterns:
                shares[name] = [float(get(name, ratio=ratio)(q, k, layout).density) for ratio in RATIOS]
        return shares

    def _weights(self) -> None:
        """Cells with errors in units of the result: squared errors of a phase times what such an error does to the result."""
        space = self.state.get("space")
        if space is None:
            raise ConfigError(
                f"fpsattention.tune: budget {self.settings.budget:g} s, expected more: nothing was measured yet (what was begun is kept)"
            )
        self.space = Space.of(space, self.settings, self.num_layers, self.class_name)
        self.shares = self._shares(space)
        raw = [
            self._cell_errors(layer, phase) for phase in range(self.settings.phases) for layer in range(self.num_layers)
        ]
        missing = sum(not errors for errors in raw)
        if missing:
            self._note(
                f"{missing} of {len(raw)} (layer, phase) pairs were not measured in the time given: they stay dense"
            )
        steps = len(self.sigmas)
        shares = [(b - a) / steps for a, b in zip(self.starts, self.starts[1:], strict=False)]
        factors = []
        for phase in range(self.settings.phases):
            cells = self._cells(raw, shares, [1.0] * self.settings.phases)
            factors.append(self._factor(phase, cells, shares))
            self.progress("effect of phases", phase + 1, self.settings.phases + 2)
        # Where a phase was not probed, the others say what a share of sigma does.
        known = [(f, self._sigma_span(p) ** 2) for p, f in enumerate(factors) if f is not None]
        unit = sum(f for f, _ in known) / sum(s for _, s in known) if known else 1.0
        self.factors = [unit * self._sigma_span(p) ** 2 if f is None else f for p, f in enumerate(factors)]
        self.measured_factors = [f is not None for f in factors]
        if self.settings.calibrate and not all(self.measured_factors):
            self._note(
                "what errors of some phases do to the result was not measured in the time given: taken from their share of sigma"
            )
        self.ratios = [1.0, 1.0]
        cells = self._cells(raw, shares, self.factors)
        if self.settings.calibrate and not missing:
            self._ratios(cells)
        self.cells = self._cells(raw, shares, self.factors, *self.ratios)

    def _cell_errors(self, layer: int, phase: int) -> dict[str, np.ndarray]:
        """Mean over the items that were measured, of one (layer, phase): kind to ``[heads, options]``."""
        found = [(self.state.get("errors", f"{item.name}/{phase}") or {}).get(str(layer)) for item in self.items]
        tables = [table for table in found if table is not None]
        kinds = (*self.settings.windowed, *self.settings.patterns) if tables else ()
        errors = {kind: np.mean([table[kind] for table in tables], axis=0) for kind in kinds}
        return errors if self.settings.per_head else {kind: e.sum(0, keepdims=True) for kind, e in errors.items()}

    def _rounding(self, errors: Mapping[str, np.ndarray], kind: str) -> np.ndarray:
        """What a kind's errors ``[heads, 1]`` are where nothing is skipped."""
        if kind in self.settings.windowed:
            return errors[kind][:, -1:]
        return errors[self.settings.granularities[0]][:, -1:].sum(0, keepdims=True)

    def _cells(
        self,
        raw: Sequence[dict[str, np.ndarray]],
        shares: list[float],
        factors: list[float],
        rounding: float = 1.0,
        skipping: float = 1.0,
    ) -> list[Cell]:
        """Phase by phase, layer by layer; ``rounding`` and ``skipping`` correct what a full window has, too, and the rest."""
        cells = []
        for i, errors in enumerate(raw):
            phase = i // self.num_layers
            scaled = {}
            for kind, e in errors.items():
                rounded = self._rounding(errors, kind)
                scaled[kind] = factors[phase] * (rounding * rounded + skipping * np.maximum(e - rounded, 0.0))
            cells.append(Cell(scaled, shares[phase] / self.num_layers))
        return cells

    def _sigma_span(self, phase: int) -> float:
        """How far sigma falls in a phase."""
        sigmas = [*self.sigmas, 0.0]
        return sigmas[self.starts[phase]] - sigmas[self.starts[phase + 1]]

    def _factor(self, phase: int, cells: list[Cell], shares: list[float]) -> float | None:
        """Squared distance of a run with errors in this phase only, over their squared prediction; None: not measured."""
        key = str(phase)
        if not self.settings.calibrate:
            return None
        if (known := self.state.get("factors", key)) is not None:
            return float(known)
        if self.late:
            return None
        own = [cell if i // self.num_layers == phase else Cell({}, cell.weight) for i, cell in enumerate(cells)]
        cost = REFERENCE_COST * shares[phase] + 2.0 * (1.0 - shares[phase])
        allocation = within_cost(own, self.shares, cost)
        if allocation.error <= 0.0:
            return None
        value, _ = self.runner.distance(build(self.space, allocation, {}), self.items[0])
        factor = value**2 / allocation.error
        self.state.put(factor, "factors", key)
        return factor

    def _ratios(self, cells: list[Cell]) -> None:
        """Two runs of everything: nothing skipped, then at ``REFERENCE_COST``. Squared distance over its prediction, of rounding and of skipping.

        Rounding errors are independent of one another; those of skipped keys are not, and add up to more from layer to layer and phase to phase.
        """
        granularity, last = self.settings.granularities[0], len(self.space.windows) - 1
        full = tuple(Choice(granularity, (last,) * len(cell.errors[granularity])) for cell in cells)
        sparse = within_cost(cells, self.shares, REFERENCE_COST).choices
        for i, (name, choices) in enumerate((("rounding", full), ("skipping", sparse))):
            known = self.state.get("ratios", name)
            if known is None and not self.late:
                rounded = skipped = 0.0
                for cell, choice in zip(cells, choices, strict=True):
                    if choice.kind is not None:
                        full_window = self._rounding(cell.errors, choice.kind)[:, 0]
                        at = cell.errors[choice.kind][np.arange(len(choice.options)), list(choice.options)]
                        rounded += float(full_window.sum())
                        skipped += float(np.maximum(at - full_window, 0.0).sum())
                schedule = build(self.space, Allocation(choices, 0.0, 0.0, 0.0), {})
                left = self.runner.distance(schedule, self.items[0])[0] ** 2 - (self.ratios[0] * rounded if i else 0.0)
                part = skipped if i else rounded
                known = left / part if part > 0 and left > 0 else 1.0
                self.state.put(known, "ratios", name)
            self.ratios[i] = 1.0 if known is None else float(known)
            self.progress("effect of phases", self.settings.phases + i + 1, self.settings.phases + 2)

    # Searching ---------------------------------------------------------------------------------------------------------------

    def _try(self, allocation: Allocation, items: Sequence[Item], what: str) -> float:
        """The largest distance over some items; kept, so that no schedule is run twice."""
        schedule = build(self.space, allocation, {})
        name = hashlib.sha256(json.dumps(schedule.to_dict(), sort_keys=True).encode()).hexdigest()[:16]
        worst = 0.0
        for item in items:
            value = self.state.get("tries", name, item.name)
            if value is None:
                value, ran = self.runner.distance(schedule, item)
                self.state.put(value, "tries", name, item.name)
                self.state.put(
                    {"cost": allocation.cost, "density": ran["density"], "predicted": allocation.error**0.5},
                    "tries",
                    name,
                    "of",
                )
            worst = max(worst, value)
        self.say(
            f"{what}: density {allocation.density:.3f}, cost {allocation.cost:.3f}: {self.target.shown(worst)} "
            f"(expected {self.target.wanted()}; predicted {self.target.shown(allocation.error**0.5)})"
        )
        return worst

    def _search(self) -> tuple[float, Allocation]:
        """The cheapest allocation that holds the bound on the calibration items, and the predicted distance that it was given."""
        goal, low, high = self.target.bound, 0.0, float("inf")
        budget, best = goal * MARGIN, None
        for attempt in range(self.settings.tries):
            self.progress("search", attempt, self.settings.tries)
            allocation = within_error(self.cells, self.shares, budget**2)
            value = self._try(allocation, self.items, f"search {attempt + 1}")
            if value <= goal:
                low = max(low, budget)
                if best is None or allocation.cost < best[1].cost:
                    best = (budget, allocation)
                    self._save(allocation, value, verified=False)
                if value >= CLOSE * goal or allocation.cost <= self._floor() * (1 + 1e-9):
                    break
            else:
                high = min(high, budget)
            if self.late:
                self._note("the time was spent before the search came near the bound")
                break
            # What the prediction is off by, and where that has been tried already, the middle.
            wanted = budget * (MARGIN * goal / value if value > 0 else 4.0)
            if not low < wanted < high:
                wanted = (low * high) ** 0.5 if low > 0 and high < float("inf") else wanted
            budget = wanted
        self.progress("search", self.settings.tries, self.settings.tries)
        return (
            best if best is not None else (min(budget, low or budget), within_error(self.cells, self.shares, budget**2))
        )

    def _floor(self) -> float:
        """The least cost that there is."""
        return within_cost(self.cells, self.shares, 0.0).cost

    def _verify(self, start: tuple[float, Allocation]) -> bool:
        """Runs the held-out item; where it misses, the prediction is corrected by a bisection between what held and what missed."""
        budget, allocation = start
        goal, low, high = self.target.bound, 0.0, float("inf")
        held: tuple[Allocation, float] | None = None
        for attempt in range(self.settings.tries):
            value = self._try(
                allocation, [self.held_out], "held out" if attempt == 0 else f"held out, correction {attempt}"
            )
            if value <= goal:
                low = max(low, budget)
                if held is None or allocation.cost < held[0].cost:
                    held = (allocation, value)
                    self._save(allocation, value, verified=True)
                if attempt == 0 or value >= CLOSE * goal:  # chosen without a look at this run, or near enough
                    break
            else:
                high = min(high, budget)
                if attempt == 0:
                    self._note(
                        f"the schedule that held the bound on the calibration runs missed it on the held-out one ({self.target.shown(value)}): "
                        "tightened until it held there as well, so the held-out run was used to choose"
                    )
            if self.late:
                break
            budget = budget * MARGIN * goal / value if held is None else (low * high) ** 0.5
            allocation = within_error(self.cells, self.shares, budget**2)
        self.final, self.held_out_value = held if held is not None else (allocation, value)
        if held is None:
            self._save(allocation, value, verified=False)
            self._note(f"not reached: {self.target.shown(value)} on the held-out run, expected {self.target.wanted()}")
        elif self.final.density > 0.999:
            self._note(f"the bound ({self.target.wanted()}) leaves nothing to skip: every layer attends everything")
        return held is not None

    def _verify_density(self, allocation: Allocation) -> bool:
        self.final = allocation
        self.held_out_value = self._try(allocation, [self.held_out], "held out")
        if allocation.cost > self.target.value * (1 + 1e-9):
            self._note(
                f"not reached: the sparsest candidates cost {allocation.cost:.3f}, expected at most {self.target.value:g}"
            )
        self._save(allocation, self.held_out_value, verified=True)
        return allocation.cost <= self.target.value * (1 + 1e-9)

    # Results -----------------------------------------------------------------------------------------------------------------

    def _note(self, text: str) -> None:
        self.notes.append(text)
        self.say(text)

    def _provenance(self, allocation: Allocation, value: float, verified: bool) -> dict[str, Any]:
        from .. import __version__

        errors = {key: table for key, table in (self.state.get("errors") or {}).items()}
        text = json.dumps(errors, sort_keys=True)
        return {
            "created_by": "fpsattention.tune", "version": __version__, "target": {self.target.metric: self.target.value},
            "verified_on_held_out": verified, "measured": self.target.shown(value), "predicted": self.target.shown(allocation.error**0.5),
            "density": allocation.density, "cost": allocation.cost, "model_hash": self.model,
            "prompts": [item.shown() for item in self.items], "held_out": self.held_out.shown(),
            "seeds": [item.seed for item in (*self.items, self.held_out)], "settings": self.settings.describe(),
            "sigmas": [self.sigmas[start] for start in self.starts[:-1]], "phase_factors": self.factors, "rounding_skipping_factors": self.ratios,
            "errors": errors if len(text) < 200_000 else {"sha256": hashlib.sha256(text.encode()).hexdigest(), "file": "state.json"},
            "windows": self.space.windows, "ratios": RATIOS if self.space.patterns else [],
        }  # fmt: skip

    def _save(self, allocation: Allocation, value: float, verified: bool) -> None:
        """``schedule.json`` is the best so far."""
        self.schedule = build(self.space, allocation, self._provenance(allocation, value, verified))
        write_json(self.settings.out / "schedule.json", self.schedule.to_dict())

    def _result(self, reached: bool) -> TuneResult:
        points = [
            {"cost": a.cost, "density": a.density, "predicted": a.error**0.5} for a in frontier(self.cells, self.shares)
        ]
        report = {
            "target": {self.target.metric: self.target.value}, "bound": self.target.bound, "reached": reached, "notes": self.notes,
            "density": self.final.density, "cost": self.final.cost, "held_out": self.held_out_value,
            "predicted": self.final.error**0.5, "frontier": points, "tries": self.state.get("tries") or {},
            "cells": self._table(), "phase_factors": self.factors, "phase_factors_measured": self.measured_factors, "rounding_skipping_factors": self.ratios,
            "sigmas": [self.sigmas[start] for start in self.starts[:-1]], "tile": list(self.space.tile),
            "windows": self.space.windows, "seconds": time.monotonic() - self.begin, "resumed": self.state.resumed,
        }  # fmt: skip
        write_json(self.settings.out / "tune.json", report)
        shown = self.target.shown(self.held_out_value)
        return TuneResult(self.schedule, reached, self.final.density, self.final.cost, shown, self.notes, report)

    def _table(self) -> list[dict[str, Any]]:
        """What was chosen, per (layer, phase)."""
        rows = []
        for i, (cell, choice) in enumerate(zip(self.cells, self.final.choices, strict=True)):
            phase, layer = divmod(i, self.num_layers)
            kind, scored = choice.kind, choice.kind in self.settings.patterns
            densities = [] if kind is None else [self.shares[kind][option] for option in choice.options]
            rows.append({
                "layer": layer, "phase": phase, "precision": "bf16" if kind is None else "fp8",
                "granularity": self.space.granularity if scored else kind and kind.removesuffix(ROTATED),
                "hadamard": kind is not None and kind.endswith(ROTATED),
                "pattern": {"name": kind, "ratio": RATIOS[choice.options[0]]} if scored else None,
                "windows": [] if scored else [self.space.windows[w] for w in choice.options], "densities": densities,
                "density": float(np.mean(densities)) if densities else 1.0,
                "error": 0.0 if kind is None else float(sum(cell.errors[kind][h, w] for h, w in enumerate(choice.options))),
                "measured": bool(cell.errors),
            })  # fmt: skip
        return rows


def _density(layout: TileLayout, window: tuple[int, int, int]) -> float:
    from ..layout.masks import sliding_tile_mask

    return float(sliding_tile_mask(layout, window).density)
