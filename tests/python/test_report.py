"""The report: tables and plots from a small synthetic results file; dry runs are loud, the paper's figures stay apart."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import report as report_module  # noqa: E402
from benchmarks.reporting import tables  # noqa: E402
from benchmarks.reporting.load import DRY, baseline_of, load  # noqa: E402
from benchmarks.suite import schema  # noqa: E402


def timing(median: float) -> dict[str, Any]:
    return {"min": median * 0.9, "median": median, "max": median * 1.2, "repeats": 5, "calls": 1}


def comparison(name: str, median: float, *, density: float, sparse: bool, kind: str = "forward") -> dict[str, Any]:
    workload = {
        "name": "shape", "grid": [4, 8, 12], "tokens": 384, "batch": 1, "heads": 2, "head_dim": 128, "dtype": "bfloat16",
        "target_density": density, "density": density, "window": [1, 1, 1], "tile": [4, 8, 8], "utilization": 1.0, "num_blocks": 3,
    }  # fmt: skip
    return schema.new_case(
        "peers", f"{kind}/shape/density={density}/{name}", implementation=name, title=f"title of {name}", precision="fp8",
        kind=kind, sparse=sparse, workload=workload, time_ms=timing(median), stages_ms={"attention": timing(median / 2)},
        accuracy={"rel_l1": 0.0432, "cosine": 0.99912, "finite": True}, computed_flops=10**9, dense_flops=10**10,
        tflops={"computed_blocks": 123.0, "dense_equivalent": 456.0}, kernel_tflops={"computed_blocks": 246.0, "dense_equivalent": 912.0},
        correct=True if name == "fpsattn" else None, memory_bytes=None, note=None,
    )  # fmt: skip


def step(name: str, median: float, **more: Any) -> dict[str, Any]:
    model = {
        "name": "wan",
        "grid": [1, 2, 3],
        "tokens": 6,
        "layers": 2,
        "layers_of_real_model": 40,
        "heads": 40,
        "head_dim": 128,
    }
    return schema.new_case(
        "end_to_end", f"wan/{name}", kind="end_to_end", model=model, time_ms=timing(median), peak_bytes=2**31,
        split_ms={"quantize": 1.0, "attention": 5.0, "rest": 4.0}, **more,
    )  # fmt: skip


@pytest.fixture
def results() -> dict[str, Any]:
    cases = [
        comparison("fpsattn", 2.0, density=0.2, sparse=True), comparison("sdpa-cudnn", 18.0, density=0.2, sparse=False),
        comparison("sdpa-flash", 20.0, density=0.2, sparse=False), comparison("fpsattn", 9.0, density=1.0, sparse=True),
        comparison("sdpa-cudnn", 18.0, density=1.0, sparse=False), comparison("fpsattn", 7.0, density=0.2, sparse=True, kind="training"),
        schema.new_case("peers", "forward/shape/density=0.2/sage", "absent", implementation="sage", reason="no module | here"),
        step("dense-cudnn", 100.0, baseline=True), step("fps-coarse", 40.0, level="coarse", preset="paper", speedup=2.5,
             amdahl={"attention_share": 0.7, "attention_speedup": 8.0, "predicted": 2.58, "limit": 3.33}),
        schema.new_case("kernels", "bench_x/00-case", kind="kernel", time_ms=timing(1.5), record={"gb_per_s": 3333.0, "of_copy": 0.8}),
    ]  # fmt: skip
    return {
        "schema": schema.SCHEMA, "state": "complete", "mode": "quick", "timings_meaningless": False, "started": "2026-01-02T03:04:05Z",
        "finished": "2026-01-02T03:10:00Z", "command": "x", "repository": {"commit": "0123456789abcdef", "dirty": False, "source": "git"},
        "environment": {"gpu": {"name": "Made-up GPU"}}, "telemetry": {},
        "ceilings": {"copy": {"value": 4000.0, "unit": "GB/s"}, "bf16-gemm": {"value": 700.0, "unit": "TFLOP/s"},
                     "fp8-gemm": {"value": 1300.0, "unit": "TFLOP/s"}},
        "parts": [{"name": "peers", "title": "peer comparison", "status": "ok", "reason": None, "seconds": 1.0, "limit_s": 2.0}],
        "cases": cases,
    }  # fmt: skip


def write(tmp_path: Path, data: dict[str, Any], name: str = "results.json") -> Path:
    path = tmp_path / name
    path.write_text(json.dumps(data))
    return path


def test_tables_hold_what_the_file_holds(tmp_path: Path, results: dict[str, Any]) -> None:
    assert schema.validate(results) == []
    text = report_module.markdown(load([write(tmp_path, results)]))
    assert "Made-up GPU, 2026-01-02, commit 0123456789" in text
    row = next(line for line in text.splitlines() if line.startswith("| title of fpsattn") and "2 (1.8-2.4)" in line)
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[4:10] == ["1", "246", "456", "9", "0.0432", "0.99912"]  # 18 ms / 2 ms, the faster of the two baselines
    assert "speed-up over title of sdpa-cudnn" in text
    assert "| sage | absent: no module / here | 1 |" in text
    assert "| wan | 2 of 40 | paper preset, level coarse |" in text and "2.58" in text
    assert "3333 gb_per_s, 0.8 of_copy" in text
    assert "meaningless" not in text.lower()


def test_the_paper_and_our_measurements_share_no_table(tmp_path: Path, results: dict[str, Any]) -> None:
    text = report_module.markdown(load([write(tmp_path, results)]))
    ours, paper = text.split("# The paper reports")
    assert ours.startswith("# We measured")
    assert "7.09" in paper and "4.96" in paper and "7.09" not in ours and "4.96" not in ours
    assert "H20" in paper and "Made-up GPU" not in paper


def test_a_dry_run_is_loud_on_every_section(tmp_path: Path, results: dict[str, Any]) -> None:
    results.update(mode="dry", timings_meaningless=True)
    text = report_module.markdown(load([write(tmp_path, results)]))
    ours = text.split("# The paper reports")[0]
    sections = ours.split("\n## ")[1:]
    assert len(sections) == 6 and all(DRY in section for section in sections)


def test_dry_and_measured_files_are_not_mixed(tmp_path: Path, results: dict[str, Any]) -> None:
    measured = write(tmp_path, results)
    dry = write(tmp_path, {**results, "mode": "dry", "timings_meaningless": True}, "dry.json")
    with pytest.raises(ValueError, match="report them apart"):
        load([measured, dry])


def test_a_partial_run_is_reported_and_named(tmp_path: Path, results: dict[str, Any]) -> None:
    results.update(state="running", finished=None, cases=[], ceilings={})
    text = report_module.markdown(load([write(tmp_path, results)]))
    assert "run running" in text and text.count("No data.") == 5


def test_the_baseline_is_the_fastest_dense_bf16(results: dict[str, Any]) -> None:
    forward = [
        case
        for case in results["cases"]
        if case["id"].startswith("forward/shape/density=0.2") and case["status"] == "ok"
    ]
    assert baseline_of(forward)["implementation"] == "sdpa-cudnn"
    assert baseline_of([case for case in forward if case["implementation"] == "fpsattn"]) is None


def test_invalid_files_are_refused(tmp_path: Path, results: dict[str, Any], capsys: pytest.CaptureFixture) -> None:
    bad = write(tmp_path, {**results, "state": "done"})
    assert report_module.main([str(bad)]) == 2
    assert "state: 'done' came" in capsys.readouterr().err
    assert report_module.main([str(tmp_path / "none.json")]) == 2


def test_plots_are_drawn_and_labelled(tmp_path: Path, results: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
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
    out = tmp_path / "plots"
    assert report_module.main([str(write(tmp_path, results)), "--out", str(out)]) == 0
    names = {"roofline.png", "speedup_density.png", "time_split.png"}
    assert {path.name for path in out.iterdir()} == names | {"report.md"}
    assert all((out / name).read_bytes().startswith(b"\x89PNG") for name in names)
    assert len(titles) == 3 and all("Made-up GPU, 2026-01-02, commit 0123456789" in title for title in titles)
    assert not shouted
    results.update(mode="dry", timings_meaningless=True)
    report_module.main([str(write(tmp_path, results)), "--out", str(out)])
    assert len(shouted) == 3 and all("DRY RUN" in word for word in shouted)


@pytest.mark.parametrize(
    ("value", "text"), [(0.0123456, "0.0123"), (12.345, "12.3"), (1234.5, "1234"), (None, "-"), (9, "9")]
)
def test_numbers_have_no_more_digits_than_they_deserve(value: Any, text: str) -> None:
    assert tables.number(value) == text
