"""The windows that are tried on a grid: every shape that is worth it, in about twelve densities."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..integrations.tokens import Grid, resolve_window
from ..layout.tiles import TileLayout

DENSITIES = (0.03, 0.05, 0.08, 0.12, 0.16, 0.2, 0.25, 0.33, 0.42, 0.55, 0.7, 0.85)
RATIOS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.55, 0.75)  # of patterns
FEW = 40  # grids with at most so many windows: all of them


def windows(layout: TileLayout) -> list[Grid]:
    """Windows in tiles, by rising size; the last one holds every tile.

    On a small grid all of them. Otherwise, for each of ``DENSITIES``, the largest windows within it of these shapes: near a cube of tokens; long
    in time; one frame of tiles; a row; a column. Heads of video models differ in just that (spatial, temporal, local).
    """
    tiles: Grid = tuple(layout.tile_grid)  # type: ignore[assignment]
    t, h, w = tiles
    if t * h * w <= FEW:
        found = {(a, b, c) for a in range(1, t + 1) for b in range(1, h + 1) for c in range(1, w + 1)}
    else:
        found = {tiles}
        for density in DENSITIES:
            budget = density * t * h * w * (1 + 1e-9)
            found.add(resolve_window(density, layout))
            for order in ((0, 1, 2), (1, 2, 0), (2, 1, 0), (1, 0, 2), (2, 0, 1), (0, 2, 1)):
                found.add(_filled(tiles, order, budget))
    return sorted(found, key=lambda window: (math.prod(window), window))


def _filled(tiles: Grid, order: Sequence[int], budget: float) -> Grid:
    """The axes of ``order``, one after the other, as long as the budget allows."""
    size = [1, 1, 1]
    for axis in order:
        others = math.prod(size) // size[axis]
        size[axis] = max(1, min(tiles[axis], int(budget // others)))
    return (size[0], size[1], size[2])
