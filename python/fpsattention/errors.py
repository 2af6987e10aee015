"""Exceptions of the package. Texts read ``fpsattention.<op>: <argument> <what came>, <what was expected>: <hint>``."""


class ConfigError(ValueError):
    """An argument, a file or a combination of settings that can never work."""


class UnsupportedError(RuntimeError):
    """A valid request that this machine, model or build cannot serve."""


class BuildError(ImportError):
    """A compiled part of the package is missing or does not load."""


def of_library(text: str) -> Exception | None:
    """What an error of the C++ library is in Python, by its text; None: not a matter of arguments or of the machine's kind.

    ``status.h`` writes "fpsattn.<op>: ...", and "... cudaSomething(...) failed: ..." where the CUDA runtime failed, which stays the
    RuntimeError that it is.
    """
    if not text.startswith("fpsattn.") or " failed: " in text:
        return None
    text = text.replace("fpsattn.", "fpsattention.", 1)
    machine = "has compute capability" in text or "has no CUDA support" in text
    return UnsupportedError(text) if machine else ConfigError(text)
