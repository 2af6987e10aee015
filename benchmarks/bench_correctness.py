"""The C++ tests on the GPU, run directly and not by ctest, whose files hold paths of the machine that built them; and compute-sanitizer
over the small ones."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

from .plugin import REPOSITORY

TOOLS = {"quick": ("memcheck", "racecheck"), "full": ("memcheck", "racecheck", "synccheck", "initcheck"), "dry": ()}
SMALL = "*-*Beyond32Bits*:*Large*:*Slow*"  # the tests run under an emulator too, so nearly all are small
SKIPPED = 77  # ctest's SKIP_RETURN_CODE


def test_programs(build: Path | None) -> list[Path]:
    """GoogleTest executables of a build folder."""
    found = (build or REPOSITORY / "build/tests").glob("**/tests/cpp/**/test_*")
    return sorted(path for path in found if path.is_file() and os.access(path, os.X_OK) and path.suffix == "")


test_programs.__test__ = False  # type: ignore[attr-defined]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    config = metafunc.config
    programs = test_programs(config.option.build_dir)
    if "program" in metafunc.fixturenames:
        metafunc.parametrize("program", programs, ids=lambda path: path.name)
    if "tool" in metafunc.fixturenames:
        metafunc.parametrize("tool", TOOLS[config.bench["mode"]])


def native_environment(program: Path) -> dict[str, str]:
    """libfpsattn and the CUDA runtime are found wherever they were carried to."""
    build = next(parent for parent in program.parents if parent.name == "tests").parent
    folders = {path.parent for path in build.rglob("libfpsattn.so*")}
    folders |= {path.parent for path in Path(sysconfig.get_paths()["purelib"]).glob("nvidia/*/lib/libcudart.so*")}
    folders |= {Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "lib64"}
    carried = [*sorted(map(str, folders)), os.environ.get("LD_LIBRARY_PATH", "")]
    return {**os.environ, "LD_LIBRARY_PATH": ":".join(filter(None, carried))}


def run_tests(
    program: Path, record, *, prefix: tuple[str, ...] = (), test_filter: str = "*", timeout: float = 200
) -> None:
    """Runs one GoogleTest program; fails with the end of its output, skips where it skipped everything."""
    run = subprocess.run(
        [*prefix, str(program), f"--gtest_filter={test_filter}"], cwd=program.parent, env=native_environment(program),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout,
    )  # fmt: skip
    counts = {name.lower(): int(n) for name, n in re.findall(r"\[ +(PASSED|SKIPPED|FAILED) +\] (\d+) test", run.stdout)}
    record("tests", counts=counts)
    if "not supported on this device" in run.stdout or "Device not supported" in run.stdout:
        pytest.skip(f"{prefix[0]} does not support this device")
    if run.returncode == SKIPPED or (run.returncode == 0 and not counts.get("passed")):
        pytest.skip(f"it ran no test: {run.stdout.strip()[-300:]}")
    assert run.returncode == 0, f"exit status {run.returncode}\n{run.stdout[-3500:]}"


def launcher(bench) -> tuple[str, ...]:
    """Nothing on a GPU; the emulator's launcher in a dry run, where one was given."""
    if bench["mode"] != "dry":
        return ()
    if not os.environ.get("FPSATTN_EMULATOR"):
        pytest.skip("a dry run has no GPU, and no FPSATTN_EMULATOR was given")
    return (os.environ["FPSATTN_EMULATOR"], "run", "--")


def test_cpp(program: Path, bench, record) -> None:
    dry = bench["mode"] == "dry"  # shows that the path works; ctest itself runs all under the emulator
    run_tests(program, record, prefix=launcher(bench), test_filter="*Layout*:*Errors*:*Check*" if dry else "*")


def test_sanitizer(tool: str, program: Path, bench, record) -> None:
    path = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if path is None:
        pytest.skip("no compute-sanitizer on PATH (it comes with the CUDA toolkit)")
    prefix = (path, "--tool", tool, "--error-exitcode=86", "--print-limit=20")
    run_tests(program, record, prefix=prefix, test_filter=SMALL, timeout=120)
