"""Parts of the suite, in the order in which they run. A part is a module with:

NAME, TITLE     its name in results.json and a line for people
WEIGHTS         {"quick": seconds, "full": seconds, "dry": seconds}: its share of the run's time
CORRECTNESS     True where the part exists to say right or wrong (its being skipped is then worth a warning)
OWN_CODE        True where a crash or a hang is a fault of this library (and so fails the run)
units(ctx)      yields ``Unit``s, or raises ``Skip(reason)`` when there is nothing it can do here
"""

from __future__ import annotations

import importlib
from types import ModuleType

ORDER = ("facts", "build", "cpp_tests", "python_tests", "sanitizer", "kernels", "peers", "end_to_end")


def load(name: str) -> ModuleType:
    """The module of part ``name``; KeyError for a name that is not in ORDER."""
    if name not in ORDER:
        raise KeyError(name)
    return importlib.import_module(f"benchmarks.suite.parts.{name}")
