"""The command line through typer's runner: results, JSON, and the texts of bad input."""

import json

import pytest
from test_evaluation import save_capture
from typer.testing import CliRunner

from fpsattention.cli.main import app, parse_sizes
from fpsattention.errors import ConfigError


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "160"})


def test_help_and_version():
    assert run("--version").stdout.startswith("fpsattn ")
    text = run("--help").stdout
    assert all(command in text for command in ("demo", "doctor", "plan", "analyze"))


def test_parse_sizes():
    assert parse_sizes("21x45x80", "x") == parse_sizes("21,45,80", "x") == (21, 45, 80)
    for bad in ("21x45", "21x45,80", "a,b,c", "", "1x2x3x4", "-1x2x3", "0x1x1"):
        with pytest.raises(ConfigError, match="wanted"):
            parse_sizes(bad, "plan: grid")


def test_plan_json(tmp_path):
    picture = tmp_path / "plan.png"
    result = run("plan", "21x45x80", "--window", "3,3,6", "--json", "--png", picture)
    assert result.exit_code == 0, result.output
    plan = json.loads(result.stdout)
    assert plan["num_tokens"] == 75600 and plan["window"] == [3, 3, 6]
    assert plan["num_slots"] / plan["num_tokens"] <= 1.016
    assert picture.stat().st_size > 10_000
    paper = json.loads(run("plan", "21x45x80", "--tile", "6,8,8", "--text-len", "77", "--json").stdout)
    assert paper["tile"] == [6, 8, 8] and paper["num_tokens"] == 75677 and paper["density"] == pytest.approx(1.0)
    assert paper["table_bytes"] > 4 * paper["num_slots"]


def test_plan_text():
    result = run("plan", "4x8x8", "--tile", "2,4,4", "--window", "1,1,1", "--text-len", "5")
    assert result.exit_code == 0
    assert "density" in result.stdout and "o" in result.stdout.splitlines()[-2]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["plan", "21x45"], "fpsattention.plan: grid '21x45', wanted three sizes"),
        (["plan", "21x45x80", "--window", "9,9,9"], "window (9, 9, 9)"),
        (["plan", "4x4x4", "--tile", "1,2"], "fpsattention.plan: tile '1,2', wanted three sizes"),
        (["plan", "4x4x0"], "wanted sizes of at least 1"),
        (["plan", "4x4x4", "--text-len", "-3"], "fpsattention.plan: text_len"),
        (["plan", "4x4x4", "--text-position", "middle"], "text_position 'middle'"),
        (["analyze", "/does/not/exist"], "/does/not/exist is not a folder"),
        (["demo", "--height", "100"], "size 100x384, wanted height and width that are multiples of 16"),
        (["demo", "--num-frames", "32"], "num_frames 32, wanted 4k + 1"),
        (["demo", "--device", "tpu"], "device 'tpu'"),
        (["demo", "--preset", "nope"], "'nope', wanted a Schedule, a preset"),
    ],
)
def test_bad_input(arguments, text):
    result = run(*arguments)
    assert result.exit_code == 2 and text in result.stderr and "Traceback" not in result.output
    as_json = run(*arguments, "--json")
    assert as_json.exit_code == 2 and text in json.loads(as_json.stdout)["error"]


def test_missing_package_in_demo(monkeypatch, tmp_path):
    import sys

    monkeypatch.setitem(sys.modules, "imageio.v2", None)
    result = run("demo", "--small", "--out", tmp_path)
    assert (
        result.exit_code == 2 and "'imageio'" in result.stderr and 'pip install "fpsattention[demo]"' in result.stderr
    )


def test_analyze(tmp_path):
    save_capture(tmp_path / "a.safetensors", 0, 0.95)
    save_capture(tmp_path / "b.safetensors", 1, 0.3)
    out = tmp_path / "out"
    result = run("analyze", tmp_path, "--schedule", "fp8", "--out", out)
    assert result.exit_code == 0, result.output
    assert "quantization" in result.stdout
    assert {path.name for path in out.iterdir()} == {
        "analysis.json", "transformer_error_vs_sigma.png", "transformer_quantization_by_layer.png",
        "transformer_sparsity_by_layer.png", "transformer_total_by_layer.png",
    }  # fmt: skip
    records = json.loads(run("analyze", tmp_path, "--level", "coarse", "--rows", "0", "--json").stdout)["captures"]
    assert [record["level"] for record in records] == ["coarse", "coarse"]
    assert all(0 < record["quantization"]["rel_l1"] < 0.1 for record in records)
    bad = run("analyze", tmp_path, "--rows", "-1")
    assert bad.exit_code == 2 and "rows -1" in bad.stderr
