"""The C++ tests (GoogleTest executables of tests/cpp), run directly rather than by ctest.

A carried build folder's ctest files hold absolute paths of the machine that built it, and perhaps an emulator; the executables
themselves run anywhere.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..context import Context, Skip, Unit, describe_status, tail

NAME, TITLE = "cpp_tests", "C++ tests, natively"
WEIGHTS = {"quick": 55.0, "full": 120.0, "dry": 6.0}
CORRECTNESS = True
OWN_CODE = True
DRY_FILTER = (
    "*Layout*:*Errors*:*Check*"  # a dry run shows that the path works; ctest itself runs all under the emulator
)


def executables(folder: Path) -> list[Path]:
    """Executable regular files below ``folder``: no libraries, no CMake leftovers."""
    if not folder.is_dir():
        return []
    return sorted(
        path for path in folder.rglob("*")
        if path.is_file() and os.access(path, os.X_OK) and "CMakeFiles" not in path.parts and ".so" not in path.name
    )  # fmt: skip


def test_programs(build: Path) -> list[Path]:
    """GoogleTest executables of a build folder; tests/ has other programs too (a consumer of the installed library)."""
    return [path for path in executables(build / "tests") if path.name.startswith("test_")]


def parse_gtest(document: dict[str, Any]) -> dict[str, Any]:
    """Counts and the first messages of a ``--gtest_output=json`` document."""
    passed, failures, skipped = 0, [], {}
    for suite in document.get("testsuites", []):
        for test in suite.get("testsuite", []):
            name = f"{test.get('classname', suite.get('name'))}.{test['name']}"
            if test.get("failures"):
                failures.append({"name": name, "message": test["failures"][0].get("failure", "")[:400]})
            elif test.get("result") == "SKIPPED":
                reasons = test.get("skipped") or [{}]
                skipped[name] = (reasons[0].get("message") or "no reason")[:200]
            elif test.get("status") == "RUN":
                passed += 1
    return {"passed": passed, "failed": len(failures), "skipped": len(skipped), "failures": failures[:20],
            "skip_reasons": sorted(set(skipped.values()))[:5]}  # fmt: skip


def run_gtest(context: Context, program: Path, log: str, *, prefix: list[str], test_filter: str | None = None,
              timeout_s: float) -> tuple[int | None, str, dict[str, Any] | None]:  # fmt: skip
    """Runs one GoogleTest program. (exit status, output, counts); counts are None when it wrote no report."""
    report = context.scratch / "raw" / f"{log}.json"
    report.unlink(missing_ok=True)
    argv = [*prefix, str(program), f"--gtest_output=json:{report}"]
    if test_filter:
        argv.append(f"--gtest_filter={test_filter}")
    status, output = context.command(argv, f"{log}.txt", timeout_s, cwd=program.parent)
    try:
        return status, output, parse_gtest(json.loads(report.read_text()))
    except (OSError, ValueError):
        return status, output, None


def units(context: Context) -> Iterator[Unit]:
    build = context.find_build_dir()
    if build is None:
        raise Skip("nothing was built: see part `build`, or give --build-dir")
    programs = test_programs(build)
    if not programs:
        raise Skip(f"no test executables under {build.name}/tests")
    if context.dry and not context.emulator:
        raise Skip("a dry run has no GPU and no FPSATTN_EMULATOR was given")
    share = context.limit_s / len(programs)

    def run(program: Path) -> None:
        # A slow program may use time that quick ones left over, but never all of it.
        timeout_s = min(context.remaining() - 1, max(share * 2, 30.0))
        with context.journal.culprit(program.name):
            status, output, counts = run_gtest(
                context, program, program.name, prefix=context.launcher(), timeout_s=timeout_s,
                test_filter=DRY_FILTER if context.dry else None,
            )  # fmt: skip
        fields = {"counts": counts, "program": program.name}
        if status is None and not (counts and counts["failed"]):
            context.journal.case(program.name, "skipped", reason=f"not through after {timeout_s:.0f} s", **fields)
        elif status == 0 and counts and counts["passed"]:
            context.journal.case(program.name, "passed", correct=True, **fields)
        elif status == 0 and counts:
            reasons = "; ".join(counts["skip_reasons"]) or "no test matched"
            context.journal.case(program.name, "skipped", reason=reasons, **fields)
        else:
            first = counts["failures"][0]["name"] if counts and counts["failures"] else tail(output, 6, 800)
            reason = f"{describe_status(status)}, {counts['failed'] if counts else '?'} failed: {first}"
            context.journal.case(program.name, "failed", reason=reason, correct=False, log_tail=tail(output), **fields)

    for program in programs:
        yield Unit(program.name, lambda program=program: run(program), estimate_s=2.0)  # type: ignore[misc]
