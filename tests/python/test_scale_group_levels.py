"""Scale groups of several tiles as granularity: of ``fpsattention.attention``, of a level under ``apply``, of the error split and of ``fpsattn compare``."""

from __future__ import annotations

import dataclasses

import pytest
import torch

pytest.importorskip("diffusers")
import tiny_wan

import fpsattention as fps
from fpsattention import ConfigError, Level, UnsupportedError, patterns
from fpsattention.analysis.captures import split_error
from fpsattention.compare.methods import Context, Method, choose
from fpsattention.compare.numerics import PAPER, blockwise_attention
from fpsattention.layout.scale_groups import scale_groups
from fpsattention.ops.attend import attend
from fpsattention.paper import PaperMode, PaperPhase

TILE, GROUP = (3, 4, 4), (3, 8, 8)
ODD = (5, 7, 11)  # the last tile and the last group are cut on every axis
WINDOW = PaperPhase((1, 3, 1), GROUP)
MODE = PaperMode(0.0, 0.0, TILE, {"coarse": WINDOW, "fine": WINDOW, "intermediate": WINDOW}, "paper")
TRUNCATED = {"name": "sliding_tile", "window": [1, 3, 1], "border": "truncate"}


def schedule(*levels):
    """Each level for an equal share of sigma, the first for the noisiest."""
    count = len(levels)
    return {
        "format": "fpsattn-schedule/3",
        "tile": list(TILE),
        "levels": {f"l{i}": level for i, level in enumerate(levels)},
        "phases": [{"sigma": [1 - i / count, 1 - (i + 1) / count], "level": f"l{i}"} for i in range(count)],
    }


def level(granularity=GROUP, precision="fp8", **others):
    granularity = granularity if isinstance(granularity, str) else list(granularity)
    return {"precision": precision, "granularity": granularity, **(others or {"window": [1, 1, 2]})}


def tensors(grid=ODD, heads=2, dtype=torch.float32, seed=0):
    """q and k whose scales differ from tile to tile."""
    generator = torch.Generator().manual_seed(seed)
    shape = (1, grid[0] * grid[1] * grid[2], heads, 64)
    q, k, v = (torch.randn(shape, generator=generator) for _ in range(3))
    loud = 0.5 + 4 * torch.rand(1, shape[1], 1, 1, generator=generator)
    return [x.to(dtype).requires_grad_() for x in (q * loud, k * loud, v)]


def gradients(out, inputs):
    return torch.autograd.grad((out * torch.linspace(-1, 1, out.shape[1]).view(1, -1, 1, 1)).sum(), inputs)


@pytest.mark.parametrize("precision", ["fp8", "paper"])
def test_attention_takes_a_size(precision):
    """As the tables of ``scale_groups``; a group of one tile as "tile"; several tiles otherwise: all to the bit, gradients too."""
    inputs = tensors()
    options = {"tile": TILE, "window": (1, 2, 2), "precision": precision}
    mask = fps.sliding_tile_mask(fps.plan(ODD, TILE), (1, 2, 2))
    grouped = fps.attention(*inputs, ODD, granularity=list(GROUP), **options)
    by_tables = attend(*inputs, scale_groups(mask, GROUP, backward=True), precision=precision)[0]
    one_tile = fps.attention(*inputs, ODD, granularity=TILE, **options)
    tile = fps.attention(*inputs, ODD, granularity="tile", **options)
    for a, b in ((grouped, by_tables), (one_tile, tile)):
        assert torch.equal(a, b)
        assert all(torch.equal(x, y) for x, y in zip(gradients(a, inputs), gradients(b, inputs), strict=True))
    assert not torch.equal(grouped, tile)
    same = fps.attention(*inputs, ODD, block_mask=mask, granularity=GROUP, precision=precision)
    assert torch.equal(same, grouped)
    reference = fps.attention(*inputs, ODD, granularity=GROUP, backend="reference", **options)
    torch.testing.assert_close(grouped, reference, rtol=1e-4, atol=1e-5)  # sums in another order


