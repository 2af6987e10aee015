"""``fpsattn demo``: one small video with and without FPSAttention, and where the error comes from."""

from .config import DemoConfig
from .demo import run_demo

__all__ = ["DemoConfig", "run_demo"]
