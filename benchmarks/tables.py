"""``python -m benchmarks.tables results.jsonl [more.jsonl] [--plots DIR]``: markdown tables, and plots, from results files.

Works on a file of any moment of a run. Every number is one that a file holds; nothing is computed but ratios. A dry run's tables and
plots say that its timings mean nothing. What the paper reports stands in a table of its own.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fpsattention.analysis.markdown import significant as number
from fpsattention.analysis.markdown import table as markdown_table
from fpsattention.estimate import Time, render

from .peers import BASELINES
from .plugin import DONE, read_lines

DRY = "DRY RUN: TIMINGS ARE MEANINGLESS"
PAPER = (("BF16", 1.00, 1.00), ("FP8", 1.84, 1.26), ("sliding tile, BF16", 5.15, 3.60), ("FPSAttention", 7.09, 4.96))
PAPER_NOTE = "arXiv 2506.04648; H20, Wan2.1-14B, 720p. Not measured here, not the same GPU, another baseline."


class Report:
    """One or more results files of the same kind: all dry or none."""

    def __init__(self, paths: Sequence[Path]):
        self.lines = [line for path in paths for line in read_lines(path)]
        self.runs = [line for line in self.lines if line["type"] == "run"]
        if len({run["timings_meaningless"] for run in self.runs}) > 1:
            raise ValueError("dry-run and measured results came together: report them apart")
        self.dry = self.runs[0]["timings_meaningless"]

    def measured(self, kind: str) -> list[dict[str, Any]]:
        """Measurements of a kind; of the same thing measured again, the last."""
        found: dict[str, dict[str, Any]] = {}
        for line in self.lines:
            if line.get("kind") == kind:
                keys = ("id", "name", "mode", "density", "implementation", "kernel")
                found[str([line.get(key) for key in keys])] = line
        return list(found.values())

    def outcomes(self) -> list[dict[str, Any]]:
        """The last outcome of every test."""
        return list({line["id"]: line for line in self.lines if line["type"] == "outcome"}.values())

    def label(self) -> str:
        """GPU, date and commit, for under a table or a plot."""
        parts = []
        for run in self.runs:
            commit = run["commit"][:10] + ("+changes" if run["dirty"] else "")
            parts.append(f"{run['gpu'].get('name', 'no GPU')}, {run['date'][:10]}, commit {commit}")
        return "; ".join(dict.fromkeys(([DRY] if self.dry else []) + parts))

    def predicted(self, head_dim: int, granularity: str) -> float | None:
        """TFLOP/s that the timing model predicts for a main loop."""
        found = {(p["head_dim"], p["granularity"]): p["tflops"] for p in self.measured("prediction")}
        return found.get((head_dim, granularity))

    def predicted_kernel(self, row: dict[str, Any]) -> float | None:
        """The same for a row of bench_kernels, over the FLOPs that it counts."""
        dim = row["workload"]["head_dim"]
        if row["name"] == "forward":
            return self.predicted(dim, row["granularity"])
        if row["name"] == "backward" and row["mode"] == "fast":
            return self.predicted(dim, "backward, fast")
        both = [self.predicted(dim, f"backward, {kernel}") for kernel in ("dK and dV", "dQ")]
        if row["name"] != "backward" or None in both:
            return None
        return 5 / (4 / both[0] + 3 / both[1])  # products: 4 and 3 are executed, of which two pairs are the same

    def comparisons(self) -> dict[str, list[dict[str, Any]]]:
        """Measured together, by comparison, fastest first."""
        groups: dict[str, list[dict[str, Any]]] = {}
        for row in sorted(self.measured("comparison"), key=lambda row: row["ms"]["median"]):
            groups.setdefault(row["comparison"], []).append(row)
        return groups

    def accuracy(self, row: dict[str, Any]) -> dict[str, Any]:
        keys = ("comparison", "implementation")
        judged = [j for j in self.measured("judged") if all(j[key] == row[key] for key in keys)]
        return judged[-1]["accuracy"] if judged else {}


def table(head: list[str], rows: list[list[Any]]) -> str:
    """Nothing without rows: the section then says so."""
    return markdown_table(head, rows) if rows else ""


def spread(ms: dict[str, Any] | None) -> str:
    """'12.3 (12.1-13.0)': median, minimum and maximum."""
    return f"{number(ms['median'])} ({number(ms['min'])}-{number(ms['max'])})" if ms else "-"


def baseline_of(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The fastest dense BF16 implementation among those measured together; None where none was."""
    dense = [row for row in rows if row["implementation"] in BASELINES]
    return min(dense, key=lambda row: row["ms"]["median"]) if dense else None


