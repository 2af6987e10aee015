"""Pictures, drawn with matplotlib's Agg canvas: no display, no global state, the same bytes for the same data.

Every function writes one file, in the format of its suffix, and returns its path. Colours are Okabe and Ito's, which stay apart for colour-blind
readers; what a colour means is always written in the picture.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConfigError
from .optional import require

COLORS = {
    "quantization": "#0072B2",
    "sparsity": "#E69F00",
    "total": "#222222",
    "quantize": "#56B4E9",
    "attention": "#D55E00",
    "rest": "#BBBBBB",
}
# Schedule phases, in the order in which levels are first met.
_PHASE_COLORS = ("#DCE9F5", "#FBE8D3", "#DDF0E4", "#F3DFEC", "#EFEFD0")
# Mask cells: skipped, attended, own tile, text.
_MASK_COLORS = ("#EBEBEB", "#0072B2", "#E69F00", "#009E73")
_MASK_LABELS = ("skipped", "attended", "own tile", "text")
_DPI = 100
# Formats of pictures, and what matplotlib would write into one without being asked.
_STAMPS: dict[str, dict[str, None] | None] = {
    ".png": {"Software": None},
    ".jpg": None,
    ".jpeg": None,
    ".pdf": {"CreationDate": None},
    ".svg": {"Date": None},
}


def new_figure(width: float, height: float) -> Any:
    figure_module = require("matplotlib.figure", "plots")
    require("matplotlib.backends.backend_agg", "plots")
    return figure_module.Figure(figsize=(width, height), dpi=_DPI, layout="constrained")


def save_figure(figure: Any, path: str | Path) -> Path:
    path = Path(path)
    suffix = check_picture(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata=_STAMPS[suffix])  # no version or date: same data, same bytes
    return path


def check_picture(path: str | Path) -> str:
    """The suffix of a picture's file, which says its format. ConfigError where there is no such format."""
    suffix = Path(path).suffix.lower()
    if suffix not in _STAMPS:
        raise ConfigError(f"fpsattention.plots: picture '{path}', expected a name that ends in {', '.join(_STAMPS)}")
    return suffix


def mask_image(mask: Any) -> np.ndarray:
    """A block mask as uint8 [tiles, blocks]: 0 skipped, 1 attended, 2 attended and of the row's own tile, 3 text.

    Batch and head 0 are shown. Text is marked where the query tile or the key block is text.
    """
    layout = mask.layout
    counts = mask.kv_num_blocks[0, 0].cpu().numpy()
    indices = mask.kv_indices[0, 0].cpu().numpy()
    tile_of_block = layout.tile_of_block.cpu().numpy()
    image = np.zeros((layout.num_tiles, layout.num_blocks), np.uint8)
    for tile in range(layout.num_tiles):
        image[tile, indices[tile, : counts[tile]]] = 1
    num_video_tiles = math.prod(layout.tile_grid)
    attended = image > 0
    image[attended & (tile_of_block[None, :] >= num_video_tiles)] = 3
    image[num_video_tiles:][attended[num_video_tiles:]] = 3
    image[attended & (tile_of_block[None, :] == np.arange(layout.num_tiles)[:, None])] = 2
    return image


def _draw_mask(axis: Any, image: np.ndarray) -> None:
    from matplotlib.colors import BoundaryNorm, ListedColormap

    rows, columns = image.shape
    axis.imshow(
        _spread_own_tile(image),
        cmap=ListedColormap(_MASK_COLORS),
        norm=BoundaryNorm([-0.5, 0.5, 1.5, 2.5, 3.5], 4),
        interpolation="nearest",
        aspect="auto",
        extent=(0, columns, rows, 0),
    )
    if max(rows, columns) <= 64:  # a grid only where the cells are large enough to be told apart
        axis.set_xticks(range(columns + 1), minor=True)
        axis.set_yticks(range(rows + 1), minor=True)
        axis.grid(which="minor", color="white", linewidth=0.6)
        axis.tick_params(which="minor", length=0)
    axis.set_xlabel("key/value block (128 slots)")


def _spread_own_tile(image: np.ndarray) -> np.ndarray:
    """Make the own-tile diagonal at least about a pixel wide: one cell of thousands would vanish in the drawing."""
    rows, columns = image.shape
    widen = columns // 500
    if widen == 0:
        return image
    spread = image.copy()
    for shift in range(1, widen + 1):
        own = image[:, :-shift] == 2
        spread[:, shift:][own] = 2
    return spread


