"""Levels of a schedule that name patterns: the file, and what runs through ``fpsattention.apply``."""

from __future__ import annotations

import copy
import json
import pickle
import re
import threading
from typing import Any

import pytest
import tiny_wan
import torch

import fpsattention as fps
from fpsattention import ConfigError, UnsupportedError, patterns
from fpsattention.integrations.selection import Selections
from fpsattention.paper import PaperMode
from fpsattention.schedule import Level
from fpsattention.training.warmup import relaxed

TOPK = {"name": "topk_mean", "ratio": 0.34}


def schedule(*levels: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Levels l0, l1, ... one after the other, each for an equal stretch of sigma."""
    borders = [1.0 - i / len(levels) for i in range(len(levels))] + [0.0]
    return {
        "format": "fpsattn-schedule/3",
        "tile": tiny_wan.TILE,
        "levels": {f"l{i}": level for i, level in enumerate(levels)},
        "phases": [{"sigma": [borders[i], borders[i + 1]], "level": f"l{i}"} for i in range(len(levels))],
        **more,
    }


def fp8(pattern: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"precision": "fp8", "pattern": pattern, **more}


@pytest.fixture(scope="module")
def model():
    return tiny_wan.transformer()


# The file ------------------------------------------------------------------------------------------------------------------


def test_file_round_trip_and_copies():
    data = schedule(
        fp8(TOPK, granularity="block", refresh=3), fp8({"name": "radial", "decay": 0.8}), {"precision": "bf16"}
    )
    made = fps.Schedule.from_dict(data)
    assert made.levels["l0"].pattern == patterns.get("topk_mean", ratio=0.34) and made.levels["l0"].refresh == 3
    assert made.levels["l0"].to_dict() == {**data["levels"]["l0"]}
    for other in (
        fps.Schedule.from_dict(json.loads(json.dumps(made.to_dict()))),
        copy.deepcopy(made),
        pickle.loads(pickle.dumps(made)),
    ):
        assert other == made and other.levels["l0"].pattern.pattern is patterns.topk_mean
    assert Level("x", pattern=TOPK) == Level("x", pattern=patterns.get("topk_mean", ratio=0.34))
    assert not Level("x", pattern={"name": "radial"}).dynamic and made.levels["l0"].dynamic


@pytest.mark.parametrize("version", [1, 2])
def test_older_files_load_and_know_no_patterns(version):
    old = schedule({"precision": "fp8", "window": [1, 1, 1]}, format=f"fpsattn-schedule/{version}")
    assert fps.Schedule.from_dict(old).to_dict()["format"] == "fpsattn-schedule/3"
    with pytest.raises(ConfigError, match=r'levels\["l0"\].pattern is an unknown key'):
        fps.Schedule.from_dict({**old, "levels": {"l0": fp8(TOPK)}})
    with pytest.raises(ConfigError, match=r'levels\["l0"\].hadamard is an unknown key'):
        fps.Schedule.from_dict({**old, "levels": {"l0": {"precision": "fp8", "hadamard": True}}})


@pytest.mark.parametrize(
    "level, message",
    [
        (fp8({"name": "topmean"}), r'levels\["l0"\].pattern: .*topmean.*expected one of'),
        (fp8({"name": "topk_mean", "share": 0.1}), r'levels\["l0"\].pattern: .*share.*ratio'),
        (fp8({"name": "sliding_tile"}), r'levels\["l0"\].pattern: .*window.* is missing'),
        (fp8({"ratio": 0.1}), r'levels\["l0"\].pattern: .*"name"'),
        (fp8("topk_mean"), r'levels\["l0"\].pattern is .*expected a JSON object'),
        (fp8(TOPK, window=[1, 1, 1]), '"pattern" or "window"'),
        ({"precision": "bf16", "pattern": TOPK}, "own dense attention"),
        (fp8(TOPK, refresh=0), r'levels\["l0"\].refresh is 0'),
        (fp8({"name": "radial"}, refresh=2), "depends on the layout only"),
        ({"precision": "fp8", "refresh": 2}, "a pattern beside it"),
        ({"precision": "fp8", "hadamard": 1}, r'levels\["l0"\].hadamard is 1, expected true or false'),
        ({"precision": "bf16", "hadamard": True}, "own dense attention"),
    ],
)
def test_errors_name_the_path(level, message):
    with pytest.raises(ConfigError, match=message):
        fps.Schedule.from_dict(schedule(level))


def test_windows_of_heads_and_patterns_exclude_each_other():
    with pytest.raises(ConfigError, match="which has a pattern"):
        fps.Schedule.from_dict(schedule(fp8(TOPK), heads={"*": {"0": [1, 1, 1]}}))
    fps.Schedule.from_dict(
        schedule(fp8(TOPK), {"precision": "fp8", "window": [1, 2, 3]}, heads={"*": {"0": {"l1": [1, 1, 1]}}})
    )


def test_warm_up_and_paper_mode():
    made = fps.Schedule.from_dict(schedule(fp8(TOPK, refresh=2), {"precision": "fp8", "window": {"density": 0.2}}))
    half = relaxed(made, 0.5, (1, 2, 3))
    assert half.levels["l0"].pattern is None and half.levels["l1"].window == pytest.approx(0.6)
    assert relaxed(made, 1.0, (1, 2, 3)) == made
    diffusers = pytest.importorskip("diffusers")
    mode = PaperMode(0.2, 0.8)
    of_steps = mode.schedule(diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0), 50)
    for phase, level in of_steps.levels.items():
        mask = level.pattern(None, None, mode.layout((21, 45, 80)))
        assert torch.equal(mask.to_blocks(), mode.mask((21, 45, 80), phase).to_blocks())


# What runs -----------------------------------------------------------------------------------------------------------------


def cores(model: Any, data: Any, timesteps: list[float]) -> tuple[dict[int, Any], Any]:
    """q, k, v, out ``(B, S, H, D)`` of every layer, and the report."""
    seen: dict[int, Any] = {}
    with fps.apply(model, data) as handle:
        for site in handle.installations[0].sites:
            site.observers.append(lambda name, *tensors, layer=site.layer: seen.update({layer: tensors}))
        tiny_wan.run(model, timesteps)
        return seen, handle.report()


ALL = [
    TOPK,
    {"name": "cdf_mean", "mass": 0.5, "window": [1, 1, 1]},
    {"name": "sparge", "mass": None, "ratio": 0.4, "similarity": -0.1},
    {"name": "draft", "sparsity": 0.6},
    {"name": "vmoba"},
    {"name": "svg", "share": 0.25},
    {"name": "blade", "max_ratio": 0.5},
    {"name": "antidiagonal", "mass": 0.4},
    {"name": "exact", "mass": 0.5},
    {"name": "sliding_tile", "window": [1, 1, 5], "border": "truncate"},
    {"name": "radial", "decay": 0.2},
    {"name": "foreground", "box": [[0, 3], [0, 4], [0, 4]], "window": [1, 1, 1]},
    {"name": "part", "labels": [i % 2 for i in range(288)]},
    {"name": "vorta", "routes": ["full", "window"], "window": [1, 1, 1]},
]


@pytest.mark.parametrize("pattern", ALL, ids=lambda pattern: pattern["name"])
@torch.no_grad()
@pytest.mark.slow
def test_every_pattern_runs_on_the_q_and_k_of_the_layer(model, pattern):
    """The output of each layer is that of the public call with the mask of the pattern of its q, k, v: the same bits."""
    seen, report = cores(model, schedule(fp8(pattern, granularity="block")), [700.0, 300.0])
    layout = fps.plan(tiny_wan.GRID, tiny_wan.TILE)
    for layer, (q, k, v, out) in seen.items():
        bound = patterns.from_dict(pattern).of_layer(layer)
        given = {"v": v.transpose(1, 2)}
        if pattern["name"] == "exact":
            given["lse"] = fps.attention(
                q, k, v, tiny_wan.GRID, tile=tiny_wan.TILE, granularity="block", return_lse=True
            )[1]
        mask = bound(q.transpose(1, 2), k.transpose(1, 2), layout, **given)
        wanted = fps.attention(q, k, v, tiny_wan.GRID, block_mask=mask, granularity="block")
        assert torch.equal(out, wanted), layer
        row = next(row for row in report.rows if row.layer == layer)
        assert row.density == pytest.approx(mask.density, abs=1e-6) and row.pattern["name"] == pattern["name"]
        if bound.static:
            assert row.selected is None
        else:
            inputs = {"q": q.transpose(1, 2), "k": k.transpose(1, 2), **given}
            inputs = {name: inputs[name] for name in bound.pattern.inputs}
            selected = bound.pattern.density(layout=layout, **inputs, **bound.hyperparameters).selected
            assert row.selected == pytest.approx(selected, abs=1e-6)
    if not bound.static:
        text = rf"level l0: {bound.name} selected 0\.\d{{4}} of the pairs, the kernel visited 0\.\d{{4}} \(1\.\d{{3}} times\)"
        assert re.search(text, str(report))


@torch.no_grad()
def test_layers_of_vmoba_cut_in_turn():
    model = tiny_wan.transformer(num_layers=4)
    with fps.apply(model, schedule(fp8({"name": "vmoba"}))) as handle:
        tables = handle.installations[0].tables
        assert tables.group_of_layer == [0, 1, 2, 0]
        assert [levels[0].pattern.hyperparameters["layer"] for levels in tables.group_levels] == [0, 1, 2]
    with fps.apply(model, schedule(fp8({"name": "vmoba", "layer": 1}))) as handle:  # said: the same everywhere
        assert handle.installations[0].tables.group_of_layer == [0] * 4


@torch.no_grad()
def test_svg2_permutes_and_starts_from_the_step_before(model):
    named = {"name": "svg2", "q_clusters": 3, "k_clusters": 5, "mass": 0.6, "iterations": 4, "later_iterations": 1}
    seen, report = cores(model, schedule(fp8(named)), [700.0])
    layout = fps.plan(tiny_wan.GRID, tiny_wan.TILE)
    options = {name: value for name, value in named.items() if name not in ("name", "later_iterations")}
    for q, k, v, out in seen.values():
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        made = patterns.svg2(q, k, layout, **options)
        assert torch.equal(out.transpose(1, 2), patterns.clustered_attention(q, k, v, made))
    row = report.rows[-1]
    assert (row.selected, row.density) == pytest.approx(tuple(made.density()), abs=1e-6)
    starts: list[Any] = []
    original = patterns.cluster.svg2
    patterns.cluster.svg2 = lambda *a, previous=None, **o: (starts.append((previous, o["iterations"])), original(*a, previous=previous, **o))[1]  # fmt: skip
    try:
        pipe = tiny_wan.pipeline()
        with fps.apply(pipe, schedule(fp8({**named, "q_clusters": 2}))):
            tiny_wan.sample(pipe, 2)
    finally:
        patterns.cluster.svg2 = original
    assert [iterations for previous, iterations in starts][:2] == [4, 4] and starts[0][0] is None
    assert starts[-1][1] == 1 and starts[-1][0] is not None


@torch.no_grad()
def test_samples_at_different_patterns_in_one_batch(model):
    data = schedule(
        {"precision": "bf16"},
        fp8(TOPK),
        fp8({"name": "cdf_mean", "mass": 0.4}),
        {"precision": "fp8", "window": [1, 1, 1]},
    )
    timesteps = [900.0, 700.0, 300.0, 100.0, 600.0]
    arguments = tiny_wan.inputs(timesteps)
    with fps.apply(model, data) as handle:
        together = model(**arguments, return_dict=False)[0]
        assert [row.calls for row in handle.report().rows[:4]] == [1, 2, 1, 1]
        alone = [model(**{k: v[i : i + 1] for k, v in arguments.items()}, return_dict=False)[0] for i in range(5)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-3, atol=2e-3)


class Counting:
    """Counts how often a pattern is scored."""

    def __init__(self, monkeypatch):
        self.calls = 0
        of_sums = patterns.topk_mean.of_sums

        def counted(*arguments, **options):
            self.calls += 1
            return of_sums(*arguments, **options)

        monkeypatch.setattr(patterns.topk_mean, "of_sums", counted)


@torch.no_grad()
@pytest.mark.slow
def test_refresh_keeps_masks_for_steps_of_one_run(monkeypatch):
    """Two layers, two forwards a step (guidance): a mask per layer serves both and stays for three steps; a new run starts anew."""
    pipe, counting = tiny_wan.pipeline(), Counting(monkeypatch)
    with fps.apply(pipe, schedule(fp8(TOPK, refresh=3))) as handle:
        tiny_wan.sample(pipe, 5)
        assert counting.calls == 2 * 2  # steps 0 and 3
        tiny_wan.sample(pipe, 5)
        assert counting.calls == 2 * 4
        assert handle.report().rows[0].calls == 20 and handle.report().host_reads == 0
    with fps.apply(pipe, schedule(fp8(TOPK))):
        tiny_wan.sample(pipe, 5)
    assert counting.calls == 8 + 2 * 2 * 5  # by itself, each forward is scored


def test_refresh_is_of_sampling_runs(monkeypatch):
    """Training, and a model on its own, see other data in every forward: nothing is kept."""
    model, counting = tiny_wan.transformer(num_layers=1), Counting(monkeypatch)
    with fps.apply(model, schedule(fp8(TOPK, refresh=3))), torch.no_grad():
        for _ in range(2):
            tiny_wan.run(model, [700.0])
    assert counting.calls == 2
    pipe = tiny_wan.pipeline()
    with fps.apply(pipe, schedule(fp8(TOPK, refresh=3))):
        pipe.scheduler.set_timesteps(4)
        for _ in range(2):
            tiny_wan.run(pipe.transformer, [700.0]).sum().backward()
    assert counting.calls == 2 + 2 * 2


@pytest.mark.slow
def test_training_checkpointed_and_copied(model):
    """Gradients, the same with checkpointing (the recomputation scores again), of a copy and of a pickle; and near those of dense."""
    model = tiny_wan.transformer().train()
    data = schedule(fp8(TOPK, granularity="block"))

    def gradients(model: Any) -> torch.Tensor:
        model.zero_grad()
        tiny_wan.run(model, [800.0, 200.0]).square().mean().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    dense = gradients(model)
    with fps.apply(model, data):
        wanted = gradients(model)
        assert 1e-4 < float((wanted - dense).norm() / dense.norm()) < 0.5
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(gradients(other), wanted)
        model.enable_gradient_checkpointing()
        torch.testing.assert_close(gradients(model), wanted, rtol=1e-5, atol=1e-7)


def test_autocast_does_not_reach_the_scores(model):
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        seen, _ = cores(model, schedule(fp8(TOPK)), [700.0])
    q, k, v, out = seen[0]
    q, k, v = (x.bfloat16() for x in (q, k, v))
    mask = patterns.topk_mean(q.transpose(1, 2), k.transpose(1, 2), fps.plan(tiny_wan.GRID, tiny_wan.TILE), ratio=0.34)
    assert torch.equal(out, fps.attention(q, k, v, tiny_wan.GRID, block_mask=mask))


def test_wrong_heads_and_wrong_ranges_are_named(model):
    for pattern, message in (
        ({"name": "vorta", "routes": ["full"] * 3, "window": [1, 1, 1]}, "lists of 3 heads, expected 1 or 2"),
        ({"name": "topk_mean", "ratio": 2.0}, "topk_mean: ratio 2.0"),
    ):
        with fps.apply(model, schedule(fp8(pattern))), pytest.raises(ConfigError, match=message):
            tiny_wan.run(model, [700.0])


# Compiled ------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


MIXED = schedule(
    fp8(TOPK), {"precision": "fp8", "window": [1, 1, 1], "hadamard": True}, fp8({"name": "cdf_mean", "mass": 0.4})
)


@pytest.mark.slow
@torch.no_grad()
def test_compiled_blocks_serve_grids_and_levels(dynamo):
    """As many compilations for five grids as for three, samples at different patterns in one batch included."""
    model = tiny_wan.transformer(num_layers=1)
    grids = ((3, 8, 12), (5, 8, 12), (3, 6, 12), (4, 4, 4), (2, 10, 8))
    cases = [(grid, times) for grid in grids for times in ([950.0, 950.0], [30.0, 650.0])]
    count = 0

    def backend(graph: Any, _inputs: Any) -> Any:
        nonlocal count
        count += 1
        return graph

    with fps.apply(model, MIXED) as handle:
        eager = [tiny_wan.run(model, times, grid=grid) for grid, times in cases]
        handle.reset()
        model.compile_repeated_blocks(fullgraph=True, backend=backend)
        for done, ((grid, times), wanted) in enumerate(zip(cases, eager, strict=True)):
            assert torch.equal(tiny_wan.run(model, times, grid=grid), wanted), (grid, times)
            if done == 5:
                after_three = count
        assert count == after_three <= 3
        assert "where densities are not counted" in str(handle.report())


@pytest.mark.slow
@torch.no_grad()
def test_hooks_and_patterns_in_one_graph(dynamo):
    model = tiny_wan.transformer(num_layers=1)
    with fps.apply(model, MIXED):
        eager = [tiny_wan.run(model, times) for times in ([950.0], [650.0, 30.0])]
        compiled = torch.compile(lambda **arguments: model(**arguments), fullgraph=True, backend="eager")
        for times, wanted in zip(([950.0], [650.0, 30.0]), eager, strict=True):
            assert torch.equal(compiled(**tiny_wan.inputs(times), return_dict=False)[0], wanted)


@pytest.mark.slow
def test_training_through_compiled_blocks(dynamo):
    model = tiny_wan.transformer(num_layers=1).train()

    def gradients() -> torch.Tensor:
        model.zero_grad()
        tiny_wan.run(model, [900.0]).square().mean().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    with fps.apply(model, schedule(fp8(TOPK))):
        wanted = gradients()
        model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(gradients(), wanted, rtol=1e-4, atol=1e-6)


@torch.no_grad()
@pytest.mark.slow
def test_what_a_graph_cannot_do_is_said(dynamo):
    model = tiny_wan.transformer(num_layers=1)
    plain = tiny_wan.run(model, [700.0])
    with fps.apply(model, KEEPING):
        compiled = torch.compile(lambda **arguments: model(**arguments), fullgraph=True, backend="eager")
        with pytest.raises(
            torch._dynamo.exc.Unsupported, match="keeps a mask for 3 steps.*compile the transformer itself"
        ):
            compiled(**tiny_wan.inputs([700.0]))
    permuting = schedule(fp8({"name": "svg2", "q_clusters": 2, "k_clusters": 2}))
    with fps.apply(model, permuting):
        compiled = torch.compile(model, backend="eager")
        with pytest.raises(UnsupportedError, match="is compiled, and level 'l0' .*cdf_mean.*expected this model eager"):
            compiled(**tiny_wan.inputs([700.0]))
    with fps.apply(model, permuting, on_unsupported="dense") as handle:
        model.compile_repeated_blocks(backend="eager")
        torch.testing.assert_close(tiny_wan.run(model, [700.0]), plain)
        report = handle.report()
        assert "permutes" in str(report) and report.executions["transformer"] == [0]


KEEPING = schedule(fp8(TOPK, refresh=3), tile=[1, 2, 2])  # 18 tiles: lists change from step to step
KEEPING_MIXED = schedule(
    fp8(TOPK, refresh=2),
    {"precision": "fp8", "window": [1, 1, 1]},
    fp8({"name": "sparge", "mass": None, "ratio": 0.4, "similarity": -0.1}, refresh=3),
    tile=[1, 2, 2],
    layers={"1": "l0"},
)


def compile_blocks(model: Any, **options: Any) -> None:
    model.compile_repeated_blocks(**options)


def compile_whole(model: Any, **options: Any) -> None:
    model.compile(**options)


@pytest.mark.slow
@pytest.mark.parametrize(
    "data, compiled, graphs",
    [
        (KEEPING, compile_whole, 1),
        (KEEPING_MIXED, compile_blocks, 2),  # a layer of its own is another code
    ],
    ids=["one-whole", "mixed-blocks"],
)
@torch.no_grad()
def test_graphs_keep_lists_for_steps_of_a_run(data, compiled, graphs, dynamo):
    """No graph breaks; lists stay in buffers of each layer and the samples have the bits of the eager ones, run after run."""
    count = 0

    def backend(graph: Any, _inputs: Any) -> Any:
        nonlocal count
        count += 1
        return graph

    pipe = tiny_wan.pipeline()
    with fps.apply(pipe, data) as handle:
        eager = [tiny_wan.sample(pipe, steps) for steps in (5, 4)]
        compiled(pipe.transformer, fullgraph=True, backend=backend)
        for steps, wanted in zip((5, 4), eager, strict=True):
            assert torch.equal(tiny_wan.sample(pipe, steps), wanted)
        assert count == graphs
        kept = [site.kept["l0"] for site in handle.installations[0].sites]
        assert kept[0].any() and not torch.equal(*kept)
        before = [buffer.clone() for buffer in kept]
        tiny_wan.sample(pipe, 2)  # a new run: its lists are made at its first step
        if data is KEEPING:  # level l0 of the other is at the first, equal step of every run alone
            assert not any(torch.equal(a, b) for a, b in zip(before, kept, strict=True))
    if data is KEEPING:
        other = tiny_wan.pipeline()  # not compiled
        with fps.apply(other, schedule(fp8(TOPK), tile=[1, 2, 2])):
            assert not torch.equal(tiny_wan.sample(other, 5), eager[0])  # what is compared can tell


def test_lists_in_buffers_are_of_one_thread():
    selections = Selections()
    owned: list[bool] = []
    other = threading.Thread(target=lambda: owned.append(selections.owned()))
    assert selections.owned()
    other.start(), other.join()
    assert owned == [False] and selections.owned()
    assert copy.deepcopy(selections).owned()
    assert selections.due("k", 1, 2, (0, "a")) and not selections.due("k", 1, 2, (0, "a"))
    assert not selections.due("k", 1, 2, (0, "b")) and selections.due("k", 1, 2, (0, "c"))
    assert selections.due("k", 2, 2, (0, "c")) and selections.due("k", 2, 2, (1, "c"))
    selections.forget()  # after an error
    assert selections.due("k", 2, 2, (1, "c"))


# Analysis, demo ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_captures_are_analyzed_and_drawn_by_what_ran(tmp_path, model):
    """Error split and pictures take the mask of the pattern on the recorded q and k: the density of the report."""
    from fpsattention.analysis.captures import analyze_captures, find_captures
    from fpsattention.demo.demo import _masks

    made = fps.Schedule.from_dict(
        schedule(fp8(TOPK), {"precision": "int8", "window": [1, 1, 1]}, {"precision": "bf16"})
    )
    with fps.apply(model, made) as handle, handle.record(dir=tmp_path):
        tiny_wan.run(model, [900.0])
        tiny_wan.run(model, [500.0])
        report = handle.report()
    records = analyze_captures(find_captures(tmp_path), made, max_rows=32)
    for record in records:
        row = next(row for row in report.rows if (row.layer, row.level) == (record["layer"], record["level"]))
        assert record["density"] == pytest.approx(row.density, abs=1e-6) and record["precision"] == row.precision
        assert 0 < record["quantization"]["rel_l1"] < record["total"]["rel_l1"]
    masks = _masks(tmp_path, made, tiny_wan.HEADS, "cpu")
    assert list(masks) == ["l0", "l1"] and masks["l0"].shape == (1, tiny_wan.HEADS) and masks["l1"].shape == (1, 1)
    with pytest.raises(ConfigError, match="reads q and k, which are not given"):
        from fpsattention.analysis.captures import level_mask

        level_mask(made, made.levels["l0"], tiny_wan.GRID, tiny_wan.HEADS)
