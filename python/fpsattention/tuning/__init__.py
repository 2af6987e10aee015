"""``fpsattention.tune``: a schedule found for one model, from a bound on what its output may lose. See ``docs/tuning.md``."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .settings import Target, TuneSettings
    from .tuner import TuneResult, tune

_WHERE = {"Target": "settings", "TuneSettings": "settings", "TuneResult": "tuner", "tune": "tuner"}

__all__ = ["Target", "TuneResult", "TuneSettings", "tune"]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_WHERE[name]}", __name__), name)
