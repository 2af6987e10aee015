"""Where the time of a call goes: quantization, self-attention, everything else; by torch's profiler.

FPSAttention's self-attention is the op ``fpsattn::quantize`` followed by ``fpsattn::forward``; the model's own is torch's SDPA with
as many keys as queries (cross-attention has fewer, and is part of the rest). The profiler sees all of them by name.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.profiler import ProfilerActivity

PARTS = ("quantize", "attention", "rest")
_PART_OF_OP = {"fpsattn::quantize": "quantize", "fpsattn::forward": "attention"}
T = TypeVar("T")


def part_of(event: Any) -> str | None:
    """The part that a profiler event (an op's ``FunctionEvent``) belongs to by itself; None: look at its parent."""
    if event.name == "aten::scaled_dot_product_attention":
        query, key = event.input_shapes[:2]
        return "attention" if query[-2] == key[-2] else "rest"
    return _PART_OF_OP.get(event.name)


def _part(event: Any) -> str:
    while event is not None:
        part = part_of(event)
        if part is not None:
            return part
        event = event.cpu_parent
    return "rest"


def time_split(call: Callable[[], T], device: str) -> tuple[T, dict[str, float]]:
    """Run ``call`` under the profiler; its result, and seconds per part.

    On "cuda" these are durations of kernels, by the op that launched them; on "cpu" the ops' own time, so that they sum to the time
    spent in ops.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler writes two lines to stderr each time
    on_gpu = device == "cuda"
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_gpu else [])
    with torch.profiler.profile(activities=activities, record_shapes=True) as recorded:
        result = call()
        if on_gpu:
            torch.cuda.synchronize()
    seconds = dict.fromkeys(PARTS, 0.0)
    for event in recorded.events():
        own = sum(kernel.duration for kernel in event.kernels) if on_gpu else event.self_cpu_time_total
        if own:
            seconds[_part(event)] += own / 1e6
    return result, seconds
