"""Thin: CMake and ninja build the compiled parts into the package. Everything else is in pyproject.toml.

Environment: FPSATTN_BUILD_CUDA=AUTO|ON|OFF, FPSATTN_CUTLASS_DIR, FPSATTN_TORCH_DIR, FPSATTN_PTX_ONLY=1,
FPSATTN_CUDA_WHEELS=AUTO|ON|OFF (nvcc from the package index), CUDA_HOME,
MAX_JOBS (default: min(cores, free GiB / 5)), CMAKE_ARGS (extra arguments).
"""

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build import build
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


def installed_torch() -> Path | None:
    """Package folder of the torch that is installed where this build will be, found by path and never imported; None: there is none,
    and CMake fetches the headers.

    A build runs in an environment of its own (PEP 517). pip's has the same site-packages as the target. Those of uv and ``build``
    are virtual environments that know nothing of the target but keep its PATH and VIRTUAL_ENV.
    """
    environments = [os.environ.get(name) for name in ("VIRTUAL_ENV", "CONDA_PREFIX")]
    environments += [str(Path(folder).parent) for folder in os.get_exec_path() if (Path(folder) / "python").exists()]
    environments.append(str(ROOT / ".venv"))  # uv's default place
    site_packages = [Path(sysconfig.get_path(name)) for name in ("purelib", "platlib")]
    for root in filter(None, environments):
        site_packages += sorted(Path(root).glob("lib/python3*/site-packages"))
    for folder in site_packages:
        if (folder / "torch" / "include" / "torch" / "csrc" / "stable").is_dir():
            return folder / "torch"
    return None


def cmake_options() -> list[str]:
    options = {
        "FPSATTN_FETCH_DIR": ROOT / "build",
        "FPSATTN_TORCH_DIR": os.environ.get("FPSATTN_TORCH_DIR") or installed_torch(),
        **{name: os.environ.get(name) for name in ("FPSATTN_BUILD_CUDA", "FPSATTN_CUTLASS_DIR", "FPSATTN_PTX_ONLY")},
    }
    return [f"-D{name}={value}" for name, value in options.items() if value]


class Build(build):
    """Modules that were renamed or removed since the last build in this folder do not come back in the wheel."""

    def run(self) -> None:
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class BuildCMake(build_ext):
    """The one "extension" stands for the whole CMake project: `_C` and `lib/`."""

    def run(self) -> None:
        import pybind11

        # Kept between builds, editable ones too, whose `build_temp` is a temporary folder.
        tree = ROOT / "build" / f"package-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        # Nothing of an earlier build may leak into this one: neither paths into a build environment that is gone, nor kernels into a
        # CPU-only package. Compiled objects are kept.
        (tree / "CMakeCache.txt").unlink(missing_ok=True)
        shutil.rmtree(tree / "CMakeFiles", ignore_errors=True)
        shutil.rmtree(self.destination / "fpsattention" / "lib", ignore_errors=True)

        configure = [
            "cmake", "-S", str(ROOT), "-B", str(tree), "-G", "Ninja",
            "-DCMAKE_BUILD_TYPE=Release", f"-DCMAKE_INSTALL_PREFIX={self.destination}",
            f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            "-DFPSATTN_BUILD_TESTS=OFF",
            *cmake_options(), *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]  # fmt: skip
        jobs = max_jobs()
        print(f"fpsattention: building with {jobs} jobs (set MAX_JOBS to change)", flush=True)
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(tree), "--parallel", str(jobs)], check=True)
        subprocess.run(["cmake", "--install", str(tree)], check=True)

    @property
    def destination(self) -> Path:
        """The folder whose fpsattention/ receives the compiled parts: the source folder itself for an editable install."""
        return ROOT / "python" if self.inplace or self.editable_mode else Path(self.build_lib).resolve()

    def get_outputs(self) -> list[str]:
        package = self.destination / "fpsattention"
        return [str(path) for path in [*package.glob("_C*.so"), *package.glob("lib/*.so")]]

    def get_output_mapping(self) -> dict[str, str]:
        return {}  # nothing is copied to the source folder: an editable install builds there


setup(ext_modules=[Extension("fpsattention._C", sources=[])], cmdclass={"build": Build, "build_ext": BuildCMake})
