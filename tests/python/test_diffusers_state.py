"""State of ``fpsattention.apply``: per thread and per forward, ordinary tensors only, counted where it ran."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import tiny_wan
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from test_diffusers import MIXED, SWITCHED

import fpsattention as fps
from fpsattention.integrations import diffusers as integration
from fpsattention.integrations.adapters import find
from fpsattention.integrations.levels import LevelTables
from fpsattention.integrations.sigmas import KEPT_RUNS, SchedulerOf, SigmaReader
from fpsattention.integrations.state import CURRENT
from fpsattention.integrations.tokens import Tokens

HEADS = {**SWITCHED, "heads": {"*": {"1": {"narrow": "dense"}}}}
SCHEDULES = {"device": SWITCHED, "host": MIXED, "heads": HEADS, "preset": "training_free"}


@pytest.fixture(params=SCHEDULES.values(), ids=SCHEDULES.keys())
def schedule(request):
    return request.param


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    model.zero_grad()
    tiny_wan.run(model.train(), [900.0, 200.0]).square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.slow
def test_inference_mode_gives_the_same_and_leaves_nothing_behind(schedule):
    """A pipeline in inference mode, and then training on the grid whose tables were built there."""
    pipe = tiny_wan.pipeline()
    with fps.apply(pipe, schedule if isinstance(schedule, str) else {**schedule, "tile": [1, 2, 2]}):
        wanted = tiny_wan.sample(pipe)
        with torch.inference_mode():
            assert torch.equal(tiny_wan.sample(pipe), wanted)

    def run(validate: bool) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        fps.clear_plan_cache()
        model = tiny_wan.transformer()
        with fps.apply(model, schedule) as handle:
            if validate:
                with torch.inference_mode():
                    tiny_wan.run(model, [900.0, 200.0])
                    handle.report()
                handle.reset()
            return gradients(model), handle.report().to_dict()

    (got, report), (expected, expected_report) = run(True), run(False)
    assert got.keys() == expected.keys() and report == expected_report
    for name, gradient in expected.items():
        assert torch.equal(got[name], gradient), name


@pytest.mark.slow
@torch.no_grad()
def test_threads_share_a_transformer(schedule):
    """Every thread gets its own level; all of them are counted."""
    model = tiny_wan.transformer()
    requests = [([970.0], tiny_wan.GRID), ([300.0], tiny_wan.GRID), ([600.0, 100.0], (2, 6, 12))]
    if schedule in (SWITCHED, MIXED, HEADS):
        schedule = {**schedule, "tile": [2, 4, 4]}
    repeats = 6
    with fps.apply(model, schedule) as handle:
        expected = [tiny_wan.run(model, timestep, grid=grid) for timestep, grid in requests]
        alone = {(row.layer, row.level): row.calls for row in handle.report().rows}
        handle.reset()
        wrong: list[Any] = []
        start = threading.Barrier(len(requests))

        def serve(index: int) -> None:
            timestep, grid = requests[index]
            start.wait()
            with torch.no_grad():  # grad mode is per thread
                for _ in range(repeats):
                    try:
                        off = (tiny_wan.run(model, timestep, grid=grid) - expected[index]).abs()
                        if off.any() or off.isnan().any():
                            wrong.append((timestep, f"{off.count_nonzero()} of {off.numel()}", off.max()))
                    except Exception as error:
                        wrong.append(error)

        threads = [threading.Thread(target=serve, args=(i,)) for i in range(len(requests))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
        assert {(row.layer, row.level): row.calls for row in handle.report().rows} == {
            key: repeats * calls for key, calls in alone.items()
        }
    assert CURRENT.forward is None and CURRENT.site is None


def test_a_run_outlives_many_shorter_ones():
    """The timesteps of a run that goes on are not read again, however many requests come and go meanwhile: its masks are kept by its number."""
    reader = SigmaReader(SchedulerOf(), 1000, find(tiny_wan.transformer(num_layers=1)))
    long, *others = (torch.tensor([900.0, 100.0]) for _ in range(2 * KEPT_RUNS))
    _, _, values, run = reader._known(long)
    for other in others:
        assert reader._known(other)[3] != run
        assert reader._known(long)[2] is values and reader._known(long)[3] == run


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["training_free", "paper"])
def test_requests_with_their_own_schedulers_and_sizes(preset):
    """Shallow copies of a pipeline, each with its own scheduler and number of steps, at the same time: as one after the other."""
    pipe = tiny_wan.pipeline()
    pipe.transformer.train()  # no warning about 'paper'
    handle = fps.apply(pipe, preset)

    def request(shift: float) -> Any:
        own = copy.copy(pipe)
        own.scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
        return own

    arguments = [(1.0, 8), (3.0, 4), (7.0, 12)]
    alone = []
    for shift, steps in arguments:
        handle.reset()
        alone.append(tiny_wan.sample(request(shift), steps=steps))
        report = handle.report()
        levels = handle.schedule.to_steps(None, steps)
        calls = {row.level: row.calls for row in report.rows if row.layer == 0}
        assert calls == {name: 2 * levels.count(name) for name in calls}  # shares of these steps, at this shift
        assert report.host_reads <= 1  # the timesteps of the run
    results: dict[int, torch.Tensor] = {}

    def serve(index: int) -> None:
        shift, steps = arguments[index]
        results[index] = tiny_wan.sample(request(shift), steps=steps)

    threads = [threading.Thread(target=serve, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    handle.remove()
    assert all(torch.equal(results[i], alone[i]) for i in range(3))


def tables_of(schedule: Any) -> list[torch.Tensor]:
    """Every tensor that the layers of two samples get."""
    fps.clear_plan_cache()
    tables = LevelTables(fps.Schedule.resolve(schedule), tiny_wan.LAYERS, tiny_wan.HEADS)
    cpu = torch.device("cpu")
    last = len(tables.edges)
    segments: Any = (last, 0)
    if not tables.needs_host:
        segments = tables.segments_on_device(torch.tensor([0.95, 0.01], dtype=torch.float64, device=cpu), tables.edges)
    tensors = []
    for call in tables.calls(Tokens(tiny_wan.GRID), cpu, segments, backward=True):
        tensors += [call.slot_of_token, *([] if call.order is None else [call.order])]
        for part in call.parts:
            tensors += [*(part.lists or ()), *([] if part.samples is None else [part.samples])]
    return tensors


def test_default_dtype_and_device_do_not_matter(schedule):
    expected = tables_of(schedule)
    torch.set_default_dtype(torch.bfloat16)
    torch.set_default_device("meta")
    try:
        got = tables_of(schedule)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


@torch.no_grad()
def test_a_failed_forward_leaves_nothing_behind():
    model = tiny_wan.transformer()
    with fps.apply(model, SWITCHED):
        broken = model.blocks[1].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            tiny_wan.run(model, [300.0])
        broken.remove()
        assert CURRENT.forward is None
        with pytest.raises(fps.ConfigError, match="ran outside of a forward"):
            model.forward(**tiny_wan.inputs([300.0]))


@torch.no_grad()
def test_one_transformer_inside_the_forward_of_another():
    """As adapters and teachers do: each has its own state, and the outer one has its own again afterwards."""
    outer, inner = tiny_wan.transformer(), tiny_wan.transformer(seed=1)
    with fps.apply(outer, MIXED), fps.apply(inner, SWITCHED):
        wanted, of_inner = tiny_wan.run(outer, [300.0]), tiny_wan.run(inner, [900.0])
        seen = []
        hook = outer.blocks[0].register_forward_pre_hook(lambda *_: seen.append(tiny_wan.run(inner, [900.0])))
        assert torch.equal(tiny_wan.run(outer, [300.0]), wanted) and torch.equal(seen[0], of_inner)
        hook.remove()
        hook = outer.blocks[0].register_forward_pre_hook(lambda *_: inner.forward(**tiny_wan.inputs([900.0])))
        with pytest.raises(fps.ConfigError, match="ran outside of a forward of its transformer"):
            tiny_wan.run(outer, [300.0])


@torch.no_grad()
def test_skipped_layers_are_not_counted():
    """The report counts what ran: a cache that leaves layers out makes their counts smaller."""
    from diffusers.hooks import FirstBlockCacheConfig

    model = tiny_wan.transformer(num_layers=3)
    with fps.apply(model, {**SWITCHED, "model": {}}) as handle:
        model.enable_cache(FirstBlockCacheConfig(threshold=1e9))  # every step after the first is like the first
        with model.cache_context("cond"):
            for timestep in (900.0, 890.0, 880.0):
                tiny_wan.run(model, [timestep])
        report = handle.report()
        model.disable_cache()
    assert report.forwards == {"transformer": 3} and report.executions == {"transformer": [3, 1, 1]}
    assert [row.calls for row in report.rows if row.level == "narrow"] == [3, 1, 1]
    assert any("ran for less than all 3 samples" in note for note in report.notes())


def test_presets_follow_the_scheduler_and_say_what_they_cannot_follow():
    class Unreadable:
        config = {"num_train_timesteps": 1000}

        def set_timesteps(self, *_: Any) -> None:
            raise RuntimeError("needs a key")

    pipe = tiny_wan.pipeline()
    for shift in (1.0, 8.0):
        pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
        with fps.apply(pipe, "training_free") as handle:
            assert handle.schedule.flow_shift == shift
    integration._warned.clear()
    three = {**SWITCHED, "tile": None, "model": {"flow_shift": 3.0}}
    with pytest.warns(
        UserWarning, match=r"made for flow shift 3\.0, FlowMatchEulerDiscreteScheduler of this pipeline has 8"
    ):
        fps.apply(pipe, three).remove()
    pipe.scheduler = Unreadable()
    with pytest.warns(
        UserWarning, match=r"the steps of Unreadable cannot be read: .*needs a key.* placed for flow shift 5\.0"
    ):
        fps.apply(pipe, "training_free", num_train_timesteps=1000).remove()


def test_dynamic_shifting_is_followed_in_every_run():
    """A scheduler whose shift depends on the size: a quarter of the steps is dense at every size."""
    pipe = tiny_wan.pipeline()
    with fps.apply(pipe, "training_free") as handle:
        for mu in (0.1, 2.5):
            pipe.scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
            plain = pipe.scheduler.set_timesteps
            pipe.scheduler.set_timesteps = lambda *args, plain=plain, mu=mu, **kwargs: plain(*args, mu=mu, **kwargs)
            handle.reset()
            tiny_wan.sample(pipe, steps=8)
            calls = {row.level: row.calls for row in handle.report().rows if row.layer == 0}
            assert calls == {"dense": 4, "careful": 12}  # 2 and 6 steps, with guidance
