"""What a result was obtained on: versions and hardware."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .markdown import counted

PACKAGES = ("fpsattention", "torch", "diffusers", "transformers", "numpy", "scikit-image", "matplotlib")


def environment(device: str, packages: Sequence[str] = PACKAGES) -> dict[str, Any]:
    """Versions and hardware; ``device`` is "cpu" or "cuda", which is asked for its name. Packages that are absent are None."""
    versions: dict[str, str | None] = {}
    for name in packages:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    gpu = torch.cuda.get_device_name() if device == "cuda" else None
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None,
        "device": gpu or f"CPU, {counted(torch.get_num_threads(), 'thread')}",
        "versions": versions,
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"
