"""Metrics against closed forms, the error split against the reference, pictures that are really drawn."""

import math

import numpy as np
import pytest
import torch

import fpsattention as fps
from fpsattention.analysis import compare, compare_videos, jsonable, plots
from fpsattention.analysis.captures import (
    analyze_captures,
    choose_tiles,
    find_captures,
    level_mask,
    split_error,
    tile_tokens,
)
from fpsattention.errors import BuildError, ConfigError
from fpsattention.layout.masks import dense_mask, sliding_tile_mask
from fpsattention.layout.tiles import plan
from fpsattention.ops.reference import attention_fp64
from fpsattention.schedule import Level, Phase, Schedule

GRID, TILE = (3, 5, 7), (3, 3, 4)


def qkv(tokens, heads=2, seed=0, batch=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, tokens, heads, 64, generator=generator) for _ in range(3)]


def save_capture(path, layer, sigma, grid=GRID, metadata=None):
    from safetensors.torch import save_file

    tensors = dict(zip("qkv", qkv(math.prod(grid), seed=layer), strict=True))
    tensors |= {"sigma": torch.tensor([sigma], dtype=torch.float64), "grid": torch.tensor(grid)}
    save_file(tensors, path, metadata={"layer": str(layer), "model": "transformer"} | (metadata or {}))


def test_metrics_closed_form():
    result = compare(torch.tensor([1.0, 2.0, -4.0]), torch.tensor([1.0, 3.0, -2.0]))
    assert result["rel_l1"] == pytest.approx(3 / 6)
    assert result["cosine"] == pytest.approx(15 / math.sqrt(21 * 14))
    assert result["rmse"] == pytest.approx(math.sqrt(5 / 3))
    assert result["max_abs"] == 2.0
    assert result["snr_db"] == pytest.approx(10 * math.log10(14 / 5))
    assert result["finite"] and not result["identical"]


def test_metrics_identical_zero_and_nan():
    same = compare(torch.ones(5), torch.ones(5))
    assert same["identical"] and same["rel_l1"] == 0.0 and same["cosine"] == 1.0 and math.isinf(same["snr_db"])
    nan = compare(torch.tensor([math.nan, 1.0]), torch.ones(2))
    assert not nan["finite"] and not nan["identical"] and math.isnan(nan["rel_l1"]) and math.isnan(nan["max_abs"])
    assert math.isinf(compare(torch.ones(2), torch.zeros(2))["rel_l1"])


@pytest.mark.parametrize(
    ("out", "ref", "text"),
    [
        (torch.ones(2), torch.ones(3), "out has shape (2,) but ref has (3,)"),
        (torch.ones(0), torch.ones(0), "no elements"),
    ],
)
def test_metrics_bad_input(out, ref, text):
    with pytest.raises(ConfigError, match=text.replace("(", r"\(").replace(")", r"\)")):
        compare(out, ref)


def test_video_metrics():
    ref = np.full((3, 16, 16, 3), 0.5, np.float64)
    out = ref.copy()
    out[1] += 0.1
    result = compare_videos(out, ref)
    assert result["psnr_db_per_frame"][1] == pytest.approx(20.0)
    assert math.isinf(result["psnr_db_per_frame"][0])
    assert result["psnr_db"] == pytest.approx((100 + 20 + 100) / 3)
    assert result["ssim"] < 1.0
    same = compare_videos(ref, ref)
    assert same["identical"] and math.isinf(same["psnr_db"]) and same["ssim"] == pytest.approx(1.0)
    with pytest.raises(ConfigError, match="same frames, size and type"):
        compare_videos(out, ref[:2])
    with pytest.raises(ConfigError, match="height and width >= 7"):
        compare_videos(out[:, :6], ref[:, :6])


def test_jsonable_is_strict():
    import json

    value = {"a": math.inf, "b": [math.nan, 1.5], 3: torch.tensor([1, 2]), "c": np.float64(2.0), "d": True, "e": None}
    text = json.dumps(jsonable(value), allow_nan=False)
    assert json.loads(text) == {"a": None, "b": [None, 1.5], "3": [1, 2], "c": 2.0, "d": True, "e": None}


def test_split_separates_causes():
    layout = plan(GRID, TILE)
    q, k, v = qkv(layout.num_tokens)
    dense = split_error(q, k, v, dense_mask(layout), "tile")
    assert dense["sparsity"]["rel_l1"] < 1e-5  # nothing is skipped
    # The order of the list differs, and with it the maxima so far: some codes of P are a step apart (docs/numerics.md).
    assert dense["total"]["rel_l1"] == pytest.approx(dense["quantization"]["rel_l1"], rel=1e-3)
    assert dense["quantization"]["rel_l1"] > 0.01
    mask = sliding_tile_mask(layout, (1, 1, 1))
    windowed = split_error(q, k, v, mask, "tile")
    assert windowed["quantization"] == dense["quantization"]
    heads = [x.transpose(1, 2) for x in (q, k, v)]
    want = compare(attention_fp64(*heads, mask.to_token_mask()), attention_fp64(*heads))
    assert windowed["sparsity"]["rel_l1"] == pytest.approx(want["rel_l1"], rel=1e-5)
    assert windowed["sparsity"]["rel_l1"] > 5 * windowed["quantization"]["rel_l1"]


