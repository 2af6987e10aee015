"""The whole demo at a tiny size: files, the control, and that timing does not change results."""

import json

import pytest
import torch

from fpsattention.demo.demo import DemoConfig, load_pipeline, run_demo, run_pipeline
from fpsattention.errors import ConfigError


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    config = DemoConfig.small(out=out, device="cpu", num_inference_steps=3)
    seen = []
    return run_demo(config, lambda *step: seen.append(step)), out, seen, config


def test_files(demo):
    report, out, seen, _ = demo
    wanted = {
        "dense.mp4", "fps.mp4", "side_by_side.png", "block_mask.png", "error_vs_sigma.png", "time_split.png",
        "report.md", "report.json",
    }  # fmt: skip
    assert {path.name for path in out.iterdir()} == wanted
    import imageio.v2 as imageio

    frames = imageio.mimread(out / "fps.mp4")
    assert len(frames) == 17 and frames[0].shape == (96, 160, 3)
    assert json.loads((out / "report.json").read_text())["schedule"]["format"] == "fpsattn-schedule/1"
    assert {what for what, _, _ in seen} == {"dense", "dense again (control)", "FPSAttention", "error split"}


def test_control_is_identical_and_fps_is_not(demo):
    report, *_ = demo
    assert report["control"]["latents"]["identical"] and report["control"]["video"]["identical"]
    assert not report["quality"]["latents"]["identical"]
    assert report["quality"]["latents"]["cosine"] > 0.8 and report["quality"]["video"]["psnr_db"] > 15


def test_levels_and_what_ran(demo):
    report, *_ = demo
    assert [level["level"] for level in report["levels"]][0] == "coarse"
    for level in report["levels"]:
        assert 0.005 < level["quantization"]["rel_l1"] < 0.06 and 0 < level["density"] <= 1
    ran = {(row["layer"], row["level"]): row["calls"] for row in report["ran"]["rows"]}
    assert sum(ran.values()) == 2 * 2 * 3  # layers, CFG, steps
    seconds = report["seconds"]
    assert seconds["FPSAttention"]["quantize"] > 0 and seconds["dense"]["quantize"] == 0
    assert seconds["dense"]["attention"] > 0  # torch's own attention was seen


def test_report_says_what_is_not_known(demo):
    _, out, *_ = demo
    text = (out / "report.md").read_text()
    assert "Not measured" in text and "no GPU was used" in text and "not trained" in text


def test_video_has_structure(demo):
    """Not noise: neighbouring pixels and frames of the dense run agree far better than shuffled ones would."""
    import imageio.v2 as imageio

    _, out, *_ = demo
    frames = torch.tensor(imageio.mimread(out / "dense.mp4")[8]).float()
    neighbour = (frames[:, 1:] - frames[:, :-1]).abs().mean()
    assert frames.std() > 20 and neighbour < 0.3 * frames.std()


def test_timed_halves_equal_the_op(demo):
    """The stopwatch runs quantize and forward apart; the result must have the same bits as the composite op."""
    import fpsattention as fps

    *_, config = demo
    pipe, call = load_pipeline(config, "cpu")
    run = run_pipeline(pipe, call, config, "cpu", "x", lambda *_: None)
    with fps.apply(pipe, "fp8"):
        timed = run_pipeline(pipe, call, config, "cpu", "x", lambda *_: None)
        with torch.no_grad():
            plain = pipe(
                **call, height=96, width=160, num_frames=17, num_inference_steps=3, guidance_scale=config.guidance_scale,
                output_type="latent", generator=torch.Generator().manual_seed(config.seed),
            ).frames  # fmt: skip
    assert torch.equal(timed.latents, plain)
    assert not torch.equal(run.latents, plain)


def test_model_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load_pipeline(DemoConfig(model=str(tmp_path / "none")), "cpu")
