"""Which precision and sparsity each noise level gets: :class:`Schedule`, its :class:`Phase` and :class:`Level`, the presets."""

from .level import Level, Window
from .schedule import Phase, Schedule

__all__ = ["Level", "Phase", "Schedule", "Window"]
