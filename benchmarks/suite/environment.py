"""What the numbers were measured on. ``python -m benchmarks.suite.environment`` prints it: the supervisor itself stays off CUDA."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from typing import Any

_PACKAGES = (
    "fpsattention", "torch", "triton", "diffusers", "nvidia-cudnn-frontend", "nvidia-cudnn-cu13", "nvidia-cudnn-cu12",
    "sageattention", "flashinfer-python", "flash-attn-3", "flash-attn", "spas-sage-attn", "fastvideo-kernel",
)  # fmt: skip


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _gpu() -> dict[str, Any] | None:
    import torch

    if not torch.cuda.is_available():
        return None
    p = torch.cuda.get_device_properties(0)
    return {
        "name": p.name, "uuid": str(getattr(p, "uuid", "")) or None, "compute_capability": f"{p.major}.{p.minor}",
        "multiprocessors": p.multi_processor_count, "memory_bytes": p.total_memory,
        "l2_bytes": getattr(p, "L2_cache_size", None),
    }  # fmt: skip


def collect() -> dict[str, Any]:
    """GPU, libraries and host. Absent things are None, never left out."""
    import torch

    packages = {}
    for name in _PACKAGES:
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            packages[name] = None
    cudnn = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    return {
        "gpu": _gpu(), "torch": torch.__version__, "cuda": torch.version.cuda, "cudnn": cudnn,
        "python": platform.python_version(), "system": f"{platform.system()} {platform.release()}",
        "cpu": _cpu_name(), "cpu_cores": os.cpu_count(), "packages": packages,
        "settings": {key: os.environ[key] for key in sorted(os.environ) if key.startswith(("FPSATTN_", "CUDA_", "HOPPER_EMU"))},
    }  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(collect()))
