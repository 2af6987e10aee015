"""A pytest plugin (``-p benchmarks.suite.pytest_stream``): one line of JSON per test, so that a killed run keeps its verdicts.

FPSATTN_PYTEST_STREAM names the file.
"""

from __future__ import annotations

import json
import os
from typing import Any


def pytest_runtest_logstart(nodeid: str, location: Any) -> None:
    _write({"event": "start", "test": nodeid})


def pytest_runtest_logreport(report: Any) -> None:
    if report.when == "call" or report.outcome != "passed":
        message = ""
        if report.outcome == "skipped" and isinstance(report.longrepr, tuple):
            message = str(report.longrepr[2])
        elif report.outcome == "failed":
            message = report.longreprtext
        _write({"event": "result", "test": report.nodeid, "outcome": report.outcome, "when": report.when,
                "message": message[-600:]})  # fmt: skip


def pytest_collectreport(report: Any) -> None:
    if report.failed:
        _write({"event": "result", "test": report.nodeid, "outcome": "failed", "when": "collect",
                "message": report.longreprtext[-600:]})  # fmt: skip


def _write(event: dict[str, Any]) -> None:
    with open(os.environ["FPSATTN_PYTEST_STREAM"], "a") as file:
        file.write(json.dumps(event) + "\n")
