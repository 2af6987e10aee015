"""The plots: roofline, speed-up against density, time split. Each carries GPU, date and commit; a dry run says so across it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fpsattention.analysis.plots import new_figure, plot_time_split, save_figure

from .tables import DRY, Report, baseline_of


def _axes(report: Report) -> tuple[Any, Any]:
    figure = new_figure(8.0, 5.0)
    axes = figure.add_subplot(xscale="log", yscale="log")
    axes.grid(True, which="both", alpha=0.3)
    if report.dry:
        loud = {"fontsize": 20, "color": "red", "alpha": 0.35, "rotation": 20}
        axes.text(0.5, 0.5, DRY, transform=axes.transAxes, ha="center", va="center", **loud)
    return figure, axes


def _finish(report: Report, figure: Any, axes: Any, path: Path, title: str) -> Path:
    axes.legend(fontsize=7)
    axes.set_title(f"{title}\nwe measured: {report.label()}", fontsize=9)
    return save_figure(figure, path)


def roofline(report: Report, path: Path) -> Path | None:
    """TFLOP/s over computed blocks against FLOP per byte of BF16 q, k, v, out, under the ceilings that the same run measured."""
    rows = [row for rows in report.comparisons().values() for row in rows if not row["training"]]
    if not rows:
        return None
    figure, axes = _axes(report)

    def intensity(row: dict[str, Any]) -> float:
        w = row["workload"]
        return w["computed_flops" if row["sparse"] else "dense_flops"] / (8 * w["heads"] * w["tokens"] * w["head_dim"])

    for i, title in enumerate(dict.fromkeys(row["title"] for row in rows)):
        mine = [row for row in rows if row["title"] == title]
        x, y = [intensity(row) for row in mine], [row["tflops"]["computed_blocks"] for row in mine]
        axes.scatter(x, y, marker="osD^vPX*<>hdp8"[i % 14], s=36, label=title)
    rates = {row["name"]: row["rate"] for row in report.measured("ceiling")}
    low, high = min(map(intensity, rows)) / 2, max(map(intensity, rows)) * 2
    xs = [low * (high / low) ** (i / 100) for i in range(101)]
    for name, style in (("bf16-gemm", "--"), ("fp8-gemm", "-")):
        if name in rates and "copy" in rates:
            roof = [min(rates[name], rates["copy"] / 1e3 * x) for x in xs]
            axes.plot(xs, roof, style, color="black", linewidth=1, label=f"{name} and copy, this run")
    axes.set(xlabel="FLOP of computed blocks per byte of q, k, v, out (BF16)",
             ylabel="TFLOP/s over computed blocks, quantization included")  # fmt: skip
    return _finish(report, figure, axes, path, "Attention forward under this board's own ceilings")


def speedup_against_density(report: Report, path: Path) -> Path | None:
    """Total time of the fastest dense BF16 call over that of each implementation, against the mask's density."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for rows in report.comparisons().values():
        base = baseline_of(rows)
        for row in rows:
            if base and row["sparse"] and not row["training"]:
                point = (row["workload"]["density"], base["ms"]["median"] / row["ms"]["median"])
                lines.setdefault(f"{row['title']}, {row['workload']['name']}", []).append(point)
    if not lines:
        return None
    figure, axes = _axes(report)
    for label, points in lines.items():
        axes.plot(*zip(*sorted(points), strict=True), marker="o", label=label)
    densities = sorted({density for points in lines.values() for density, _ in points})
    inverse, label = [1 / d for d in densities], "1 / density: skipped work alone, same rate"
    axes.plot(densities, inverse, ":", color="black", label=label)
    axes.set(
        xlabel="density (attended pairs / all pairs)", ylabel="speed-up over the fastest dense BF16 of the same run"
    )
    return _finish(report, figure, axes, path, "Speed-up against density, quantization included")


def time_split(report: Report, path: Path) -> Path | None:
    """Quantize, self-attention and the rest of one denoising step."""
    runs = {}
    for row in (row for row in report.measured("step") if row.get("split_ms")):
        model = row["model"]
        label = f"{model['name']}\n{row['name']}, {model['layers']}/{model['layers_of_real_model']} layers"
        runs[label] = {part: ms / 1e3 for part, ms in row["split_ms"].items()}
    title = f"Where a denoising step's time goes, random weights\nwe measured: {report.label()}"
    return plot_time_split(runs, path, title) if runs else None


def draw_all(report: Report, folder: Path) -> list[Path]:
    """Every plot that the files have data for."""
    folder.mkdir(parents=True, exist_ok=True)
    plots = {"roofline": roofline, "speedup_density": speedup_against_density, "time_split": time_split}
    return [path for name, draw in plots.items() if (path := draw(report, folder / f"{name}.png"))]
