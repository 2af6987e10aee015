"""Which precision and sparsity each noise level gets: :class:`Schedule`, its :class:`Phase` and :class:`Level`, the presets."""

from .schedule import Level, Phase, Schedule, Window

__all__ = ["Level", "Phase", "Schedule", "Window"]
