"""Ranges of tokens that are dense in both directions: in one call, in masks, in models."""

from __future__ import annotations

import pytest
import tiny_models
import tiny_wan
import torch
from test_adapters import SPARSE, build, observe, run

import fpsattention as fps
from fpsattention import patterns
from fpsattention.errors import ConfigError, UnsupportedError
from fpsattention.layout import masks, tiles

GRID, TILE, WINDOW, TEXT = (5, 7, 6), (2, 4, 4), (1, 1, 1), 3


@pytest.mark.parametrize("position", ["suffix", "prefix"])
def test_what_holds_such_a_token_is_dense_and_nothing_else_changes(position):
    """By a rule of its own: a pair is attended if the window says so, or if either token shares a tile, or a block, with a range."""
    layout = tiles.plan(GRID, tile=TILE, text_len=TEXT, text_position=position)
    mask = masks.sliding_tile_mask(layout, WINDOW)
    ranges = [(40, 45), (200, 201)]
    block = layout.slot_of_token // 128
    tile = layout.tile_of_block[block]
    chosen = torch.cat([torch.arange(*ends) for ends in ranges])
    rows, columns = torch.isin(tile, tile[chosen]), torch.isin(block, block[chosen])
    want = mask.to_token_mask()[0, 0] | rows[:, None] | columns
    got = mask.with_exact(ranges)
    assert torch.equal(got.to_token_mask()[0, 0], want)
    assert mask.density < got.density < 1
    got.validate()
    assert mask.with_exact([]) is mask
    stacked = masks.BlockMask.stack([mask, masks.dense_mask(layout)]).with_exact(ranges)
    assert torch.equal(stacked.to_token_mask()[0, 0], want) and bool(stacked.to_token_mask()[1].all())


def test_attention_with_exact_ranges_and_its_gradients():
    layout = tiles.plan(GRID, tile=TILE)
    q, k, v = (
        torch.randn(1, 210, 2, 64, generator=torch.Generator().manual_seed(i)).requires_grad_() for i in range(3)
    )
    ranges = [(0, 42)]
    out = fps.attention(q, k, v, GRID, tile=TILE, window=WINDOW, exact=ranges)
    same = fps.attention(q, k, v, GRID, block_mask=masks.sliding_tile_mask(layout, WINDOW).with_exact(ranges))
    assert torch.equal(out, same)
    assert torch.equal(
        out, fps.attention(q, k, v, GRID, block_mask=masks.sliding_tile_mask(layout, WINDOW), exact=ranges)
    )
    mask = same_mask = masks.sliding_tile_mask(layout, WINDOW).with_exact(ranges).to_token_mask()
    exact = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), attn_mask=same_mask
    ).transpose(1, 2)
    assert mask[0, 0, :42].all() and mask[0, 0, :, :42].all()
    assert (out - exact).abs().mean() < 0.06 * exact.abs().mean()
    grads = torch.autograd.grad(out.square().sum(), (q, k, v))
    wanted = torch.autograd.grad(exact.square().sum(), (q, k, v))
    for got, want in zip(grads, wanted, strict=True):
        assert (got - want).abs().mean() < 0.15 * want.abs().mean()  # straight through


def test_bad_ranges():
    q = torch.zeros(1, 210, 1, 64)
    for bad in ([(0, 211)], [(5, 5)], [(-1, 3)], [0, 3], [(0.0, 3)], (4, 5), 7):
        with pytest.raises(ConfigError, match="attention: exact"):
            fps.attention(q, q, q, GRID, window=WINDOW, tile=TILE, exact=bad)
    with pytest.raises(Exception, match="traced call"):  # Dynamo puts it into one of its own
        torch.compile(lambda q: fps.attention(q, q, q, GRID, exact=[(0, 3)]), backend="eager", fullgraph=True)(q)
    with pytest.raises(ConfigError, match="expected numbers of frames"):
        fps.apply(tiny_wan.transformer(), "fp8", exact=["first"])


