"""Where the time of a denoising step goes, and where it could go: from FLOPs, bytes and rates. ``fpsattn estimate``, docs/end_to_end.md."""

from .forward import CONFIGURATIONS, Configuration, Estimate, estimate
from .kernels import Kernel, block_kernels
from .models import MODELS, Model
from .rates import BASELINES, GPUS, Gpu, Rate
from .table import Time, render

__all__ = [
    "BASELINES", "CONFIGURATIONS", "GPUS", "MODELS", "Configuration", "Estimate", "Gpu", "Kernel", "Model", "Rate", "Time",
    "block_kernels", "estimate", "render",
]  # fmt: skip
