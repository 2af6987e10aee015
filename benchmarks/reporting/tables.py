"""The markdown tables. Every number is one that a file holds; nothing is computed but ratios, and each says of what."""

from __future__ import annotations

from typing import Any

from .load import DRY, Report, baseline_of

# arXiv 2506.04648: H20, Wan2.1-14B, 720p. Kept in a table of its own: another GPU, another baseline, not our measurement.
PAPER = (("BF16", 1.00, 1.00), ("FP8", 1.84, 1.26), ("sliding tile, BF16", 5.15, 3.60), ("FPSAttention", 7.09, 4.96))


def table(header: list[str], rows: list[list[Any]]) -> str:
    """A markdown table; numbers are right-aligned."""
    numeric = [all(str(row[i])[:1].isdigit() or str(row[i]) in ("", "-") for row in rows) for i in range(len(header))]
    lines = ["| " + " | ".join(header) + " |", "|" + "|".join(" ---: " if n else " --- " for n in numeric) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(str(cell) for cell in row) + " |" for row in rows)])


def number(value: Any, digits: int = 3) -> str:
    """``digits`` significant digits without exponent; '-' for what is not there."""
    if not isinstance(value, (int, float)):
        return "-"
    return f"{value:.0f}" if abs(value) >= 10 ** (digits - 1) else f"{value:.{digits}g}"


def spread(summary: dict[str, Any] | None) -> str:
    """'12.3 (12.1-13.0)': median, minimum and maximum."""
    if not summary:
        return "-"
    return f"{number(summary['median'])} ({number(summary['min'])}-{number(summary['max'])})"


def banner(report: Report) -> str:
    return f"> **{DRY}.** Tiny sizes on a CPU; only the machinery was exercised.\n" if report.dry else ""


def _shape(workload: dict[str, Any]) -> str:
    grid = "x".join(map(str, workload["grid"]))
    tile = "x".join(map(str, workload["tile"]))
    return (
        f"{workload['name']}: grid {grid} ({workload['tokens']} tokens), {workload['heads']} heads, D = {workload['head_dim']}, "
        f"density {workload['density']:.3f}, tile {tile}"
    )


def comparison_tables(report: Report, kind: str) -> str:
    """One table per workload: everybody on the same tensors."""
    blocks = []
    for _, cases in report.comparisons(kind):
        base = baseline_of(cases)
        rows = []
        for case in sorted(cases, key=lambda case: case["time_ms"]["median"]):
            stages = case.get("stages_ms") or {}
            kernel = case.get("kernel_tflops") or {}
            pre = stages.get("quantize") or stages.get("permute")
            rows.append([
                case["title"], case["precision"], spread(case["time_ms"]), number((pre or {}).get("median")),
                number((stages.get("attention") or stages.get("backward") or {}).get("median")),
                number(kernel.get("computed_blocks")), number(case["tflops"]["dense_equivalent"]),
                number(base["time_ms"]["median"] / case["time_ms"]["median"]) if base else "-",
                number((case["accuracy"] or {}).get("rel_l1")),
                f"{case['accuracy']['cosine']:.5f}" if isinstance((case["accuracy"] or {}).get("cosine"), float) else "-",
            ])  # fmt: skip
        alone = "backward alone, ms" if kind == "training" else "attention alone, ms"
        header = [
            "implementation", "precision", "total, ms: median (min-max)", "quantize or permute, ms", alone,
            "TFLOP/s over computed blocks, kernel alone", "TFLOP/s dense-equivalent, total",
            f"speed-up over {base['title']}" if base else "speed-up (no dense BF16 baseline)", "relative L1", "cosine",
        ]  # fmt: skip
        blocks.append(f"**{_shape(cases[0]['workload'])}**\n\n{table(header, rows)}\n\n{report.label()}")
    return "\n\n".join(blocks)


def absent_table(report: Report) -> str:
    """Who was not measured, and why."""
    rows: dict[tuple[str, str], list[str]] = {}
    for case in report.cases("peers", status=None):
        if case["status"] in ("absent", "failed", "crashed", "skipped") and case.get("implementation"):
            key = (
                case["implementation"],
                f"{case['status']}: {case['reason']}".replace("|", "/").replace("\n", " ")[:160],
            )
            rows.setdefault(key, []).append(case["id"].rsplit("/", 1)[0])
    body = [[name, why, len(where)] for (name, why), where in rows.items()]
    return table(["implementation", "why it was not measured", "comparisons"], body) if body else ""


def end_to_end_table(report: Report) -> str:
    rows = []
    for case in report.cases("end_to_end", "end_to_end"):
        model, split, law = case["model"], case.get("split_ms") or {}, case.get("amdahl") or {}
        layers = f"{model['layers']} of {model['layers_of_real_model']}"
        what = f"{case['preset']} preset, level {case['level']}" if case.get("level") else case["id"].rsplit("/", 1)[1]
        rows.append([
            model["name"], layers, what, spread(case["time_ms"]), number(split.get("quantize")), number(split.get("attention")),
            number(split.get("rest")), number(case.get("peak_bytes", None) and case["peak_bytes"] / 2**30),
            number(case.get("speedup")), number(law.get("predicted")), number(law.get("limit")),
        ])  # fmt: skip
    header = [
        "model (random weights)", "layers", "attention", "one step, ms: median (min-max)", "quantize, ms", "self-attention, ms", "rest, ms",
        "peak memory, GiB", "speed-up of the step", "predicted by Amdahl", "limit (attention free)",
    ]  # fmt: skip
    return f"{table(header, rows)}\n\n{report.label()}" if rows else ""


def kernel_table(report: Report) -> str:
    rows = []
    for case in report.cases("kernels", "kernel"):
        record = case.get("record") or {}
        words = ("gb_per_s", "tflop", "of_copy", "of_dense", "ratio")
        rates = [f"{number(record[key])} {key}" for key in sorted(record) if any(word in key for word in words)]
        rows.append([case["id"], spread(case.get("time_ms")), ", ".join(rates) or "-"])
    for name, ceiling in report.ceilings().items():
        rows.append([f"ceiling: {name}", "-", f"{number(ceiling['value'])} {ceiling['unit']}"])
    return f"{table(['case', 'ms: median (min-max)', 'rate'], rows)}\n\n{report.label()}" if rows else ""


def parts_table(report: Report) -> str:
    rows = []
    for data in report.files:
        for part in data["parts"]:
            cases = [case for case in data["cases"] if case["part"] == part["name"]]
            wrong = sum(case.get("correct") is False for case in cases)
            right = sum(case.get("correct") is True for case in cases)
            rows.append(
                [
                    part["title"],
                    part["status"],
                    part["seconds"],
                    right,
                    wrong,
                    (part["reason"] or "").replace("|", "/")[:160],
                ]
            )
    return table(["part", "status", "seconds", "checks right", "checks wrong", "reason"], rows)


def paper_table() -> str:
    """What the paper reports, apart from everything measured here."""
    body = table(
        ["attention", "kernel speed-up", "end-to-end speed-up"], [[a, f"{b:.2f}", f"{c:.2f}"] for a, b, c in PAPER]
    )
    return (
        f"{body}\n\nThe paper reports (arXiv 2506.04648; H20, Wan2.1-14B, 720p). Not measured here, not the same GPU."
    )
