"""Exceptions. Messages read ``fpsattention.<op>: <argument> <what came>, <what was wanted>: <hint>``."""

from __future__ import annotations


class ConfigError(ValueError):
    """An argument, a schedule or a file is wrong; the message says which, what came and what was wanted."""


class UnsupportedError(RuntimeError):
    """The request is well formed, but this model, device or build cannot do it; the message says why and what can."""


class BuildError(ImportError):
    """A part of the library, or a package it needs, is not there; the message carries the command that mends it."""