def test_sizes_that_attention_refuses():
    q, k, v = (x.detach() for x in tensors())
    for size, message in (
        ((3, 6, 8), r"size \(3, 6, 8\), expected multiples of the tile \(3, 4, 4\)"),
        ((3, 8), r"attention: granularity \(3, 8\), expected three integers"),
        ("head", "granularity 'head', expected one of 'tile'"),
    ):
        with pytest.raises(ConfigError, match=message):
            fps.attention(q, k, v, ODD, tile=TILE, granularity=size)
    tables = fps.dense_mask(fps.plan(ODD, TILE)).lists(False)
    with pytest.raises(ConfigError, match=r"granularity \(3, 8, 8\) with ready tables, expected a BlockMask"):
        attend(q, k, v, tables, granularity=GROUP)
    with pytest.raises(Exception, match="granularity is a size in a traced call"):  # Dynamo puts it into one of its own
        torch.compile(lambda q: fps.attention(q, k, v, ODD, tile=TILE, granularity=GROUP), backend="eager")(q)
    torch._dynamo.reset()


# Schedules -----------------------------------------------------------------------------------------------------------------


def test_files_have_sizes():
    made = fps.Schedule.from_dict(schedule(level(), level("tile")))
    assert made.levels["l0"] == Level("l0", granularity=list(GROUP), window=(1, 1, 2))
    assert made.to_dict()["levels"]["l0"]["granularity"] == [3, 8, 8]
    assert fps.Schedule.from_dict(made.to_dict()) == made
    assert made.levels["l0"].scales == "3x8x8" and made.levels["l1"].scales == "tile"
    assert made.levels["l0"].kernel_class != made.levels["l1"].kernel_class


@pytest.mark.parametrize(
    ("changes", "entry", "message"),
    [
        ({}, level((3, 6, 8)), r'levels\["l0"\]\.granularity is \[3, 6, 8\], expected multiples of the tile \[3, 4, 4\]'),
        ({"tile": None}, level(), r'levels\["l0"\]\.granularity is \[3, 8, 8\] without a tile, expected "tile" \[t, h, w\]'),
        ({}, level((3, 8)), r'levels\["l0"\]\.granularity is \[3, 8\], expected \'tile\', \'block\', \'token\', or a size'),
        ({}, level((3, 0, 8)), r'levels\["l0"\]\.granularity is \[3, 0, 8\], expected'),
        ({}, {"precision": "fp8", "granularity": 8}, r'levels\["l0"\]\.granularity is 8, expected'),
        ({}, level(precision="int8"), r'levels\["l0"\]\.granularity is \(3, 8, 8\), expected \'block\''),
        ({}, level(pattern={"name": "svg2"}), r'levels\["l0"\]\.granularity is \[3, 8, 8\], expected .* beside svg2'),
        ({"format": "fpsattn-schedule/2"}, level(), r'levels\["l0"\]\.granularity is \[3, 8, 8\], expected one of tile'),
    ],
)  # fmt: skip
def test_sizes_that_files_may_not_have(changes, entry, message):
    with pytest.raises(ConfigError, match=rf"^fpsattention\.Schedule: {message}"):
        fps.Schedule.from_dict(schedule(entry) | changes)
    for wrong in ((3, True, 8), (3, 8), [3.0, 8, 8]):
        with pytest.raises(ConfigError, match=r'levels\["x"\] has precision \'fp8\' and granularity .*a size of scale'):
            Level("x", granularity=wrong)


# Models --------------------------------------------------------------------------------------------------------------------


def seen_under(model, data, timestep, grid=tiny_wan.GRID, **options):
    """q, k, v and the output of the first layer, in a forward that may be differentiated."""
    seen = []
    with fps.apply(model, data, **options) as handle:
        handle.installations[0].sites[0].observers.append(lambda name, *tensors: seen.extend(tensors))
        out = tiny_wan.run(model, timestep, grid=grid)
        rows = handle.report().rows
    return seen[:4], out, rows


@pytest.mark.parametrize("grid", [tiny_wan.GRID, ODD])
def test_a_level_is_what_paper_mode_computes(grid):
    """Output and gradients of the layer to the bit, and the report says what shared a scale."""
    model = tiny_wan.transformer(num_layers=1)
    data = schedule(level(precision="paper", pattern=TRUNCATED))
    (q, k, v, out), _, rows = seen_under(model, data, [500.0], grid)
    of_level = gradients(out, (q, k, v))
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    want = MODE.attention(*leaves, grid, "coarse")
    assert torch.equal(out, want)
    assert all(torch.equal(a, b) for a, b in zip(of_level, gradients(want, leaves), strict=True))
    assert [row.granularity for row in rows] == ["3x8x8"]
    assert not torch.equal(
        out, fps.attention(q, k, v, grid, block_mask=MODE.mask(grid, "coarse"), precision="paper", smooth_k=False)
    )


