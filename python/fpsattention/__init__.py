"""FP8 + 3D-tile-sparse attention for video diffusion transformers on NVIDIA Hopper GPUs, trainable straight through.

``import fpsattention as fps``: :func:`attention`, :func:`plan`, :func:`sliding_tile_mask`, :func:`dense_mask`,
:class:`BlockMask`, :class:`TileLayout`, :class:`Schedule`, :func:`apply`. Importing needs no GPU and no compiled part;
what is missing raises :class:`BuildError` where it is used, and ``fpsattn doctor`` explains it.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

from .errors import BuildError, ConfigError, UnsupportedError

if TYPE_CHECKING:
    from .functional import attention
    from .integrations.diffusers import apply, remove, status
    from .layout.masks import BlockMask, dense_mask, sliding_tile_mask
    from .layout.tiles import TileLayout, clear_plan_cache, plan
    from .schedule import Schedule

try:
    __version__ = importlib.metadata.version("fpsattention")
except importlib.metadata.PackageNotFoundError:  # used from a source folder
    __version__ = "0+source"

_LAZY = {
    "apply": "integrations.diffusers",
    "attention": "functional",
    "BlockMask": "layout.masks",
    "dense_mask": "layout.masks",
    "sliding_tile_mask": "layout.masks",
    "Schedule": "schedule",
    "TileLayout": "layout.tiles",
    "clear_plan_cache": "layout.tiles",
    "plan": "layout.tiles",
    "remove": "integrations.diffusers",
    "status": "integrations.diffusers",
}

__all__ = [
    "BlockMask",
    "BuildError",
    "ConfigError",
    "Schedule",
    "TileLayout",
    "UnsupportedError",
    "apply",
    "attention",
    "clear_plan_cache",
    "dense_mask",
    "plan",
    "remove",
    "sliding_tile_mask",
    "status",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
