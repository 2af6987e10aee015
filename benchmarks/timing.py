"""Interleaved timing of several implementations of one thing.

Every repeat runs each implementation once, in an order that rotates, on the next of the rotating input sets: clocks, heat
and neighbours then act on all of them alike. CUDA events on a GPU, a host clock elsewhere.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

# The device sleeps so long before each sample that the host is ahead of it: launches then cost the sample nothing. About 0.1 ms.
HEAD_START_CYCLES = 200_000
MIN_SAMPLE_MS = 0.5  # shorter calls are repeated inside one pair of events, whose resolution is about 0.5 us

BUDGET_S = {"quick": 1.5, "full": 3.0, "dry": 0.02}  # of one comparison, by the suite's mode; some take a multiple

Call = Callable[[int], Any]  # given the number of the call, by which it picks an input set


def sample_ms(call: Call, device: str, first: int, count: int) -> float:
    """Milliseconds per call of ``count`` calls, numbered from ``first``; the device is idle before and after."""
    if device != "cuda":
        start = time.perf_counter()
        for i in range(count):
            call(first + i)
        return 1e3 * (time.perf_counter() - start) / count
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    torch.cuda._sleep(HEAD_START_CYCLES)
    begin.record()
    for i in range(count):
        call(first + i)
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / count


def interleaved(
    calls: Mapping[str, Call], device: str, budget_s: float, *, min_repeats: int = 5, max_repeats: int = 50,
    failed: dict[str, str] | None = None,
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Times every ``calls[name](number)`` for about ``budget_s`` seconds in all.

    Returns {"min", "median", "max" (ms per call), "repeats", "calls" (per repeat)} per name. Where ``failed`` is given, one that
    raises is left out, and what it said stands there.
    """
    alive, rough = dict(calls), {}

    def guarded(name: str, first: int, count: int) -> float | None:
        try:
            return sample_ms(alive[name], device, first, count)
        except Exception as error:
            if failed is None:
                raise
            del alive[name]
            failed[name] = f"{type(error).__name__}: {error}"
            return None

    for name in calls:
        if guarded(name, 0, 1) is not None:  # warm-up
            rough[name] = guarded(name, 1, 1)
    shortest = MIN_SAMPLE_MS if device == "cuda" else 0.0
    inner = {name: max(1, round(shortest / max(ms, 1e-3))) for name, ms in rough.items() if ms}
    round_s = sum(rough[name] * inner[name] for name in inner) / 1e3
    repeats = int(max(min_repeats, min(max_repeats, budget_s / max(1e-6, round_s))))
    samples: dict[str, list[float]] = {name: [] for name in alive}
    turn = 2
    for repeat in range(repeats):
        names = list(alive)
        shift = repeat % max(1, len(names))
        for name in names[shift:] + names[:shift]:
            ms = guarded(name, turn, inner[name])
            turn += inner[name]
            if ms is not None:
                samples[name].append(ms)
    return {
        name: {"min": min(ms), "median": statistics.median(ms), "max": max(ms), "repeats": repeats, "calls": inner[name]}
        for name, ms in samples.items() if name in alive
    }  # fmt: skip
