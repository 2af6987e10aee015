"""CPU forward of ``fpsattention.attention``, quantization included, against torch's dense SDPA in FP32, in one run.

``python -m benchmarks.python.bench_cpu [--threads N]``. Prints a table, then one line of JSON. Peak memory is the growth of the
resident set over what was resident before the call, per number of tokens, each in a fresh process: it should be linear in the
tokens, so the bytes per token should stay level.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

import fpsattention as fps

HEADS, DIM = 4, 128
GRID, WINDOW = (21, 15, 26), (1, 2, 2)  # 8190 tokens
MEMORY_GRIDS = ((21, 15, 13), GRID, (21, 30, 26), (21, 30, 52))  # 4095 tokens, doubling to 32760
MEMORY_TILE, MEMORY_WINDOW = (7, 9, 6), (1, 1, 2)


def inputs(grid: tuple[int, int, int]) -> tuple[torch.Tensor, ...]:
    """FP32 q, k, v ``(1, L, H, D)``, seeded."""
    generator = torch.Generator().manual_seed(0)
    shape = (1, grid[0] * grid[1] * grid[2], HEADS, DIM)
    return tuple(torch.randn(shape, generator=generator) for _ in range(3))


def milliseconds(call: Callable[[], object], repeats: int) -> list[float]:
    """Times of `repeats` calls after one that is not counted."""
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    return times


def speed(repeats: int) -> dict[str, object]:
    """fps.attention at a density of at most 0.2 and dense SDPA, alternating, so that both see the same machine."""
    q, k, v = inputs(GRID)
    layout = fps.plan(GRID)
    density = fps.sliding_tile_mask(layout, WINDOW).density
    if density > 0.2:
        raise SystemExit(
            f"bench_cpu: window {WINDOW} on tile {layout.tile} has density {density:.3f}, wanted at most 0.2"
        )
    heads_first = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
    ours, dense = [], []
    for _ in range(repeats):
        ours += milliseconds(lambda: fps.attention(q, k, v, GRID, window=WINDOW), 1)
        dense += milliseconds(lambda: torch.nn.functional.scaled_dot_product_attention(*heads_first), 1)
    return {
        "grid": GRID,
        "tokens": q.shape[1],
        "heads": HEADS,
        "dim": DIM,
        "tile": layout.tile,
        "window": WINDOW,
        "density": round(density, 4),
        "threads": torch.get_num_threads(),
        "fps_ms": round(statistics.median(ours), 1),
        "fps_best_ms": round(min(ours), 1),
        "dense_fp32_ms": round(statistics.median(dense), 1),
        "dense_fp32_best_ms": round(min(dense), 1),
        "speedup": round(statistics.median(dense) / statistics.median(ours), 2),
    }


def status_kib(field: str) -> int:
    """A field of ``/proc/self/status`` in KiB: VmRSS is the resident set, VmHWM its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))


def reset_peak() -> int:
    """Sets the peak resident set to the current one (Linux), which is returned in KiB."""
    Path("/proc/self/clear_refs").write_text("5")
    return status_kib("VmRSS")


def peak_mib(grid: tuple[int, int, int]) -> float:
    """Growth of this process's peak resident set in one forward; call it in a fresh process."""
    tiny = (2, 4, 4)
    fps.attention(*inputs(tiny), tiny)  # loads and allocates what does not depend on the size
    q, k, v = inputs(grid)
    fps.plan(grid, MEMORY_TILE)
    before = reset_peak()
    with torch.no_grad():
        fps.attention(q, k, v, grid, tile=MEMORY_TILE, window=MEMORY_WINDOW)
    return (status_kib("VmHWM") - before) / 1024


def memory() -> list[dict[str, object]]:
    """Peak memory of one forward per grid, each in a process of its own."""
    rows = []
    for grid in MEMORY_GRIDS:
        command = [sys.executable, "-m", "benchmarks.python.bench_cpu", "--peak", *map(str, grid)]
        mib = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        tokens = grid[0] * grid[1] * grid[2]
        rows.append(
            {"grid": grid, "tokens": tokens, "peak_mib": round(mib, 1), "kib_per_token": round(1024 * mib / tokens, 1)}
        )
    return rows


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, help="default: torch's choice")
    parser.add_argument(
        "--peak", type=int, nargs=3, metavar=("T", "H", "W"), help="only print the peak memory of one grid, MiB"
    )
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.peak:
        print(peak_mib(tuple(options.peak)))
        return
    result = speed(options.repeats)
    print(
        f"{result['tokens']} tokens, {HEADS} heads, D={DIM}, density {result['density']}, {result['threads']} threads (median of {options.repeats})"
    )
    print(f"  fps.attention (cpu)  {result['fps_ms']:8} ms")
    print(f"  dense SDPA, FP32     {result['dense_fp32_ms']:8} ms   {result['speedup']} x")
    result["memory"] = memory()
    print(f"  {'tokens':>8} {'peak MiB':>10} {'KiB/token':>10}")
    for row in result["memory"]:
        print(f"  {row['tokens']:>8} {row['peak_mib']:>10} {row['kib_per_token']:>10}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