def test_the_schedule_of_paper_mode_has_its_groups():
    from diffusers import FlowMatchEulerDiscreteScheduler

    made = MODE.schedule(FlowMatchEulerDiscreteScheduler(shift=5.0), 4)
    model = tiny_wan.transformer(num_layers=1)
    with torch.no_grad():
        (q, k, v, out), _, _ = seen_under(model, made, [500.0])
        assert torch.equal(out, MODE.attention(q, k, v, tiny_wan.GRID, "intermediate"))


@torch.no_grad()
@pytest.mark.parametrize("order", [None, "tile"])
def test_sizes_beside_other_levels_text_heads_and_exact_frames(order):
    """Samples of one batch at levels of three kernel classes; a group of one tile is "tile" to the bit; what is exact is dense."""
    model = tiny_wan.transformer(num_layers=1)
    heads = {"heads": {"*": {"1": [1, 2, 1]}}}
    data = schedule(level(), {"precision": "bf16"}, level("tile"), level()) | heads
    timesteps = [900.0, 600.0, 400.0, 100.0]
    together = seen_under(model, data, timesteps, token_order=order, exact=(0,))[1]
    single = [seen_under(model, data, [t], token_order=order, exact=(0,)) for t in timesteps[:1] + timesteps[2:]]
    inputs = tiny_wan.inputs(timesteps)
    for i in range(len(timesteps)):
        one = {name: x[i : i + 1] for name, x in inputs.items()}
        with fps.apply(model, data, token_order=order, exact=(0,)):
            torch.testing.assert_close(model(**one, return_dict=False)[0], together[i : i + 1], rtol=1e-4, atol=1e-4)
    (q, k, v, out), _, rows = single[0]
    mask = fps.BlockMask.from_tiles(
        fps.plan(tiny_wan.GRID, TILE), torch.ones(2, 6, 6, dtype=torch.bool)
    )  # a tile of all frames holds the exact one
    want = fps.attention(q, k, v, tiny_wan.GRID, block_mask=mask, granularity=GROUP)
    torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-5)
    assert {row.granularity for row in rows} == {"3x8x8", "", "tile"}
    alike = [seen_under(model, schedule(level(g)) | heads, [500.0], ODD, token_order=order)[1] for g in (TILE, "tile")]
    assert torch.equal(*alike)


@torch.no_grad()
@pytest.mark.parametrize("pattern", [{"name": "topk_mean", "ratio": 0.3}, {"name": "exact", "mass": 0.5}])
def test_patterns_that_read_q_and_k_choose_tiles_as_ever(pattern):
    """Their lists are those of the pattern; only scales are shared by groups."""
    model = tiny_wan.transformer(num_layers=1)
    (q, k, v, out), _, _ = seen_under(model, schedule(level(pattern=pattern)), [500.0], ODD)
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    from fpsattention.ops.selection import measured

    mask, _ = measured(patterns.from_dict(pattern), "tile", fps.plan(ODD, TILE), *heads_first)
    assert torch.equal(out, fps.attention(q, k, v, ODD, block_mask=mask, granularity=GROUP))


@torch.no_grad()
def test_norm_and_rope_in_the_quantizer():
    model = tiny_wan.transformer(num_layers=1)
    wanted = seen_under(model, schedule(level()), [500.0], ODD)[1]
    with fps.apply(model, schedule(level()), prepare=True) as handle:
        got = tiny_wan.run(model, [500.0], grid=ODD)
        assert handle.report().prepared["transformer"] == [1]
    assert 0 <= (got - wanted).abs().sum() / wanted.abs().sum() < 1e-4


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("way", ["blocks", "whole"])
def test_compiled_models(way):
    """The eager output to the bit, of levels of different sizes, a scored pattern among them; blocks serve several grids by few compilations."""
    levels = (level((3, 4, 8)), level(pattern={"name": "topk_mean", "ratio": 0.3}))
    model, count = tiny_wan.transformer(num_layers=1), []
    cases = [(grid, [t]) for grid in ((ODD, (3, 4, 6)) if way == "blocks" else (ODD,)) for t in (900.0, 100.0)]

    def backend(graph, _inputs):
        count.append(graph)
        return graph

    torch._dynamo.reset()
    with fps.apply(model, schedule(*levels)):
        eager = [tiny_wan.run(model, t, grid=grid) for grid, t in cases]
        compiled = model
        if way == "blocks":
            model.compile_repeated_blocks(fullgraph=True, backend=backend)
        else:
            compiled = torch.compile(model, fullgraph=True, backend=backend)
        for (grid, t), expected in zip(cases, eager, strict=True):
            got = compiled(**tiny_wan.inputs(t, grid), return_dict=False)[0]
            assert torch.equal(got, expected), (grid, t)
    torch._dynamo.reset()
    assert way == "whole" or len(count) <= 4


