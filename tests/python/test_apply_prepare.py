"""``fps.apply(prepare=)``: norms and RoPE of q and k inside of the quantizer, in models whose own code runs around it."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from typing import Any

import pytest
import tiny_models
import tiny_wan
import torch
from torch import Tensor

import fpsattention as fps
from fpsattention.errors import ConfigError, UnsupportedError
from fpsattention.integrations import adapters
from fpsattention.integrations.site import Site

SCHEDULE: dict[str, Any] = {
    "format": "fpsattn-schedule/2",
    "tile": tiny_wan.TILE,
    "levels": {"own": {"precision": "bf16"}, "fp8": {"precision": "fp8", "granularity": "block"}},
    "phases": [{"sigma": [1.0, 0.0], "level": "fp8"}],
}
SWITCHED = {**SCHEDULE, "phases": [{"sigma": [1.0, 0.5], "level": "own"}, {"sigma": [0.5, 0.0], "level": "fp8"}]}
FAMILIES = [
    "wan", "vace", "animate", "skyreels", "chronoedit", "hunyuan", "hunyuan15", "motif", "cogvideox", "consisid", "ltx", "mochi",
    "flux", "flux2", "qwen",
]  # fmt: skip


def stir(model: torch.nn.Module) -> torch.nn.Module:
    """Weights of norms that are not all ones."""
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if ".norm_" in name and parameter.ndim == 1:
            parameter.data.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def made(family: str) -> tuple[torch.nn.Module, tiny_models.Arguments]:
    """A tiny model of a family and arguments of two samples, without padding of text that is rotated."""
    torch.manual_seed(0)
    model, arguments = tiny_models.FAMILIES[family].make(2)
    if family == "qwen":
        del arguments["encoder_hidden_states_mask"]
    return stir(model), arguments


@pytest.fixture
def model() -> torch.nn.Module:
    return stir(tiny_wan.transformer())


def off(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Tensor, bool]]:
    """Of every launch, q and k as the model makes them, and whether they came raw."""
    seen: list[tuple[Tensor, Tensor, bool]] = []
    launch = Site.launch

    def watched(self: Site, call: Any, core: Any, part: Any, q: Tensor, k: Tensor, *others: Any) -> Tensor:
        raw = None if core.raw is None else core.raw.select(part.samples)
        seen.append((*(raw.finish(q, k) if raw else (q, k)), raw is not None))
        return launch(self, call, core, part, q, k, *others)

    monkeypatch.setattr(Site, "launch", watched)
    return seen


@pytest.mark.filterwarnings("ignore:In CPU autocast")
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_families(family, monkeypatch):
    """The code hands over projections from which the model's own norms and the given rotation make its own q and k, to the bit, and FP8
    attention of them in the quantizer is that of q and k as they were, up to FP32 roundings that flip a code."""
    model, arguments = made(family)
    seen = launches(monkeypatch)
    schedule = {**SCHEDULE, "tile": tiny_models.TILE}
    plain = model(**arguments, return_dict=False)[0]
    with fps.apply(model, schedule) as handle:
        apart = model(**arguments, return_dict=False)[0]
        assert not any(handle.report().prepared["transformer"])
    wanted = list(seen)
    seen.clear()
    with fps.apply(model, schedule, prepare=True) as handle:
        fused = model(**arguments, return_dict=False)[0]
        report = handle.report()
    count = len(report.prepared["transformer"])
    assert report.prepared["transformer"] == [2] * count and not report.fallbacks
    assert f"ran in the quantizer, {count} of {count} layers" in str(report)
    for layer, ((q, k, raw), (own_q, own_k, own_raw)) in enumerate(zip(seen, wanted, strict=True)):
        assert raw and not own_raw and off(q, own_q) < 0.01 and off(k, own_k) < 0.01
        assert layer or (torch.equal(q, own_q) and torch.equal(k, own_k))  # before anything differs
    assert off(fused, apart) <= 0.1 * off(apart, plain)
    assert torch.equal(model(**arguments, return_dict=False)[0], plain)


@torch.no_grad()
def test_a_wrong_row_of_the_table_shows(model, monkeypatch):
    """Pairs of the other kind, as a family that is described wrongly would have them."""
    plain = tiny_wan.run(model, [100.0])
    wrong = replace(adapters.find(model), prepare=replace(adapters.find(model).prepare, style="halves"))
    with fps.apply(model, SCHEDULE, adapter=wrong, prepare=True):
        assert off(tiny_wan.run(model, [100.0]), plain) > 10 * 5e-4


@torch.no_grad()
def test_levels_and_samples(model, monkeypatch):
    """Dense forwards run the model's own code; in a batch of both levels the dense sample keeps every bit, and the other is fused."""
    plain = tiny_wan.run(model, [900.0])
    with fps.apply(model, SWITCHED):
        apart = tiny_wan.run(model, [900.0, 100.0])
    seen = launches(monkeypatch)
    with fps.apply(model, SWITCHED, prepare=True) as handle:
        assert torch.equal(tiny_wan.run(model, [900.0]), plain)
        assert not any(raw for *_, raw in seen) and handle.report().prepared["transformer"] == [0, 0]
        fused = tiny_wan.run(model, [900.0, 100.0])
        assert all(raw for *_, raw in seen[-4:]) and handle.report().prepared["transformer"] == [1, 1]
    assert torch.equal(fused[0], apart[0]) and off(fused[1], apart[1]) < 1e-4
    pattern = {
        **SCHEDULE,
        "format": "fpsattn-schedule/3",
        "levels": {"fp8": {"precision": "fp8", "pattern": {"name": "topk_mean", "ratio": 0.34}}},
    }
    seen.clear()
    with fps.apply(model, pattern, prepare="auto") as handle:  # it reads q and k before they are quantized
        tiny_wan.run(model, [100.0])
        assert not any(raw for *_, raw in seen) and not handle.report().fallbacks


