"""The CPU path: forward against torch's dense SDPA in FP32, peak memory, and planning. ``python -m benchmarks.cpu``.

Prints a line of JSON. Peak memory is the growth of the resident set over what was resident before the call, each grid in a fresh process: it
should be linear in the tokens, so the KiB per token should stay level. Planning is cold; its goal on 21 x 45 x 80 is 50 ms.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import fpsattention as fps
from fpsattention.analysis.environment import environment
from fpsattention.layout.tiles import clear_plan_cache

from .timing import interleaved

HEADS, DIM = 4, 128
GRID, WINDOW = (21, 15, 26), (1, 2, 2)  # 8190 tokens
MEMORY_GRIDS = ((21, 15, 13), GRID, (21, 30, 26), (21, 30, 52))  # 4095 tokens, doubling to 32760
MEMORY_TILE, MEMORY_WINDOW = (7, 9, 6), (1, 1, 2)
PLANNED = {  # grid: window in tiles of the planned layout
    (21, 45, 80): (3, 3, 6), (21, 30, 52): (3, 2, 4), (33, 45, 80): (3, 3, 3), (33, 34, 60): (3, 3, 3), (31, 22, 40): (2, 3, 3)
}  # fmt: skip


def inputs(grid: tuple[int, int, int]) -> list[torch.Tensor]:
    """FP32 q, k, v (1, L, H, D), seeded."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, math.prod(grid), HEADS, DIM, generator=generator) for _ in range(3)]


def speed(repeats: int) -> dict[str, Any]:
    """fps.attention, quantization included, and dense SDPA, in turns."""
    q, k, v = inputs(GRID)
    heads_first = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
    calls = {
        "fps": lambda _: fps.attention(q, k, v, GRID, window=WINDOW),
        "dense_fp32": lambda _: torch.nn.functional.scaled_dot_product_attention(*heads_first),
    }
    times = interleaved(calls, "cpu", 0.0, min_repeats=repeats)
    density = fps.sliding_tile_mask(fps.plan(GRID), WINDOW).density
    return {"grid": GRID, "tokens": q.shape[1], "heads": HEADS, "dim": DIM, "window": WINDOW, "density": density, "ms": times,
            "speedup": times["dense_fp32"]["median"] / times["fps"]["median"]}  # fmt: skip


def planning(repeats: int) -> list[dict[str, Any]]:
    """Plan, mask and its transpose, nothing cached."""

    def cold(grid: tuple[int, int, int], window: tuple[int, int, int]) -> fps.BlockMask:
        clear_plan_cache()
        return fps.sliding_tile_mask(fps.plan(grid), window)

    calls = {}
    for grid, window in PLANNED.items():
        calls[f"{grid} plan and mask"] = lambda _, grid=grid, window=window: cold(grid, window)
        calls[f"{grid} with transpose"] = lambda _, grid=grid, window=window: cold(grid, window).transpose()
    times = interleaved(calls, "cpu", 0.0, min_repeats=repeats)
    return [{"case": name, "ms": ms} for name, ms in times.items()]


def status_kib(field: str) -> int:
    """A field of /proc/self/status in KiB: VmRSS is the resident set, VmHWM its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))


def peak_mib(grid: tuple[int, int, int]) -> float:
    """Growth of this process's peak resident set in one forward; call it in a fresh process."""
    tiny = (2, 4, 4)
    fps.attention(*inputs(tiny), tiny)  # loads and allocates what does not depend on the size
    q, k, v = inputs(grid)
    fps.plan(grid, MEMORY_TILE)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is resident
    before = status_kib("VmRSS")
    with torch.no_grad():
        fps.attention(q, k, v, grid, tile=MEMORY_TILE, window=MEMORY_WINDOW)
    return (status_kib("VmHWM") - before) / 1024


def memory() -> list[dict[str, Any]]:
    rows = []
    for grid in MEMORY_GRIDS:
        command = [sys.executable, "-m", "benchmarks.cpu", "--peak", *map(str, grid)]
        mib = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        rows.append({"grid": grid, "peak_mib": mib, "kib_per_token": 1024 * mib / math.prod(grid)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--peak", type=int, nargs=3, metavar=("T", "H", "W"), help="only the peak memory of one grid, MiB"
    )
    options = parser.parse_args()
    if options.peak:
        print(peak_mib(tuple(options.peak)))
        return
    result = {"speed": speed(options.repeats), "memory": memory(), "planning": planning(options.repeats)}
    print(json.dumps({"environment": environment("cpu"), **result}))


if __name__ == "__main__":
    main()
