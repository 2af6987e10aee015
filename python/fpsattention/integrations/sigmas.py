"""Sigma of the samples of a forward: on the device always, on the host without a sync where that is possible."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class SigmaReader:
    """Turns the ``timestep`` argument of a transformer into sigmas, one per sample.

    Args:
        scheduler: returns the pipeline's current scheduler, or None (a transformer on its own).
        num_train_timesteps: timesteps are divided by it.

    The host path: a pipeline hands its transformer a view into ``scheduler.timesteps``. That tensor is copied to the host once per
    ``set_timesteps``; afterwards the view's storage and offset say which entry it is, and nothing waits for the device. Any other
    tensor (training, timesteps computed per token) is read once per transformer forward (``host_reads`` counts), never per layer.
    """

    def __init__(self, scheduler: Callable[[], Any], num_train_timesteps: int):
        self.scheduler = scheduler
        self.num_train_timesteps = num_train_timesteps
        self.host_reads = 0
        self._timesteps: Tensor | None = None
        self._version = -1
        self._values: list[float] = []

    def per_sample(self, timestep: Tensor, batch: int) -> Tensor:
        """``[B]``, in the timestep's own dtype: the maximum over tokens where ``timestep`` is (B, S); one value serves all samples."""
        if timestep.ndim == 2:  # Wan2.2 TI2V marks conditioned tokens with timestep 0
            timestep = timestep.amax(dim=1)
        return timestep.reshape(-1).expand(batch) if timestep.numel() == 1 else timestep

    def on_device(self, timestep: Tensor) -> Tensor:
        """FP64 sigma ``[B]``: in FP64, so that the device and the host agree at the borders of phases."""
        return timestep.to(torch.float64) / self.num_train_timesteps

    def on_host(self, timestep: Tensor) -> list[float]:
        """Sigma of every sample, clipped to [0, 1]."""
        values = self._lookup(timestep)
        if values is None:
            values = timestep.tolist()
            self.host_reads += 1
        return [min(max(value / self.num_train_timesteps, 0.0), 1.0) for value in values]

    def _lookup(self, timestep: Tensor) -> list[float] | None:
        known = getattr(self.scheduler(), "timesteps", None)
        if (
            not isinstance(known, Tensor)
            or known.ndim != 1
            or known.dtype != timestep.dtype
            or not known.is_contiguous()
        ):
            return None
        if known.untyped_storage().data_ptr() != timestep.untyped_storage().data_ptr():
            return None
        if self._timesteps is not known or self._version != known._version:
            self._timesteps, self._version, self._values = known, known._version, known.tolist()
        first = timestep.storage_offset() - known.storage_offset()
        indices = [first + i * timestep.stride(0) for i in range(timestep.shape[0])]
        return [self._values[i] for i in indices] if all(0 <= i < len(self._values) for i in indices) else None