@torch.no_grad()
def test_in_bf16_it_is_no_less_exact():
    exact = stir(tiny_wan.transformer())
    half = copy.deepcopy(exact).to(torch.bfloat16)
    arguments = tiny_wan.inputs([100.0])
    rounded = {name: x.bfloat16() if x.is_floating_point() and x.ndim > 1 else x for name, x in arguments.items()}
    wanted = exact(**arguments, return_dict=False)[0]
    errors = []
    for prepare in (False, True):
        with fps.apply(half, SCHEDULE, prepare=prepare):
            errors.append(off(half(**rounded, return_dict=False)[0].float(), wanted))
    assert errors[0] != errors[1] and errors[1] < 1.02 * errors[0]


class Scaled(torch.nn.RMSNorm):
    """A norm of somebody's own."""


@pytest.mark.parametrize("how", ["class", "hook", "forward", "eps"])
@torch.no_grad()
def test_norms_that_are_not_as_expected_stay_the_models_own(model, how):
    """Such a layer runs as without prepare, to the bit, and the report says why; the others are fused."""
    attention = model.blocks[0].attn1

    def change() -> None:
        norm = attention.norm_k
        if how == "class":
            norm.__class__ = Scaled
        elif how == "hook":
            norm.register_forward_hook(lambda module, arguments, output: output * 1.5)
        elif how == "forward":  # as offloading and casting do
            norm.forward = lambda x: torch.nn.RMSNorm.forward(norm, x)
        else:
            norm.eps = 1e-3

    handle = fps.apply(model, SCHEDULE, prepare="auto")
    change()
    got = tiny_wan.run(model, [100.0])
    report = handle.report()
    assert report.prepared["transformer"] == [0, 1]
    ((reason, count),) = report.fallbacks.items()
    assert count == 1 and "blocks.0.attn1: norm and RoPE outside of the quantizer: has" in reason and "norm_k" in reason
    handle.remove()
    with fps.apply(model, SCHEDULE):
        wanted = tiny_wan.run(model, [100.0])
    assert off(got, wanted) < 1e-4
    with pytest.raises(UnsupportedError, match=r"blocks.0.attn1 has .*norm_k.*prepare=\"auto\""):
        fps.apply(model, SCHEDULE, prepare=True)
    assert not model._forward_pre_hooks


