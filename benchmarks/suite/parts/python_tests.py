"""The Python tests of the sm90 kernels (tests/python/test_sm90_*.py), on the GPU."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..context import REPOSITORY, Context, Skip, Unit, describe_status, tail

NAME, TITLE = "python_tests", "Python tests of the sm90 kernels"
WEIGHTS = {"quick": 55.0, "full": 150.0, "dry": 6.0}
CORRECTNESS = True
OWN_CODE = True
PATTERN = "tests/python/test_sm90_*.py"


def summarize(stream: Path) -> dict[str, Any]:
    """Counts, failures and what was running last, from the lines of ``pytest_stream``."""
    results: dict[str, dict[str, Any]] = {}
    running = None
    for line in stream.read_text().splitlines() if stream.exists() else []:
        event = json.loads(line)
        if event["event"] == "start":
            running = event["test"]
            continue
        earlier = results.get(event["test"])
        if earlier is None or event["outcome"] == "failed":
            results[event["test"]] = event
        if event["test"] == running:
            running = None
    by = {
        outcome: [r for r in results.values() if r["outcome"] == outcome] for outcome in ("passed", "failed", "skipped")
    }
    failures = [{"name": r["test"], "message": r["message"]} for r in by["failed"]]
    return {
        "passed": len(by["passed"]), "failed": len(failures), "skipped": len(by["skipped"]), "failures": failures[:20],
        "skip_reasons": sorted({r["message"] for r in by["skipped"]})[:5], "running": running,
    }  # fmt: skip


def units(context: Context) -> Iterator[Unit]:
    files = sorted(REPOSITORY.glob(PATTERN))
    if not files:
        raise Skip(f"no file matches {PATTERN}")
    for module in ("pytest", "torch", "fpsattention"):
        if importlib.util.find_spec(module) is None:
            raise Skip(f"no module {module} here")
    if context.dry:
        raise Skip("a dry run leaves these to the test suite itself, which runs them under the emulator")

    def run(file: Path) -> None:
        stream = context.scratch / "raw" / f"{file.stem}.pytest.jsonl"
        stream.unlink(missing_ok=True)
        os.environ["FPSATTN_PYTEST_STREAM"] = str(stream)
        argv = [sys.executable, "-m", "pytest", "-q", "-x" if context.mode == "quick" else "--maxfail=20", "--tb=short",
                "-p", "no:cacheprovider", "-p", "benchmarks.suite.pytest_stream", str(file)]  # fmt: skip
        with context.journal.culprit(file.name):
            status, output = context.command(argv, f"{file.stem}.txt", context.remaining() - 1)
        counts = summarize(stream)
        if status in (0, 5) and not counts["failed"] and counts["passed"]:
            context.journal.case(file.name, "passed", correct=True, counts=counts)
        elif status in (0, 5) and not counts["failed"]:
            reason = "; ".join(counts["skip_reasons"]) or "nothing was collected"
            context.journal.case(file.name, "skipped", reason=reason, counts=counts)
        elif status is None and not counts["failed"]:
            reason = f"not through in time, last in {counts['running']}"
            correct = True if counts["passed"] else None
            context.journal.case(
                file.name, "passed" if correct else "skipped", reason=reason, correct=correct, counts=counts
            )
        else:
            reason = f"{describe_status(status)}, {counts['failed']} failed" + (
                f", died in {counts['running']}" if counts["running"] else ""
            )  # fmt: skip
            context.journal.case(
                file.name, "failed", reason=reason, correct=False, counts=counts, log_tail=tail(output)
            )

    for file in files:
        yield Unit(file.name, lambda file=file: run(file), estimate_s=5.0)  # type: ignore[misc]
