"""The plots: roofline, speed-up against density, time split. Each carries GPU, date and commit; a dry run says so across it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .load import Report, baseline_of


def _figure(report: Report) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), constrained_layout=True)
    axes.grid(True, which="both", alpha=0.3)
    if report.dry:
        axes.text(0.5, 0.5, "DRY RUN\ntimings are meaningless", transform=axes.transAxes, ha="center", va="center", fontsize=28,
                  color="red", alpha=0.35, rotation=20, zorder=10)  # fmt: skip
    return figure, axes


def _save(report: Report, figure: Any, axes: Any, path: Path, title: str) -> Path:
    import matplotlib.pyplot as plt

    axes.set_title(f"{title}\nwe measured: {report.label()}", fontsize=9)
    figure.savefig(path, dpi=150, metadata={"Software": None})
    plt.close(figure)
    return path


def bytes_moved(workload: dict[str, Any]) -> int:
    """Least bytes of an attention call through device memory: BF16 q, k, v read and out written once."""
    return 4 * workload["batch"] * workload["heads"] * workload["tokens"] * workload["head_dim"] * 2


def roofline(report: Report, path: Path) -> Path | None:
    """TFLOP/s over computed blocks against FLOP per byte, under the ceilings that the same run measured."""
    cases = [case for _, group in report.comparisons("forward") for case in group]
    ceilings = report.ceilings()
    if not cases:
        return None
    figure, axes = _figure(report)
    markers = {name: "osD^vPX*<>hdp8"[i % 14] for i, name in enumerate(dict.fromkeys(case["title"] for case in cases))}
    for title, marker in markers.items():
        mine = [case for case in cases if case["title"] == title]
        x = [case["computed_flops"] / bytes_moved(case["workload"]) for case in mine]
        y = [case["tflops"]["computed_blocks"] for case in mine]
        axes.scatter(x, y, marker=marker, s=36, label=title)
    low, high = axes.get_xlim()
    low, high = max(low, 1.0), max(high, 10.0)
    for name, style in (("bf16-gemm", "--"), ("fp8-gemm", "-")):
        if name in ceilings and "copy" in ceilings:
            peak, slope = ceilings[name]["value"], ceilings["copy"]["value"] / 1e3
            xs = [low * (high / low) ** (i / 100) for i in range(101)]
            axes.plot(
                xs,
                [min(peak, slope * x) for x in xs],
                style,
                color="black",
                linewidth=1,
                label=f"{name} and copy, this run",
            )
    axes.set(xscale="log", yscale="log", xlabel="FLOP of computed blocks per byte of q, k, v, out (BF16)",
             ylabel="TFLOP/s over computed blocks, quantization included")  # fmt: skip
    axes.legend(fontsize=7)
    return _save(report, figure, axes, path, "Attention forward under this board's own ceilings")


def speedup_against_density(report: Report, path: Path) -> Path | None:
    """Total time of the fastest dense BF16 call over the total time of each implementation, against the mask's density."""
    lines: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for _, cases in report.comparisons("forward"):
        base = baseline_of(cases)
        for case in cases:
            if base and case.get("sparse"):
                point = (case["workload"]["density"], base["time_ms"]["median"] / case["time_ms"]["median"])
                lines.setdefault((case["workload"]["name"], case["title"]), []).append(point)
    if not lines:
        return None
    figure, axes = _figure(report)
    for (shape, title), points in lines.items():
        points.sort()
        axes.plot(*zip(*points, strict=True), marker="o", label=f"{title}, {shape}")
    densities = sorted({point[0] for points in lines.values() for point in points})
    axes.plot(
        densities, [1 / d for d in densities], ":", color="black", label="1 / density: skipped work alone, same rate"
    )
    axes.set(xscale="log", yscale="log", xlabel="density (attended pairs / all pairs)",
             ylabel="speed-up over the fastest dense BF16 of the same run")  # fmt: skip
    axes.legend(fontsize=7)
    return _save(report, figure, axes, path, "Speed-up against density, quantization included")


def time_split(report: Report, path: Path) -> Path | None:
    """Stacked bars: quantize, self-attention and the rest of one denoising step."""
    cases = [case for case in report.cases("end_to_end", "end_to_end") if case.get("split_ms")]
    if not cases:
        return None
    figure, axes = _figure(report)
    bottom = [0.0] * len(cases)
    for category, colour in (("quantize", "tab:orange"), ("attention", "tab:blue"), ("rest", "tab:gray")):
        heights = [case["split_ms"][category] for case in cases]
        axes.bar(range(len(cases)), heights, bottom=bottom, color=colour, label=category)
        bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
    labels = [
        f"{case['id'].replace('/', chr(10))}\n{case['model']['layers']}/{case['model']['layers_of_real_model']} layers"
        for case in cases
    ]
    axes.set_xticks(range(len(cases)), labels, fontsize=7)
    axes.set(ylabel="ms of one denoising step (profiled)")
    axes.legend()
    return _save(report, figure, axes, path, "Where a denoising step's time goes, random weights")


def draw_all(report: Report, folder: Path) -> list[Path]:
    """Every plot that the files have data for."""
    folder.mkdir(parents=True, exist_ok=True)
    made = [
        roofline(report, folder / "roofline.png"), speedup_against_density(report, folder / "speedup_density.png"),
        time_split(report, folder / "time_split.png"),
    ]  # fmt: skip
    return [path for path in made if path]
