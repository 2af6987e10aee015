"""Bytes that quantization moves, counted by the emulator, against the ideal: Q, K, V read once, their e4m3 outputs written once, one
more read of V (absmax) and of the K subsample (mean).

Counted: 16-byte loads of input rows and everything stored. Not counted: token indices, scales and means (a few bytes per row, the
same for all heads or all rows, served by the caches). Of the 16-byte loads of the main kernel, 4 in 20 are token indices: a
thread reads 16 rows and the 16 indices that say where they are.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EMULATOR = os.environ.get("FPSATTN_EMULATOR") or str(ROOT / "tools/hopper-emu/bin/hopper-emu")
BUILT = Path(os.environ.get("HOPPER_EMU_BUILD") or ROOT / "build/hopper-emu") / "lib"
PACKAGE = os.environ.get("FPSATTN_BUILD_DIR", "")  # with the kernels just built, as run_tests.sh has it
GRID, TILE, HEADS, MEAN_STRIDE = (7, 9, 8), (7, 9, 4), 2, 8
TOKENS = 7 * 9 * 8
LIMIT = 1.10
WARP_BYTES = 32 * 16  # a 16-byte load or store of a full warp
PROGRAM = f"""
import sys, torch, fpsattention as fps
from fpsattention.ops import core
if core.sm90_missing():
    sys.exit(77)
dim = int(sys.argv[1])
layout = fps.plan({GRID}, tile={TILE})
q, k, v = (torch.randn(1, {TOKENS}, {HEADS}, dim).bfloat16().transpose(1, 2) for _ in range(3))
options = dict(granularity=0, smooth_k=True, pow2_scales=False, k_mean_stride={MEAN_STRIDE})
what = sys.argv[2]
if what.startswith("norm"):
    norm = int(what[-1])
    ones, angles = torch.ones(1, dim * (1, {HEADS})[norm == 2]), torch.randn(1, 1, {TOKENS}, dim // 2)
    torch.ops.fpsattn.prepare(q, k, v, layout.token_of_slot, layout.tile_block_offsets, ones, ones, None, None, angles.cos(),
                              angles.sin(), norm=norm, eps=1e-6, **options)
else:
    torch.ops.fpsattn.quantize(q, k, v, layout.token_of_slot, layout.tile_block_offsets, block_sums=what == "block_sums", **options)
"""


def count(tmp_path: Path, dim: int, what: str = "quantize") -> tuple[float, float, float]:
    """Bytes of 16-byte row loads if all lanes are busy, of all loads, and of all stores."""
    stats = tmp_path / "stats.json"
    path = os.pathsep.join(filter(None, [PACKAGE, os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "FPSATTN_SM90_ON_HOST": "1", "PYTHONPATH": path}
    command = [EMULATOR, "run", f"--stats={stats}", "--", sys.executable, "-c", PROGRAM, str(dim), what]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    if run.returncode == 77:
        pytest.skip("this build has no sm_90a kernels")
    assert run.returncode == 0, run.stderr
    rows = loaded = stored = 0.0
    for kernel in json.loads(stats.read_text()):
        wide = sum(group["opcodes"].get("ld.global.v4", 0) for group in kernel["warpgroups"])
        rows += wide * WARP_BYTES * (16 / 20 if re.search("(quantize|prepare)_kernel", kernel["kernel"]) else 1)
        loaded += kernel["bytes"]["global_load"]
        stored += kernel["bytes"]["global_store"]
    return rows, loaded, stored


@pytest.mark.skipif(
    not os.access(EMULATOR, os.X_OK) or not (os.environ.get("FPSATTN_EMULATOR") or BUILT.is_dir()),
    reason="no emulator: run_tests.sh builds tools/hopper-emu, FPSATTN_EMULATOR names another",
)
def test_bytes_moved(tmp_path):
    rows, loaded, stored = count(tmp_path, 128)
    elements = TOKENS * HEADS * 128
    ideal = elements * (3 * 3 + 2 + 2 / MEAN_STRIDE)
    assert rows > 0.9 * 8 * elements and stored >= 3 * elements  # the counters saw the rows
    assert rows + stored <= LIMIT * ideal, f"{(rows + stored) / ideal:.3f} of the ideal"

    # D = 96: rows of 96 columns are read and nothing else is loaded that D = 128 does not load; codes have 128 columns. The sums by
    # block read no rows: their 16 token indices a thread and block, and 2 x D floats a block are written.
    _, loaded_96, stored_96 = count(tmp_path, 96)
    rows_96 = loaded_96 - (loaded - rows)
    ideal_96 = TOKENS * HEADS * (96 * (3 * 2 + 2 + 2 / MEAN_STRIDE) + 3 * 128)
    assert rows_96 > 0.9 * 8 * TOKENS * HEADS * 96
    assert rows_96 + stored_96 <= LIMIT * ideal_96, f"{(rows_96 + stored_96) / ideal_96:.3f} of the ideal"
    _, loaded_sums, stored_sums = count(tmp_path, 128, "block_sums")
    blocks = 2 * HEADS * 4  # of Q and K: 2 tiles of 252 tokens
    assert stored_sums - stored == blocks * 128 * 4
    assert loaded_sums - loaded == blocks * 128 * 16 * 4

    # Norm per head (1): what quantization alone moves. Across heads (2): q and k are read once more, for the sums of squares. Weights and
    # tables, shared by heads or tokens, are not counted.
    for norm, again in ((1, 0), (2, 2)):
        rows, _, stored = count(tmp_path, 128, f"norm{norm}")
        ideal = elements * (2 * (3 + 1 + again) + 2 / MEAN_STRIDE + 3)
        assert rows > 0.9 * 2 * (4 + again) * elements
        assert rows + stored <= LIMIT * ideal, f"norm {norm}: {(rows + stored) / ideal:.3f} of the ideal"
