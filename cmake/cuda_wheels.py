"""A CUDA toolkit from the package index: nvcc, the runtime, headers and disassemblers, as NVIDIA's wheels (Linux, x86-64 and aarch64).

    python cmake/cuda_wheels.py FOLDER [--disassemblers]

Installs them below FOLDER, unless they are there already, and prints the toolkit's root, a value for CUDA_HOME. With
``--disassemblers`` only cuobjdump and nvdisasm, for a toolkit that lacks them.
"""

from __future__ import annotations

import argparse
import platform
import shutil
import subprocess
import sys
from pathlib import Path

# 13.0: the minor release that torch 2.13's default wheels run with. There are no disassemblers of it as wheels, and 13.2's nvdisasm
# cannot count the live registers of a kernel that has 255.
COMPILER = [
    "nvidia-cuda-nvcc==13.0.88",
    "nvidia-nvvm==13.0.88",
    "nvidia-cuda-crt==13.0.88",
    "nvidia-cuda-runtime==13.0.96",
    "nvidia-cuda-cccl==13.0.85",
]
DISASSEMBLERS = ["nvidia-cuda-cuobjdump==13.5.37", "nvidia-cuda-nvdisasm==13.5.37"]
ROOT = "nvidia/cu13"  # of the toolkit, in every one of these wheels


def install(folder: Path, wheels: list[str]) -> Path:
    """The toolkit's root below ``folder``, with ``wheels`` and nothing else in it. RuntimeError where pip fails."""
    machine = (platform.system(), platform.machine())
    if machine not in {("Linux", "x86_64"), ("Linux", "aarch64")}:
        raise RuntimeError(f"there are no wheels of nvcc for {' '.join(machine)}, only for Linux on x86_64 and aarch64")
    stamp = folder / "wheels.txt"
    if stamp.exists() and stamp.read_text().splitlines() == wheels:
        return folder / ROOT
    shutil.rmtree(folder, ignore_errors=True)
    size = "20 MB" if wheels == DISASSEMBLERS else "300 MB on disk"
    print(f"fpsattention: fetching {', '.join(wheels)} ({size}) into {folder}", file=sys.stderr, flush=True)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run(
        [*pip, "--only-binary=:all:", "--target", str(folder), *wheels], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )  # fmt: skip
    if done.returncode != 0:
        raise RuntimeError(f"pip could not install {' '.join(wheels)}:\n{done.stdout}")
    root = folder / ROOT
    # Names that an installed toolkit has and the wheels lack: what linkers look for, and the folder that nvcc gives them.
    library = next(root.glob("lib/libcudart.so.*"), None)
    if library:
        (root / "lib" / "libcudart.so").symlink_to(library.name)
        (root / "lib64").symlink_to("lib")
    stamp.write_text("\n".join(wheels) + "\n")
    return root


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--disassemblers", action="store_true")
    args = parser.parse_args()
    try:
        print(install(args.folder.absolute(), DISASSEMBLERS if args.disassemblers else COMPILER + DISASSEMBLERS))
    except (OSError, RuntimeError) as error:
        print(f"fpsattention: no CUDA toolkit from the package index: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