@torch.no_grad()
@pytest.mark.parametrize("level", [{"window": [1, 1, 1]}, {"pattern": {"name": "topk_mean", "ratio": 0.1}}])
def test_recordings_are_analyzed_with_their_exact_frames(tmp_path, level):
    """The density and the error are those of the run: an analysis without the frames would have another mask."""
    from fpsattention.analysis.captures import analyze_captures, find_captures

    model = tiny_wan.transformer(num_layers=1)
    data = {
        "format": "fpsattn-schedule/3", "tile": [1, 4, 4], "levels": {"narrow": {"precision": "fp8", **level}},
        "phases": [{"sigma": [1.0, 0.0], "level": "narrow"}],
    }  # fmt: skip
    seen = []
    with fps.apply(model, data, exact=(0, -1)) as handle, handle.record(dir=tmp_path):
        handle.installations[0].sites[0].observers.append(lambda name, *tensors: seen.extend(tensors))
        tiny_wan.run(model, [500.0])
        ran = _density(handle)
    (capture,) = find_captures(tmp_path)
    assert capture.exact == (0, 2)
    (record,) = analyze_captures([capture], fps.Schedule.from_dict(data))
    assert record["density"] == pytest.approx(ran, abs=1e-6) and ran > 2 * (2 / 3) - (2 / 3) ** 2
    q, k, v, out = seen
    exact = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    assert record["total"]["rel_l1"] == pytest.approx(((out - exact).abs().sum() / exact.abs().sum()).item(), rel=1e-4)
    if "pattern" in level:
        permuting = {**data, "levels": {"narrow": {"precision": "fp8", "pattern": {"name": "svg2"}}}}
        with pytest.raises(ConfigError, match=r"exact frames \(0, 2\), which svg2 of level 'narrow' permutes"):
            analyze_captures([capture], fps.Schedule.from_dict(permuting))


def _density(handle) -> float:
    return next(row.density for row in handle.report().rows if row.level == "narrow")


def test_frames_of_a_model():
    """The first frame of image-to-video: with tiles of one frame, its rows and columns are dense, and no others."""
    model, arguments = build(tiny_models.FAMILIES["wan"], 1, 0.9)
    t, h, w = tiny_models.GRID
    with fps.apply(model, SPARSE, exact=(0,)) as handle:
        seen = observe(handle)
        run(model, arguments)
        _, q, k, v, out = seen[0]
        density = _density(handle)
    allowed = masks.sliding_tile_mask(tiles.plan((t, h, w), tile=SPARSE["tile"]), WINDOW).to_token_mask()[0, 0].clone()
    assert not allowed[: h * w].all()
    allowed[: h * w] = allowed[:, : h * w] = True
    want = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=allowed)
    error = (out - want.transpose(1, 2)).abs().mean() / want.abs().mean()
    assert error < 0.06
    assert density == pytest.approx(allowed.float().mean().item())
    with (
        fps.apply(model, SPARSE, exact=(5,)),
        pytest.raises(ConfigError, match=r"exact \(5,\), expected frames of the 2"),
    ):
        run(model, arguments)


def test_references_of_adapters_are_exact():
    """Wan Animate's reference frame, Flux 2's reference images: pairs of video tokens only are sparse."""
    for name in ("animate", "flux2", "flux3"):
        model, arguments = build(tiny_models.FAMILIES[name], 1, 0.9)
        if name == "flux2":
            for key in ("hidden_states", "img_ids"):
                again = arguments[key].clone()
                if key == "img_ids":
                    again[..., 0] += 10
                arguments[key] = torch.cat([arguments[key], again], -2)
        if name == "flux3":
            arguments["image_cond_hidden_states"] = arguments["hidden_states"] + 1
            arguments["image_cond_ids"] = arguments["img_ids"] + torch.tensor([10.0, 0, 0, 0])
        with fps.apply(model, SPARSE) as handle:
            run(model, arguments)
            tokens = next(iter(handle.installations[0].counts()))[0]
            assert tokens.exact == ((0,) if name == "animate" else (1,))
            t, h, w = tokens.grid
            dense = 1 - (1 - 1 / t) ** 2  # rows or columns of one frame of t
            assert _density(handle) > dense


