"""The program of docs/training.md's evidence, at the smallest size that runs: what it writes, and that nothing runs twice."""

import csv
import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("accelerate")
pytest.importorskip("matplotlib")

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

import training_evidence


@pytest.mark.slow
def test_all_runs_and_none_again(tmp_path, monkeypatch):
    arguments = [
        "--out", str(tmp_path), "--work", str(tmp_path / "work"), "--samples", "10", "--validation", "2", "--batch-size", "1",
        "--pretrain-steps", "11", "--steps", "22", "--every", "11", "--rates", "1e-4,1e-3", "--seeds", "0",
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["training_evidence.py", *arguments])
    monkeypatch.setattr(training_evidence, "LATENTS", (8, 3, 8, 12))  # 2 x 3 tiles
    monkeypatch.setattr(training_evidence, "TILE", (3, 2, 2))
    monkeypatch.setattr(training_evidence, "WINDOWS", {"0": {"0": [1, 1, 3]}, "1": {"0": [1, 2, 1]}})
    training_evidence.main()
    with (tmp_path / "synthetic.csv").open() as file:
        rows = {(row["run"], int(row["step"])): row for row in csv.DictReader(file)}
    of_data = {(name, step) for name in ("dense", "naive", "training-aware") for step in (0, 11, 22)}
    taught = ("velocity", "velocity and data", "velocity without data")
    assert rows.keys() == of_data | {(name, step) for name in taught for step in (0, 11)}
    for (
        name,
        step,
    ), row in rows.items():  # gaps are to the dense counterpart: that of the step, of the end, or the teacher
        other = float(rows["dense", 22 if name == "velocity and data" else 0 if name in taught else step]["loss"])
        assert float(row["gap_percent"]) == pytest.approx(100 * (float(row["loss"]) / other - 1), abs=0.01)
        assert (float(row["distance_percent"]) == 0) == (name == "dense")
    assert len({rows[name, 0]["loss"] for name in ("naive", "training-aware", "velocity")}) == 1  # the same start
    result = json.loads((tmp_path / "synthetic.json").read_text())
    tried = result["loss_at_the_end_by_learning_rate"]["velocity"]
    assert len(tried) == 2 and result["learning_rates"]["velocity"] == float(min(tried, key=tried.get))
    ended = [float(rows[name, step]["gap_percent"]) for name, step in (("velocity", 11), ("training-aware", 22))]
    assert result["at_training_aware's_gap_in_half_the_steps"]["velocity"] == [ended[0] <= ended[1]]
    assert (tmp_path / "synthetic.png").stat().st_size > 5_000
    monkeypatch.setattr(training_evidence, "train", None)
    training_evidence.main()
