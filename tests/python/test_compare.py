"""``fpsattn compare`` on the tiny pipeline: methods reach every attention, runs resume, the report says what ran; temporal metrics."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("imageio_ffmpeg")
pytest.importorskip("skimage")

from typer.testing import CliRunner

import fpsattention as fps
from fpsattention import ConfigError
from fpsattention.cli import app
from fpsattention.compare.harness import CompareConfig, run_compare
from fpsattention.compare.methods import Context, choose, methods
from fpsattention.compare.report import predicted_ms, predicted_speedup, summary
from fpsattention.compare.running import attention_by
from fpsattention.compare.temporal import frame_features, temporal_metrics
from fpsattention.demo.tiny_wan import tiny_inputs, tiny_pipeline
from fpsattention.schedule import Schedule

pytestmark = pytest.mark.slow

TILE = (1, 3, 5)  # 12 tiles of the grid 3 x 6 x 10
SMALL = {"height": 96, "width": 160, "num_frames": 9, "num_inference_steps": 2, "max_rows": 64}


def latents(pipe, **changes):
    call = tiny_inputs(0, 96, 160, 9)
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        **call, height=96, width=160, num_frames=9, num_inference_steps=2, guidance_scale=2.0, output_type="latent",
        generator=torch.Generator().manual_seed(0), **changes,
    ).frames  # fmt: skip


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    path = tmp_path_factory.mktemp("schedule") / "schedule.json"
    replace(Schedule.preset("paper", 3.0), tile=TILE).save(path)
    return {**SMALL, "schedule": str(path)}


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline(0)


@pytest.fixture(scope="module")
def all_methods():
    return methods(replace(Schedule.preset("paper", 3.0), tile=TILE))


def test_dense_is_the_model_itself_and_others_are_not(pipe, all_methods):
    plain = latents(pipe)
    seen = {}
    for name, method in all_methods.items():
        with attention_by(pipe, method, TILE) as counted:
            seen[name] = latents(pipe)
        assert counted.calls == 2 * 2 * 2  # steps, layers, both forwards of the guidance
        assert counted.density == pytest.approx(counted.flops / counted.dense_flops)
        if name in ("dense", "bf16", "sage", "naive", "fps-fp8", "paper-fp8"):
            assert counted.density == 1.0
        if name in ("sta", "fps", "fps-pseudo"):
            assert 0 < counted.density < 0.5
    assert torch.equal(seen["dense"], plain)
    assert torch.equal(latents(pipe), plain)  # everything was put back
    errors = {name: ((x - plain).norm() / plain.norm()).item() for name, x in seen.items()}
    assert all(0 < error < 1 for name, error in errors.items() if name != "dense"), errors
    assert errors["bf16"] < errors["fps-fp8"] < errors["fps"] and errors["sage"] < errors["sta"], errors


def test_fps_is_what_apply_runs(pipe, all_methods):
    method = all_methods["fps"]
    with attention_by(pipe, method, TILE):
        ours = latents(pipe)
    with fps.apply(pipe, method.schedule):
        applied = latents(pipe)
    torch.testing.assert_close(ours, applied, rtol=1e-4, atol=1e-5)


def test_methods_by_name(all_methods):
    schedule = Schedule.preset("paper")
    assert [m.name for m in choose("sage, fps ,dense,sage", schedule)] == ["sage", "fps"]
    for wrong in ("sage,sag", ""):
        with pytest.raises(
            ConfigError, match=r"compare: method .* expected some of dense, bf16, sage, sparge, svg, sta"
        ):
            choose(wrong, schedule)
    fine = Context(fps.plan((3, 6, 10), TILE), 0, 0.9, None)
    assert all_methods["dense"].is_dense(fine) and not all_methods["fps"].is_dense(fine)
    free = methods(Schedule.preset("training_free"))["fps"]
    assert (
        free.level(fine._replace(sigma=0.9, trajectory=(0.99, 0.9, 0.5, 0.1))).name == "careful"
    )  # the second of four steps
    assert free.level(fine._replace(sigma=0.99, trajectory=(0.99, 0.9, 0.5, 0.1))).name == "dense"
    assert free.is_dense(fine._replace(sigma=1.0)) and not free.is_dense(fine._replace(sigma=0.1))


@pytest.mark.slow
def test_a_comparison_resumes_and_reports(tmp_path, monkeypatch, small):
    """Two prompts; the second call runs only what is new, and a changed setting runs again."""
    from fpsattention.compare import harness

    generated = []
    generate = harness._generate
    monkeypatch.setattr(harness, "_generate", lambda *args: generated.append(1) or generate(*args))
    config = CompareConfig(out=tmp_path, methods=("sta", "fps"), prompts=("a fox", "a/b: sea?"), **small)
    ticks = []
    report = run_compare(config, lambda *tick: ticks.append(tick))
    assert len(generated) == 2 * 3 + 1  # dense and two methods per prompt, and the recording
    assert ticks[0] == ("runs", 0, 6) and ("runs", 6, 6) in ticks
    again = run_compare(config)
    assert len(generated) == 7 and again["table"] == report["table"] and again["errors"] == report["errors"]
    more = run_compare(CompareConfig(out=tmp_path, methods=("sta", "fps", "fps-fp8"), prompts=config.prompts, **small))
    assert len(generated) == 7 + 2 + 1
    run_compare(CompareConfig(out=tmp_path, methods=("sta",), sta_density=0.4, prompts=config.prompts, **small))
    assert len(generated) == 10 + 2 + 1
    (tmp_path / "runs" / "p1-s0" / "fps" / "result.json").write_text("{")  # interrupted while writing
    run_compare(config)
    assert len(generated) == 13 + 1 + 2 + 1  # that one, and sta at the old density with its error

    rows = {row["method"]: row for row in more["table"]}
    assert list(rows) == ["dense", "sta", "fps", "fps-fp8"]
    assert rows["dense"]["psnr_db"] is None and rows["dense"]["density"] == 1.0
    assert rows["fps-fp8"]["psnr_db"] > max(20, rows["fps"]["psnr_db"])
    assert rows["fps"]["density"] < 0.5 and rows["fps"]["attention_tflop"] < rows["dense"]["attention_tflop"]
    assert rows["sta"]["lpips"] is None  # no weights here, and the report says so
    for name in rows:
        videos = sorted(path.name for path in (tmp_path / "vbench" / name).iterdir())
        assert videos == ["a fox-0.mp4", "a_b_ sea_-0.mp4"]  # VBench's naming
    sigmas = {entry["sigma"] for entry in more["errors"]["fps"]}
    assert len(sigmas) == 2 and {entry["layer"] for entry in more["errors"]["fps"]} == {0, 1}
    for entry in more["errors"]["fps-fp8"]:
        assert entry["sparsity"] < 1e-5 < entry["quantization"] == pytest.approx(entry["total"])
        assert entry["selected_density"] == entry["density"] == 1.0
    for entry in more["errors"]["sta"]:
        assert entry["quantization"] < 1e-5 < entry["sparsity"] == pytest.approx(entry["total"])

    written = (tmp_path / "report.md").read_text()
    assert "kernel / selected" in written
    assert "computed, not measured" in written and "nothing was timed on a GPU" in written
    ours, papers = written.split("## The paper's own figures")
    assert "21.35" in papers and "21.35" not in ours  # never in one table
    data = json.loads((tmp_path / "report.json").read_text())
    assert data["settings"]["seeds"] == [0] and (tmp_path / "error_by_sigma.png").stat().st_size > 10_000


@pytest.mark.slow
def test_processes_share_the_items(tmp_path, small):
    """Two processes give what one gives."""
    common = {"methods": ("fps",), "seeds": (0, 1), **{**small, "max_rows": 0}}
    serial = run_compare(CompareConfig(out=tmp_path / "one", **common))
    shared = run_compare(CompareConfig(out=tmp_path / "two", jobs=2, **common))
    for a, b in zip(serial["table"], shared["table"], strict=True):
        assert a["psnr_db"] == pytest.approx(b["psnr_db"], abs=0.01) if a["psnr_db"] else b["psnr_db"] is None
        assert a["density"] == b["density"]
    assert serial["table"][1]["psnr_db"] is not None and serial["errors"] == {}


def test_command_line(tmp_path):
    arguments = [
        "compare",
        "--out",
        str(tmp_path),
        "--methods",
        "fps",
        "--height",
        "96",
        "--width",
        "160",
        "--num-frames",
        "5",
    ]
    result = CliRunner().invoke(app, [*arguments, "--num-inference-steps", "1", "--max-rows", "0", "--json"])
    assert result.exit_code == 0, result.output
    assert [row["method"] for row in json.loads(result.stdout)["table"]] == ["dense", "fps"]
    for wrong, message in (
        (["--methods", "x"], "method 'x', expected some of"),
        (["--seeds", "a"], "seeds 'a', expected comma-separated"),
        (["--seeds", "1,1"], "seeds all different"),
        (["--height", "97"], "size 97x160"),
        (["--jobs", "0"], "jobs 0"),
    ):
        result = CliRunner().invoke(app, [*arguments, *wrong])
        assert result.exit_code == 2 and message in result.stderr, (wrong, result.output)


def test_prediction_is_rate_over_density():
    assert predicted_speedup("bf16", 1.0) == 1.0 and predicted_speedup("bf16", 0.25) == 4.0
    assert predicted_ms("bf16", 0.7) / predicted_ms("fp8", 0.7 / 4) == pytest.approx(predicted_speedup("fp8", 0.25))
    assert predicted_speedup("fp8", 0.5) == pytest.approx(2 * predicted_speedup("fp8", 1.0))
    report = {
        "runs": {"fps": [{"density": 0.2, "video": {"psnr_db": None, "identical": True}}]},
        "methods": {"fps": {"label": "x", "bits": "fp8"}},
    }
    assert summary(report)[0]["psnr_db"] == float("inf")


def test_no_curve_hides_another_and_counts_agree(monkeypatch, tmp_path):
    """Methods with the same errors: every curve is wider than the one that lies on it."""
    from fpsattention.analysis import plots
    from fpsattention.analysis.markdown import counted
    from fpsattention.compare import report

    drawn = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: drawn.append(figure))
    entries = [{"sigma": s, "quantization": 0.1, "sparsity": 0.0, "total": 0.1} for s in (1.0, 0.5)]
    methods = {name: {"label": name.upper()} for name in ("a", "b", "c")}
    report._draw(tmp_path, {"errors": dict.fromkeys(methods, entries), "methods": methods})
    for axis in drawn[0].axes:
        lines = {line.get_label(): line for line in axis.lines}
        widths, orders = (
            [getattr(lines[label], f"get_{what}")() for label in "ABC"] for what in ("linewidth", "zorder")
        )
        assert widths[0] > widths[1] > widths[2] and orders[0] < orders[1] < orders[2]
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == ["A", "B", "C"]
    assert (counted(1, "seed"), counted(2, "seed")) == ("1 seed", "2 seeds")
    assert "| 21.00 | 0.798 | 0.151 | 32.01 | 144 | 1.88 |" in "\n".join(report._paper_lines())


# Over time ---------------------------------------------------------------------------------------------------------------


def still(frames=6, seed=0):
    picture = np.random.default_rng(seed).integers(0, 256, (40, 56, 3), dtype=np.uint8)
    return np.repeat(picture[None], frames, 0)


def test_a_still_video_is_perfect_and_noise_is_not():
    assert temporal_metrics(still()) == {"flicker": 1.0, "smoothness": 1.0, "subject": pytest.approx(1.0)}
    noisy = still().astype(int) + np.random.default_rng(1).integers(-20, 21, (6, 40, 56, 3))
    values = temporal_metrics(np.clip(noisy, 0, 255).astype(np.uint8))
    assert all(0.5 < value < 1.0 for value in values.values())


def test_steady_change_is_smooth_but_flickers():
    ramp = (np.arange(8)[:, None, None, None] * 10 + np.zeros((8, 32, 32, 3))).astype(np.uint8)
    values = temporal_metrics(ramp)
    assert values["smoothness"] == 1.0  # each frame is the mean of its neighbours
    assert values["flicker"] == pytest.approx(1 - 10 / 255)
    blink = np.where(np.arange(8)[:, None, None, None] % 2, 255, 0).astype(np.uint8) + np.zeros(
        (8, 32, 32, 3), np.uint8
    )
    assert temporal_metrics(blink)["flicker"] == 0.0 and temporal_metrics(blink)["smoothness"] == 0.0


def test_another_subject_drifts_more_than_a_moved_one():
    first = still(1, 0)[0]
    first[10:25, 10:30] = 255
    moved = np.roll(first, 2, axis=1)
    other = still(1, 5)[0] // 4
    features = [frame_features(frame) for frame in (first, moved, other)]
    assert all(np.linalg.norm(f) == pytest.approx(1.0) for f in features)
    assert features[0] @ features[1] > features[0] @ features[2]
    assert temporal_metrics(np.stack([first, moved]))["subject"] > temporal_metrics(np.stack([first, other]))["subject"]


def test_short_videos_and_wrong_frames():
    assert temporal_metrics(still(1)) == {"flicker": None, "smoothness": None, "subject": None}
    assert temporal_metrics(still(2))["smoothness"] is None
    with pytest.raises(ConfigError, match=r"frames are float64 \(2, 4, 4, 3\), expected uint8"):
        temporal_metrics(np.zeros((2, 4, 4, 3)))
