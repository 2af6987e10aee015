"""Exceptions of the package. Texts read ``fpsattention.<op>: <argument> <what came>, <what was wanted>: <hint>``."""


class ConfigError(ValueError):
    """An argument, a file or a combination of settings that can never work."""


class UnsupportedError(RuntimeError):
    """A valid request that this machine, model or build cannot serve."""


class BuildError(ImportError):
    """A compiled part of the package is missing or does not load."""
