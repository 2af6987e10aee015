"""FP8 + 3D-tile-sparse attention for video diffusion transformers on NVIDIA Hopper GPUs, trainable straight through.

``import fpsattention as fps``: :func:`attention`, :func:`plan`, :func:`sliding_tile_mask`, :func:`dense_mask`,
:class:`BlockMask`, :class:`TileLayout`, :class:`Norm`, :class:`Rope`, :class:`Schedule` (of :class:`Phase` and :class:`Level`), :func:`apply`,
:func:`tune`. Each is
imported when first used: importing the package needs no GPU, no compiled part and not even torch. What is missing raises
:class:`BuildError` where it is used, and ``fpsattn doctor`` explains it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .errors import BuildError, ConfigError, UnsupportedError

if TYPE_CHECKING:
    from . import parallel
    from .functional import attention
    from .integrations.diffusers import apply, remove, status
    from .layout.masks import BlockMask, dense_mask, sliding_tile_mask
    from .layout.tiles import TileLayout, clear_plan_cache, plan
    from .ops.prepare import Norm, Rope
    from .schedule import Level, Phase, Schedule
    from .tuning.tuner import tune

    __version__: str

_LAZY = {  # name: the module it is imported from when first used
    "apply": "integrations.diffusers",
    "attention": "functional",
    "BlockMask": "layout.masks",
    "dense_mask": "layout.masks",
    "sliding_tile_mask": "layout.masks",
    "Level": "schedule",
    "Norm": "ops.prepare",
    "Phase": "schedule",
    "Rope": "ops.prepare",
    "Schedule": "schedule",
    "TileLayout": "layout.tiles",
    "clear_plan_cache": "layout.tiles",
    "parallel": "",  # the subpackage itself
    "plan": "layout.tiles",
    "remove": "integrations.diffusers",
    "status": "integrations.diffusers",
    "tune": "tuning",
}

__all__ = [
    "BlockMask",
    "BuildError",
    "ConfigError",
    "Level",
    "Norm",
    "Phase",
    "Rope",
    "Schedule",
    "TileLayout",
    "UnsupportedError",
    "apply",
    "attention",
    "clear_plan_cache",
    "dense_mask",
    "parallel",
    "plan",
    "remove",
    "sliding_tile_mask",
    "status",
    "tune",
]


def __getattr__(name: str) -> object:
    import importlib

    if name == "__version__":
        value: object = _version()
    elif name in _LAZY:
        where = _LAZY[name]
        value = (
            getattr(importlib.import_module(f".{where}", __name__), name)
            if where
            else importlib.import_module(f".{name}", __name__)
        )
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("fpsattention")
    except PackageNotFoundError:  # used from a source folder
        return "0+source"


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
