"""Where the time of a call goes: quantization, self-attention, linear layers, everything else; by torch's profiler.

FPSAttention's self-attention is the op ``fpsattn::quantize``, or ``fpsattn::prepare`` with norms and RoPE in it, followed by ``fpsattn::forward``; the model's own is torch's SDPA with
as many keys as queries (cross-attention has fewer, and is part of the rest). The profiler sees all of them by name.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, record_function

PARTS = ("quantize", "attention", "rest")
FINE_PARTS = (
    "attention",
    "quantize",
    "linears",
    "cross-attention",
    "norms",
)  # as fpsattention.estimate; norms: what is left
_SELF_ATTENTION, _CROSS_ATTENTION = "fpsattention: self-attention", "fpsattention: cross-attention"
_PART_OF = {
    "fpsattn::quantize": "quantize", "fpsattn::prepare": "quantize", "fpsattn::forward": "attention", _SELF_ATTENTION: "attention", _CROSS_ATTENTION: "cross-attention",
    **dict.fromkeys(("aten::mm", "aten::addmm", "aten::bmm", "aten::linear", "aten::_scaled_mm"), "linears"),
}  # fmt: skip
T = TypeVar("T")


class _MarkSelfAttention(TorchFunctionMode):
    """Puts torch's own attention under a name. (The profiler could tell shapes, but keeps the tensors' memory for it.)"""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is scaled_dot_product_attention:
            query, key = (kwargs[name] if name in kwargs else args[i] for i, name in enumerate(("query", "key")))
            with record_function(_SELF_ATTENTION if query.shape[-2] == key.shape[-2] else _CROSS_ATTENTION):
                return func(*args, **kwargs)
        return func(*args, **kwargs)


def _part(event: Any) -> str:
    found = "norms"
    while event is not None:  # the outermost name counts: an attention may multiply matrices inside
        found = _PART_OF.get(event.name, found)
        event = event.cpu_parent
    return found


def time_split(call: Callable[[], T], device: str, fine: bool = False) -> tuple[T, dict[str, float]]:
    """Run ``call`` under the profiler; its result, and seconds per part: of ``PARTS``, or with ``fine`` of ``FINE_PARTS``.

    On "cuda" these are durations of kernels, by the op that launched them; on "cpu" the ops' own time, so that they sum to the time
    spent in ops.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler writes two lines to stderr each time
    on_gpu = device == "cuda"
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_gpu else [])
    with torch.profiler.profile(activities=activities) as recorded, _MarkSelfAttention():
        result = call()
        if on_gpu:
            torch.cuda.synchronize()
    seconds = dict.fromkeys(FINE_PARTS, 0.0)
    for event in recorded.events():
        own = sum(kernel.duration for kernel in event.kernels) if on_gpu else event.self_cpu_time_total
        if own:
            seconds[_part(event)] += own / 1e6
    return result, seconds if fine else coarse(seconds)


def coarse(seconds: dict[str, float]) -> dict[str, float]:
    """``PARTS`` of ``FINE_PARTS``."""
    known = {part: seconds[part] for part in PARTS[:2]}
    return {**known, "rest": sum(time for part, time in seconds.items() if part not in known)}
