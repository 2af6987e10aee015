"""Fine-tuning through the FP8 sparse forward. See ``docs/training.md``."""

from .config import TrainConfig
from .data import LatentFolder, write_synthetic
from .objective import flow_matching_loss, sample_sigma
from .trainer import TrainResult, train

__all__ = [
    "LatentFolder",
    "TrainConfig",
    "TrainResult",
    "flow_matching_loss",
    "sample_sigma",
    "train",
    "write_synthetic",
]