def shape_of(workload: dict[str, Any]) -> str:
    w, (grid, tile) = workload, ("x".join(map(str, workload[key])) for key in ("grid", "tile"))
    return (f"{w['name']}: grid {grid} ({w['tokens']} tokens), {w['heads']} heads, D = {w['head_dim']}, "
            f"density {w['density']:.3f}, tile {tile}")  # fmt: skip


def comparison_tables(report: Report, training: bool) -> str:
    """One table per workload: everybody on the same tensors, with what was predicted for our main loop."""
    blocks = []
    for rows in report.comparisons().values():
        if rows[0]["training"] != training:
            continue
        base = baseline_of(rows)
        body = []
        for row in rows:
            stages, accuracy = row["stages_ms"], report.accuracy(row)
            granularity = {} if training else {"fpsattn": "tile", "fpsattn-token": "token"}
            predicted = report.predicted(row["workload"]["head_dim"], granularity.get(row["implementation"], ""))
            body.append([
                row["title"], row["precision"], spread(row["ms"]), number((stages.get("quantize") or stages.get("permute") or {}).get("median")),
                number((stages.get("backward" if training else "attention") or {}).get("median")),
                number((row["kernel_tflops"] or {}).get("computed_blocks")), number(predicted), number(row["tflops"]["dense_equivalent"]),
                number(base["ms"]["median"] / row["ms"]["median"]) if base else "-", number(accuracy.get("rel_l1")),
                f"{accuracy['cosine']:.5f}" if isinstance(accuracy.get("cosine"), float) else "-",
            ])  # fmt: skip
        head = [
            "implementation", "precision", "total, ms: median (min-max)", "quantize or permute, ms",
            "backward alone, ms" if training else "attention alone, ms", "TFLOP/s over computed blocks, kernel alone",
            "the same, predicted (main loop)", "TFLOP/s dense-equivalent, total",
            f"speed-up over {base['title']}" if base else "speed-up (no dense BF16 baseline)", "relative L1", "cosine",
        ]  # fmt: skip
        blocks.append(f"**{shape_of(rows[0]['workload'])}**\n\n{table(head, body)}")
    return "\n\n".join(blocks)


def kernel_table(report: Report) -> str:
    """Prediction and measurement side by side."""
    ceilings = {row["name"]: row for row in report.measured("ceiling")}
    copy = ceilings.get("copy", {}).get("rate")
    rows = []
    for row in report.measured("kernel"):
        w = row["workload"]
        what = f"{row['name']}, scales per {row['granularity']}" + (f", {row['mode']}" if "mode" in row else "")
        predicted = report.predicted_kernel(row)
        rate = f"{number(row['tflops'])} TFLOP/s" if "tflops" in row else f"{number(row['gb_per_s'])} GB/s"
        share = (
            row["tflops"] / predicted if predicted else row["gb_per_s"] / copy if copy and "gb_per_s" in row else None
        )
        against = f"{number(predicted)} TFLOP/s" if predicted else f"{number(copy)} GB/s (copy)" if share else "-"
        density = number(row.get("density", 1.0))
        rows.append([what, w["name"], w["head_dim"], density, spread(row["ms"]), rate, against, number(share)])
    for name, row in ceilings.items():
        rate = f"{number(row['rate'])} {row['unit']}"
        rows.append([f"ceiling: {name}", "-", "-", "-", spread(row["ms"]), rate, "-", "-"])
    predictions = []
    for p in report.measured("prediction"):
        rate = f"{number(p['tflops'])} TFLOP/s"
        predictions.append([f"predicted main loop: {p['kernel']}", "-", p["head_dim"], "-", "-", "-", rate, "-"])
    head = ["kernel", "shape", "D", "density", "ms: median (min-max)", "measured", "predicted, or copy", "ratio"]
    return table(head, rows + predictions)


def linears_table(report: Report) -> str:
    rows = [
        ["x".join(map(str, row["size"])), row["name"], spread(row["ms"]), number(row["rate"]), number(row["error"])]
        for row in report.measured("linear")
    ]
    head = ["rows x inputs x outputs", "layer", "ms: median (min-max)", "TFLOP/s", "relative error of 64 rows"]
    return table(head, rows)


def steps_table(report: Report) -> str:
    rows = []
    for row in report.measured("step"):
        model, split, law = row["model"], row.get("split_ms") or {}, row.get("amdahl") or {}
        rows.append([
            model["name"], f"{model['layers']} of {model['layers_of_real_model']}", row["name"], spread(row["ms"]),
            *(number(split.get(part)) for part in ("quantize", "attention", "rest")),
            number(row["peak_bytes"] / 2**30) if row.get("peak_bytes") else "-", number(row.get("speedup")),
            number(law.get("predicted")), number(law.get("limit")),
        ])  # fmt: skip
    head = [
        "model (random weights)", "layers", "attention", "one step, ms: median (min-max)", "quantize, ms", "self-attention, ms", "rest, ms",
        "peak memory, GiB", "speed-up of the step", "predicted by Amdahl", "limit (attention free)",
    ]  # fmt: skip
    return table(head, rows)


