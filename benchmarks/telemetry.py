"""Clocks, power and temperature through NVML (nvidia-ml-py). Reads the GPU's state, changes nothing."""

from __future__ import annotations

import statistics
import threading
import time
from collections import deque
from typing import Any

INTERVAL_S = 0.25
KEPT = 4096  # samples: 17 minutes


class Telemetry:
    """Samples device 0 in a thread. In the process that only supervises: nothing runs beside what is measured."""

    def __init__(self) -> None:
        self.absent: str | None = None
        self._samples: deque[tuple[float, dict[str, float]]] = deque(maxlen=KEPT)
        self._stop = threading.Event()
        try:
            import pynvml

            pynvml.nvmlInit()
            self._nvml, self._device = pynvml, pynvml.nvmlDeviceGetHandleByIndex(0)
        except Exception as error:  # no package, no driver, no device
            self.absent = f"{type(error).__name__}: {error} (pip install nvidia-ml-py)"
            return
        threading.Thread(target=self._run, daemon=True).start()

    def static(self) -> dict[str, Any]:
        """Name, driver, limits; or why there is nothing to say."""
        if self.absent:
            return {"absent": self.absent}
        n, device = self._nvml, self._device
        return {
            "name": n.nvmlDeviceGetName(device), "uuid": n.nvmlDeviceGetUUID(device), "driver": n.nvmlSystemGetDriverVersion(),
            "memory_bytes": n.nvmlDeviceGetMemoryInfo(device).total,
            "power_limit_w": n.nvmlDeviceGetPowerManagementLimit(device) / 1e3,
            "max_sm_mhz": n.nvmlDeviceGetMaxClockInfo(device, n.NVML_CLOCK_SM),
            "max_memory_mhz": n.nvmlDeviceGetMaxClockInfo(device, n.NVML_CLOCK_MEM),
        }  # fmt: skip

    def _sample(self) -> dict[str, float]:
        n, device = self._nvml, self._device
        return {
            "sm_mhz": n.nvmlDeviceGetClockInfo(device, n.NVML_CLOCK_SM),
            "memory_mhz": n.nvmlDeviceGetClockInfo(device, n.NVML_CLOCK_MEM),
            "power_w": n.nvmlDeviceGetPowerUsage(device) / 1e3,
            "temperature_c": n.nvmlDeviceGetTemperature(device, n.NVML_TEMPERATURE_GPU),
            "event_reasons": n.nvmlDeviceGetCurrentClocksEventReasons(device),
        }

    def _run(self) -> None:
        while not self._stop.wait(INTERVAL_S):
            try:
                self._samples.append((time.time(), self._sample()))
            except self._nvml.NVMLError as error:
                self.absent = str(error)
                return

    def between(self, start: float, stop: float) -> dict[str, Any] | None:
        """min, median, max of every field between two times (``time.time()``), and the clock-event reasons seen; None without samples."""
        samples = [values for when, values in list(self._samples) if start <= when <= stop]
        if not samples:
            return None
        fields = [name for name in samples[0] if name != "event_reasons"]
        columns = {name: [sample[name] for sample in samples] for name in fields}
        return {
            "samples": len(samples), "event_reasons": sorted({hex(int(sample["event_reasons"])) for sample in samples}),
            **{name: [min(column), statistics.median(column), max(column)] for name, column in columns.items()},
        }  # fmt: skip

    def stop(self) -> None:
        self._stop.set()
