"""Bytes that quantization moves, counted by the emulator, against the ideal: ``quantize_bytes.py --emulator E bench_quantize``.

Counted: 16-byte loads of input rows and everything stored. Not counted: token indices, scales and means (a few bytes per row, the
same for all heads or all rows, served by the caches). Of the 16-byte loads of the main kernel, 4 in 20 are token indices: a
thread reads 16 rows and the 16 indices that say where they are. Exit status 1 beyond the limit.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from pathlib import Path

LIMIT = 1.10
WARP_BYTES = 32 * 16  # a 16-byte load or store of a full warp


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--emulator", required=True)
    parser.add_argument("bench")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        stats = Path(folder) / "stats.json"
        command = [args.emulator, "run", f"--stats={stats}", "--", args.bench, "--small"]
        line = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
        kernels = json.loads(stats.read_text())
    ideal = json.loads(line)["ideal_bytes"]

    loaded = stored = 0.0
    for kernel in kernels:
        if "sm90::quantize::" not in kernel["kernel"]:
            continue  # the benchmark's own fill kernel
        wide = sum(group["opcodes"].get("ld.global.v4", 0) for group in kernel["warpgroups"])
        loaded += wide * WARP_BYTES * (16 / 20 if "quantize_kernel" in kernel["kernel"] else 1)
        stored += kernel["bytes"]["global_store"]
    moved = loaded + stored
    print(
        f"loaded {loaded:.0f} + stored {stored:.0f} = {moved:.0f} bytes; ideal {ideal:.0f}; ratio {moved / ideal:.3f} (limit {LIMIT})"
    )
    return 0 if loaded > 0 and stored > 0 and moved <= LIMIT * ideal else 1


if __name__ == "__main__":
    raise SystemExit(main())
