"""hopper-facts without a GPU: it compiles, its timed loops hold what the figures assume, and its exact rows are exact under the emulator."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sassbudget.binary import find_tool

FOLDER = Path(__file__).resolve().parents[1]
EMULATOR = FOLDER.parent / "hopper-emu/bin/hopper-emu"
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path=os.path.join(os.environ.get("CUDA_HOME", ""), "bin"))


def run(*command, **variables):
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, env={**os.environ, **variables})
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_the_generated_header_is_what_its_generator_writes():
    assert run(sys.executable, FOLDER / "gen_wgmma.py") == (FOLDER / "wgmma.cuh").read_text()


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    if not NVCC:
        pytest.skip("no nvcc")
    folder = tmp_path_factory.mktemp("hopper-facts")
    run("sh", FOLDER / "build.sh", "shared", folder, NVCC=NVCC)
    return folder


@pytest.mark.slow
def test_exact_rows_under_the_emulator(build):
    out = build / "facts.json"
    run(
        EMULATOR,
        "run",
        "--",
        build / "hopper-facts",
        "--emulated",
        "--quick",
        "--no-smi",
        "--only",
        "exact/",
        "--out",
        out,
    )
    rows = json.loads(out.read_text())["rows"]
    assert len(rows) > 30 and [row["id"] for row in rows if row["outside"]] == []
    assert all(row["value"] == 0 for row in rows if row["id"].endswith("/integers"))


@pytest.mark.slow
@pytest.mark.skipif(not find_tool("nvdisasm", required=False), reason="no nvdisasm")
@pytest.mark.skipif(not find_tool("cuobjdump", required=False), reason="no cuobjdump")
def test_timed_loops_hold_what_the_figures_assume(build):
    run(sys.executable, FOLDER / "check_sass.py", build)
