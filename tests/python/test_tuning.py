"""Tuning: allocation against brute force, predicted errors against the model, bounds that hold on held-out runs, exact resumption."""

import itertools
import json
import math

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")

import tiny_wan

import fpsattention as fps
from fpsattention import patterns
from fpsattention.errors import ConfigError
from fpsattention.layout.masks import sliding_tile_mask
from fpsattention.ops.attend import attend
from fpsattention.schedule import Level, Phase, Schedule
from fpsattention.tuning import Target, TuneSettings
from fpsattention.tuning.allocate import Cell, Choice, at_price, frontier, within_cost, within_error
from fpsattention.tuning.build import build
from fpsattention.tuning.candidates import RATIOS, windows
from fpsattention.tuning.measure import Inputs, Rows, cell_errors, phase_starts, sensitivities
from fpsattention.tuning.runs import Item, dense
from fpsattention.tuning.settings import COST, cost_of, seconds
from fpsattention.tuning.state import State
from fpsattention.tuning.tuner import Tuner, run_tune

DENSITIES = [0.1, 0.25, 0.5, 1.0]
SHARES = {"block": DENSITIES, "token": DENSITIES, "topk_mean": [0.1, 0.2, 0.4]}


def random_cells(seed, count=3, heads=2, granularities=("block", "token")):
    """Errors that fall with density, as they do."""
    rng = np.random.default_rng(seed)
    make = lambda heads, n: np.sort(rng.lognormal(0.0, 2.0, (heads, n)), axis=1)[:, ::-1].copy()  # noqa: E731
    kinds = {**dict.fromkeys(granularities, heads), "topk_mean": 1}  # a pattern is of all heads
    return [Cell({g: make(n, len(SHARES[g])) for g, n in kinds.items()}, 1 / count) for _ in range(count)]


def everything(cells):
    """(error, cost) of every allocation there is."""
    options = []
    for cell in cells:
        own = [(0.0, cell.weight * COST["bf16"])]
        for g, errors in cell.errors.items():
            for picked in itertools.product(range(len(SHARES[g])), repeat=errors.shape[0]):
                cost = sum(SHARES[g][w] for w in picked) / errors.shape[0] * cell.weight * cost_of(g)
                own.append((sum(errors[h, w] for h, w in enumerate(picked)), cost))
        options.append(own)
    return [tuple(map(sum, zip(*chosen, strict=True))) for chosen in itertools.product(*options)]


@pytest.mark.parametrize("seed", range(3))
def test_allocations_are_on_the_hull_of_all_there_are(seed):
    cells = random_cells(seed, count=2)
    points = everything(cells)
    for lam in (1e-3, 0.1, 10.0, 1e3):
        found = at_price(cells, SHARES, lam)
        assert found.error + lam * found.cost == pytest.approx(min(e + lam * c for e, c in points), rel=1e-12)
        # Its own account of itself.
        assert any(math.isclose(e, found.error) and math.isclose(c, found.cost) for e, c in points)


def test_bounds_are_kept_and_nothing_on_the_hull_is_cheaper():
    cells = random_cells(7)
    hull = frontier(cells, SHARES, points=200)
    for bound in (0.0, 0.5, 3.0, 1e6):
        found = within_error(cells, SHARES, bound)
        assert found.error <= bound
        assert found.cost <= min(a.cost for a in hull if a.error <= bound) + 1e-12
    for bound in (0.2, 0.5, 1.3):
        found = within_cost(cells, SHARES, bound)
        assert found.cost <= bound
        assert found.error <= min(a.error for a in hull if a.cost <= bound) + 1e-12
    assert within_error(cells, SHARES, 0.0).choices == (Choice(None),) * 3  # only BF16 loses nothing
    assert within_cost(cells, SHARES, 0.0).cost == pytest.approx(0.1)  # less than there is: the cheapest


def test_what_was_not_measured_stays_dense_and_ties_are_cheap():
    flat = Cell({"block": np.ones((2, 4)), "token": np.ones((2, 4))}, 0.5)
    found = at_price([flat, Cell({}, 0.5)], SHARES, 10.0)
    assert found.choices == (Choice("block", (0, 0)), Choice(None))
    assert found.density == pytest.approx(0.5 * 0.1 + 0.5)


