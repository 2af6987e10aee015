"""Bytes that quantization moves, counted by the emulator, against the ideal: Q, K, V read once, their e4m3 outputs written once, one
more read of V (absmax) and of the K subsample (mean).

Counted: 16-byte loads of input rows and everything stored. Not counted: token indices, scales and means (a few bytes per row, the
same for all heads or all rows, served by the caches). Of the 16-byte loads of the main kernel, 4 in 20 are token indices: a
thread reads 16 rows and the 16 indices that say where they are.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EMULATOR = os.environ.get("FPSATTN_EMULATOR") or str(ROOT / "tools/hopper-emu/bin/hopper-emu")
BUILT = Path(os.environ.get("HOPPER_EMU_BUILD") or ROOT / "build/hopper-emu") / "lib"
PACKAGE = os.environ.get("FPSATTN_BUILD_DIR", "")  # with the kernels just built, as run_tests.sh has it
GRID, TILE, HEADS, DIM, MEAN_STRIDE = (7, 9, 8), (7, 9, 4), 2, 128, 8
TOKENS = 7 * 9 * 8
LIMIT = 1.10
WARP_BYTES = 32 * 16  # a 16-byte load or store of a full warp
PROGRAM = f"""
import sys, torch, fpsattention as fps
from fpsattention.ops import core
if core.sm90_missing():
    sys.exit(77)
layout = fps.plan({GRID}, tile={TILE})
q, k, v = (torch.randn(1, {TOKENS}, {HEADS}, {DIM}).bfloat16().transpose(1, 2) for _ in range(3))
torch.ops.fpsattn.quantize(q, k, v, layout.token_of_slot, layout.tile_block_offsets, granularity=0, smooth_k=True,
                           pow2_scales=False, k_mean_stride={MEAN_STRIDE})
"""


@pytest.mark.skipif(
    not os.access(EMULATOR, os.X_OK) or not (os.environ.get("FPSATTN_EMULATOR") or BUILT.is_dir()),
    reason="no emulator: run_tests.sh builds tools/hopper-emu, FPSATTN_EMULATOR names another",
)
def test_bytes_moved(tmp_path):
    stats = tmp_path / "stats.json"
    path = os.pathsep.join(filter(None, [PACKAGE, os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "FPSATTN_SM90_ON_HOST": "1", "PYTHONPATH": path}
    command = [EMULATOR, "run", f"--stats={stats}", "--", sys.executable, "-c", PROGRAM]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    if run.returncode == 77:
        pytest.skip("this build has no sm_90a kernels")
    assert run.returncode == 0, run.stderr
    loaded = stored = 0.0
    for kernel in json.loads(stats.read_text()):
        wide = sum(group["opcodes"].get("ld.global.v4", 0) for group in kernel["warpgroups"])
        loaded += wide * WARP_BYTES * (16 / 20 if "quantize_kernel" in kernel["kernel"] else 1)
        stored += kernel["bytes"]["global_store"]
    ideal = TOKENS * HEADS * DIM * (3 * 3 + 2 + 2 / MEAN_STRIDE)
    assert loaded > 0.9 * 8 * TOKENS * HEADS * DIM and stored >= 3 * TOKENS * HEADS * DIM  # the counters saw the rows
    assert loaded + stored <= LIMIT * ideal, f"{(loaded + stored) / ideal:.3f} of the ideal"
