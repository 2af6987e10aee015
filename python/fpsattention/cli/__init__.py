"""The ``fpsattn`` command."""

from .main import app

__all__ = ["app"]