@pytest.mark.parametrize("grid, tile", [((3, 8, 12), (3, 4, 4)), ((21, 45, 80), None)])
def test_candidates(grid, tile):
    layout = fps.plan(grid, tile)
    found = windows(layout)
    assert found[-1] == layout.tile_grid and len(set(found)) == len(found) <= 80
    sizes = [math.prod(window) for window in found]
    assert sizes == sorted(sizes) and sizes[0] <= max(1, 0.03 * sizes[-1])
    if (
        tile is None
    ):  # all kinds of shapes: whole rows of tiles in time, in height, in width, at a sixth of the density or less
        small = [w for w, size in zip(found, sizes, strict=True) if size <= sizes[-1] / 6]
        assert all(any(w[axis] == layout.tile_grid[axis] for w in small) for axis in range(3))
        assert max(b / a for a, b in itertools.pairwise(sizes)) < 2


def test_phases_begin_where_the_schedule_puts_its_borders():
    for steps in (1, 4, 7, 50):
        sigmas = [1 - i / steps for i in range(steps)]
        for phases in range(1, min(steps, 5) + 1):
            levels = {f"l{i}": Level(f"l{i}", window=0.5) for i in range(phases)}
            cuts = [round(1 - i / phases, 12) for i in range(phases + 1)]
            spans = tuple(Phase(cuts[i], cuts[i + 1], f"l{i}") for i in range(phases))
            schedule = Schedule(levels, spans, axis="steps")
            edges, levels_of = schedule.edges_of(sigmas), schedule.segment_levels()
            starts = phase_starts(phases, steps)
            for step, sigma in enumerate(sigmas):
                phase = int(levels_of[schedule.segment(sigma, edges)].name[1:])
                assert starts[phase] <= step < starts[phase + 1]


@pytest.mark.slow
def test_cell_errors_are_those_of_the_engine():
    """Text after the video, a weight per element, two granularities; every row looked at, or whole tiles of them."""
    layout = fps.plan((3, 5, 7), (3, 4, 4), text_len=11)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, layout.num_tokens, 2, 64, generator=generator) for _ in range(3))
    candidates = [(1, 1, 1), layout.tile_grid]
    for limit in (10_000, 60):
        rows = Rows(layout, limit, seed=3)
        weight = torch.rand(2, len(rows.tokens), 2, 64, generator=generator)
        found, own = cell_errors(q, k, v, rows, candidates, ("block", "token+hadamard"), 0.1, weight, ["topk_mean"])
        exact = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), scale=0.1)
        exact = exact.transpose(1, 2)[:, rows.tokens]
        assert own == pytest.approx(float(exact.square().sum()) * layout.num_tokens / len(rows.tokens), rel=1e-4)
        patterned = found.pop("topk_mean")
        assert patterned.shape == (1, len(RATIOS))
        for i in (0, 4):
            mask = patterns.get("topk_mean", ratio=RATIOS[i])(q.transpose(1, 2), k.transpose(1, 2), layout)
            out = attend(q, k, v, mask, granularity="block", scale=0.1)[0][:, rows.tokens]
            torch.testing.assert_close(patterned[0, i], ((out - exact).square() * weight).sum(), rtol=1e-4, atol=1e-6)
        for kind, errors in found.items():
            granularity, _, rotated = kind.partition("+")
            for i, window in enumerate(candidates):
                mask = sliding_tile_mask(layout, window)
                out = attend(q, k, v, mask, granularity=granularity, scale=0.1, hadamard=bool(rotated))[0][
                    :, rows.tokens
                ]
                wanted = ((out - exact).square() * weight).sum((0, 1, 3))
                torch.testing.assert_close(errors[:, i], wanted, rtol=1e-4, atol=1e-6)


