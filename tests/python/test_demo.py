"""The whole demo at a tiny size: files, no warning, the control, the picture, and that timing does not change results."""

import json
import warnings

import numpy as np
import pytest
import torch

from fpsattention.demo.config import DemoConfig
from fpsattention.demo.demo import run_demo
from fpsattention.demo.pipeline import load_pipeline, run_pipeline
from fpsattention.demo.tiny_wan import scene, tiny_inputs
from fpsattention.errors import ConfigError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    config = DemoConfig.small(out=out, device="cpu", num_inference_steps=3)
    seen = []
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # it starts, and goes on, without a warning
        report = run_demo(config, lambda *step: seen.append(step))
    return report, out, seen, config


@pytest.fixture(scope="module")
def dense_frames(demo):
    """uint8 [F, H, W, 3]"""
    import imageio.v2 as imageio

    return np.stack(imageio.mimread(demo[1] / "dense.mp4"))


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
    assert json.loads((out / "report.json").read_text())["schedule"]["format"] == "fpsattn-schedule/3"
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


def test_video_is_a_picture(dense_frames):
    """Not noise: neighbouring pixels of the dense run agree far better than shuffled ones would, and it uses its range."""
    frames = dense_frames.astype(float)
    across = np.abs(np.diff(frames, axis=2)).mean()
    assert frames.std() > 30 and across < 0.1 * frames.std()
    assert frames.min() < 60 and frames.max() > 200
    assert ((frames < 3) | (frames > 252)).mean() < 0.02  # no neon: hardly anything is clipped


def test_video_has_no_dot_pattern(dense_frames):
    """Patches are 16 pixels wide: what all of them have in common, beyond a slope, would be a pattern of that period.

    The slope of a picture that changes by less than its range over its width is below 1 level a pixel.
    """
    frames = dense_frames.astype(float)
    count, height, width, _ = frames.shape
    blurred = frames - _box_blur(frames, 16)
    inner = blurred[:, 16 : height - 16, 16 : width - 16]
    patches = inner.reshape(count, (height - 32) // 16, 16, (width - 32) // 16, 16, 3)
    assert patches.mean(axis=(0, 1, 3)).std(axis=(0, 1)).max() < 1.0


def _box_blur(frames, size):
    """Mean over size x size pixels, which removes every pattern of that period; edges repeat."""
    for axis in (1, 2):
        padded = np.concatenate([np.repeat(np.take(frames, [0], axis), size // 2, axis), frames,
                                 np.repeat(np.take(frames, [-1], axis), size - size // 2 - 1, axis)], axis)  # fmt: skip
        sums = np.cumsum(padded, axis)
        length = frames.shape[axis]
        first = np.take(sums, range(size - 1, size - 1 + length), axis)
        before = np.concatenate([np.zeros_like(np.take(sums, [0], axis)), np.take(sums, range(length - 1), axis)], axis)
        frames = (first - before) / size
    return frames


def test_video_moves_smoothly_from_the_first_frame(dense_frames):
    """Every frame differs from the one before, by about the same amount: nothing is frozen, nothing jumps."""
    steps = np.abs(np.diff(dense_frames.astype(float), axis=0)).mean(axis=(1, 2, 3))
    assert steps.min() > 0.5 and steps.max() < 3 * np.median(steps) and steps.min() > np.median(steps) / 3


def test_latents_hold_the_scene(demo):
    """The decoder alone shows the scene in the starting latents' colours, but for their noise: four video frames per latent frame."""
    *_, config = demo
    pipe, _ = load_pipeline(config, "cpu")
    latents = tiny_inputs(config.seed, 96, 160, 17)["latents"]
    with torch.no_grad():
        video = pipe.vae.decode(latents, return_dict=False)[0][0]  # [3, F, H, W]
    wanted, _ = scene(17, 12, 20, torch.Generator().manual_seed(config.seed + 1))
    got = torch.nn.functional.avg_pool2d(video.transpose(0, 1), 8)
    assert video.shape == (3, 17, 96, 160)
    # The noise of 0.35 is averaged by the decoder's smoothing; the norm bends colours by a few percent.
    errors = torch.stack([(got - wanted[f]).abs().mean((1, 2, 3)) for f in range(17)])  # [wanted, got]
    assert errors.diagonal().max() < 0.15 and errors[16, 0] > 0.2 and errors[0, 16] > 0.2


def test_timing_changes_no_bit(demo):
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
    with pytest.raises(ConfigError, match="neither a folder here nor the form of a hub id"):
        DemoConfig(model=str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load_pipeline(DemoConfig(model=str(tmp_path)), "cpu")
