"""``python -m benchmarks.suite.bundle BUILD_DIR BUNDLE_DIR``: what a machine without network and toolchain needs, nothing else.

Copies test and benchmark executables and the shared libraries they load, keeping their places; give the folder there as
``--build-dir``. ``--strip`` leaves debug information out of host code (device line tables stay).
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

from .parts.cpp_tests import executables


def wanted(build: Path) -> list[Path]:
    """Executables under tests/ and benchmarks/, shared libraries anywhere, each once; no links, no CMake leftovers."""
    libraries = [path for path in build.rglob("*.so*") if "CMakeFiles" not in path.parts and path.is_file()]
    programs = executables(build / "tests") + executables(build / "benchmarks")
    return sorted(set(programs) | set(libraries))


def bundle(build: Path, target: Path, *, strip: bool) -> list[Path]:
    """Copies and returns the copied files; FileNotFoundError when there is nothing to copy."""
    files = wanted(build)
    if not files:
        raise FileNotFoundError(f"{build}: no executables under tests/ or benchmarks/ and no shared libraries")
    copied = []
    for file in files:
        destination = target / file.relative_to(build)
        destination.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(file, destination)
        if strip and shutil.which("strip"):
            subprocess.run(["strip", "--strip-debug", str(destination)], check=False)
        copied.append(destination)
    return copied


def main(argv: list[str]) -> int:
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.suite.bundle", description="Copy what another machine needs."
    )
    p.add_argument("build", type=Path)
    p.add_argument("bundle", type=Path)
    p.add_argument("--strip", action="store_true")
    args = p.parse_args(argv)
    try:
        copied = bundle(args.build, args.bundle, strip=args.strip)
    except FileNotFoundError as error:
        print(f"bundle: {error}", file=sys.stderr)
        return 2
    size = sum(os.path.getsize(path) for path in copied)
    print(f"{len(copied)} files, {size / 2**20:.1f} MiB in {args.bundle}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