def calls(count, steps=4):
    """Arguments of the tiny pipeline: 9 frames of 64x96, grid 3x4x6."""
    made = []
    for seed in range(count):
        generator = torch.Generator().manual_seed(10 + seed)
        embeds = torch.randn(2, 1, 16, tiny_wan.TEXT, generator=generator)
        made.append({
            "prompt_embeds": embeds[0], "negative_prompt_embeds": embeds[1], "height": 64, "width": 96, "num_frames": 9,
            "num_inference_steps": steps, "guidance_scale": 1.0,
        })  # fmt: skip
    return made


def pipeline():
    pipe = tiny_wan.pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_predicted_errors_of_the_velocity(tmp_path):
    """What one layer's FP8 does to the model's output, to first order: against the model run with just that."""
    pipe = pipeline()
    with fps.apply(pipe, dense((3, 2, 3))) as handle:
        inputs = Inputs(handle.installations, tmp_path, 2)
        with inputs.recording():
            pipe(**calls(1)[0], output_type="latent", generator=torch.Generator().manual_seed(0))
        assert len(inputs.sigmas) == 4
        installation, sigma, arguments = inputs.load(1)
        assert sigma == pytest.approx(inputs.sigmas[2])
        squares, total = sensitivities(installation, arguments, (3, 2, 3), 10_000, 8, seed=0)
        assert all(p.requires_grad for p in installation.transformer.parameters())
        with torch.no_grad():
            exact = installation.transformer(**arguments, return_dict=False)[0]
    assert total == pytest.approx(float(exact.square().sum()), rel=1e-5)
    transformer, captured = pipe.transformer, {}
    for layer in range(2):
        levels = {"dense": Level("dense", precision="bf16"), "fp8": Level("fp8", granularity="block")}
        only = Schedule(levels, (Phase(1.0, 0.0, "dense"),), tile=(3, 2, 3), layers={layer: (Phase(1.0, 0.0, "fp8"),)})
        with fps.apply(transformer, only) as handle, torch.no_grad():
            site = handle.installations[0].sites[layer]
            site.observers.append(lambda name, q, k, v, out, layer=layer: captured.update({layer: (q, k, v)}))
            out = transformer(**arguments, return_dict=False)[0]
        q, k, v = captured[layer]
        rows = Rows(fps.plan((3, 4, 6), (3, 2, 3)), 10_000, 0)
        errors, _ = cell_errors(q, k, v, rows, [rows.layout.tile_grid], ("block",), q.shape[3] ** -0.5, squares[layer])
        measured = float((out - exact).square().sum())
        # Eight random directions and errors that are not quite independent: a factor, not digits.
        assert 0.4 < float(errors["block"].sum()) / measured < 2.5


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """A whole run, and how often it ran the pipeline."""
    folder = tmp_path_factory.mktemp("tuned")
    pipe, counted = pipeline(), []
    pipe.transformer.register_forward_pre_hook(lambda *_: counted.append(1))
    settings = TuneSettings(
        out=folder, budget=None, phases=2, rows=10_000, tile=(3, 2, 3), tries=5, patterns=("topk_mean",), hadamard=True
    )
    return pipe, counted, settings, run_tune(pipe, Target("rel_l1", 0.004), settings, items())


def items():
    made = calls(2)
    return [Item("calibration0", made[0], 0), Item("held-out", made[1], 1000)]


@pytest.mark.slow
def test_the_bound_holds_on_the_held_out_run(tuned):
    pipe, _, settings, result = tuned
    assert result.reached and result.report["held_out"] <= 0.004
    assert 0.1 < result.density < 1.0  # it has skipped something
    saved = Schedule.load(settings.out / "schedule.json")
    assert saved == result.schedule and saved.provenance["verified_on_held_out"] is True
    assert len(saved.provenance["model_hash"]) == 64 and saved.provenance["errors"]
    # Independently: the same run, by hand.
    item = items()[-1]

    def run(schedule):
        with fps.apply(pipe, schedule) as handle:
            out = pipe(**item.call, output_type="latent", generator=torch.Generator().manual_seed(item.seed)).frames
            return out, handle.report().density

    exact, _ = run("dense")
    out, density = run(saved)
    assert float((out - exact).abs().sum() / exact.abs().sum()) == pytest.approx(result.report["held_out"], rel=1e-4)
    assert density == pytest.approx(result.density, rel=1e-6)


