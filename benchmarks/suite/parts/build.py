"""Build or prebuilt: executables of tests and benchmarks, and the Python package with its kernels."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator

from ..context import REPOSITORY, Context, Skip, Unit, describe_status, tail

NAME, TITLE = "build", "build, or find what was built elsewhere"
WEIGHTS = {"quick": 150.0, "full": 420.0, "dry": 1.0}
CORRECTNESS = False
OWN_CODE = False
_GIB_PER_JOB = 5  # a kernel instance takes 3-6 GB to compile


def jobs() -> int:
    """Compilations at a time: the cores, or the free memory over what one takes."""
    try:
        with open("/proc/meminfo") as file:
            available = next(int(line.split()[1]) for line in file if line.startswith("MemAvailable")) / 2**20
    except (OSError, StopIteration):
        available = _GIB_PER_JOB
    return max(1, min(os.cpu_count() or 1, int(available / _GIB_PER_JOB)))


def python_package() -> dict[str, object]:
    """Whether ``fpsattention`` imports here and from where, asked of a process of its own."""
    code = "import fpsattention, os; print(os.path.dirname(fpsattention.__file__))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY)
    if run.returncode == 0:
        return {"imports": True, "from": run.stdout.strip().splitlines()[-1]}
    return {"imports": False, "why": tail(run.stderr, 2, 300)}


def units(context: Context) -> Iterator[Unit]:
    found = context.find_build_dir()
    if found:

        def report() -> None:
            context.journal.case("prebuilt", folder=found.name, python_package=python_package())

        yield Unit("prebuilt", report)
        return
    if context.build_dir:
        raise Skip(f"--build-dir {context.build_dir} has neither tests/ nor benchmarks/ in it")
    if context.dry:
        raise Skip("a dry run builds nothing: --build-dir names a build folder")
    for tool, hint in (("cmake", "pip install cmake"), ("nvcc", "put the CUDA toolkit's bin on PATH")):
        if shutil.which(tool) is None and not (tool == "nvcc" and os.environ.get("CUDA_HOME")):
            raise Skip(f"no {tool} here ({hint}), and no --build-dir with prebuilt executables")

    def build() -> None:
        target = context.scratch / "build"
        generator = ["-G", "Ninja"] if shutil.which("ninja") else []
        configure = [
            "cmake",
            "-S",
            str(REPOSITORY),
            "-B",
            str(target),
            *generator,
            f"-DPython_EXECUTABLE={sys.executable}",
        ]
        for name in ("FPSATTN_CUTLASS_DIR", "FPSATTN_EMULATOR"):
            if os.environ.get(name):
                configure.append(f"-D{name}={os.environ[name]}")
        for step, argv in (("configure", configure), ("compile", ["cmake", "--build", str(target), "-j", str(jobs())])):
            status, output = context.command(argv, f"build-{step}.txt", context.remaining() - 1)
            if status != 0:
                context.journal.case(step, "failed", reason=f"{describe_status(status)}: {tail(output, 4, 800)}")
                return
            context.journal.case(step, jobs=jobs(), python_package=python_package() if step == "compile" else None)

    yield Unit("build", build, estimate_s=30.0)
