"""Time of planning and of mask building on the CPU, cold (nothing cached): `python benchmarks/python/bench_planner.py`.

Prints one line of JSON per grid. The goal for plan + mask on 21 x 45 x 80 is 50 ms.
"""

import json
import statistics
import time

from fpsattention.layout.masks import sliding_tile_mask
from fpsattention.layout.tiles import clear_plan_cache, plan

REPEATS = 20
CASES = {  # grid: window in tiles of the planned layout
    (21, 45, 80): (3, 3, 6),
    (21, 30, 52): (3, 2, 4),
    (33, 45, 80): (3, 3, 3),
    (33, 34, 60): (3, 3, 3),
    (31, 22, 40): (2, 3, 3),
}


def milliseconds(grid: tuple[int, int, int], window: tuple[int, int, int]) -> dict[str, float]:
    """Median times of the steps."""
    times: dict[str, list[float]] = {"plan_ms": [], "mask_ms": [], "transpose_ms": []}
    for _ in range(REPEATS):
        clear_plan_cache()
        t0 = time.perf_counter()
        layout = plan(grid)
        t1 = time.perf_counter()
        mask = sliding_tile_mask(layout, window)
        t2 = time.perf_counter()
        mask.transpose()
        t3 = time.perf_counter()
        for values, seconds in zip(times.values(), (t1 - t0, t2 - t1, t3 - t2), strict=True):
            values.append(1e3 * seconds)
    return {name: round(statistics.median(values), 3) for name, values in times.items()}


def main() -> None:
    plan((1, 1, 1))  # loads the compiled module
    for grid, window in CASES.items():
        layout = plan(grid)
        result = {
            "grid": grid,
            "tile": layout.tile,
            "window": window,
            "density": sliding_tile_mask(layout, window).density,
        }
        result |= milliseconds(grid, window)
        result["plan_and_mask_ms"] = round(result["plan_ms"] + result["mask_ms"], 3)
        print(json.dumps(result))


if __name__ == "__main__":
    main()
