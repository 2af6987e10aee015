"""compute-sanitizer over the small cases of the C++ tests: memory, races, uninitialized reads, barriers."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from ..context import Context, Skip, Unit, describe_status, tail
from .cpp_tests import run_gtest, test_programs

NAME, TITLE = "sanitizer", "compute-sanitizer on small cases"
WEIGHTS = {"quick": 30.0, "full": 150.0, "dry": 1.0}
CORRECTNESS = True
OWN_CODE = True
TOOLS = {
    "quick": ("memcheck", "racecheck"),
    "full": ("memcheck", "racecheck", "synccheck", "initcheck"),
    "dry": ("memcheck",),
}
# All but the large: the tests run under an emulator too, so nearly all are small. FPSATTN_SANITIZER_FILTER overrides.
SMALL = "*-*Beyond32Bits*:*Large*:*Slow*"
ERROR_EXIT = 86  # so that a finding differs from a failing test


def matching(context: Context, program: Path, test_filter: str) -> int:
    """How many tests of a program match; 0 when it cannot be asked."""
    try:
        run = subprocess.run(
            [str(program), "--gtest_list_tests", f"--gtest_filter={test_filter}"],
            capture_output=True, text=True, timeout=20, env=context.native_environment(),
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return sum(line.startswith("  ") for line in run.stdout.splitlines()) if run.returncode == 0 else 0


def units(context: Context) -> Iterator[Unit]:
    tool_path = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if tool_path is None:
        raise Skip("compute-sanitizer is not on PATH (it comes with the CUDA toolkit)")
    if context.dry:
        raise Skip("a dry run has no GPU to sanitize on")
    build = context.find_build_dir()
    programs = test_programs(build) if build else []
    if not programs:
        raise Skip("no test executables: see part `build`, or give --build-dir")
    test_filter = os.environ.get("FPSATTN_SANITIZER_FILTER", SMALL)

    def run(tool: str, program: Path) -> None:
        name = f"{tool}/{program.name}"
        tests = matching(context, program, test_filter)
        if tests == 0:
            context.journal.case(name, "skipped", reason=f"no test matches {test_filter}")
            return
        prefix = [tool_path, "--tool", tool, f"--error-exitcode={ERROR_EXIT}", "--print-limit=20"]
        with context.journal.culprit(name):
            status, output, counts = run_gtest(
                context, program, f"{tool}-{program.name}", prefix=prefix, test_filter=test_filter,
                timeout_s=min(context.remaining() - 1, 60.0),
            )  # fmt: skip
        if "Device not supported" in output or "not supported on this device" in output:
            context.journal.case(name, "skipped", reason="compute-sanitizer says that it does not support this device")
        elif status is None:
            context.journal.case(name, "skipped", reason="not through in time", counts=counts)
        elif status == 0:
            context.journal.case(name, "passed", correct=True, counts=counts, tests=tests)
        else:
            what = f"{tool} found errors" if status == ERROR_EXIT else describe_status(status)
            context.journal.case(
                name, "failed", reason=what, correct=False, counts=counts, log_tail=tail(output, 40, 4000)
            )

    for tool in TOOLS[context.mode]:
        for program in programs:
            yield Unit(f"{tool}/{program.name}", lambda tool=tool, program=program: run(tool, program), estimate_s=5.0)  # type: ignore[misc]
