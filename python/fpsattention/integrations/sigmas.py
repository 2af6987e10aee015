"""Sigma of the samples of a forward: on the device always, on the host without a sync where that is possible."""

from __future__ import annotations

import itertools
import threading
import weakref
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor

from ..schedule.scheduler import shifts_dynamically
from .adapters import Adapter

_RUNS = itertools.count()
KEPT_RUNS = 32  # sampling runs whose timesteps are kept on the host: requests that are served at the same time


class SchedulerOf:
    """The current scheduler of a pipeline, held weakly; None where there is no pipeline (any more). Copies and pickles hold none."""

    def __init__(self, pipeline: Any = None):
        self._pipeline = None if pipeline is None else weakref.ref(pipeline)

    def __call__(self) -> Any:
        return getattr(self._pipeline() if self._pipeline is not None else None, "scheduler", None)

    def __getstate__(self) -> dict[str, Any]:
        return {"_pipeline": None}


class SigmaReader:
    """Turns the noise level that a transformer receives into sigmas, one per sample.

    Args:
        scheduler: returns the pipeline's current scheduler, or None (a transformer on its own).
        num_train_timesteps, adapter: ``adapter.sigma(timestep, num_train_timesteps)`` is sigma.

    The host path: a pipeline hands its transformer a view of one entry of ``scheduler.timesteps``. That tensor is copied to the host
    once per ``set_timesteps``; afterwards the view's storage and offset say which entry it is, and nothing waits for the device.
    Any other tensor (training, timesteps computed per token) is read once per transformer forward (``host_reads`` counts), never per
    layer. Requests with schedulers of their own are served alike: the view knows what it is a view of.
    """

    def __init__(self, scheduler: SchedulerOf, num_train_timesteps: int, adapter: Adapter):
        self.scheduler = scheduler
        self.num_train_timesteps = num_train_timesteps
        self.adapter = adapter
        self.host_reads = 0
        # id -> tensor, version, values, which run it is of
        self._read: OrderedDict[int, tuple[Tensor, int, list[float], int]] = OrderedDict()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "host_reads": 0, "_read": OrderedDict(), "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    def per_sample(self, timestep: Tensor, batch: int) -> Tensor:
        """``[B]``: several values per sample (Wan2.2 TI2V marks conditioned tokens with 0) are kept, to be reduced as sigmas."""
        if timestep.numel() == 1:
            return timestep.reshape(1).expand(batch)
        return timestep if timestep.ndim == 1 else timestep.flatten(1)

    def on_device(self, timestep: Tensor) -> Tensor:
        """FP64 sigma ``[B]``: in FP64, so that the device and the host agree at the borders of phases."""
        sigma = self.adapter.sigma(timestep.to(torch.float64), self.num_train_timesteps)
        return sigma if sigma.ndim == 1 else sigma.amax(dim=1)

    def on_host(self, timestep: Tensor) -> list[float]:
        """Sigma of every sample, clipped to [0, 1]."""
        entries = self._entries(timestep)
        if entries is None:
            with self._lock:
                self.host_reads += 1
            return [min(max(sigma, 0.0), 1.0) for sigma in self.on_device(timestep).tolist()]
        values, indices = entries
        return [self._sigma(values[i]) for i in indices]

    def run(self, timestep: Tensor) -> int | None:
        """Which sampling run a forward is a step of (numbers are never used again), or None where :meth:`trajectory` is."""
        if self.trajectory(timestep) is None:
            return None
        entries = self._whole(timestep)
        whole = self.scheduler().timesteps if entries is None else entries[0]
        return self._known(whole)[3]

    def trajectory(self, timestep: Tensor) -> tuple[float, ...] | None:
        """The sigmas of all steps of the sampling run that this forward is a step of, or None: training, or not to be seen.

        A forward is a step of a run if the schedule is applied to a pipeline, nothing wants gradients, and the timestep is an entry of
        a falling tensor of timesteps. Where a model is given something computed from it, the adapter knows the sigmas of the
        scheduler, or its shift stands in, if that has one; a scheduler that shifts with the size is looked at as it is.
        """
        scheduler = self.scheduler()
        if scheduler is None or torch.is_grad_enabled():
            return None
        entries = self._entries(timestep)
        if entries is not None:
            values, indices = entries
            if len(set(indices)) > 1:
                return None
            sigmas = tuple(self._sigma(value) for value in values)
            if _falls(sigmas):
                return sigmas
        steps = getattr(scheduler, "timesteps", None)
        if isinstance(steps, Tensor) and (self.adapter.scheduled is not None or shifts_dynamically(scheduler)):
            values = self._known(steps)[2]
            if self.adapter.scheduled is not None:
                sigmas = tuple(min(max(sigma, 0.0), 1.0) for sigma in self.adapter.scheduled(values))
            else:
                total = scheduler.config.num_train_timesteps
                sigmas = tuple(min(max(value / total, 0.0), 1.0) for value in values)
                sigmas = tuple(1.0 - sigma for sigma in sigmas) if sigmas[0] < sigmas[-1] else sigmas
            return sigmas if _falls(sigmas) else None
        return None

    def _sigma(self, value: float) -> float:
        return min(max(float(self.adapter.sigma(value, self.num_train_timesteps)), 0.0), 1.0)

    def _entries(self, timestep: Tensor) -> tuple[list[float], list[int]] | None:
        """The host's copy of the tensor that ``timestep`` is a view of, and where in it its elements are."""
        found = self._whole(timestep)
        if found is None:
            return None
        whole, indices = found
        return self._known(whole, count=whole is not getattr(self.scheduler(), "timesteps", None))[2], indices

    def _whole(self, timestep: Tensor) -> tuple[Tensor, list[int]] | None:
        if timestep.ndim != 1:
            return None
        own = getattr(self.scheduler(), "timesteps", None)
        for whole in (own, timestep._base):
            if (
                isinstance(whole, Tensor)
                and whole.ndim == 1
                and whole.dtype == timestep.dtype
                and whole.is_contiguous()
                and whole.untyped_storage().data_ptr() == timestep.untyped_storage().data_ptr()
            ):
                first = timestep.storage_offset() - whole.storage_offset()
                indices = [int(first + i * timestep.stride(0)) for i in range(timestep.shape[0])]
                if all(0 <= i < whole.shape[0] for i in indices):
                    return whole, indices
        return None

    def _known(self, whole: Tensor, count: bool = False) -> tuple[Tensor, int, list[float], int]:
        # Inference tensors have no version: nobody writes to timesteps there.
        version = 0 if whole.is_inference() else whole._version
        with self._lock:
            known = self._read.get(id(whole))  # the tensor is held, so its id is its own
            if known is None or known[0] is not whole or known[1] != version:
                known = (whole, version, whole.tolist(), next(_RUNS))
                self._read[id(whole)] = known
                self.host_reads += count
                while len(self._read) > KEPT_RUNS:
                    self._read.popitem(last=False)
            self._read.move_to_end(id(whole))
            return known


def _falls(sigmas: tuple[float, ...]) -> bool:
    return all(a >= b for a, b in zip(sigmas, sigmas[1:], strict=False)) and sigmas[0] > sigmas[-1]
