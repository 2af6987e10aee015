"""Pictures of what tuning found: density and error per layer and phase, windows per head, and the trade of error against cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..analysis.plots import new_figure, save_figure

_KINDS = {"tune": ("#0072B2", "o"), "preset": ("#D55E00", "s"), "pattern": ("#009E73", "^")}
_MEASURES = {"psnr": "root mean square of the video's error", "rel_l1": "relative L1 of the latents", "density": "relative L1 of the latents"}  # fmt: skip


def draw(folder: Path, report: Mapping[str, Any]) -> list[Path]:
    """``schedule.png``, ``heads.png`` and ``pareto.png`` in ``folder``, from the report of a tuning."""
    return [plot_schedule(report, folder / "schedule.png"), plot_heads(report, folder / "heads.png"), plot_pareto(report, folder / "pareto.png")]  # fmt: skip


def plot_schedule(report: Mapping[str, Any], path: str | Path) -> Path:
    """Heat maps, layers by phases: density, and share of the predicted squared error; BF16 cells are marked."""
    cells = report["cells"]
    layers, phases = 1 + max(c["layer"] for c in cells), 1 + max(c["phase"] for c in cells)
    density, error = (np.zeros((layers, phases)) for _ in range(2))
    for cell in cells:
        density[cell["layer"], cell["phase"]] = cell["density"]
        error[cell["layer"], cell["phase"]] = cell["error"]
    total = error.sum()
    figure = new_figure(9.0, min(max(0.4 * layers + 2.0, 3.2), 13.0))
    axes = figure.subplots(1, 2, sharey=True)
    panels = (
        (density, "density", "viridis", 1.0),
        (error / total if total else error, "share of the squared error", "magma", None),
    )
    for axis, (table, label, colors, top) in zip(axes, panels, strict=True):
        image = axis.imshow(table, cmap=colors, vmin=0.0, vmax=top, aspect="auto", interpolation="nearest")
        figure.colorbar(image, ax=axis, label=label)
        axis.set_xticks(range(phases), [f"{sigma:.3f}" for sigma in report["sigmas"]], fontsize=8)
        axis.set_xlabel("first sigma of the phase (denoising runs to the right)")
        peak = top or (table.max() or 1.0)
        if table.size <= 200:
            for (row, column), value in np.ndenumerate(table):
                bf16 = axis is axes[0] and any(
                    c["precision"] == "bf16" for c in cells if (c["layer"], c["phase"]) == (row, column)
                )
                color = "black" if value > 0.6 * peak else "white"
                axis.text(
                    column, row, "BF16" if bf16 else f"{value:.2f}", ha="center", va="center", fontsize=8, color=color
                )
    axes[0].set_yticks(range(layers))
    axes[0].set_ylabel("layer")
    figure.suptitle(f"tuned schedule: density {report['density']:.3f}", fontsize=12)
    return save_figure(figure, path)


def plot_heads(report: Mapping[str, Any], path: str | Path) -> Path:
    """Density of every head (rows: layers and heads) in every phase, with the window written into it where it fits."""
    cells = report["cells"]
    heads = max((len(c["densities"]) for c in cells), default=1) or 1
    layers, phases = 1 + max(c["layer"] for c in cells), 1 + max(c["phase"] for c in cells)
    table, text = np.ones((layers * heads, phases)), {}
    for cell in cells:
        for head in range(heads):
            row = cell["layer"] * heads + head
            if cell["densities"]:
                table[row, cell["phase"]] = cell["densities"][head if cell["windows"] else 0]
            text[row, cell["phase"]] = _rule(cell, head)
    figure = new_figure(max(5.5, 1.1 * phases + 2.5), min(max(0.32 * layers * heads + 1.8, 3.2), 14.0))
    axis = figure.add_subplot()
    image = axis.imshow(table, cmap="viridis", vmin=0.0, vmax=1.0, aspect="auto", interpolation="nearest")
    figure.colorbar(image, ax=axis, label="density")
    for layer in range(1, layers):
        axis.axhline(layer * heads - 0.5, color="white", linewidth=1.5)
    axis.set_xticks(range(phases), [f"{sigma:.3f}" for sigma in report["sigmas"]], fontsize=8)
    axis.set_xlabel("first sigma of the phase (denoising runs to the right)")
    if layers * heads <= 64:
        axis.set_yticks(
            range(layers * heads), [f"{row // heads}.{row % heads}" for row in range(layers * heads)], fontsize=7
        )
        for (row, column), shown in text.items():
            color = "black" if table[row, column] > 0.6 else "white"
            axis.text(column, row, shown, ha="center", va="center", fontsize=7, color=color)
    axis.set_ylabel("layer.head")
    axis.set_title("windows per head, in tiles (time x height x width)", fontsize=11)
    return save_figure(figure, path)


def _rule(cell: Mapping[str, Any], head: int) -> str:
    if cell["pattern"]:
        return f"{cell['pattern']['name']} {cell['pattern']['ratio']:g}"
    return "x".join(map(str, cell["windows"][head])) if cell["windows"] else "BF16"


def plot_pareto(report: Mapping[str, Any], path: str | Path) -> Path:
    """Error of the result against cost: predicted along the hull, and measured where runs were made."""
    metric = next(iter(report["target"]))
    figure = new_figure(8.0, 5.0)
    axis = figure.add_subplot()
    hull = [(p["cost"], p["predicted"]) for p in report["frontier"] if p["predicted"] > 0]
    axis.plot(*_columns(hull), color="#0072B2", linestyle=":", linewidth=1.2, label="tune, predicted")
    tries = sorted((t["of"]["cost"], max(v for k, v in t.items() if k != "of")) for t in report["tries"].values())
    if tries:
        axis.plot(*_columns(tries), "x", color="#56B4E9", markersize=7, label="tune, runs of the search")
    points = report.get("pareto", ())
    for kind, (color, marker) in _KINDS.items():
        named: dict[str, list[tuple[float, float]]] = {}
        for point in points:
            if point["kind"] == kind:
                series = point["name"].rpartition(" ")[0] if kind == "pattern" else kind
                named.setdefault(series, []).append((point["cost"], point["value"]))
        for number, (name, series_points) in enumerate(named.items()):
            label = {"tune": "tune, measured on the held-out run", "preset": "presets"}.get(name, f"{name}, FP8")
            axis.plot(
                *_columns(sorted(series_points)), marker=marker if number == 0 else "v", color=color if number == 0 else "#CC79A7",
                linestyle="" if kind == "preset" else "-", label=label,
            )  # fmt: skip
    for point in points:
        if point["kind"] == "preset":
            axis.annotate(
                point["name"], (point["cost"], point["value"]), xytext=(6, 4), textcoords="offset points", fontsize=8
            )
    if metric != "density":
        axis.axhline(report["bound"], color="#888888", linewidth=1.0)
        axis.annotate("bound", (0.99, report["bound"]), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8, color="#666666")  # fmt: skip
        axis.plot(
            [report["cost"]], [report["held_out"]], "*", color="black", markersize=13, label="what was chosen, held out"
        )
    axis.set_yscale("log")
    axis.set_xlabel("cost: density, BF16 counted twice")
    axis.set_ylabel(_MEASURES[metric])
    axis.grid(alpha=0.3, which="both")
    axis.legend(fontsize=8)
    axis.set_title("what a block pair buys", fontsize=12)
    return save_figure(figure, path)


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]
