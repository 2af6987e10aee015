"""Sigma of the samples of a forward: on the device always, on the host without a sync where that is possible."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


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
        num_train_timesteps: see ``convention``.
        convention: ``(timestep, num_train_timesteps)`` to sigma, for floats and tensors: ``Adapter.sigma``.

    The host path: a pipeline hands its transformer a view into ``scheduler.timesteps``. That tensor is copied to the host once per
    ``set_timesteps``; afterwards the view's storage and offset say which entry it is, and nothing waits for the device. Any other
    tensor (training, timesteps computed per token) is read once per transformer forward (``host_reads`` counts), never per layer.
    """

    def __init__(self, scheduler: SchedulerOf, num_train_timesteps: int, convention: Callable[[Any, int], Any]):
        self.scheduler = scheduler
        self.num_train_timesteps = num_train_timesteps
        self.convention = convention
        self.host_reads = 0
        self._known: tuple[Tensor, int, list[float]] | None = (
            None  # timesteps, their version, their values: replaced as a whole
        )
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "host_reads": 0, "_known": None, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    def per_sample(self, timestep: Tensor, batch: int) -> Tensor:
        """``[B]``: several values per sample (Wan2.2 TI2V marks conditioned tokens with 0) are kept, to be reduced as sigmas."""
        if timestep.numel() == 1:
            return timestep.reshape(1).expand(batch)
        return timestep if timestep.ndim == 1 else timestep.flatten(1)

    def on_device(self, timestep: Tensor) -> Tensor:
        """FP64 sigma ``[B]``: in FP64, so that the device and the host agree at the borders of phases."""
        sigma = self.convention(timestep.to(torch.float64), self.num_train_timesteps)
        return sigma if sigma.ndim == 1 else sigma.amax(dim=1)

    def on_host(self, timestep: Tensor) -> list[float]:
        """Sigma of every sample, clipped to [0, 1]."""
        values = self._lookup(timestep)
        if values is None:
            with self._lock:
                self.host_reads += 1
            return [min(max(sigma, 0.0), 1.0) for sigma in self.on_device(timestep).tolist()]
        return [min(max(float(self.convention(value, self.num_train_timesteps)), 0.0), 1.0) for value in values]

    def _lookup(self, timestep: Tensor) -> list[float] | None:
        steps = getattr(self.scheduler(), "timesteps", None)
        if (
            timestep.ndim != 1
            or not isinstance(steps, Tensor)
            or steps.ndim != 1
            or steps.dtype != timestep.dtype
            or not steps.is_contiguous()
            or steps.untyped_storage().data_ptr() != timestep.untyped_storage().data_ptr()
        ):
            return None
        version = (
            0 if steps.is_inference() else steps._version
        )  # inference tensors have no version: nobody writes to them
        known = self._known
        if known is None or known[0] is not steps or known[1] != version:
            known = self._known = (steps, version, steps.tolist())
        first = timestep.storage_offset() - steps.storage_offset()
        indices = [first + i * timestep.stride(0) for i in range(timestep.shape[0])]
        values = known[2]
        return [values[i] for i in indices] if all(0 <= i < len(values) for i in indices) else None