def parts_tables(report: Report) -> str:
    """The table of ``fpsattn estimate``, measured: per model and density the dense step, attention alone, FP8 linears too."""
    steps: dict[str, list[dict[str, Any]]] = {}
    for row in report.measured("step"):
        if row.get("parts_ms"):
            steps.setdefault(row["model"]["name"], []).append(row)
    blocks = []
    for name, rows in steps.items():
        dense = [row for row in rows if "density" not in row]
        for density in dict.fromkeys(row["density"] for row in rows if "density" in row):
            shown = [*dense[:1], *(row for row in rows if row.get("density") == density)]
            columns = {row["name"]: _times(row) for row in shown}
            layers = f"{rows[0]['model']['layers']} of {rows[0]['model']['layers_of_real_model']} layers"
            blocks.append(f"**{name}, {layers}, density {density:g}**\n\n```\n" + "\n".join(render(columns)) + "\n```")
    return "\n\n".join(blocks)


def _times(row: dict[str, Any]) -> dict[str, Time]:
    floors = row.get("floor_ms") or {}
    return {part: Time(ms, floors.get(part), "measured") for part, ms in row["parts_ms"].items()}


def facts_table(report: Report) -> str:
    facts = {k: row for line in report.measured("facts") for k, row in line["rows"].items()}
    return table(["fact", "value", "unit"], [[name, number(value, 4), unit] for name, (value, unit) in facts.items()])


def outcome_table(report: Report) -> str:
    """Per file of tests, how many of ours were right; then everybody who was not measured, and why."""
    kinds = [*DONE, "not run"]
    parts: dict[str, Counter[str]] = defaultdict(Counter)
    for outcome in report.outcomes():
        parts[outcome["id"].split("::")[0]][outcome["outcome"]] += 1
    return table(["part", *kinds], [[name, *(counts[kind] for kind in kinds)] for name, counts in parts.items()])


def unmeasured_table(report: Report) -> str:
    reasons: Counter[tuple[str, str]] = Counter()
    for outcome in report.outcomes():
        if outcome["outcome"] != "passed":  # of a peer its name alone: its comparisons fail alike
            what = re.sub(r"^test_(own|peer)\[(.+)-(forward|training)-.*", r"\2", outcome["id"].split("::")[-1])
            lines = [line for line in (outcome["reason"] or "").splitlines() if line.strip()] or ["no reason"]
            reasons[what, f"{outcome['outcome']}: {lines[-1].strip()[:200]}"] += 1
    return table(["what", "why", "times"], [[what, why, n] for (what, why), n in reasons.items()])


def markdown(paths: Sequence[Path]) -> str:
    """The whole report. Sections without data say so in a line."""
    report = Report(paths)
    banner = f"> **{DRY}.** Tiny sizes on a CPU; only the machinery was exercised.\n\n" if report.dry else ""
    sections = {
        "Right or wrong": outcome_table(report),
        "Attention forward": comparison_tables(report, training=False),
        "Forward and backward": comparison_tables(report, training=True),
        "One denoising step": steps_table(report),
        "One denoising step, part by part": parts_tables(report),
        "Kernels: predicted and measured": kernel_table(report),
        "Linear layers": linears_table(report),
        "Hardware facts": facts_table(report),
        "Not measured, or not right": unmeasured_table(report),
    }
    lines = ["# We measured\n", f"{report.label()}\n"]
    for title, body in sections.items():
        lines.append(f"## {title}\n\n{banner}{body or 'No data.'}\n")
    head = ["attention", "kernel speed-up", "end-to-end speed-up"]
    paper = table(head, [[name, f"{kernel:.2f}", f"{whole:.2f}"] for name, kernel, whole in PAPER])
    lines.append(f"# The paper reports\n\n{paper}\n\n{PAPER_NOTE}\n")
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    p = argparse.ArgumentParser(prog="python -m benchmarks.tables", description="Tables and plots from results files.")
    p.add_argument("results", type=Path, nargs="+")
    p.add_argument("--plots", type=Path, help="folder for the plots")
    args = p.parse_args(argv)
    try:
        print(markdown(args.results))
    except (OSError, ValueError) as error:
        print(f"tables: {error}", file=sys.stderr)
        return 2
    if args.plots:
        from .plots import draw_all

        for path in draw_all(Report(args.results), args.plots):
            print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