@torch.no_grad()
def test_what_is_refused(model):
    with pytest.raises(ConfigError, match="prepare 'yes', expected one of"):
        fps.apply(model, SCHEDULE, prepare="yes")
    unknown, _ = tiny_models.FAMILIES["kandinsky"].make(1)
    with pytest.raises(UnsupportedError, match="prepare: norms and RoPE of Kandinsky 5 are not known"):
        fps.apply(unknown, {**SCHEDULE, "tile": None}, prepare=True)
    with fps.apply(unknown, {**SCHEDULE, "tile": None}, prepare="auto") as handle:
        ((reason, count),) = handle.report().fallbacks.items()
        assert reason.endswith("those of Kandinsky 5 are not known to be those of the quantizer") and count == 0
    narrow = tiny_wan.transformer(head_dim=48)
    with pytest.raises(UnsupportedError, match="has head dimension 48"):
        fps.apply(narrow, SCHEDULE, prepare=True)
    with fps.apply(narrow, SCHEDULE, prepare="auto") as handle:
        tiny_wan.run(narrow, [100.0])
        assert sum("head dimension 48" in reason for reason in handle.report().fallbacks) == 2
    with fps.apply(model, SCHEDULE, prepare=True):
        model.blocks[1].attn1.norm_q.register_forward_pre_hook(lambda module, arguments: None)
        with pytest.raises(UnsupportedError, match="blocks.1.attn1 has hooks on norm_q"):
            tiny_wan.run(model, [100.0])


@torch.no_grad()
@pytest.mark.slow
def test_fused_projections_lora_copies_and_recordings(model, tmp_path):
    twin = copy.deepcopy(model)
    twin.fuse_qkv_projections()
    with fps.apply(model, SCHEDULE):
        wanted = tiny_wan.run(model, [100.0])
    for folder, one in ((tmp_path / "model", model), (tmp_path / "twin", twin)):
        with fps.apply(one, SCHEDULE, prepare=True) as handle:
            got = tiny_wan.run(one, [100.0])
            assert off(got, wanted) < 1e-4 and handle.report().prepared["transformer"] == [1, 1]
            for same in (copy.deepcopy(one), pickle.loads(pickle.dumps(one))):
                assert torch.equal(tiny_wan.run(same, [100.0]), got)
            with handle.record(dir=folder) as recorder:  # of q and k after RoPE, so the model makes them
                tiny_wan.run(one, [100.0])
            assert recorder is not None and handle.report().prepared["transformer"] == [1, 1]
    pytest.importorskip("peft")
    from peft import LoraConfig

    torch.manual_seed(1)
    model.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_v"], init_lora_weights=False))
    with fps.apply(model, SCHEDULE):
        adapted = tiny_wan.run(model, [100.0])
    with fps.apply(model, SCHEDULE, prepare=True, linears="fp8"), fps.apply(twin, SCHEDULE):
        assert off(tiny_wan.run(model, [100.0]), adapted) < 0.1
    with fps.apply(model, SCHEDULE, prepare=True):
        assert off(tiny_wan.run(model, [100.0]), adapted) < 1e-4 < off(adapted, wanted)


def test_checkpointing_keeps_the_gradients(model):
    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        tiny_wan.run(model, [900.0, 100.0]).square().mean().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    model.train()
    with fps.apply(model, SWITCHED, prepare=True):
        wanted = gradients()
        model.enable_gradient_checkpointing()
        got = gradients()
    assert "blocks.0.attn1.norm_q.weight" in wanted and set(got) == set(wanted)
    for name, gradient in wanted.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("training", [False, True])
