"""``fpsattn plan``: how a grid is cut into tiles, and what a window attends."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ConfigError
from .output import JsonOption, make_folder, print_json, stdout, working

if TYPE_CHECKING:
    from rich.text import Text

    from ..layout import BlockMask

_SHADES = "\u00b7\u2591\u2592\u2593\u2588"  # nothing, then quarters


def command(
    grid: Annotated[str, typer.Argument(help="Token grid T x H x W, e.g. 21x45x80 (Wan 720p, 81 frames).")],
    tile: Annotated[str | None, typer.Option(help="Tile in tokens, e.g. 6,8,8. Default: the planner's choice.")] = None,
    window: Annotated[
        str | None, typer.Option(help="Sliding window in tiles, e.g. 3,3,6. Default: everything.")
    ] = None,
    text_len: Annotated[int, typer.Option(help="Text tokens of the same sequence.")] = 0,
    text_position: Annotated[str, typer.Option(help="suffix or prefix.")] = "suffix",
    png: Annotated[
        Path | None, typer.Option(help="Draw the plan into this file: PNG, or what its suffix says (.jpg, .pdf, .svg).")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show how a token grid is cut into tiles, and what a window attends."""
    sizes = parse_sizes(grid, "plan: grid")
    tile_sizes = parse_sizes(tile, "plan: tile") if tile else None
    window_sizes = parse_sizes(window, "plan: window") if window else None
    if png is not None:
        from ..analysis.plots import check_picture

        check_picture(png)
        make_folder(png.parent)

    shown = "x".join(map(str, sizes))
    with working(f"planning {shown}", quiet=as_json):
        from ..layout import dense_mask, sliding_tile_mask
        from ..layout import plan as make_plan

        _check_memory(sizes, tile_sizes, window_sizes, text_len, picture=png is not None)
        layout = make_plan(sizes, tile_sizes, text_len, text_position)
        mask = sliding_tile_mask(layout, window_sizes) if window_sizes else dense_mask(layout)
        summary = _summary(mask, window_sizes)
        if png is not None:
            from ..analysis.plots import plot_plan

            attended = "x".join(map(str, window_sizes)) if window_sizes else "everything"
            tile_text = "x".join(map(str, layout.tile))
            title = f"{shown} = {layout.num_tokens:,} tokens, tile {tile_text}, window {attended}"
            summary["png"] = str(plot_plan(mask, png, title))
    if as_json:
        print_json(summary)
        return
    console = stdout()
    console.print(layout.describe())
    attended = "x".join(map(str, window_sizes)) + " tiles" if window_sizes else "all tiles"
    fewest, most = summary["kv_blocks_per_tile"]
    console.print(
        f"window {attended}: density {summary['density']:.4g}, KV blocks per tile {fewest} to {most} of {layout.num_blocks}"
    )
    console.print(f"tables {summary['table_bytes'] / 2**20:.2f} MiB with the backward's transpose")
    console.print(_sketch(mask))
    if png is not None:
        console.print(f"picture: {png}")


def parse_sizes(text: str, what: str) -> tuple[int, int, int]:
    """Three positive integers out of `21x45x80` or `21,45,80`; `what` names them in the error ("plan: grid")."""
    if not re.fullmatch(r"[0-9]+([xX,])[0-9]+\1[0-9]+", text.strip()):
        raise ConfigError(f"fpsattention.{what} {text!r}, expected three sizes T, H, W such as 21x45x80 or 21,45,80")
    t, h, w = (int(size) for size in re.split("[xX,]", text.strip()))
    if min(t, h, w) < 1:
        raise ConfigError(f"fpsattention.{what} {text!r}, expected sizes of at least 1")
    return t, h, w