def _mask_legend(figure: Any, images: Sequence[np.ndarray]) -> None:
    from matplotlib.patches import Patch

    present = [code for code in range(4) if any((image == code).any() for image in images)]
    handles = [Patch(facecolor=_MASK_COLORS[c], edgecolor="#999999", label=_MASK_LABELS[c]) for c in present]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)


def plot_block_masks(masks: Mapping[str, Any], path: str | Path, title: str) -> Path:
    """One panel per named `BlockMask`: query tiles are rows, key blocks are columns.

    Names become panel titles, with the mask's density below.
    """
    if not masks:
        raise ConfigError("fpsattention.plots: masks is empty, expected at least one named block mask")
    count = len(masks)
    columns = 2 if count == 4 else min(count, 3)
    rows = -(-count // columns)
    figure = new_figure(max(4.2 * columns, 6.4), 3.9 * rows + 0.9)
    figure.suptitle(title, fontsize=12)
    images = [mask_image(mask) for mask in masks.values()]
    for index, ((name, mask), image) in enumerate(zip(masks.items(), images, strict=True)):
        axis = figure.add_subplot(rows, columns, index + 1)
        _draw_mask(axis, image)
        if index % columns == 0:
            axis.set_ylabel("query tile")
        axis.set_title(f"{name}\ndensity {float(mask.density):.3f}", fontsize=10)
    _mask_legend(figure, images)
    return save_figure(figure, path)


def plot_plan(mask: Any, path: str | Path, title: str) -> Path:
    """A plan: the block mask, and the tiles of the grid with the window of the central tile, frame group by frame group."""
    layout = mask.layout
    tiles_t, tiles_h, tiles_w = layout.tile_grid
    center = (tiles_t // 2 * tiles_h + tiles_h // 2) * tiles_w + tiles_w // 2
    image = mask_image(mask)
    figure = new_figure(11.0, 6.0)
    figure.suptitle(title, fontsize=12)
    left, right = figure.subfigures(1, 2, width_ratios=(1.15, 1.0))
    axis = left.add_subplot()
    _draw_mask(axis, image)
    axis.set_ylabel("query tile")
    axis.set_title(f"block mask, density {float(mask.density):.3f}", fontsize=10)
    axis.axhline(center + 0.5, color="#D55E00", linewidth=0.9, linestyle=":")
    _mask_legend(left, [image])
    _draw_window(right, layout, image[center], center)
    return save_figure(figure, path)


def _draw_window(figure: Any, layout: Any, row: np.ndarray, center: int) -> None:
    """The tiles attended by tile `center`, one panel of H x W tiles per temporal tile."""
    from matplotlib.colors import BoundaryNorm, ListedColormap

    tiles_t, tiles_h, tiles_w = layout.tile_grid
    tile_of_block = layout.tile_of_block.cpu().numpy()
    codes = np.zeros(layout.num_tiles, np.uint8)
    np.maximum.at(codes, tile_of_block, row)
    codes = codes[: tiles_t * tiles_h * tiles_w].reshape(layout.tile_grid)
    codes = np.where(codes == 3, 1, codes)
    columns = math.ceil(math.sqrt(tiles_t * tiles_h / tiles_w)) if tiles_t > 1 else 1
    columns = min(max(columns, 1), tiles_t)
    rows = -(-tiles_t // columns)
    place = np.unravel_index(center, layout.tile_grid)
    figure.suptitle(
        f"what tile (t {place[0]}, h {place[1]}, w {place[2]}) attends (dotted line):\n"
        f"{tiles_t} x {tiles_h} x {tiles_w} tiles of {'x'.join(map(str, layout.tile))} tokens",
        fontsize=10,
    )
    for t in range(tiles_t):
        axis = figure.add_subplot(rows, columns, t + 1)
        axis.imshow(
            codes[t],
            cmap=ListedColormap(_MASK_COLORS[:3]),
            norm=BoundaryNorm([-0.5, 0.5, 1.5, 2.5], 3),
            interpolation="nearest",
            aspect="auto",
            extent=(0, tiles_w, tiles_h, 0),
        )
        axis.set_xticks(range(tiles_w + 1), minor=True)
        axis.set_yticks(range(tiles_h + 1), minor=True)
        axis.grid(which="minor", color="white", linewidth=0.8)
        axis.tick_params(which="both", length=0, labelsize=7)
        axis.set_xticks([])
        axis.set_yticks([])
        axis.set_title(f"temporal tile {t}", fontsize=8)


def plot_error_vs_sigma(
    series: Mapping[str, Sequence[tuple[float, float]]],
    phases: Sequence[tuple[float, float, str]],
    path: str | Path,
    title: str,
    ylabel: str = "relative L1 error",
) -> Path:
    """Error against sigma, in the order of denoising (sigma falls from left to right), over the sigmas that there are.

    Args:
        series: name ("quantization", "sparsity", "total", ...) to (sigma, error) points. "total" is drawn as a wide band below the others,
            so that a part that makes up nearly all of it is seen beside it.
        phases: (sigma high, sigma low, level) of the schedule; shaded, with the level's name on top.
    """
    points = [(s, e) for values in series.values() for s, e in values]
    if not points:
        raise ConfigError("fpsattention.plots: series has no points, expected at least one (sigma, error)")
    figure = new_figure(9.0, 5.0)
    axis = figure.add_subplot()
    sigmas = [sigma for sigma, _ in points]
    margin = 0.04 * (max(sigmas) - min(sigmas)) or 0.05
    left, right = max(sigmas) + margin, min(sigmas) - margin
    axis.set_xlim(left, right)
    axis.set_ylim(0.0, 1.15 * max([e for _, e in points if math.isfinite(e)] + [1e-9]))
    color_of: dict[str, str] = {}
    for high, low, level in phases:
        color = color_of.setdefault(level, _PHASE_COLORS[len(color_of) % len(_PHASE_COLORS)])
        high, low = min(high, left), max(low, right)
        if high <= low:
            continue
        axis.axvspan(low, high, color=color, zorder=0, linewidth=0)
        axis.axvline(low, color="white", linewidth=1.5, zorder=0.5)
        place = axis.get_xaxis_transform()
        axis.text((high + low) / 2, 1.01, level, transform=place, ha="center", va="bottom", fontsize=9)
    for index, (name, values) in enumerate(series.items()):
        ordered = sorted(values, reverse=True)
        band = name == "total"
        axis.plot(
            [s for s, _ in ordered], [e if math.isfinite(e) else math.nan for _, e in ordered], label=name,
            color=COLORS.get(name, f"C{index}"), alpha=0.3 if band else 1.0, linewidth=9 if band else 1.8,
            solid_capstyle="round", marker="" if band and len(ordered) > 1 else "os^Dv"[index % 5], markersize=5, zorder=2 if band else 3,
        )  # fmt: skip
    axis.grid(which="major", axis="y", color="white" if phases else "#DDDDDD", linewidth=0.8, zorder=1)
    axis.set_xlabel("sigma (1 = pure noise; denoising runs to the right)")
    axis.set_ylabel(ylabel)
    figure.legend(loc="outside lower center", ncols=len(series), frameon=False, fontsize=9)
    axis.set_title(title, fontsize=12, pad=24 if phases else 10)
    return save_figure(figure, path)


def plot_layer_heatmap(
    values: Mapping[tuple[int, float], float], path: str | Path, title: str, label: str = "relative L1 error"
) -> Path:
    """Error per layer (rows) and sigma (columns, high to low); numbers are written into the cells where they fit.

    Args:
        values: (layer, sigma) to error; missing pairs stay blank.
    """
    if not values:
        raise ConfigError("fpsattention.plots: values is empty, expected at least one (layer, sigma)")
    layers = sorted({layer for layer, _ in values})
    sigmas = sorted({sigma for _, sigma in values}, reverse=True)
    table = np.full((len(layers), len(sigmas)), np.nan)
    for (layer, sigma), value in values.items():
        table[layers.index(layer), sigmas.index(sigma)] = value
    figure = new_figure(min(max(0.75 * len(sigmas) + 2.4, 5.5), 16.0), min(max(0.42 * len(layers) + 1.9, 3.2), 14.0))
    axis = figure.add_subplot()
    finite = table[np.isfinite(table)]
    peak = float(finite.max()) if finite.size and finite.max() > 0 else 1.0
    image = axis.imshow(table, cmap="viridis", vmin=0.0, vmax=peak, aspect="auto", interpolation="nearest")
    figure.colorbar(image, ax=axis, label=label)
    axis.set_xticks(
        range(len(sigmas)), [f"{s:.3f}" for s in sigmas], rotation=90 if len(sigmas) > 10 else 0, fontsize=8
    )
    axis.set_yticks(range(len(layers)), [str(layer) for layer in layers], fontsize=8)
    axis.set_xlabel("sigma (denoising runs to the right)")
    axis.set_ylabel("layer")
    axis.set_title(title, fontsize=12)
    if table.size <= 200:
        for (row, column), value in np.ndenumerate(table):
            if np.isfinite(value):
                axis.text(
                    column, row, f"{value:.3f}", ha="center", va="center", fontsize=8,
                    color="black" if value > 0.6 * peak else "white",
                )  # fmt: skip
    return save_figure(figure, path)


def frames_shown(frames: int, columns: int = 5) -> list[int]:
    """The frames that `plot_side_by_side` shows of a video: first, last, and evenly between."""
    columns = min(columns, frames)
    return [round(i * (frames - 1) / max(columns - 1, 1)) for i in range(columns)]


def plot_side_by_side(
    dense: np.ndarray,
    fps: np.ndarray,
    path: str | Path,
    title: str,
    psnr_per_frame: Sequence[float],
    ssim_per_frame: Sequence[float],
) -> Path:
    """Frames of two videos above one another, and their difference, amplified until its largest value is white.

    Args:
        dense, fps: frames [F, H, W, 3], uint8 or floating point in [0, 1].
        psnr_per_frame, ssim_per_frame: [F], in dB and at most 1, written above each column; their ranges over the frames shown and over the
            whole video go into the heading.
    """

    def to_unit(frames: np.ndarray) -> np.ndarray:
        return frames.astype(np.float32) / 255.0 if frames.dtype == np.uint8 else frames.astype(np.float32)

    dense, fps = to_unit(np.asarray(dense)), to_unit(np.asarray(fps))
    frames, height, width, _ = dense.shape
    chosen = frames_shown(frames)
    columns = len(chosen)
    difference = np.abs(dense - fps)
    gain = 1.0 / max(float(difference[chosen].max()), 1e-6)
    cell_width = 11.0 / columns
    figure = new_figure(11.6, 3 * cell_width * height / width + 1.1)
    shown = _quality([psnr_per_frame[f] for f in chosen], [ssim_per_frame[f] for f in chosen])
    figure.suptitle(
        f"{title}. Frames shown: {shown}\nall {frames} frames: {_quality(psnr_per_frame, ssim_per_frame)}", fontsize=11
    )
    rows = (
        ("dense", dense),
        ("FPSAttention", fps),
        (f"|difference|\nx {gain:.0f}", np.clip(difference * gain, 0.0, 1.0)),
    )
    for row, (name, video) in enumerate(rows):
        for column, frame in enumerate(chosen):
            axis = figure.add_subplot(3, columns, row * columns + column + 1)
            axis.imshow(np.clip(video[frame], 0.0, 1.0), interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
            if row == 0:
                axis.set_title(f"frame {frame}, {_decibels([psnr_per_frame[frame]])}", fontsize=9)
            if column == 0:
                axis.set_ylabel(name, fontsize=10)
    return save_figure(figure, path)


def _decibels(psnr: Sequence[float]) -> str:
    """'identical', '31.2 dB' or '30.1 to 31.2 dB'."""
    if all(math.isinf(value) for value in psnr):
        return "identical"
    low, high = f"{min(psnr):.1f}", "identical" if math.isinf(max(psnr)) else f"{max(psnr):.1f}"
    return f"{low} dB" if low == high else f"{low} to {high} dB"


def _quality(psnr: Sequence[float], ssim: Sequence[float]) -> str:
    low, high = f"{min(ssim):.3f}", f"{max(ssim):.3f}"
    return f"PSNR {_decibels(psnr)}, SSIM {low if low == high else f'{low} to {high}'}"


def plot_time_split(runs: Mapping[str, Mapping[str, float]], path: str | Path, title: str) -> Path:
    """Stacked bars, one per run: seconds by part ("quantize", "attention", "rest", in the order given)."""
    if not runs:
        raise ConfigError("fpsattention.plots: runs is empty, expected at least one run with its parts in seconds")
    figure = new_figure(9.0, 1.6 + 0.6 * len(runs))
    axis = figure.add_subplot()
    names = list(runs)
    longest = max(sum(parts.values()) for parts in runs.values())
    labelled: set[str] = set()
    for row, name in enumerate(names):
        left = 0.0
        for part, seconds in runs[name].items():
            axis.barh(
                row, seconds, left=left, height=0.62, color=COLORS.get(part, "#999999"), edgecolor="white",
                label=None if part in labelled else part,
            )  # fmt: skip
            labelled.add(part)
            if seconds > 0.07 * longest:
                axis.text(left + seconds / 2, row, f"{seconds:.2f} s", ha="center", va="center", fontsize=9)
            left += seconds
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.set_xlabel("seconds")
    axis.set_xlim(0, longest * 1.02 if longest > 0 else 1.0)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_title(title, fontsize=12)
    figure.legend(loc="outside lower center", ncols=len(labelled), frameon=False)
    return save_figure(figure, path)
