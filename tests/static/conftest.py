"""Machine code is disassembled, and loops are predicted, once per run, whichever worker of pytest-xdist comes first."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock  # comes with torch

sys.path.insert(0, str(Path(__file__).parent))
import budgets
import predictions


def once(factory: pytest.TempPathFactory, name: str, read: Callable[[], Any]) -> Any:
    """``read()``, which must fit into JSON, for all workers of a run; a skip where there is no machine code."""
    folder = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # of the whole run; the worker's own is below it
    kept = folder / f"{name}.json"
    with FileLock(f"{kept}.lock"):
        if not kept.exists():
            try:
                kept.write_text(json.dumps(read()))
            except budgets.Unavailable as reason:
                pytest.skip(str(reason))
        return json.loads(kept.read_text())


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What :func:`budgets.read_kernels` reads."""
    return once(tmp_path_factory, "kernels", budgets.read_kernels)


@pytest.fixture(scope="session")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Predictions of every described loop."""
    names = list(predictions.read_data()["kernels"])
    return once(tmp_path_factory, "predictions", lambda: predictions.predict_all(names))
