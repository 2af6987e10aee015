"""Bytes and instructions of the kernels that make block lists, counted by the emulator on one head of Wan 14B at 720p (300 tiles, 600 blocks),
against the budget of docs/kernels/patterns.md: 0.1 ms per layer of 40 heads."""

import json
import os
import subprocess
import sys

import pytest
from test_quantize_bytes import BUILT, EMULATOR, PACKAGE

HEADS, TILES, BLOCKS, COUNT = 40, 300, 600, 60
BANDWIDTH = 4.8e12  # bytes/s of an H200's memory
WARP_RATE = 132 * 4 * 1.7e9  # warp instructions/s at 1.7 GHz
FP32_RATE = 60e12  # FLOP/s of an FP32 product, as cuBLAS reaches on Hopper
PROGRAM = f"""
import sys, torch
from fpsattention.ops import core
if core.sm90_missing():
    sys.exit(77)
offsets, sizes = 2 * torch.arange({TILES} + 1, dtype=torch.int32), torch.full(({BLOCKS},), 126, dtype=torch.int32)
values = torch.randn(1, 1, {TILES}, {BLOCKS})
lists = torch.ops.fpsattn.select_blocks(values, offsets, sizes, num_video_tiles={TILES}, count={COUNT}, max_count={BLOCKS},
                                        own_first=True, width={COUNT})
torch.ops.fpsattn.transpose_blocks(*lists[:2], offsets, num_blocks={BLOCKS}, width={BLOCKS})
"""


def counted(stats):
    """Kernel name to (bytes loaded and stored, warp instructions) of one head."""
    found = {}
    for kernel in json.loads(stats.read_text()):
        name = next(n for n in ("select_kernel", "bits_kernel", "transpose_kernel") if n in kernel["kernel"])
        moved = kernel["bytes"]["global_load"] + kernel["bytes"]["global_store"]
        found[name] = (moved, sum(sum(group["opcodes"].values()) for group in kernel["warpgroups"]))
    return found


@pytest.mark.skipif(
    not os.access(EMULATOR, os.X_OK) or not (os.environ.get("FPSATTN_EMULATOR") or BUILT.is_dir()),
    reason="no emulator: run_tests.sh builds tools/hopper-emu, FPSATTN_EMULATOR names another",
)
def test_selection_stays_in_its_budget(tmp_path):
    stats = tmp_path / "stats.json"
    path = os.pathsep.join(filter(None, [PACKAGE, os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "FPSATTN_SM90_ON_HOST": "1", "PYTHONPATH": path}
    command = [EMULATOR, "run", f"--stats={stats}", "--", sys.executable, "-c", PROGRAM]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    if run.returncode == 77:
        pytest.skip("this build has no sm_90a kernels")
    assert run.returncode == 0, run.stderr
    kernels = counted(stats)
    row = 4 * BLOCKS
    moved, instructions = kernels["select_kernel"]
    assert TILES * (row + 4 * COUNT) < moved < 2.2 * TILES * row  # values and block sizes read, lists written
    # A row: 20 columns a lane, about 20 steps of 3 PTX instructions a column, then its list; ptxas makes 2 of 3.
    assert 500 < instructions / TILES < 2800
    product = 2 * TILES * BLOCKS * 128 * HEADS / FP32_RATE
    seconds = {name: HEADS * max(b / BANDWIDTH, n / WARP_RATE) for name, (b, n) in kernels.items()}
    print(json.dumps({"kernels": kernels, "ms": {n: 1e3 * s for n, s in seconds.items()}, "product ms": 1e3 * product}))
    assert sum(seconds.values()) + product < 0.1e-3
