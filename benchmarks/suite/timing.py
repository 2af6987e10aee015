"""Interleaved timing of several implementations of one thing.

Every repeat runs each implementation once, in an order that rotates, on the next of the rotating input sets: clocks, heat
and neighbours then act on all of them alike. CUDA events on a GPU, a host clock elsewhere (dry runs).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

# The device sleeps so long before each sample that the host is ahead of it: launches then cost the sample nothing. About 0.1 ms.
HEAD_START_CYCLES = 200_000
MIN_SAMPLE_MS = 0.5  # shorter calls are repeated inside one pair of events, whose resolution is about 0.5 us


def summarize(samples: list[float], calls: int) -> dict[str, Any]:
    """min, median, max in milliseconds per call; ``repeats`` samples of ``calls`` calls each."""
    return {
        "min": min(samples), "median": statistics.median(samples), "max": max(samples), "repeats": len(samples), "calls": calls,
    }  # fmt: skip


class Stopwatch:
    """One sample: ``with Stopwatch(device) as s: ...`` then ``s.milliseconds()`` once the device is done."""

    def __init__(self, device: str):
        self._cuda = device == "cuda"

    def __enter__(self) -> Stopwatch:
        if self._cuda:
            torch.cuda._sleep(HEAD_START_CYCLES)
            self._begin = torch.cuda.Event(enable_timing=True)
            self._end = torch.cuda.Event(enable_timing=True)
            self._begin.record()
        else:
            self._begin = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        if self._cuda:
            self._end.record()
        else:
            self._end = time.perf_counter()

    def milliseconds(self) -> float:
        return self._begin.elapsed_time(self._end) if self._cuda else 1e3 * (self._end - self._begin)


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def rough_ms(call: Callable[[int], Any], device: str) -> float:
    """Duration of one warm call, for planning."""
    call(0)
    synchronize(device)
    with Stopwatch(device) as watch:
        call(1)
    synchronize(device)
    return max(1e-3, watch.milliseconds())


def interleaved(
    calls: dict[str, Callable[[int], Any]], device: str, budget_s: float, *, min_repeats: int = 5, max_repeats: int = 50,
    on_error: Callable[[str, Exception], None] | None = None, enter: Callable[[str], Any] | None = None,
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Times every ``calls[name](set_index)`` for about ``budget_s`` seconds in all.

    One that raises is handed to ``on_error`` and left out from then on. ``enter(name)`` is told who runs next: the device is
    idle between two implementations, so that a fault is found under the name of whoever caused it. Returns ``summarize``
    per name; names that failed are absent.
    """
    alive, rough = {}, {}
    for name, call in calls.items():
        try:
            if enter:
                enter(name)
            rough[name] = rough_ms(call, device)
            alive[name] = call
        except Exception as error:
            if on_error is None:
                raise
            on_error(name, error)
    inner = {name: max(1, round(MIN_SAMPLE_MS / rough[name])) if device == "cuda" else 1 for name in alive}
    round_s = sum(rough[name] * inner[name] for name in alive) / 1e3
    repeats = int(max(min_repeats, min(max_repeats, budget_s / max(1e-6, round_s))))
    samples: dict[str, list[float]] = {name: [] for name in alive}
    turn = 2  # the warm-up calls used sets 0 and 1
    for repeat in range(repeats):
        names = list(alive)
        shift = repeat % max(1, len(names))
        for name in names[shift:] + names[:shift]:
            try:
                if enter:
                    enter(name)
                with Stopwatch(device) as watch:
                    for _ in range(inner[name]):
                        alive[name](turn)
                        turn += 1
                synchronize(device)
                samples[name].append(watch.milliseconds() / inner[name])
            except Exception as error:
                if on_error is None:
                    raise
                on_error(name, error)
                del alive[name]
    return {name: summarize(values, inner[name]) for name, values in samples.items() if values and name in alive}
