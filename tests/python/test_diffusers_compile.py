"""``fpsattention.apply`` under torch.compile and torch.export: no graph breaks, few compilations, the eager output."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_wan
import torch
from test_diffusers import MIXED, SWITCHED

import fpsattention as fps

pytestmark = pytest.mark.slow

TIMESTEPS = ([950.0], [300.0], [30.0], [980.0, 100.0])  # the last: samples of different kernel classes in one batch
GRIDS = [
    (3, 8, 12),
    (3, 8, 8),
    (3, 6, 12),
    (5, 8, 12),
    (2, 10, 8),
    (4, 4, 4),
    (3, 4, 6),
    (2, 6, 10),
    (1, 8, 8),
    (5, 5, 7),
]


class Counting:
    """A backend that runs graphs as they are and counts them."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: torch.fx.GraphModule, _inputs: Any) -> torch.fx.GraphModule:
        self.count += 1
        return graph


@pytest.fixture(autouse=True)
def clean():
    torch._dynamo.reset()
    fps.clear_plan_cache()
    yield
    torch._dynamo.reset()


@torch.no_grad()
def test_compiled_blocks_serve_ten_grids_and_all_levels():
    """No more compilations than the plain model has."""
    model = tiny_wan.transformer()
    fps.apply(model, "training_free")
    cases = [(grid, TIMESTEPS[i % 3]) for i, grid in enumerate(GRIDS)]
    cases += [(grid, TIMESTEPS[(i + 1) % 3]) for i, grid in enumerate(GRIDS)]
    eager = [tiny_wan.run(model, timestep, grid=grid) for grid, timestep in cases]
    backend = Counting()
    model.compile_repeated_blocks(fullgraph=True, backend=backend)
    for (grid, timestep), wanted in zip(cases, eager, strict=True):
        assert torch.equal(tiny_wan.run(model, timestep, grid=grid), wanted), grid
    assert backend.count <= 4


def ways() -> dict[str, Any]:
    def in_place(model: Any) -> Any:
        model.compile(fullgraph=True, backend="eager")
        return model

    def forward_only(model: Any) -> Any:
        model.forward = torch.compile(model.forward, fullgraph=True, backend="eager")
        return model

    return {
        "forward": forward_only,
        "whole": lambda model: torch.compile(model, fullgraph=True, backend="eager"),
        "in place": in_place,
        "inside a function": lambda model: torch.compile(lambda **k: model(**k), fullgraph=True, backend="eager"),
    }


@pytest.mark.filterwarnings("ignore:fpsattention.apply. the preset 'paper'")
@pytest.mark.parametrize(
    "schedule, way",
    [
        ("training_free", "whole"),
        ("paper", "forward"),
        (SWITCHED, "in place"),
        (MIXED, "inside a function"),
    ],
    ids=lambda value: value if isinstance(value, str) else "mixed" if value is MIXED else "switched",
)
@torch.no_grad()
def test_whole_models_compile_with_fullgraph(schedule, way):
    model = tiny_wan.transformer(num_layers=1)
    with fps.apply(model, schedule) as handle:
        eager = [tiny_wan.run(model, timestep) for timestep in TIMESTEPS]
        fps.clear_plan_cache()
        handle.reset()
        compiled = ways()[way](model)
        for timestep, wanted in zip(TIMESTEPS, eager, strict=True):
            got = compiled(**tiny_wan.inputs(timestep), return_dict=False)[0]
            torch.testing.assert_close(got, wanted, rtol=0, atol=0)
        if way != "inside a function":  # there the hooks are part of the graph
            report = handle.report()
            assert report.executions == {"transformer": None} and report.forwards == {"transformer": 5}


@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")
@pytest.mark.parametrize(
    "schedule, strict", [("training_free", False), (SWITCHED, True)], ids=["training_free", "switched-strict"]
)
@torch.no_grad()
def test_export_is_bit_equal_and_switches_levels(schedule, strict):
    model = tiny_wan.transformer(num_layers=1)
    with fps.apply(model, schedule):
        program = torch.export.export(model, (), tiny_wan.inputs([950.0]), strict=strict).module()
        # ... also a model whose tables were first built while it was exported
        eager = [tiny_wan.run(model, [timestep]) for timestep in (950.0, 300.0)]
    for timestep, wanted in zip((950.0, 300.0), eager, strict=True):
        got = program(**tiny_wan.inputs([timestep]))
        assert torch.equal(got[0] if isinstance(got, tuple) else got.sample, wanted)


def test_training_through_compiled_blocks():
    """Gradients through the branches of a graph, samples at different kernel classes in one batch."""
    model = tiny_wan.transformer(num_layers=1).train()

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        tiny_wan.run(model, TIMESTEPS[3]).square().mean().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    with fps.apply(model, "training_free"):
        wanted = gradients()
        model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
        got = gradients()
    assert got.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@torch.no_grad()
def test_threads_and_compiled_blocks():
    import threading

    model = tiny_wan.transformer(num_layers=1)
    with fps.apply(model, "training_free"):
        wanted = {t: tiny_wan.run(model, [t]) for t in (950.0, 300.0)}
        model.compile_repeated_blocks(fullgraph=True, backend="eager")
        for timestep in wanted:
            tiny_wan.run(model, [timestep])
        wrong: list[Any] = []

        def serve(timestep: float) -> None:
            with torch.no_grad():
                for _ in range(5):
                    try:
                        if not torch.equal(tiny_wan.run(model, [timestep]), wanted[timestep]):
                            wrong.append(timestep)
                    except Exception as error:
                        wrong.append(error)

        threads = [threading.Thread(target=serve, args=(timestep,)) for timestep in wanted]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def test_layers_of_their_own_in_a_graph_of_the_whole_model():
    """A level per layer, with a branch in the graph for each kernel class: every layer takes its own lists."""
    levels = {
        "a": {"precision": "fp8", "granularity": "block", "window": [1, 1, 2]},
        "b": {"precision": "fp8", "granularity": "tile", "window": [1, 2, 1]},
        "dense": {"precision": "bf16"},
    }
    phases = {name: [{"sigma": [1.0, 0.5], "level": first}, {"sigma": [0.5, 0.0], "level": second}]
              for name, first, second in (("0", "a", "dense"), ("1", "dense", "b"))}  # fmt: skip
    schedule = {
        "format": "fpsattn-schedule/3", "tile": tiny_wan.TILE, "levels": levels, "phases": phases["0"],
        "layers": {"1": phases["1"]},
    }  # fmt: skip
    model = tiny_wan.transformer()
    with torch.no_grad(), fps.apply(model, schedule):
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        for timestep in ([900.0, 100.0], [900.0, 800.0], [100.0, 200.0]):
            wanted = tiny_wan.run(model, timestep)
            assert torch.equal(compiled(**tiny_wan.inputs(timestep), return_dict=False)[0], wanted), timestep