def test_compiled_blocks(model, training):
    """One graph for all levels, in which dense samples get the model's own norms; gradients too."""
    cases = [[900.0], [100.0]] if training else [[900.0, 100.0], [800.0, 50.0]]
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        from torch._dynamo.backends.debugging import aot_eager

        graphs.append(graph)
        return aot_eager(graph, inputs)

    def run(timestep: list[float]) -> tuple[Tensor, Tensor | None]:
        weight = model.blocks[0].attn1.norm_k.weight
        with torch.set_grad_enabled(training):
            out = tiny_wan.run(model, timestep)
            return out.detach(), torch.autograd.grad(out.square().mean(), weight)[0] if training else None

    with fps.apply(model, SWITCHED, prepare=True):
        eager = [run(timestep) for timestep in cases]
        torch._dynamo.reset()
        model.compile_repeated_blocks(fullgraph=True, backend=backend)
        for timestep, (wanted, gradient) in zip(cases, eager, strict=True):
            out, compiled = run(timestep)
            assert off(out, wanted) < 1e-5
            if gradient is not None:
                assert gradient.any() and off(compiled, gradient) < 1e-4
    (graph,) = graphs
    assert "attention_prepared" in graph.cond_false_0.code + graph.cond_true_0.code + graph.cond_true_1.code


@pytest.mark.slow
@torch.no_grad()
def test_graphs_of_the_whole_model():
    """Three layers in one graph, each with norms and levels of its own and a branch for each kernel class: every bit of the eager model,
    which is close to that of layers whose norms run apart."""
    levels = {
        "a": {"precision": "fp8", "granularity": "block", "window": [1, 1, 2]},
        "b": {"precision": "fp8", "granularity": "tile", "window": [1, 2, 1]},
        "dense": {"precision": "bf16"},
    }
    both = [[{"sigma": [1.0, 0.5], "level": first}, {"sigma": [0.5, 0.0], "level": second}]
            for first, second in (("a", "dense"), ("dense", "b"), ("b", "a"))]  # fmt: skip
    layers = {"1": both[1], "2": both[2]}
    schedule = {**SCHEDULE, "format": "fpsattn-schedule/3", "levels": levels, "phases": both[0], "layers": layers}
    model = stir(tiny_wan.transformer(num_layers=3))
    cases = ([900.0, 100.0], [900.0, 800.0], [100.0, 200.0])
    with fps.apply(model, schedule):
        apart = [tiny_wan.run(model, timestep) for timestep in cases]
    with fps.apply(model, schedule, prepare=True) as handle:
        eager = [tiny_wan.run(model, timestep) for timestep in cases]
        counts = handle.report().prepared
        assert counts["transformer"] == [3, 3, 6]
        handle.reset()
        torch._dynamo.reset()
        prepared: list[int] = []

        def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
            prepared.append(
                sum(m.code.count("fpsattn.attention_prepared") for m in graph.modules() if hasattr(m, "code"))
            )
            return graph

        outer = torch.compile(lambda **kwargs: model(**kwargs, return_dict=False)[0], fullgraph=True, backend=backend)
        inner = torch.compile(model, fullgraph=True, backend=backend)
        for timestep, wanted, other in zip(cases, eager, apart, strict=True):
            arguments = tiny_wan.inputs(timestep)
            assert off(wanted, other) < 1e-4
            assert torch.equal(inner(**arguments, return_dict=False)[0], wanted)
            assert torch.equal(outer(**arguments), wanted)
        assert prepared == [4, 4]  # branches of one graph
        assert handle.report().prepared == counts  # of the former; nothing is counted in the latter


@pytest.mark.slow
@pytest.mark.parametrize("family", ["flux", "qwen"])
def test_gradients_reach_the_norms_of_video_and_text(family):
    """Those of the model's own norms, beside FP8 attention with the same straight-through gradients; rows that change places would show."""
    model, arguments = made(family)

    def gradients(**options: Any) -> dict[str, Tensor]:
        model.zero_grad()
        with fps.apply(model, {**SCHEDULE, "tile": tiny_models.TILE}, **options):
            model(**arguments, return_dict=False)[0].square().mean().backward()
        of_norms = {
            name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None and "attn.norm_" in name
        }
        return {name: gradient for name, gradient in of_norms.items() if gradient.any()}

    wanted, got = gradients(), gradients(prepare=True)
    assert set(got) == set(wanted) and {name.split(".")[3] for name in got} >= {"norm_q", "norm_k", "norm_added_k"}
    for name, gradient in wanted.items():
        assert off(got[name], gradient) < 0.02, name
    joint = "transformer_blocks.0.attn.norm_{}.weight"
    assert off(got[joint.format("added_k")], wanted[joint.format("k")]) > 0.5


