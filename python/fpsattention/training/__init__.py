"""Fine-tuning through the FP8 sparse forward. See ``docs/training.md``. Nothing heavy is imported until it is asked for."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import TrainConfig
    from .data import LatentFolder, write_synthetic
    from .objective import flow_matching_loss, rollout, sample_sigma, step_distillation_loss, velocity_loss
    from .teacher import Teacher
    from .trainer import TrainResult, train

_WHERE = {
    "LatentFolder": "data",
    "Teacher": "teacher",
    "TrainConfig": "config",
    "TrainResult": "trainer",
    "flow_matching_loss": "objective",
    "rollout": "objective",
    "sample_sigma": "objective",
    "step_distillation_loss": "objective",
    "train": "trainer",
    "velocity_loss": "objective",
    "write_synthetic": "data",
}

__all__ = [
    "LatentFolder",
    "Teacher",
    "TrainConfig",
    "TrainResult",
    "flow_matching_loss",
    "rollout",
    "sample_sigma",
    "step_distillation_loss",
    "train",
    "velocity_loss",
    "write_synthetic",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_WHERE[name]}", __name__), name)