def test_only_what_tuning_wrote_is_replaced(tmp_path):
    """Another key empties a folder of tuning; files of these names beside no state.json are somebody else's."""
    (tmp_path / "runs" / "wan").mkdir(parents=True)
    with pytest.raises(ConfigError, match="holds runs and no state.json, expected an empty folder or one of tuning"):
        State(tmp_path, "one")
    assert (tmp_path / "runs" / "wan").is_dir()

    own = tmp_path / "own"
    assert not State(own, "one").resumed and State(own, "one").resumed
    (own / "runs").mkdir()
    (own / "schedule.json").write_text("{}")
    assert not State(own, "two").resumed and [path.name for path in own.iterdir()] == ["state.json"]
    for text, error in (("{", "is not JSON"), ('{"loss": 1}', "is not of tuning")):
        (own / "state.json").write_text(text)
        with pytest.raises(ConfigError, match=error):
            State(own, "two")


@pytest.mark.slow
def test_a_finished_run_is_not_repeated(tuned):
    pipe, counted, settings, result = tuned
    before = len(counted)
    again = run_tune(pipe, Target("rel_l1", 0.004), settings, items())
    assert again.schedule == result.schedule and len(counted) == before


@pytest.mark.slow
def test_interruption_leaves_a_schedule_and_goes_on_to_the_same_end(tuned, tmp_path):
    pipe, _, settings, result = tuned
    settings = TuneSettings(**{**vars(settings), "out": tmp_path})

    def interrupt(when):
        def say(text):
            if text.startswith(when):
                raise KeyboardInterrupt

        return say

    def stop(what, done, total):
        if what == "errors of attention" and done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):  # while it measures
        run_tune(pipe, Target("rel_l1", 0.004), settings, items(), progress=stop)
    assert len(json.loads((tmp_path / "state.json").read_text())["errors"]) == 1
    with pytest.raises(KeyboardInterrupt):  # before it verifies
        run_tune(pipe, Target("rel_l1", 0.004), settings, items(), say=interrupt("held out"))
    best = Schedule.load(tmp_path / "schedule.json")
    assert best.provenance["verified_on_held_out"] is False
    assert run_tune(pipe, Target("rel_l1", 0.004), settings, items()).schedule == result.schedule


@pytest.mark.slow
def test_patterns_are_chosen_where_they_are_better(tuned):
    """Their errors are measured beside those of windows; once windows lose more, the schedule names the pattern, and it runs."""
    pipe, _, settings, _ = tuned
    tuner = Tuner(pipe, Target("rel_l1", 0.004), settings, items(), lambda *_: None, lambda _: None)
    tuner.run()
    cells = tuner.cells
    assert all(cell.errors["topk_mean"].shape == (1, len(RATIOS)) for cell in cells)
    # What a ratio attends here is what it attends when it runs.
    worse = [Cell({k: e if k == "topk_mean" else 1e3 * e for k, e in c.errors.items()}, c.weight) for c in cells]
    found = within_cost(worse, tuner.shares, 0.6)
    assert {choice.kind for choice in found.choices} == {"topk_mean"}
    schedule = build(tuner.space, found, {})
    assert all(level.pattern.name == "topk_mean" for name, level in schedule.levels.items() if name != "dense")
    value, ran = tuner.runner.distance(Schedule.from_dict(schedule.to_dict()), items()[0])
    assert value > 0 and ran["density"] == pytest.approx(found.density, rel=1e-6)
    assert ran["cost"] == pytest.approx(found.cost, rel=1e-6)
    rotated = within_cost(
        [Cell({"block+hadamard": c.errors["block+hadamard"]}, c.weight) for c in cells], tuner.shares, 0.6
    )
    levels = build(tuner.space, rotated, {}).levels
    assert {(level.granularity, level.hadamard) for level in levels.values()} == {("tile", False), ("block", True)}