@torch.no_grad()
def test_padded_text_that_is_rotated():
    """What stands for a hidden key must not turn with its place, so norms run apart, bit for bit, and the report says why."""
    model, arguments = tiny_models.FAMILIES["qwen"].make(2)
    stir(model)
    schedule = {**SCHEDULE, "tile": tiny_models.TILE}
    with fps.apply(model, schedule):
        apart = model(**arguments, return_dict=False)[0]
    with fps.apply(model, schedule, prepare="auto") as handle:
        assert torch.equal(model(**arguments, return_dict=False)[0], apart)
        report = handle.report()
    assert report.prepared["transformer"] == [0]
    assert ["got padded text, which it rotates" in reason for reason in report.fallbacks] == [True]
    with (
        fps.apply(model, schedule, prepare=True),
        pytest.raises(UnsupportedError, match="padded text, which it rotates"),
    ):
        model(**arguments)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["flux", "qwen"])
@torch.no_grad()
def test_compiled_joint_blocks(family):
    """Where the text ends is a size of the graph: another length makes it dynamic, and then it serves all."""
    from torch._dynamo.testing import CompileCounterWithBackend

    model, arguments = made(family)
    cases = []
    for length in (tiny_models.TEXT, 29, 23):
        text = tiny_models.rand(2, length, tiny_models.DIM)
        cases.append({**arguments, "encoder_hidden_states": text})
        if "txt_ids" in arguments:
            cases[-1]["txt_ids"] = torch.zeros(length, arguments["txt_ids"].shape[1])
    with fps.apply(model, {**SCHEDULE, "tile": tiny_models.TILE}, prepare=True):
        wanted = [model(**case, return_dict=False)[0] for case in cases]
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        model.compile_repeated_blocks(fullgraph=True, backend=counter)
        for case, out in zip(cases, wanted, strict=True):
            assert off(model(**case, return_dict=False)[0], out) < 1e-5
    kinds = 2 if family == "flux" else 1  # of blocks
    assert counter.frame_count == 2 * kinds
    for graph in counter.graphs:
        assert any("attention_prepared" in getattr(module, "code", "") for module in graph.modules())


@torch.no_grad()
def test_attention_beside_the_core_is_an_error():
    """Flux.2 with a cache of keys attends in a function of its own: q and k without norms must not get there."""
    from diffusers.models.transformers.transformer_flux2 import Flux2KVAttnProcessor

    model, arguments = made("flux2")
    model.transformer_blocks[0].attn.set_processor(Flux2KVAttnProcessor())
    with fps.apply(model, {**SCHEDULE, "tile": tiny_models.TILE}, prepare="auto") as handle:
        model(**arguments)
        assert handle.report().prepared["transformer"] == [2, 2]
        with pytest.raises(
            UnsupportedError, match=r"blocks.0.attn took q and k elsewhere than to dispatch_attention_fn"
        ):
            model(**arguments, kv_cache_mode="extract", num_ref_tokens=16)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda x: x[:, 0::2].repeat(1, 2), "hold two angles for a pair"),
        (lambda x: x[:, 0::2].contiguous(), "come out as torch.float32"),
        (lambda x: torch.polar(x, x), "come out as torch.complex64"),
    ],
)
@torch.no_grad()
def test_rotary_tables_of_another_kind(change, reason):
    model, arguments = tiny_models.FAMILIES["cogvideox"].make(1)
    others = {**arguments, "image_rotary_emb": tuple(map(change, arguments["image_rotary_emb"]))}
    with fps.apply(model, {**SCHEDULE, "tile": tiny_models.TILE}, prepare="auto"):
        with pytest.raises(UnsupportedError, match=f"the rotary tables {reason}"):
            model(**others)
        model(**arguments)
