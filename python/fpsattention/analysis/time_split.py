"""Where the time of a call goes: quantization, self-attention, linear layers, everything else.

On a GPU torch's profiler tells, by the ops that launched the kernels. On the CPU every op is timed as it is called: the profiler would take longer to
list them than they ran.

FPSAttention's self-attention is the op ``fpsattn::quantize``, or ``fpsattn::prepare`` with norms and RoPE in it, followed by ``fpsattn::forward``; the model's own is torch's SDPA with
as many keys as queries (cross-attention has fewer, and is part of the rest). All of them have names.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, record_function
from torch.utils._python_dispatch import TorchDispatchMode

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
_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
T = TypeVar("T")


class _MarkSelfAttention(TorchFunctionMode):
    """Puts torch's own attention under a name. (The profiler could tell shapes, but keeps the tensors' memory for it.)"""

    def __init__(self) -> None:
        super().__init__()
        self.within: str | None = None  # that name, while it runs

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not scaled_dot_product_attention:
            return func(*args, **kwargs)
        query, key = (kwargs[name] if name in kwargs else args[i] for i, name in enumerate(("query", "key")))
        self.within = _SELF_ATTENTION if query.shape[-2] == key.shape[-2] else _CROSS_ATTENTION
        try:
            with record_function(self.within):
                return func(*args, **kwargs)
        finally:
            self.within = None


class _TimeOps(TorchDispatchMode):
    """Seconds per part of the ops that are called; what an op calls itself is its own."""

    def __init__(self, marked: _MarkSelfAttention):
        super().__init__()
        self.marked, self.seconds = marked, dict.fromkeys(FINE_PARTS, 0.0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = self.marked.within or func.name(), kwargs or {}
        if name.startswith("fpsattn::") and name not in _PART_OF:  # made of those that are
            with self:
                return func.redispatch(_CPU, *args, **kwargs)
        start = time.perf_counter()
        result = func(*args, **kwargs)
        self.seconds[_PART_OF.get(name, "norms")] += time.perf_counter() - start
        return result


def _part(event: Any) -> str:
    found = "norms"
    while event is not None:  # the outermost name counts: an attention may multiply matrices inside
        found = _PART_OF.get(event.name, found)
        event = event.cpu_parent
    return found


def time_split(call: Callable[[], T], device: str, fine: bool = False) -> tuple[T, dict[str, float]]:
    """Run ``call``; its result, and seconds per part: of ``PARTS``, or with ``fine`` of ``FINE_PARTS``.

    On "cuda" these are durations of kernels, by the op that launched them; on "cpu" those of the ops, so that they sum to the time
    spent in ops.
    """
    marked = _MarkSelfAttention()
    if device == "cuda":
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler writes two lines to stderr each time
        with torch.profiler.profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded, marked:
            result = call()
            torch.cuda.synchronize()
        seconds = dict.fromkeys(FINE_PARTS, 0.0)
        for event in recorded.events():
            if own := sum(kernel.duration for kernel in event.kernels):
                seconds[_part(event)] += own / 1e6
    else:
        with marked, _TimeOps(marked) as timed:
            result = call()
        seconds = timed.seconds
    return result, seconds if fine else coarse(seconds)


def coarse(seconds: dict[str, float]) -> dict[str, float]:
    """``PARTS`` of ``FINE_PARTS``."""
    known = {part: seconds[part] for part in PARTS[:2]}
    return {**known, "rest": sum(time for part, time in seconds.items() if part not in known)}