def _content(pattern: dict, tile=SPARSE["tile"], **more) -> dict:
    level = {"precision": "fp8", "pattern": pattern, **more}
    return {
        **SPARSE,
        "format": "fpsattn-schedule/3",
        "tile": list(tile),
        "levels": {"narrow": level, "dense": {"precision": "bf16"}},
    }


@pytest.mark.parametrize("name", ["wan", "animate"])
@pytest.mark.parametrize(
    "pattern",
    [{"name": "topk_mean", "ratio": 0.2}, {"name": "sparge", "mass": None, "ratio": 0.2, "similarity": -0.1}],
    ids=["topk_mean", "sparge"],
)
def test_frames_under_patterns_that_read_the_content(name, pattern):
    """Told by apply (Wan) or by the adapter (Animate's reference): their rows and columns are dense, all else is what the pattern chose."""
    model, arguments = build(tiny_models.FAMILIES[name], 1, 0.9)
    with fps.apply(model, _content(pattern), exact=(0,) if name == "wan" else ()) as handle:
        seen = observe(handle)
        run(model, arguments)
        _, q, k, v, out = seen[0]
        t, h, w = next(iter(handle.installations[0].counts()))[0].grid
        row = next(row for row in handle.report().rows if row.level == "narrow" and row.layer == 0)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    layout = tiles.plan((t, h, w), tile=SPARSE["tile"])
    chosen = patterns.from_dict(pattern)(q, k, layout, v=v).to_token_mask()
    allowed = chosen.clone()
    allowed[:, :, : h * w] = allowed[:, :, :, : h * w] = True
    assert not chosen[:, :, : h * w].all() and not allowed.all()
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=allowed).transpose(1, 2)
    assert (out - want).abs().mean() < 0.06 * want.abs().mean()
    assert row.density == pytest.approx(allowed.float().mean().item(), abs=1e-6)
    assert row.selected < row.density + 1e-9


def test_frames_and_a_pattern_that_permutes_are_refused():
    model, arguments = build(tiny_models.FAMILIES["wan"], 1, 0.9)
    schedule = _content({"name": "svg2", "q_clusters": 2, "k_clusters": 4})
    with (
        fps.apply(model, schedule, exact=(0,)),
        pytest.raises(UnsupportedError, match="exact under svg2, which permutes"),
    ):
        run(model, arguments)
    plain = run(model, arguments)
    with fps.apply(model, schedule, exact=(0,), on_unsupported="dense") as handle:
        assert torch.equal(run(model, arguments), plain)
        assert "permutes tokens" in next(iter(handle.report().fallbacks))


@pytest.mark.parametrize("name, content", [("wan", True), ("animate", False), ("cogvideox", False)])
@pytest.mark.slow
def test_compiled_models_with_exact_frames(name, content):
    """Whole, with the hooks around the graph and in it: one graph, the eager bits. Frames told by ``apply``, Animate's by its adapter."""
    model, arguments = build(tiny_models.FAMILIES[name], 1, 0.9)
    schedule = _content({"name": "topk_mean", "ratio": 0.2}) if content else SPARSE
    with fps.apply(model, schedule):
        sparse = run(model, arguments)
    with fps.apply(model, schedule, exact=(1,), replace=True), torch.no_grad():
        eager = run(model, arguments)
        assert not torch.equal(eager, sparse)
        hooks_in_it = name != "animate"
        compiled = torch.compile(
            (lambda **given: model(**given)) if hooks_in_it else model, fullgraph=True, backend="eager"
        )
        assert torch.equal(compiled(**arguments, return_dict=False)[0], eager)
    torch._dynamo.reset()
