"""Imports of packages that only the command line and the evaluation tools need."""

from __future__ import annotations

import importlib
from types import ModuleType

from ..errors import BuildError

_DISTRIBUTION = {"skimage": "scikit-image", "imageio_ffmpeg": "imageio-ffmpeg"}


def require(module: str, needed_for: str, extra: str = "demo") -> ModuleType:
    """Import `module`; where it is missing, raise `BuildError` with the command that installs the extra it is part of."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        name = _DISTRIBUTION.get(module.split(".")[0], module.split(".")[0])
        raise BuildError(
            f"fpsattention.{needed_for}: the package {name!r} cannot be imported ({error}): "
            f'pip install "fpsattention[{extra}]"'
        ) from error