@pytest.mark.parametrize("hadamard", [False, True])
def test_what_is_measured_is_what_runs(hadamard):
    """Rotation, and the stride of the K mean, which 2048 tokens have, included: the error is that of ``fps.attention``."""
    mask = dense_mask(plan((8, 16, 16), (4, 4, 8)))
    q, k, v = qkv(2048, heads=1)
    q[:, ::97, :, 3] *= 20.0
    out = fps.attention(q, k, v, (8, 16, 16), block_mask=mask, granularity="block", hadamard=hadamard)
    heads = (x.transpose(1, 2) for x in (q, k, v))
    want = compare(out, torch.nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2))["rel_l1"]
    measured = [split_error(q, k, v, mask, "block", hadamard=h)["total"]["rel_l1"] for h in (hadamard, not hadamard)]
    assert measured[0] == pytest.approx(want, rel=1e-5)
    assert measured[1] != pytest.approx(want, rel=1e-2)


def test_split_subsample_is_exact_on_its_rows():
    """Looking at few tiles must not change what is measured on them: sums over single tiles equal the whole."""
    layout = plan(GRID, TILE)
    q, k, v = qkv(layout.num_tokens, heads=1)
    mask = sliding_tile_mask(layout, (1, 2, 1))
    whole = split_error(q, k, v, mask, "block")
    few = split_error(q, k, v, mask, "block", max_rows=1)
    tiles = choose_tiles(layout, 1)
    assert len(tiles) == 1 and few["total"]["count"] == 64 * len(tile_tokens(layout)[tiles[0]])
    assert few["total"]["count"] < whole["total"]["count"] == layout.num_tokens * 64
    assert few["total"]["max_abs"] <= whole["total"]["max_abs"]
    assert few["total"]["rel_l1"] == pytest.approx(whole["total"]["rel_l1"], rel=0.5)
    with pytest.raises(ConfigError, match="rows is 0"):
        choose_tiles(layout, 0)


def test_level_mask_per_head():
    levels = {"a": Level("a", window=(1, 1, 1))}
    schedule = Schedule(levels=levels, phases=(Phase(1.0, 0.0, "a"),), tile=TILE, heads={(None, 1): (1, 2, 2)})
    mask = level_mask(schedule, levels["a"], GRID, 3)
    assert mask.shape == (1, 3)
    layout = plan(GRID, TILE)
    want = [sliding_tile_mask(layout, w).density for w in ((1, 1, 1), (1, 2, 2), (1, 1, 1))]
    assert mask.densities()[0].tolist() == pytest.approx(want)
    q, k, v = qkv(layout.num_tokens, heads=3)
    assert split_error(q, k, v, mask, "token")["total"]["finite"]


def test_captures_round_trip(tmp_path):
    for layer in (1, 0):
        for sigma in (0.2, 0.95):
            save_capture(tmp_path / f"l{layer}s{sigma}.safetensors", layer, sigma)
    captures = find_captures(tmp_path)
    assert [(c.layer, c.sigma) for c in captures] == [(0, 0.95), (0, 0.2), (1, 0.95), (1, 0.2)]
    seen = []
    records = analyze_captures(captures, Schedule.preset("training_free", 3.0), on_step=seen.append)
    assert seen == captures
    first, second = records[0], records[1]
    assert first["level"] == "dense" and "total" not in first and first["density"] == 1.0
    assert second["level"] == "careful" and second["total"]["finite"] and second["granularity"] == "block"
    with pytest.raises(ConfigError, match="level 'nope' is not in the schedule, expected one of dense, careful"):
        analyze_captures(captures, Schedule.preset("training_free"), level="nope")


def test_captures_bad_files(tmp_path):
    with pytest.raises(ConfigError, match="is not a folder"):
        find_captures(tmp_path / "none")
    with pytest.raises(ConfigError, match="no \\*.safetensors"):
        find_captures(tmp_path)
    bad = tmp_path / "x.safetensors"
    bad.write_bytes(b"not safetensors")
    with pytest.raises(ConfigError, match="cannot be read as safetensors"):
        find_captures(tmp_path)
    save_capture(bad, 0, 0.5, metadata={"layer": "first"})
    with pytest.raises(ConfigError, match="first"):
        find_captures(tmp_path)
    from safetensors.torch import save_file

    save_file({"q": torch.ones(1)}, bad, metadata={"layer": "0"})
    with pytest.raises(ConfigError, match="no 'sigma'"):
        find_captures(tmp_path)
    save_file({"q": torch.ones(1)}, bad, metadata={"layer": "0", "sigma": "0.5", "grid": "1,1,1"})
    with pytest.raises(ConfigError, match="has no tensor 'k'"):
        find_captures(tmp_path)[0].load()
    one = torch.ones(1, 2, 1, 64)
    save_file(
        dict.fromkeys("qkv", one) | {"k": one.clone(), "v": one.clone()},
        bad,
        metadata={"layer": "0", "sigma": "0.5", "grid": "1,1,1"},
    )
    with pytest.raises(ConfigError, match=r"three times \[B, 1, H, D\]"):
        find_captures(tmp_path)[0].load()


