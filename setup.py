"""Thin: runs CMake + ninja once and puts what it installs into the package. Everything else is in pyproject.toml.

Environment: FPSATTN_BUILD_CUDA=AUTO|ON|OFF, FPSATTN_CUTLASS_DIR, FPSATTN_TORCH_DIR, FPSATTN_PTX_ONLY=1, CUDA_HOME,
MAX_JOBS (default: min(cores, free GiB / 5)), CMAKE_ARGS (extra arguments).
"""

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
GIB_PER_JOB = 5  # one nvcc on a WGMMA kernel takes 3 to 5 GiB


def max_jobs() -> int:
    if os.environ.get("MAX_JOBS"):
        return int(os.environ["MAX_JOBS"])
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        free_gib = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    except (ValueError, OSError):
        free_gib = GIB_PER_JOB
    return max(1, min(cores, int(free_gib / GIB_PER_JOB)))


def torch_dir() -> Path:
    """Folder of the torch package, for its headers. Never imported: see cmake/build_backend.py."""
    if os.environ.get("FPSATTN_TORCH_DIR"):
        return Path(os.environ["FPSATTN_TORCH_DIR"])
    installed = Path(sysconfig.get_path("purelib")) / "torch"
    spec = importlib.util.find_spec("torch")
    if not installed.is_dir() and spec and spec.submodule_search_locations:
        return Path(spec.submodule_search_locations[0])
    return installed


def cmake_option(name: str) -> list[str]:
    return [f"-D{name}={os.environ[name]}"] if os.environ.get(name) else []


class CMakeBuild(build_ext):
    """The one "extension" stands for the whole CMake project."""

    def build_extension(self, ext: Extension) -> None:
        build = Path(self.build_temp).resolve() / "cmake"
        # The package folder that receives _C and lib/: the build folder, or python/ for an editable install.
        destination = Path(self.get_ext_fullpath("fpsattention._C")).resolve().parent.parent
        import pybind11

        # Nothing of an earlier build may leak into this one: neither paths into pip's last, deleted, build environment, nor
        # kernels into a CPU-only package. Compiled objects are kept.
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        shutil.rmtree(build / "CMakeFiles", ignore_errors=True)
        shutil.rmtree(destination / "fpsattention" / "lib", ignore_errors=True)

        configure = [
            "cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja",
            "-DCMAKE_BUILD_TYPE=Release", f"-DCMAKE_INSTALL_PREFIX={destination}",
            f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DFPSATTN_TORCH_DIR={torch_dir()}", "-DFPSATTN_BUILD_TESTS=OFF", "-DFPSATTN_BUILD_BENCHMARKS=OFF",
            "-DFPSATTN_INSTALL_CPP=OFF",
            *cmake_option("FPSATTN_BUILD_CUDA"), *cmake_option("FPSATTN_CUTLASS_DIR"), *cmake_option("FPSATTN_PTX_ONLY"),
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]  # fmt: skip
        jobs = max_jobs()
        print(f"fpsattention: building with {jobs} jobs (set MAX_JOBS to change)", flush=True)
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build), "--parallel", str(jobs)], check=True)
        subprocess.run(["cmake", "--install", str(build)], check=True)


setup(ext_modules=[Extension("fpsattention._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