def test_where_paper_levels_with_sizes_do_not_run(monkeypatch):
    model = tiny_wan.transformer(num_layers=1)
    with torch.no_grad(), fps.apply(model, schedule(level(precision="paper"))):
        with pytest.raises(UnsupportedError, match="level 'l0' has precision 'paper'.*expected this model eager"):
            torch.compile(model, backend="eager")(**tiny_wan.inputs([500.0]))
        torch._dynamo.reset()
        monkeypatch.setattr("fpsattention.ops.attend.resolve_backend", lambda *_: "sm90")
        with pytest.raises(UnsupportedError, match="precision 'paper' on the sm_90a kernels"):
            tiny_wan.run(model, [500.0])


# Looking at it ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp8", "paper"])
def test_the_error_split_has_the_groups_scales(precision):
    q, k, v = (x.detach() for x in tensors(heads=1))
    mask = fps.sliding_tile_mask(fps.plan(ODD, TILE), (1, 2, 2))
    out = fps.attention(
        q, k, v, ODD, block_mask=mask, granularity=GROUP, precision=precision, smooth_k=precision != "paper"
    )
    exact = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    want = ((out - exact).abs().sum() / exact.abs().sum()).item()
    grouped, tile = (split_error(q, k, v, mask, g, precision=precision)["total"]["rel_l1"] for g in (GROUP, "tile"))
    assert grouped == pytest.approx(want, rel=1e-5) and tile != pytest.approx(want, rel=1e-4)


def test_compare_rows_have_sizes():
    """``fps`` as its schedule says, ``fps-fp8`` and ``paper-fp8`` as ``granularity``: the op, and the numerics written beside it."""
    q, k, v = (x.detach().transpose(1, 2) for x in tensors())
    made = fps.Schedule.from_dict(schedule(level(precision="paper", hadamard=True, window=[1, 2, 2])))
    layout = fps.plan(ODD, TILE)
    context = Context(layout, 0, 0.5, None)
    ours, every, paper = choose("fps,fps-fp8,paper-fp8", made, granularity=GROUP)
    assert "3x8x8 scales" in every.source and "3x8x8 scales" in paper.source
    options = {"tensor_layout": "HND", "granularity": GROUP}
    dense, mask = fps.dense_mask(layout), fps.sliding_tile_mask(layout, (1, 2, 2))
    assert torch.equal(ours.mask(q, k, v, context).to_blocks(), mask.to_blocks())
    assert torch.equal(
        ours.attention(q, k, v, mask, context),
        fps.attention(q, k, v, ODD, block_mask=mask, precision="paper", smooth_k=False, hadamard=True, **options),
    )
    assert torch.equal(
        every.attention(q, k, v, dense, context), fps.attention(q, k, v, ODD, block_mask=dense, **options)
    )
    got = paper.attention(q, k, v, dense, context)
    want = fps.attention(q, k, v, ODD, block_mask=dense, precision="paper", smooth_k=False, **options)
    assert (
        got - want
    ).abs().sum() / want.abs().sum() < 1e-4  # a score whose last bit differs rounds P to its neighbour
    coarse, fine = (
        blockwise_attention(q, k, v, dense, dataclasses.replace(PAPER, q_group=g, k_group=g))[0] for g in (TILE, "tile")
    )
    assert torch.equal(coarse, fine) and not torch.equal(fine, got)
    with pytest.raises(
        ConfigError, match=r"compare: granularity: .* is \[3, 6, 8\], expected multiples of the tile \[3, 4, 4\]"
    ):
        choose("fps-fp8", made, granularity=(3, 6, 8))
    with pytest.raises(ConfigError, match="fps-pseudo with level 'l0' .paper, 3x8x8 scales, rotated., expected fp8"):
        choose("fps-pseudo", made)[0].attention(q, k, v, mask, context)
    assert isinstance(every, Method) and every.describe()["schedule"]["levels"]["all"]["granularity"] == [3, 8, 8]
