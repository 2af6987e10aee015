"""``fpsattn demo``: one small video with and without FPSAttention, and where the error comes from."""

from .demo import DemoConfig, run_demo

__all__ = ["DemoConfig", "run_demo"]
