"""Tables and plots from a small synthetic results file; dry runs are loud, the paper's figures stay apart."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import tables  # noqa: E402
from benchmarks.plugin import SCHEMA, Results  # noqa: E402
from benchmarks.tables import DRY, Report, baseline_of, markdown  # noqa: E402
from fpsattention.analysis.markdown import significant, table  # noqa: E402


def ms(median: float) -> dict[str, Any]:
    return {"min": median * 0.9, "median": median, "max": median * 1.2, "repeats": 5, "calls": 1}


def comparison(name: str, median: float, density: float, *, sparse: bool, training: bool = False) -> dict[str, Any]:
    workload = {
        "name": "shape", "grid": [4, 8, 12], "tokens": 384, "heads": 2, "head_dim": 128, "density": density, "tile": [4, 8, 8],
        "computed_flops": 10**9, "dense_flops": 10**10,
    }  # fmt: skip
    kind = "training" if training else "forward"
    return {
        "id": f"{kind}-{density}", "kind": "comparison", "comparison": f"{kind}-shape-{density}", "training": training,
        "workload": workload, "implementation": name, "title": f"title of {name}", "precision": "fp8", "sparse": sparse,
        "ms": ms(median), "stages_ms": {"backward" if training else "attention": ms(median / 2)}, "own": name == "fpsattn",
        "tflops": {"computed_blocks": 123.0, "dense_equivalent": 456.0}, "kernel_tflops": {"computed_blocks": 246.0},
    }  # fmt: skip


def write(path: Path, *, dry: bool = False, empty: bool = False) -> Path:
    results = Results(path)
    results.append("run", schema=SCHEMA, mode="dry" if dry else "quick", timings_meaningless=dry, date="2026-01-02T03:04:05+00:00",
                   commit="0123456789abcdef", dirty=False, gpu={"name": "Made-up GPU"})  # fmt: skip
    if empty:
        return path
    rows = [comparison("fpsattn", 2.0, 0.2, sparse=True), comparison("sdpa-cudnn", 18.0, 0.2, sparse=False),
            comparison("sdpa-flash", 20.0, 0.2, sparse=False), comparison("fpsattn", 9.0, 1.0, sparse=True),
            comparison("sdpa-cudnn", 18.0, 1.0, sparse=False), comparison("fpsattn", 7.0, 0.2, sparse=True, training=True)]  # fmt: skip
    model = {"name": "wan", "grid": [1, 2, 3], "layers": 2, "layers_of_real_model": 40, "heads": 40, "head_dim": 128}
    split = {"quantize": 1.0, "attention": 5.0, "rest": 4.0}
    parts = {"attention": 5.0, "quantize": 1.0, "linears": 3.0, "cross-attention": 0.5, "norms": 0.5}
    kernel = {
        "id": "k",
        "kind": "kernel",
        "granularity": "tile",
        "workload": rows[0]["workload"],
        "ms": ms(1.5),
        "density": 0.3,
    }
    rows += [
        {"id": "j", "kind": "judged", "comparison": "forward-shape-0.2", "implementation": "fpsattn",
         "accuracy": {"rel_l1": 0.0432, "cosine": 0.99912}},
        {"id": "p", "kind": "prediction", "kernel": "d128", "head_dim": 128, "granularity": "tile", "tflops": 1366.0},
        *({"id": "p", "kind": "prediction", "kernel": name, "head_dim": 128, "granularity": f"backward, {name}", "tflops": rate}
          for name, rate in (("dK and dV", 800.0), ("dQ", 1000.0), ("fast", 700.0))),
        {"id": "p", "kind": "prediction", "kernel": "alone", "head_dim": 128, "granularity": "tile, no clusters", "tflops": 1300.0},
        {**kernel, "name": "forward", "tflops": 683.0}, {**kernel, "name": "quantize", "gb_per_s": 3200.0},
        {**kernel, "id": "n", "name": "forward", "granularity": "tile, no clusters", "tflops": 650.0},
        {**kernel, "name": "backward", "mode": "fast", "tflops": 350.0},
        {**kernel, "name": "backward", "mode": "deterministic", "tflops": 250.0},
        {"id": "c", "kind": "ceiling", "name": "copy", "ms": ms(1.0), "rate": 4000.0, "unit": "GB/s"},
        {"id": "c", "kind": "ceiling", "name": "fp8-gemm", "ms": ms(1.0), "rate": 1300.0, "unit": "TFLOP/s"},
        {"id": "s", "kind": "step", "model": model, "name": "dense-cudnn", "ms": ms(100.0), "split_ms": split, "peak_bytes": 2**31,
         "parts_ms": {**parts, "attention": 15.0}},
        {"id": "s", "kind": "step", "model": model, "name": "fps-0.1", "ms": ms(40.0), "split_ms": split, "peak_bytes": 2**31,
         "density": 0.1, "linears": "bf16", "parts_ms": parts, "floor_ms": {part: 0.5 for part in parts}, "speedup": 2.5, "amdahl": {"predicted": 2.58, "limit": 3.33}},
        {"id": "f", "kind": "facts", "rows": {"pipe/ex2": [15.9, "instr/clk"]}},
    ]  # fmt: skip
    for row in rows:
        results.append("measurement", **row)
    peer = "benchmarks/bench_peers.py::test_peer[sage-forward-tiny-0.3]"
    results.append(
        "outcome", id=peer, outcome="skipped", own=False, reason="no module | here", seconds=0, telemetry=None
    )
    results.append(
        "outcome", id="tests/x.py::test_y", outcome="passed", own=True, reason=None, seconds=0, telemetry=None
    )
    return path


def test_tables_hold_what_the_file_holds(tmp_path: Path) -> None:
    text = markdown([write(tmp_path / "r.jsonl")])
    assert "Made-up GPU, 2026-01-02, commit 0123456789" in text and "meaningless" not in text.lower()
    row = next(line for line in text.splitlines() if line.startswith("| title of fpsattn") and "2 (1.8-2.4)" in line)
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    # 18 ms / 2 ms, the faster of the two baselines; 246 was measured where the model said 1366
    assert cells[4:] == ["1", "246", "1366", "456", "9", "0.0432", "0.99912"]
    assert "speed-up over title of sdpa-cudnn" in text
    assert "| sage | skipped: no module / here | 1 |" in text
    assert "| wan | 2 of 40 | fps-0.1 |" in text and "2.58" in text
    assert "**wan, 2 of 40 layers, density 0.1**" in text
    (speedups,) = [line.split() for line in text.splitlines() if line.startswith("speed-up")]
    assert speedups == ["speed-up", "1.00x", "2.00x"]  # 20 ms and 10 ms
    assert "| 683 TFLOP/s | 1366 TFLOP/s | 0.5 |" in text and "| 3200 GB/s | 4000 GB/s (copy) | 0.8 |" in text
    assert "| pipe/ex2 | 15.9 | instr/clk |" in text
    # Without clusters, and the backward: 5 products in the time of 4 at 800 TFLOP/s and 3 at 1000 are 625
    for what, cells in (
        ("forward, scales per tile, no clusters", "650 TFLOP/s | 1300 TFLOP/s | 0.5"),
        ("backward, scales per tile, fast", "350 TFLOP/s | 700 TFLOP/s | 0.5"),
        ("backward, scales per tile, deterministic", "250 TFLOP/s | 625 TFLOP/s | 0.4"),
    ):
        (row,) = [line for line in text.splitlines() if line.startswith(f"| {what} |")]
        assert row.endswith(f"| {cells} |"), row


def test_the_paper_and_our_measurements_share_no_table(tmp_path: Path) -> None:
    ours, paper = markdown([write(tmp_path / "r.jsonl")]).split("# The paper reports")
    assert ours.startswith("# We measured")
    assert "7.09" in paper and "4.96" in paper and "7.09" not in ours and "4.96" not in ours
    assert "H20" in paper and "Made-up GPU" not in paper


def test_a_dry_run_is_loud_on_every_section(tmp_path: Path) -> None:
    ours = markdown([write(tmp_path / "r.jsonl", dry=True)]).split("# The paper reports")[0]
    sections = ours.split("\n## ")[1:]
    assert len(sections) == 9 and all(DRY in section for section in sections)
    with pytest.raises(ValueError, match="report them apart"):
        Report([write(tmp_path / "measured.jsonl"), tmp_path / "r.jsonl"])


def test_a_run_that_has_just_begun_is_reported(tmp_path: Path) -> None:
    assert markdown([write(tmp_path / "r.jsonl", empty=True)]).count("No data.") == 9


def test_the_baseline_is_the_fastest_dense_bf16(tmp_path: Path) -> None:
    rows = Report([write(tmp_path / "r.jsonl")]).comparisons()["forward-shape-0.2"]
    assert baseline_of(rows)["implementation"] == "sdpa-cudnn"
    assert baseline_of([row for row in rows if row["implementation"] == "fpsattn"]) is None


def test_other_files_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "other.jsonl").write_text('{"schema": "other/1"}\n')
    assert tables.main([str(tmp_path / "other.jsonl")]) == 2
    assert "no results file of schema" in capsys.readouterr().err
    assert tables.main([str(tmp_path / "none.jsonl")]) == 2


@pytest.mark.slow
def test_plots_are_drawn_and_labelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    import matplotlib.axes

    titles: list[str] = []
    shouted: list[str] = []
    set_title, text = matplotlib.axes.Axes.set_title, matplotlib.axes.Axes.text
    monkeypatch.setattr(
        matplotlib.axes.Axes, "set_title", lambda a, t, **k: (titles.append(t), set_title(a, t, **k))[1]
    )
    monkeypatch.setattr(
        matplotlib.axes.Axes, "text", lambda a, x, y, s, **k: (shouted.append(s), text(a, x, y, s, **k))[1]
    )
    for dry in (False, True):
        titles.clear(), shouted.clear()
        out = tmp_path / str(dry)
        assert tables.main([str(write(tmp_path / f"{dry}.jsonl", dry=dry)), "--plots", str(out)]) == 0
        names = {"roofline.png", "speedup_density.png", "time_split.png"}
        assert {path.name for path in out.iterdir()} == names
        assert all((out / name).read_bytes().startswith(b"\x89PNG") for name in names)
        assert len(titles) == 3 and all("Made-up GPU, 2026-01-02, commit 0123456789" in title for title in titles)
        assert all(DRY in title for title in titles) == dry and (DRY in shouted) == dry


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0123456, "0.0123"), (12.345, "12.3"), (1234.5, "1234"), (None, "-"), (9, "9"), (float("nan"), "-")],
)
def test_numbers_have_no_more_digits_than_they_deserve(value: Any, text: str) -> None:
    assert significant(value) == text


def test_a_bar_in_a_cell_does_not_break_the_table() -> None:
    assert table(["a", "b"], [["x|y\nz", 1]]).splitlines() == ["| a | b |", "| --- | ---: |", "| x/y z | 1 |"]
