"""``fpsattn demo`` and ``fpsattn train`` under a schedule file whose levels name patterns, one that permutes tokens among them."""

from __future__ import annotations

import json
from collections import Counter

import pytest

pytest.importorskip("diffusers")

from typer.testing import CliRunner

from fpsattention.cli import app
from fpsattention.integrations.selection import Selections
from fpsattention.schedule import Schedule

pytestmark = pytest.mark.slow

BORDERS = (1.0, 0.9, 0.8, 0.7, 0.0)  # the demo's six steps: 1.00 0.94 | 0.86 | 0.75 | 0.60 0.38
PATTERNS = {
    "scored": {"name": "topk_mean", "ratio": 0.3},
    "gated": {"name": "sparge", "mass": None, "ratio": 0.4, "similarity": -0.1},
    "banded": {"name": "svg", "share": 0.2, "rows": 8},
    "clustered": {"name": "svg2", "q_clusters": 4, "k_clusters": 6, "mass": 0.5, "iterations": 4},
}


def write(path, tile):
    levels = {name: {"precision": "fp8", "pattern": pattern} for name, pattern in PATTERNS.items()}
    levels["scored"]["refresh"] = 2
    phases = [{"sigma": [BORDERS[i], BORDERS[i + 1]], "level": name} for i, name in enumerate(PATTERNS)]
    path.write_text(json.dumps({"format": "fpsattn-schedule/3", "tile": tile, "levels": levels, "phases": phases}))
    return path


def run(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_demo(tmp_path):
    """Every level runs, is split by cause, has both densities in the report; masks are drawn of those that have one."""
    pytest.importorskip("imageio_ffmpeg")
    file = write(tmp_path / "patterns.json", [1, 3, 5])  # 12 tiles of the grid 3 x 6 x 10
    size = ("--height", 96, "--width", 160, "--num-frames", 9)
    report = run("demo", "--schedule", file, "--out", tmp_path / "out", *size, "--no-control", "--json")
    assert [level["level"] for level in report["levels"]] == list(PATTERNS)
    assert report["masks_drawn"] == ["scored", "gated", "banded"]
    for level in report["levels"]:
        assert 0 < level["quantization"]["rel_l1"] < 0.06 and 0 < level["density"] < 1
        assert level["sparsity"]["rel_l1"] < level["total"]["rel_l1"] * 1.2
    ran = {row["level"]: row for row in report["ran"]["rows"] if row["layer"] == 1}
    assert {name: row["calls"] for name, row in ran.items()} == {"scored": 4, "gated": 2, "banded": 2, "clustered": 4}
    text = (tmp_path / "out" / "report.md").read_text()
    for name, row in ran.items():
        assert 0 < row["selected"] <= row["density"] < 1
        assert f"level {name}: {PATTERNS[name]['name']} selected" in text
    assert (tmp_path / "out" / "block_mask.png").stat().st_size > 5_000


def test_compare_says_what_it_cannot_run(tmp_path):
    """Its methods share the tiles of the grid; nothing is loaded before that is said."""
    file = write(tmp_path / "patterns.json", [1, 3, 5])
    result = CliRunner().invoke(app, ["compare", "--schedule", str(file), "--out", str(tmp_path / "out")])
    assert result.exit_code == 2 and "'clustered' has the pattern svg2, which permutes tokens" in result.stderr
    assert not any((tmp_path / "out").iterdir())


def test_train(tmp_path, monkeypatch):
    """The warm-up is dense; from its last stage on every pattern is scored; the schedule is saved beside the weights as it was."""
    pytest.importorskip("accelerate")
    from accelerate.state import AcceleratorState

    from fpsattention.training import write_synthetic

    scored, count = Counter(), Selections._count
    monkeypatch.setattr(Selections, "_count", lambda self, layer, level, *more: (scored.update([level]), count(self, layer, level, *more)))  # fmt: skip
    data = write_synthetic(tmp_path / "data", num_samples=4, latent_shape=(4, 3, 10, 14), text_shape=(3, 16))
    file = write(tmp_path / "patterns.json", [1, 3, 4])  # 12 tiles of the grid 3 x 5 x 7
    common = ("train", "--data", data, "--schedule", file, "--warmup-steps", 1, "--json")
    warm = ("--steps", 2, "--sparsity-warmup-steps", 2, "--sparsity-warmup-stages", 1)
    try:
        assert run(*common, *warm, "--output", tmp_path / "warm")["steps"] == 2 and not scored
        done = run(*common, "--steps", 3, "--batch-size", 6, "--output", tmp_path / "run")
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert set(scored) == set(PATTERNS) and done["steps"] == 3
    assert 0 < done["loss_last_20"] < 10
    assert Schedule.load(tmp_path / "run" / "fps_schedule.json").levels == Schedule.load(file).levels
