"""``python -m benchmarks.report results.json [more.json] [--out DIR]``: README tables (markdown) and plots.

Works on partial files too. A dry run's report says on every table and across every plot that its timings mean nothing.
What the paper reports stands in a table of its own, never beside what was measured.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.reporting import tables
from benchmarks.reporting.load import Report, load


def markdown(report: Report) -> str:
    """The whole report. Sections without data say so in a line."""
    sections = [
        ("Parts", tables.parts_table(report)),
        ("Attention forward", tables.comparison_tables(report, "forward")),
        ("Forward and backward", tables.comparison_tables(report, "training")),
        ("Not measured", tables.absent_table(report)),
        ("One denoising step", tables.end_to_end_table(report)),
        ("Kernels and ceilings", tables.kernel_table(report)),
    ]
    lines = [f"# We measured\n\n{report.label()}\n"]
    for title, body in sections:
        lines.append(f"## {title}\n\n{tables.banner(report)}\n{body or 'No data.'}\n")
    lines.append(f"# The paper reports\n\n{tables.paper_table()}\n")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    p = argparse.ArgumentParser(prog="python -m benchmarks.report", description="Tables and plots from results files.")
    p.add_argument("results", type=Path, nargs="+")
    p.add_argument("--out", type=Path, help="folder for report.md and the plots (default: tables to stdout, no plots)")
    args = p.parse_args(argv)
    try:
        report = load(args.results)
    except (OSError, ValueError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    text = markdown(report)
    print(text)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "report.md").write_text(text)
        try:
            from benchmarks.reporting.plots import draw_all

            for path in draw_all(report, args.out):
                print(f"wrote {path}")
        except ImportError as error:
            print(f"plots skipped: {error} (pip install matplotlib)")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
