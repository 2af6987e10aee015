"""Schedules: lookup by sigma, files, validation by JSON path, presets, step lists."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fpsattention.errors import ConfigError
from fpsattention.schedule import Level, Schedule
from fpsattention.schedule.presets import PRESETS, sigma_at

FULL: dict[str, Any] = {
    "format": "fpsattn-schedule/1",
    "axis": "sigma",
    "model": {"class": "WanTransformer3DModel", "num_layers": 30, "num_heads": 12, "flow_shift": 3},
    "tile": [6, 8, 8],
    "levels": {
        "dense": {"precision": "bf16"},
        "coarse": {"precision": "fp8", "granularity": "tile", "window": [1, 3, 3]},
        "fine": {"precision": "fp8", "granularity": "token", "window": {"density": 0.25}},
        "all": {"precision": "fp8"},
    },
    "phases": [
        {"sigma": [1.0, 0.9], "level": "coarse"},
        {"sigma": [0.9, 0.4], "level": "fine"},
        {"sigma": [0.4, 0.0], "level": "coarse"},
    ],
    "layers": {"0-1": "dense", "7": [{"sigma": [1.0, 0.7], "level": "all"}, {"sigma": [0.7, 0], "level": "coarse"}]},
    "heads": {"*": {"3": [1, 5, 5]}, "7": {"3": "dense", "0-2": {"coarse": {"density": 0.5}}}},
    "required": True,
    "provenance": {"created_by": "a test", "seed": 0},
}


def changed(**changes: Any) -> dict[str, Any]:
    """FULL with entries replaced; a key is a dotted path."""
    data = copy.deepcopy(FULL)
    for path, value in changes.items():
        *parents, last = path.split("__")
        target = data
        for key in parents:
            target = target[int(key) if key.isdigit() and isinstance(target, list) else key]
        target[int(last) if last.isdigit() and isinstance(target, list) else last] = value
    return data


def test_lookup_by_sigma_and_layer():
    schedule = Schedule.from_dict(FULL)
    assert [schedule.at(s).name for s in (1.0, 0.91, 0.9, 0.41, 0.4, 0.0)] == [
        "coarse",
        "coarse",
        "fine",
        "fine",
        "coarse",
        "coarse",
    ]
    assert [schedule.at(s, layer=1).name for s in (1.0, 0.5, 0.0)] == ["dense"] * 3
    assert [schedule.at(s, layer=7).name for s in (0.71, 0.7, 0.0)] == ["all", "coarse", "coarse"]
    assert schedule.edges == (0.4, 0.7, 0.9)
    assert [level.name for level in schedule.segment_levels()] == ["coarse", "fine", "fine", "coarse"]
    for sigma in (-0.01, 1.01, float("nan")):
        with pytest.raises(ConfigError, match=r"sigma .*expected a number in \[0, 1\]"):
            schedule.at(sigma)


def test_windows_per_head():
    schedule = Schedule.from_dict(FULL)
    coarse, fine, dense = (schedule.levels[name] for name in ("coarse", "fine", "dense"))
    assert schedule.windows(fine, layer=2, num_heads=5) == (0.25, 0.25, 0.25, (1, 5, 5), 0.25)
    assert schedule.windows(coarse, layer=7, num_heads=5) == (0.5, 0.5, 0.5, None, (1, 3, 3))
    assert schedule.windows(fine, layer=7, num_heads=5) == (0.25, 0.25, 0.25, None, 0.25)
    assert schedule.windows(dense, layer=7, num_heads=5) == (None,)
    assert Schedule.preset("paper").windows(coarse) == ((1, 3, 3),)
    with pytest.raises(ConfigError, match="windows per head"):
        schedule.windows(fine, layer=2)


def test_round_trip(tmp_path):
    schedules = [Schedule.from_dict(FULL), *map(Schedule.preset, PRESETS)]
    for i, schedule in enumerate(schedules):
        path = tmp_path / f"{i}.json"
        schedule.save(path)
        assert Schedule.load(path) == schedule
        assert Schedule.resolve(path) == schedule
        assert Schedule.resolve(schedule.to_dict()) == schedule
    assert schedules[0] != schedules[1]


BAD = {
    "unknown key": (changed(phase=[]), "phase is an unknown key"),
    "format": (
        changed(format="fpsattn-schedule/4"),
        r"format is 'fpsattn-schedule/4', expected 'fpsattn-schedule/1' or",
    ),
    "axis of version 1": (changed(axis="steps"), r"axis is 'steps', expected one of sigma"),
    "axis": (changed(axis="step"), "axis is 'step'"),
    "gap": (
        changed(phases__1__sigma=[0.8, 0.4]),
        r"phases\[1\]\.sigma is \[0\.8, 0\.4\] and leaves a gap, expected high = 0\.9",
    ),
    "overlap": (changed(phases__1__sigma=[0.95, 0.4]), r"phases\[1\]\.sigma .* overlaps"),
    "late start": (changed(phases__0__sigma=[0.99, 0.9]), r"phases\[0\]\.sigma .* gap, expected high = 1\.0"),
    "early end": (changed(phases__2__sigma=[0.4, 0.1]), r"phases\[2\]\.sigma ends at 0\.1"),
    "reversed": (changed(phases__0__sigma=[0.9, 1.0]), r"phases\[0\]\.sigma is \[0\.9, 1\.0\], expected \[high, low\]"),
    "sigma type": (changed(phases__0__sigma=[1.0, True]), r"phases\[0\]\.sigma is \[1\.0, True\]"),
    "phase key": (changed(phases__0__step=3), r"phases\[0\]\.step is an unknown key"),
    "missing level": (changed(phases__0={"sigma": [1.0, 0.9]}), r"phases\[0\]\.level is missing"),
    "no phases": (changed(phases=[]), "phases is empty"),
    "no levels": (changed(levels={}), "levels is empty"),
    "unknown level": (
        changed(phases__1__level="fien"),
        r"phases\[1\]\.level is the unknown level 'fien', expected one of all, coarse",
    ),
    "level key": (changed(levels__all__windows=[1, 1, 1]), r'levels\["all"\]\.windows is an unknown key'),
    "precision": (
        changed(levels__all__precision="fp4"),
        r'levels\["all"\]\.precision is \'fp4\', expected one of fp8, bf16',
    ),
    "granularity": (changed(levels__all__granularity="head"), r'levels\["all"\]\.granularity is \'head\''),
    "bf16 window": (changed(levels__dense__window=[1, 1, 1]), r'levels\["dense"\] is .*model\'s own dense attention'),
    "zero window": (
        changed(levels__coarse__window=[0, 3, 3]),
        r'levels\["coarse"\]\.window is \[0, 3, 3\], expected three whole numbers',
    ),
    "window text": (
        changed(levels__coarse__window="3,3,3"),
        r'levels\["coarse"\]\.window is \'3,3,3\', expected "dense"',
    ),
    "density": (changed(levels__fine__window={"density": 1.5}), r'levels\["fine"\]\.window\.density is 1\.5'),
    "tile": (changed(tile=[6, 8]), r"tile is \[6, 8\], expected three whole numbers"),
    "layer count": (
        changed(layers__30="fine"),
        r'layers\["30"\] names layer 30, expected a layer below num_layers = 30',
    ),
    "layer key": (changed(layers__first="fine"), r'layers\["first"\] is \'first\', expected an index'),
    "layer twice": (changed(layers__1="fine"), r'layers\["1"\] is \'layer 1 again\''),
    "layer gap": (
        changed(layers__7=[{"sigma": [1.0, 0.5], "level": "all"}]),
        r'layers\["7"\]\[0\]\.sigma ends at 0\.5',
    ),
    "head count": (
        changed(heads={"*": {"12": [1, 1, 1]}}),
        r'heads\["\*"\]\["12"\] names head 12, expected a head below num_heads = 12',
    ),
    "head layer": (changed(heads={"44": {"1": [1, 1, 1]}}), r'heads\["44"\] names layer 44'),
    "head level": (
        changed(heads={"*": {"1": {"fast": [1, 1, 1]}}}),
        r'heads\["\*"\]\["1"\]\["fast"\] is the unknown level \'fast\'',
    ),
    "head bf16": (
        changed(heads={"*": {"1": {"dense": [1, 1, 1]}}}),
        r'heads\["\*"\]\["1"\]\["dense"\] .* bf16 level has no window',
    ),
    "model key": (changed(model__layers=30), r"model\.layers is an unknown key"),
    "model value": (changed(model__num_heads=0), r"model\.num_heads is 0, expected a positive number"),
    "required": (changed(required="yes"), r"required is 'yes', expected true or false"),
    "not an object": ([1, 2], r"the file is \[1, 2\], expected a JSON object"),
}


@pytest.mark.parametrize("case", BAD)
def test_validation_names_the_path(case):
    data, message = BAD[case]
    with pytest.raises(ConfigError, match=rf"^fpsattention\.Schedule: {message}"):
        Schedule.from_dict(data)


def test_bad_files_and_names(tmp_path):
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ConfigError, match="bad.json is not JSON"):
        Schedule.load(tmp_path / "bad.json")
    with pytest.raises(ConfigError, match="cannot be read"):
        Schedule.load(tmp_path / "missing.json")
    with pytest.raises(ConfigError, match="'papre', expected a Schedule, a preset"):
        Schedule.resolve("papre")
    with pytest.raises(ConfigError, match="name 'papre', expected one of paper"):
        Schedule.preset("papre")
    with pytest.raises(ConfigError, match="flow_shift 0.0"):
        Schedule.preset("paper", flow_shift=0.0)
    with pytest.raises(ConfigError, match=r"precision 'fp4'"):
        Level("x", precision="fp4")


def test_check_model():
    schedule = Schedule.from_dict(FULL)
    schedule.check_model("WanTransformer3DModel", 30, 12)
    with pytest.raises(ConfigError, match=r"model\.num_heads is 12, expected 40"):
        schedule.check_model("WanTransformer3DModel", 30, 40)
    with pytest.raises(ConfigError, match=r'layers\["7"\] names layer 7, expected a layer below num_layers = 2'):
        Schedule.from_dict(changed(model={}, layers={"7": "dense"}, heads={})).check_model(num_layers=2)


def test_presets_point_where_they_should():
    """paper: ends coarser and sparser than the middle. training_free: starts dense."""
    for shift in (1.0, 3.0, 5.0, 8.0):
        paper = Schedule.preset("paper", flow_shift=shift)
        early, middle, late = (paper.at(sigma_at(p, shift)) for p in (0.0, 0.5, 0.99))
        assert early.window < late.window < middle.window
        assert len({level.kernel_class for level in paper.levels.values()}) == 1  # switched on the device
        free = Schedule.preset("training_free", flow_shift=shift)
        assert free.at(1.0).precision == "bf16" and free.at(sigma_at(0.3, shift)).precision == "fp8"
    assert Schedule.preset("fp8").at(0.5).window is None
    assert {level.precision for level in Schedule.preset("dense").levels.values()} == {"bf16"}
    assert not any(Schedule.preset(name).required for name in PRESETS)


@given(
    st.lists(st.sampled_from(["coarse", "fine", "dense", "fp8"]), min_size=1, max_size=30),
    st.sampled_from([1.0, 3.0, 5.0]),
)
@settings(max_examples=30, deadline=None)
def test_step_lists_round_trip(steps, shift):
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    before = scheduler.timesteps.clone()
    schedule = Schedule.from_steps(steps, scheduler)
    assert schedule.to_steps(scheduler, len(steps)) == steps
    assert Schedule.from_dict(json.loads(json.dumps(schedule.to_dict()))) == schedule
    assert scheduler.timesteps.equal(before)


def test_fractions_of_steps_follow_the_steps():
    """A quarter of the steps is a quarter of the steps, whatever their sigmas; without a scheduler the flow shift places it."""
    free = Schedule.preset("training_free")
    for sigmas in (
        [1.0, 0.9, 0.8, 0.1],
        [1.0, 0.4, 0.3, 0.2, 0.15, 0.1, 0.05, 0.0],
        [0.99 - 0.02 * i for i in range(40)],
    ):
        edges = free.edges_of(sigmas)
        dense = [free.segment_levels()[free.segment(s, edges)].name for s in sigmas].count("dense")
        assert dense == len(sigmas) // 4
    assert free.edges_of([0.7]) == (1.0,)  # one step: no quarter of it is dense
    for shift, border in ((1.0, 0.75), (3.0, 0.9), (5.0, 0.9375)):  # s u / (1 + (s - 1) u) at u = 3 / 4
        assert free.with_flow_shift(shift).edges == pytest.approx((border,))
    assert free.edges == free.with_flow_shift(5.0).edges
    placed = free.with_flow_shift(3.0).in_sigma()
    assert placed.axis == "sigma" and [(p.high, p.low) for p in placed.phases] == [(1.0, 0.9), (0.9, 0.0)]
    assert all(placed.at(s) == free.with_flow_shift(3.0).at(s) for s in (1.0, 0.91, 0.9, 0.5, 0.0))
    sigma = Schedule.from_dict(FULL)
    assert sigma.in_sigma() is sigma
    assert sigma.with_flow_shift(9.0) is sigma and sigma.edges_of([1.0, 0.5]) == sigma.edges


def test_files_of_both_versions_and_axes(tmp_path):
    data = {
        "format": "fpsattn-schedule/2",
        "axis": "steps",
        "levels": {"a": {"precision": "bf16"}, "b": {"precision": "fp8"}},
        "phases": [{"steps": [0, 0.2], "level": "a"}, {"steps": [0.2, 1], "level": "b"}],
        "layers": {"1": [{"steps": [0, 0.5], "level": "b"}, {"steps": [0.5, 1], "level": "a"}]},
    }
    schedule = Schedule.from_dict(data)
    assert schedule.to_steps(None, 10) == ["a"] * 2 + ["b"] * 8
    assert schedule.to_steps(None, 10, layer=1) == ["b"] * 5 + ["a"] * 5
    assert schedule.to_dict()["phases"] == data["phases"] and schedule.to_dict()["layers"] == data["layers"]
    old = Schedule.from_dict(FULL)
    assert FULL["format"] == "fpsattn-schedule/1" and old.axis == "sigma"
    assert Schedule.from_dict(old.to_dict()) == old and old.to_dict()["format"] == "fpsattn-schedule/3"
    with pytest.raises(ConfigError, match=r"phases\[0\]\.sigma is an unknown key, expected one of steps, level"):
        Schedule.from_dict({**data, "phases": [{"sigma": [1, 0], "level": "a"}]})


def test_the_flow_shift_of_schedulers():
    from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

    from fpsattention.schedule.scheduler import flow_shift_of

    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
    for shift in (1.0, 3.0, 12.0):
        assert flow_shift_of(FlowMatchEulerDiscreteScheduler(shift=shift)) == shift
        assert flow_shift_of(UniPCMultistepScheduler(flow_shift=shift, **flow)) == shift
    assert 0.8 < flow_shift_of(DDIMScheduler()) <= 1.0  # timesteps fall evenly, from 945 in 64 steps
    curved = flow_shift_of(FlowMatchEulerDiscreteScheduler(shift=3.0, use_beta_sigmas=True))
    assert curved != 3.0 and curved > 0
    with pytest.raises(ConfigError, match="the steps of FlowMatchEulerDiscreteScheduler cannot be read"):
        flow_shift_of(FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True))
    with pytest.raises(ConfigError, match="the steps of object cannot be read"):
        flow_shift_of(object())


def test_step_lists_with_other_schedulers_and_levels():
    from diffusers import UniPCMultistepScheduler

    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    mine = Level("mine", granularity="token", window=(1, 2, 3))
    schedule = Schedule.from_steps(["dense", mine, mine, "fp8"], scheduler, required=True)
    assert schedule.to_steps(scheduler, 4) == ["dense", "mine", "mine", "fp8"]
    assert schedule.levels["mine"] == mine and schedule.required
    assert len(schedule.to_steps(scheduler, 50)) == 50  # any other number of steps reads the same sigmas
    with pytest.raises(ConfigError, match=r"steps\[1\] is the unknown level 'slow'"):
        Schedule.from_steps(["dense", "slow"], scheduler)
    with pytest.raises(ConfigError, match="0 steps"):
        Schedule.from_steps([], scheduler)
    with pytest.raises(ConfigError, match="strictly falling"):
        Schedule.from_steps(["dense"] * 2000, scheduler)


def test_save_makes_its_folder_or_says_why_not(tmp_path):
    schedule = Schedule.preset("fp8")
    schedule.save(tmp_path / "new" / "folder" / "s.json")
    assert Schedule.load(tmp_path / "new" / "folder" / "s.json") == schedule
    (tmp_path / "file").touch()
    for path, reason in (
        (tmp_path / "file" / "s.json", "File exists|Not a directory"),
        (tmp_path / "new", "Is a directory"),
    ):
        with pytest.raises(ConfigError, match=rf"Schedule.save: {path} cannot be written \(({reason})"):
            schedule.save(path)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="is not JSON"):
        Schedule.load(tmp_path / "binary")


@pytest.mark.parametrize(
    ("phases", "text"),
    [
        ([[0.0, 0.2], [0.3, 1.0]], r"phases\[1\]\.steps is \[0\.3, 1\.0\] and leaves a gap, expected first = 0\.2, because phases\[0\]"),
        ([[0.0, 0.2], [0.1, 1.0]], r"phases\[1\]\.steps is \[0\.1, 1\.0\] and overlaps"),
        ([[0.1, 1.0]], r"phases\[0\]\.steps is \[0\.1, 1\.0\] and leaves a gap, expected first = 0\.0, because steps start at 0\.0"),
        ([[0.0, 0.9]], r"phases\[0\]\.steps ends at 0\.9, expected last = 1\.0 in the last phase"),
        ([[0.5, 0.2]], r"phases\[0\]\.steps is \[0\.5, 0\.2\], expected \[first, last\] with 0 <= first < last <= 1"),
    ],
)  # fmt: skip
def test_errors_about_steps_are_in_steps(phases, text):
    levels = {"a": {"precision": "fp8"}}
    data = {"format": "fpsattn-schedule/3", "axis": "steps", "levels": levels}
    with pytest.raises(ConfigError, match=text):
        Schedule.from_dict({**data, "phases": [{"steps": span, "level": "a"} for span in phases]})


@pytest.mark.parametrize(
    ("precision", "linears", "text"),
    [
        ("fp8", "int8", "linears 'int8', expected one of fp8, bf16"),
        ("int8", "fp8", "for levels of precision 'int8' only"),
    ],
)
def test_linears_that_no_level_can_have(precision, linears, text):
    level = {"precision": precision, "granularity": "block"}
    phases = [{"sigma": [1.0, 0.0], "level": "a"}]
    schedule = Schedule.from_dict({"format": "fpsattn-schedule/3", "levels": {"a": level}, "phases": phases})
    with pytest.raises(ConfigError, match=text):
        schedule.with_linears(linears)