def test_what_cannot_be_reached_is_said(tuned, tmp_path):
    pipe, _, settings, _ = tuned
    # Nothing that skips or rounds is as near as this: BF16 stays, which loses nothing.
    strict = run_tune(pipe, Target("rel_l1", 1e-9), settings, items())
    assert strict.reached and strict.density == 1.0 and any("leaves nothing to skip" in note for note in strict.notes)
    sparse = run_tune(pipe, Target("density", 0.001), settings, items())
    assert not sparse.reached and any("not reached: the sparsest" in note for note in sparse.notes)
    # No time: nothing is measured, and that is an error; a little: what is not measured stays dense.
    short = TuneSettings(**{**vars(settings), "out": tmp_path, "budget": 1e-9})
    with pytest.raises(ConfigError, match=r"budget 1e-09 s, expected more: nothing was measured"):
        run_tune(pipe, Target("rel_l1", 0.004), short, items())


def test_arguments():
    assert Target.of("psnr=30") == Target.of({"psnr": 30}) == Target("psnr", 30.0)
    assert Target("psnr", 40.0).bound == pytest.approx(0.01) and "40.00 dB" in Target("psnr", 40.0).shown(0.01)
    assert [seconds(x) for x in ("20m", "1.5h", "90s", 7, None)] == [1200.0, 5400.0, 90.0, 7.0, None]
    for target in ("psnr", "psnr=x", "ssim=1", "rel_l1=0", {"psnr": 1, "rel_l1": 1}, "density=1.5"):
        with pytest.raises(ConfigError, match=r"fpsattention\.tune: target"):
            Target.of(target)
    for changes in (
        {"phases": 0},
        {"rows": 0},
        {"granularities": ("row",)},
        {"patterns": ("radial",)},
        {"sensitivity": "x"},
        {"budget": 0.0},
    ):
        with pytest.raises(ConfigError, match=rf"fpsattention\.tune: {next(iter(changes))}"):
            TuneSettings(**changes)
    with pytest.raises(ConfigError, match="budget 'soon'"):
        seconds("soon")
    with pytest.raises(ConfigError, match="prompts 1, expected at least two"):
        fps.tune(pipeline(), "rel_l1=0.1", prompts=["a"])


@pytest.mark.slow
def test_command_beats_presets_at_equal_density(tmp_path, capsys):
    """``fpsattn tune --small``: the bound holds on the held-out seed, and at the density of each preset that skips, tuning is nearer to dense."""
    from fpsattention.cli.main import app

    densities = {"paper": 0.165, "training_free": 0.535}  # of these presets on this grid; asserted below
    margins = {"paper": 0.9, "training_free": 0.6}
    costs = ",".join(map(str, (*densities.values(), 1)))
    arguments = [
        "tune",
        "--small",
        "--target",
        "rel_l1=0.12",
        "--guidance-scale",
        "1",
        "--out",
        str(tmp_path),
        "--json",
    ]
    with pytest.raises(SystemExit) as stopped:
        app([*arguments, "--budget", "2h", "--pareto", costs])
    assert stopped.value.code == 0
    report = json.loads(capsys.readouterr().out)
    assert report["reached"] and report["density"] < 0.5 and float(report["held_out"].split()[-1]) <= 0.12
    assert Schedule.load(tmp_path / "schedule.json").provenance["verified_on_held_out"] is True
    points = {point["name"]: point for point in report["pareto"]}
    for name, density in densities.items():
        ours, theirs = points[f"tune {density:g}"], points[name]
        assert theirs["density"] == pytest.approx(density, abs=1e-3) and ours["density"] <= theirs["density"] + 1e-9
        assert ours["value"] < margins[name] * theirs["value"]
    # `fp8` skips nothing and rounds everything: near it, for fewer pairs.
    assert points["tune 1"]["value"] <= 1.25 * points["fp8"]["value"] and points["tune 1"]["cost"] <= 1.0 + 1e-9
    assert points["tune 1"]["density"] < 0.8
    for name in ("schedule.png", "heads.png", "pareto.png"):
        assert (tmp_path / name).stat().st_size > 5_000