def test_mask_image_codes():
    layout = plan(GRID, TILE, text_len=9)
    image = plots.mask_image(sliding_tile_mask(layout, (1, 1, 1)))
    assert image.shape == (layout.num_tiles, layout.num_blocks)
    assert (np.diag(image) == 2).all()  # one block per tile here
    assert (image[-1, :-1] == 3).all() and (image[:-1, -1] == 3).all()
    assert image[0, 1] == 0


def read_png(path):
    from matplotlib.image import imread

    return imread(path)


@pytest.mark.slow
def test_pictures_are_drawn_and_deterministic(tmp_path):
    layout = plan((4, 8, 9), (2, 4, 3), text_len=5)
    mask = sliding_tile_mask(layout, (1, 2, 2))
    frames = np.random.default_rng(0).random((5, 16, 32, 3))
    draw = [
        lambda p: plots.plot_block_masks({"a": mask, "b": dense_mask(layout)}, p, "masks"),
        lambda p: plots.plot_plan(mask, p, "plan"),
        lambda p: plots.plot_error_vs_sigma({"total": [(1.0, 0.1), (0.2, 0.0)]}, [(1.0, 0.0, "x")], p, "error"),
        lambda p: plots.plot_layer_heatmap({(0, 1.0): 0.1, (3, 0.5): 0.2}, p, "heat"),
        lambda p: plots.plot_side_by_side(frames, frames * 0.9, p, "frames", [20.0] * 5, [0.9] * 5),
        lambda p: plots.plot_time_split({"dense": {"quantize": 0.0, "attention": 1.0, "rest": 2.0}}, p, "time"),
    ]
    for index, function in enumerate(draw):
        first, second = function(tmp_path / f"{index}a.png"), function(tmp_path / f"{index}b.png")
        assert first.read_bytes() == second.read_bytes()
        pixels = read_png(first)
        assert min(pixels.shape[:2]) > 150 and pixels[..., :3].std() > 0.02  # not blank
    with pytest.raises(ConfigError, match="masks is empty"):
        plots.plot_block_masks({}, tmp_path / "x.png", "x")
    with pytest.raises(ConfigError, match="no points"):
        plots.plot_error_vs_sigma({}, [], tmp_path / "x.png", "x")


def drawn(monkeypatch, call):
    """The figure that a plot function draws, without writing it."""
    kept = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: kept.append(figure))
    call()
    return kept[0]


def test_the_heading_agrees_with_the_frames_shown(monkeypatch):
    frames = np.random.default_rng(0).random((9, 16, 32, 3))
    psnr = [99.0 if frame in (1, 3, 5, 7) else 30.0 + frame for frame in range(9)]  # only even frames are shown
    figure = drawn(
        monkeypatch, lambda: plots.plot_side_by_side(frames, frames * 0.9, "x", "Same seed", psnr, [0.9] * 9)
    )
    heading = figure.get_suptitle()
    shown, everything = heading.split("\n")
    assert plots.frames_shown(9) == [0, 2, 4, 6, 8]
    assert shown == "Same seed. Frames shown: PSNR 30.0 to 38.0 dB, SSIM 0.900"
    assert everything == "all 9 frames: PSNR 30.0 to 99.0 dB, SSIM 0.900"
    titles = [axis.get_title() for axis in figure.axes[:5]]
    assert titles == [f"frame {frame}, {30 + frame:.1f} dB" for frame in (0, 2, 4, 6, 8)]


def test_no_curve_hides_another_and_no_half_is_empty(monkeypatch):
    sigmas = [1.0, 0.9, 0.7, 0.4]
    series = {
        "quantization": [(s, 0.02) for s in sigmas],
        "sparsity": [(s, 0.1) for s in sigmas],
        "total": [(s, 0.1) for s in sigmas],
    }
    figure = drawn(
        monkeypatch, lambda: plots.plot_error_vs_sigma(series, [(1.0, 0.5, "a"), (0.5, 0.0, "b")], "x", "error")
    )
    (axis,) = figure.axes
    lines = {line.get_label(): line for line in axis.lines}
    total, sparsity = lines["total"], lines["sparsity"]
    assert total.get_linewidth() > 3 * sparsity.get_linewidth() and total.get_zorder() < sparsity.get_zorder()
    left, right = axis.get_xlim()
    assert left > 1.0 and right < 0.4 and (1.0 - 0.4) / (left - right) > 0.85  # the data fills the width
    low, high = axis.get_ylim()
    assert low == 0.0 and 0.1 / high > 0.8
    legend = figure.legends[0]
    assert {text.get_text() for text in legend.get_texts()} == set(series) and axis.get_legend() is None


def test_missing_package_names_the_command(monkeypatch, tmp_path):
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(BuildError, match=r'matplotlib.*pip install "fpsattention\[demo\]"'):
        plots.plot_layer_heatmap({(0, 1.0): 0.1}, tmp_path / "x.png", "x")
