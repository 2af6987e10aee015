"""Clocks, power and temperature through nvidia-smi. Reads the GPU's state, changes nothing."""

from __future__ import annotations

import csv
import shutil
import statistics
import subprocess
from pathlib import Path
from typing import Any

_FIELDS = (
    "clocks.sm", "clocks.mem", "power.draw", "temperature.gpu", "utilization.gpu", "memory.used",
    "clocks_event_reasons.active",
)  # fmt: skip
_STATIC = (
    "name",
    "driver_version",
    "power.limit",
    "clocks.max.sm",
    "clocks.max.mem",
    "vbios_version",
    "ecc.mode.current",
)
_INTERVAL_MS = 250


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _query(fields: tuple[str, ...]) -> dict[str, Any]:
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return {"absent": "nvidia-smi is not on PATH"}
    try:
        run = subprocess.run(
            [smi, "-i", "0", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"],
            capture_output=True, text=True, timeout=15,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"absent": f"nvidia-smi: {type(error).__name__}"}
    if run.returncode != 0 or not run.stdout.strip():
        return {"absent": f"nvidia-smi answered {run.returncode}: {(run.stderr or run.stdout).strip()[:200]}"}
    values = [value.strip() for value in run.stdout.strip().splitlines()[0].split(",")]
    return {
        field: _number(value) if _number(value) is not None else value
        for field, value in zip(fields, values, strict=True)
    }


def snapshot() -> dict[str, Any]:
    """One reading of the changing fields: MHz, W, degrees C, %, MiB."""
    return _query(_FIELDS)


def static() -> dict[str, Any]:
    """Driver, limits and maximum clocks."""
    return _query(_STATIC)


class Sampler:
    """Samples in a process of its own while a part runs; ``stop`` gives min, median and max of each field."""

    def __init__(self, path: Path):
        self._path = path
        self._process: subprocess.Popen | None = None
        smi = shutil.which("nvidia-smi")
        if smi is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "w") as file:
            self._process = subprocess.Popen(
                [smi, "-i", "0", f"--query-gpu={','.join(_FIELDS)}", "--format=csv,noheader,nounits", "-lms", str(_INTERVAL_MS)],
                stdout=file, stderr=subprocess.DEVNULL,
            )  # fmt: skip

    def stop(self) -> dict[str, Any] | None:
        """Summary of the samples, or None where there are none."""
        if self._process is None:
            return None
        self._process.terminate()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
        return summarize(self._path)


def summarize(path: Path) -> dict[str, Any] | None:
    """min, median and max of every numeric column of a sample file; the set of clock-event reasons seen."""
    try:
        rows = [row for row in csv.reader(path.open()) if len(row) == len(_FIELDS)]
    except OSError:
        return None
    if not rows:
        return None
    summary: dict[str, Any] = {"samples": len(rows), "interval_ms": _INTERVAL_MS}
    for column, field in enumerate(_FIELDS):
        values = [_number(row[column].strip()) for row in rows]
        numbers = [value for value in values if value is not None]
        if numbers:
            summary[field] = {"min": min(numbers), "median": statistics.median(numbers), "max": max(numbers)}
        elif field.endswith("reasons.active"):
            summary[field] = sorted({row[column].strip() for row in rows})
    return summary