def _free_bytes() -> int:
    """Memory that could be had now; what is installed where the system does not say."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return 2**63


def _check_memory(
    grid: tuple[int, int, int],
    tile: tuple[int, int, int] | None,
    window: tuple[int, int, int] | None,
    text_len: int,
    picture: bool,
) -> None:
    """A plan is tables over tokens and lists over pairs of blocks: say at once if they cannot fit, rather than be killed later."""
    from ..layout.tiles import BLOCK, core

    tokens = math.prod(grid)
    if tokens >= 2**31:
        return  # the planner's own error is better
    tile = tile or core().choose_tile(grid)
    tile = tuple(min(pair) for pair in zip(tile, grid, strict=True))  # type: ignore[assignment]
    per_axis = [-(-size // step) for size, step in zip(grid, tile, strict=True)]
    tiles = math.prod(per_axis)
    attended = math.prod(map(min, window, per_axis)) if window else tiles
    blocks = -(-math.prod(tile) // BLOCK)  # of a tile
    tables = 4 * (tokens + tiles * blocks * BLOCK + max(text_len, 0) * 2)
    lists = 4 * tiles * attended * blocks * 2  # by query tile, and by KV block
    # Every table exists twice while it is handed over from C++.
    needed = 2 * (tables + lists) + (tiles * tiles * blocks if picture else 0)
    free = _free_bytes()
    if needed > free:
        raise ConfigError(
            f"fpsattention.plan: grid {'x'.join(map(str, grid))} has {tiles:,} tiles that attend {attended:,} tiles each: its tables need "
            f"about {needed / 2**30:,.0f} GiB, {free / 2**30:,.0f} GiB are free: expected a smaller grid, a larger --tile or a smaller --window"
        )


def _summary(mask: BlockMask, window: tuple[int, int, int] | None) -> dict[str, Any]:
    layout, counts = mask.layout, mask.kv_num_blocks
    tables = [
        layout.token_of_slot, layout.slot_of_token, layout.tile_of_block, layout.tile_block_offsets,
        counts, mask.kv_indices, *mask.transpose(),
    ]  # fmt: skip
    return {
        "grid": list(layout.grid),
        "tile": list(layout.tile),
        "tile_grid": list(layout.tile_grid),
        "window": list(window) if window else None,
        "text_len": layout.text_len,
        "num_tokens": layout.num_tokens,
        "num_tiles": layout.num_tiles,
        "num_blocks": layout.num_blocks,
        "num_slots": layout.num_slots,
        "utilization": layout.utilization,
        "density": float(mask.density),
        "kv_blocks_per_tile": [int(counts.min()), int(counts.max())],
        "table_bytes": sum(table.numel() * table.element_size() for table in tables),
    }


def _sketch(mask: BlockMask, columns: int = 64, rows: int = 20) -> Text:
    """The block mask in characters: the darker, the more of a cell is attended; `o` where a query tile's own blocks are."""
    import numpy as np
    from rich.text import Text

    layout = mask.layout
    rows, columns = min(rows, layout.num_tiles), min(columns, layout.num_blocks)
    row_of = np.arange(layout.num_tiles) * rows // layout.num_tiles
    column_of = np.arange(layout.num_blocks) * columns // layout.num_blocks
    tile_of_block = layout.tile_of_block.numpy()
    counts = mask.kv_num_blocks[0, 0].numpy()
    listed = np.arange(mask.kv_indices.shape[-1]) < counts[:, None]
    query, block = np.repeat(np.arange(layout.num_tiles), counts), mask.kv_indices[0, 0].numpy()[listed]

    def cells(chosen: Any = slice(None)) -> Any:
        cell = row_of[query[chosen]] * columns + column_of[block[chosen]]
        return np.bincount(cell, minlength=rows * columns).reshape(rows, columns)

    size = np.bincount(row_of, minlength=rows)[:, None] * np.bincount(column_of, minlength=columns)[None, :]
    shade = np.ceil(4 * cells() / size).astype(int)
    own = cells(tile_of_block[block] == query) > 0
    text_tile = layout.num_video_tiles
    words = cells((query >= text_tile) | (tile_of_block[block] >= text_tile)) > 0
    text = Text("block mask: rows are query tiles, columns key/value blocks; o own tile, darker attends more\n")
    for row in range(rows):
        for column in range(columns):
            if own[row, column]:
                text.append("o", style="yellow")
            elif words[row, column]:
                text.append("t", style="green")
            else:
                text.append(_SHADES[shade[row, column]], style="blue")
        text.append("\n")
    return text
