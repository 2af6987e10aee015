"""``fpsattention.apply`` on tiny random Wan models: levels, sigma, reports, recording, compile, refusals."""

from __future__ import annotations

import copy
import json
import warnings
from typing import Any

import pytest
import tiny_wan
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fpsattention as fps
from fpsattention.errors import ConfigError, UnsupportedError
from fpsattention.integrations import diffusers as integration
from fpsattention.integrations.cores import is_swapped
from fpsattention.integrations.tokens import resolve_window
from fpsattention.layout.tiles import plan

SWITCHED = {  # one kernel class: levels switch on the device
    "format": "fpsattn-schedule/1",
    "tile": tiny_wan.TILE,
    "levels": {
        "narrow": {"precision": "fp8", "window": [1, 1, 1]},
        "wide": {"precision": "fp8", "window": [1, 2, 3]},
    },
    "phases": [{"sigma": [1.0, 0.5], "level": "narrow"}, {"sigma": [0.5, 0.0], "level": "wide"}],
}
MIXED = {
    **SWITCHED,
    "levels": {
        **SWITCHED["levels"],
        "dense": {"precision": "bf16"},
        "token": {"precision": "fp8", "granularity": "token"},
    },
    "phases": [
        {"sigma": [1.0, 0.8], "level": "dense"},
        {"sigma": [0.8, 0.4], "level": "token"},
        {"sigma": [0.4, 0.0], "level": "narrow"},
    ],
}


def single(level: dict[str, Any]) -> dict[str, Any]:
    """A schedule with one level."""
    return {**SWITCHED, "levels": {"it": level}, "phases": [{"sigma": [1, 0], "level": "it"}]}


@pytest.fixture(scope="module")
def model():
    return tiny_wan.transformer()


@torch.no_grad()
def test_dense_is_bit_identical_and_remove_restores(model):
    keys = list(model.state_dict())
    plain = tiny_wan.run(model, [700.0])
    with fps.apply(model, "dense") as handle:
        assert torch.equal(tiny_wan.run(model, [700.0]), plain)
        assert list(model.state_dict()) == keys
    with fps.apply(model, SWITCHED):
        assert not torch.equal(tiny_wan.run(model, [700.0]), plain)
    handle.remove()  # a second time, after another handle came and went
    assert torch.equal(tiny_wan.run(model, [700.0]), plain)
    assert not model._forward_pre_hooks and not model._forward_hooks
    assert not any(is_swapped(block.attn1.processor) for block in model.blocks)


@torch.no_grad()
def test_full_window_is_near_dense_and_a_small_one_is_not(model):
    plain = tiny_wan.run(model, [700.0])

    def error(schedule: Any) -> float:
        with fps.apply(model, schedule):
            return float((tiny_wan.run(model, [700.0]) - plain).abs().sum() / plain.abs().sum())

    assert error("fp8") < 0.002 < 0.01 < error(single({"precision": "fp8", "window": [1, 1, 1]}))


@torch.no_grad()
def test_the_core_is_the_public_op_and_the_dense_core_is_sdpa(model):
    """What the swapped core sees are q, k, v after RoPE; FP8 levels give fps.attention of them, bf16 levels SDPA, the same bits."""
    schedule = {
        **SWITCHED,
        "levels": {
            "it": {"precision": "fp8", "granularity": "block", "window": [1, 2, 2]},
            "dense": {"precision": "bf16"},
        },
        "phases": [{"sigma": [1, 0], "level": "it"}],
        "layers": {"1": "dense"},
    }
    seen: dict[str, Any] = {}
    with fps.apply(model, schedule) as handle:
        for site in handle.installations[0].sites:
            site.observers.append(lambda name, q, k, v, out: seen.update({name: (q, k, v, out)}))
        tiny_wan.run(model, [300.0, 900.0])
    assert list(seen) == ["transformer.blocks.0.attn1", "transformer.blocks.1.attn1"]
    q, k, v, out = seen["transformer.blocks.0.attn1"]
    wanted = fps.attention(q, k, v, tiny_wan.GRID, tile=tiny_wan.TILE, window=(1, 2, 2), granularity="block")
    assert torch.equal(out, wanted)
    q, k, v, out = (x.transpose(1, 2) for x in seen["transformer.blocks.1.attn1"])
    assert torch.equal(out, torch.nn.functional.scaled_dot_product_attention(q, k, v))


@pytest.mark.parametrize("schedule", [SWITCHED, MIXED], ids=["device", "host"])
@torch.no_grad()
def test_per_sample_sigma_equals_one_by_one(model, schedule):
    """A batch of samples at different levels gives what each gives alone; borders belong below."""
    timesteps = [900.0, 500.0, 100.0, 800.0]
    arguments = tiny_wan.inputs(timesteps)
    with fps.apply(model, schedule):
        together = model(**arguments, return_dict=False)[0]
        alone = [model(**{k: v[i : i + 1] for k, v in arguments.items()}, return_dict=False)[0] for i in range(4)]
    # GEMMs of another batch size round differently, which flips an e4m3 rounding here and there.
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-3, atol=2e-3)
    with fps.apply(model, schedule):
        swapped = model(**{**arguments, "timestep": arguments["timestep"].flip(0)}, return_dict=False)[0]
    assert float((together - swapped).abs().max()) > 2e-2


@torch.no_grad()
def test_timesteps_per_token_take_the_maximum(model):
    arguments = tiny_wan.inputs([300.0])
    per_token = torch.full((1, 288), 300.0)
    per_token[:, :96] = 0.0  # Wan2.2 TI2V: the conditioned frame
    with fps.apply(model, MIXED) as handle:
        model(**{**arguments, "timestep": per_token}, return_dict=False)
    assert {row.level: row.calls for row in handle.report().rows if row.layer == 0} == {
        "dense": 0,
        "token": 0,
        "narrow": 1,
    }


class NoHostReads(TorchDispatchMode):
    """Counts what would wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if "_local_scalar_dense" in str(func) or "nonzero" in str(func):
            self.reads.append(str(func))
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def test_device_switching_never_reads_the_level(model):
    plain = NoHostReads()
    with plain:
        tiny_wan.run(model, [900.0, 100.0])
    with fps.apply(model, SWITCHED) as handle:
        tiny_wan.run(model, [900.0, 100.0])  # builds the tables
        with NoHostReads() as mode:
            tiny_wan.run(model, [200.0, 600.0])
        assert mode.reads == plain.reads == []
        report = handle.report()
    assert report.host_reads == 0
    assert {row.level: row.calls for row in report.rows if row.layer == 1} == {"narrow": 2, "wide": 2}
    with fps.apply(model, MIXED) as handle:  # the planted failure: here the host must know, and asks once
        tiny_wan.run(model, [200.0])
        assert handle.report().host_reads == 1


@torch.no_grad()
def test_pipeline_with_guidance_reads_nothing_per_forward():
    pipe = tiny_wan.pipeline()
    plain = tiny_wan.sample(pipe)
    schedule = {**MIXED, "tile": None}
    with fps.apply(pipe, schedule) as handle:
        assert not torch.equal(tiny_wan.sample(pipe), plain)
        report = handle.report()
    assert report.host_reads == 0  # the timesteps are views of the scheduler's
    steps = fps.Schedule.from_dict(schedule).to_steps(pipe.scheduler, 4)
    for layer in range(tiny_wan.LAYERS):
        calls = {row.level: row.calls for row in report.rows if row.layer == layer}
        assert calls == {level: 2 * steps.count(level) for level in calls}  # two forwards per step: guidance
    assert report.executions == {"transformer": [8, 8]}
    assert torch.equal(tiny_wan.sample(pipe), plain)


@torch.no_grad()
def test_both_experts_of_a_pipeline():
    pipe = tiny_wan.pipeline(experts=2)
    with fps.apply(pipe, "fp8") as handle:
        tiny_wan.sample(pipe)
        rows = handle.report().rows
    calls = {(row.model, row.layer): row.calls for row in rows}
    assert set(calls) == {(name, layer) for name in ("transformer", "transformer_2") for layer in (0, 1)}
    assert calls["transformer", 0] > 0 and calls["transformer_2", 0] > 0
    assert calls["transformer", 0] + calls["transformer_2", 0] == 8


@torch.no_grad()
def test_layers_heads_and_report(model):
    schedule = {**SWITCHED, "layers": {"1": "wide"}, "heads": {"0": {"1": {"narrow": "dense"}}}}
    with fps.apply(model, schedule) as handle:
        tiny_wan.run(model, [900.0])
        report, log = handle.report(), handle.log_dict()
    rows = {(row.layer, row.level): row for row in report.rows}
    assert (rows[0, "narrow"].calls, rows[0, "wide"].calls, rows[1, "wide"].calls) == (1, 0, 1)
    assert rows[0, "narrow"].density == pytest.approx((1 / 6 + 1) / 2)  # 1 of 6 tiles, and all of them in head 1
    assert rows[1, "wide"].windows == () and rows[0, "narrow"].windows == ((1, 1, 1), (1, 2, 3))
    assert log["fpsattn/calls/wide"] == 1 and log["fpsattn/density"] == pytest.approx(report.density)
    json.dumps(report.to_dict())
    from rich.console import Console

    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(report)
    for text in (str(report), console.export_text()):
        assert "narrow" in text and "1x1x1" in text and "3x4x4" in text


@torch.no_grad()
def test_lora_fused_projections_and_dtypes():
    from peft import LoraConfig

    model = tiny_wan.transformer()
    plain = tiny_wan.run(model, [300.0])
    with fps.apply(model, "fp8"):
        before = tiny_wan.run(model, [300.0])
        model.fuse_qkv_projections()
        torch.testing.assert_close(tiny_wan.run(model, [300.0]), before, rtol=1e-3, atol=1e-3)
        model.unfuse_qkv_projections()
        model.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False))
        adapted = tiny_wan.run(model, [300.0])
        assert float((adapted - before).abs().max()) > 1e-3
    torch.testing.assert_close(tiny_wan.run(model, [300.0]), adapted, rtol=0.2, atol=0.1)
    assert not torch.allclose(plain, adapted, atol=1e-3)
    half = tiny_wan.transformer(head_dim=128).to(torch.bfloat16)
    arguments = {k: v.to(torch.bfloat16) if k != "timestep" else v for k, v in tiny_wan.inputs([300.0]).items()}
    with fps.apply(half, "fp8"):
        assert half(**arguments, return_dict=False)[0].dtype == torch.bfloat16


@pytest.mark.slow
@torch.no_grad()
def test_compiled_blocks_do_not_recompile_across_sigma():
    model = tiny_wan.transformer()
    with fps.apply(model, SWITCHED) as handle:
        eager = [tiny_wan.run(model, [t]) for t in (900.0, 600.0, 100.0)]
        torch._dynamo.reset()
        model.compile_repeated_blocks(fullgraph=True, backend="eager")
        first = tiny_wan.run(model, [900.0])
        torch._dynamo.config.error_on_recompile = True
        try:
            later = [tiny_wan.run(model, [t]) for t in (600.0, 100.0)]
        finally:
            torch._dynamo.config.error_on_recompile = False
        for got, wanted in zip([first, *later], eager, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
        assert handle.report().executions == {"transformer": None}
        with pytest.raises(UnsupportedError, match="transformer is compiled"):
            handle.record(dir="unused")
    torch._dynamo.reset()


@torch.no_grad()
def test_record(model, tmp_path):
    from safetensors import safe_open

    with fps.apply(model, MIXED) as handle:
        with handle.record(dir=tmp_path, layers=[1], sigmas=[0.9, 0.35]) as recorder:
            for timestep in (950.0, 880.0, 860.0, 350.0, 100.0):
                tiny_wan.run(model, [timestep])
            with pytest.raises(ConfigError, match="a recording is on already"):
                handle.record(dir=tmp_path)
        tiny_wan.run(model, [10.0])
        with pytest.raises(ConfigError, match=r"layers \[2\], expected indices below 2"):
            handle.record(dir=tmp_path, layers=[2])
        with pytest.raises(ConfigError, match=r"dir '.*' holds 2 \*.safetensors files, expected a new folder"):
            handle.record(dir=tmp_path)
        assert handle.installations[0].recorder is None  # nothing is on
    names = ["transformer.layer001.sigma0.880000.safetensors", "transformer.layer001.sigma0.350000.safetensors"]
    assert [path.name for path in recorder.files] == names
    for path in recorder.files:
        with safe_open(path, framework="pt") as file:
            assert file.metadata()["format"] == "fpsattn-record/1" and file.metadata()["tile"] == "3,4,4"
            assert tuple(file.get_tensor("grid").tolist()) == tiny_wan.GRID
            assert file.get_tensor("sigma").tolist()[0] in (0.88, 0.35)
            assert {file.get_tensor(name).shape for name in "qkv"} == {(1, 288, 2, 64)}


@torch.no_grad()
def test_unsupported_raises_or_runs_dense(model):
    wide = tiny_wan.transformer(head_dim=144)
    for other, message in (
        (torch.nn.Linear(2, 2), "Linear is not supported, expected one of WanTransformer3DModel"),
        (wide, "head dimension 144, expected at most 128"),
    ):
        with pytest.raises(UnsupportedError, match=message):
            fps.apply(other, "fp8")
        integration._warned.clear()
        with pytest.warns(UserWarning, match="stays dense"):
            handle = fps.apply(other, "fp8", on_unsupported="dense")
        assert handle.report().fallbacks and not handle.report().rows
    with pytest.raises(UnsupportedError, match="str is not supported"):
        fps.apply("model", "fp8")
    handle = fps.apply(model, "fp8")
    with pytest.raises(ConfigError, match="a schedule is applied already"):
        fps.apply(model, "fp8")
    x, mask = torch.randn(1, 288, 128), torch.ones(1, 1, 288, 288, dtype=torch.bool)
    with pytest.raises(UnsupportedError, match=r"blocks\.0\.attn1 got an attention mask"):
        model.blocks[0].attn1(x, None, mask, None)
    for before in (False, True):  # nothing of an earlier forward is left
        with pytest.raises(ConfigError, match=r"blocks\.0\.attn1 ran outside of a forward of its transformer"):
            model.blocks[0].attn1(x, None, None, None)
        with pytest.raises(ConfigError, match="ran outside of a forward"):
            model.forward(**tiny_wan.inputs([300.0]))
        if not before:
            tiny_wan.run(model, [300.0])
    shorter = model.blocks[0].attn1.register_forward_pre_hook(lambda module, args: (args[0][:, :200], *args[1:3], None))
    with pytest.raises(ConfigError, match="got 200 tokens, expected 288"):
        tiny_wan.run(model, [300.0])
    shorter.remove()
    model.blocks[1].attn1.processor._parallel_config = object()  # as enable_parallelism does
    with pytest.raises(UnsupportedError, match=r"blocks\.1\.attn1 runs under context parallelism"):
        tiny_wan.run(model, [300.0])
    model.blocks[1].attn1.processor._parallel_config = None
    handle.remove()
    with fps.apply(model, "fp8", on_unsupported="dense") as handle:
        assert torch.equal(
            model.blocks[0].attn1(x, None, mask, None),
            model.blocks[0].attn1.processor.original(model.blocks[0].attn1, x, None, mask, None),
        )
        assert sum(handle.report().fallbacks.values()) == 1
    with pytest.raises(ConfigError, match="on_unsupported 'ignore'"):
        fps.apply(model, "fp8", on_unsupported="ignore")
    with pytest.raises(ConfigError, match=r"model\.num_heads is 40, expected 2"):
        fps.apply(model, {**SWITCHED, "model": {"num_heads": 40}})
    with pytest.raises(ConfigError, match="the schedule is required"):
        fps.apply(model, {**SWITCHED, "required": True}, on_unsupported="dense")
    with (
        fps.apply(model, single({"precision": "fp8", "window": [1, 3, 3]})),
        pytest.raises(ConfigError, match="exceeds"),
    ):
        tiny_wan.run(model, [300.0])


def test_paper_preset_warns_once_on_stock_weights(model):
    integration._warned.clear()
    with pytest.warns(UserWarning, match="'paper' is meant for weights fine-tuned with it"):
        fps.apply(model, "paper").remove()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fps.apply(model, "paper").remove()
        integration._warned.clear()
        fps.apply(model, {**fps.Schedule.preset("paper").to_dict(), "required": True}).remove()


@torch.no_grad()
def test_copies_of_an_applied_model_work(model):
    with fps.apply(model, SWITCHED):
        wanted = tiny_wan.run(model, [300.0])
        assert torch.equal(tiny_wan.run(copy.deepcopy(model), [300.0]), wanted)


@pytest.mark.parametrize("grid", [(21, 45, 80), (21, 30, 52), (33, 45, 80), (1, 7, 13), (5, 1, 1)])
def test_density_windows_fit_any_grid(grid):
    layout = plan(grid)
    total = layout.tile_grid[0] * layout.tile_grid[1] * layout.tile_grid[2]
    before = 0
    for density in (0.01, 0.12, 0.2, 0.35, 0.7, 1.0):
        window = resolve_window(density, layout)
        count = window[0] * window[1] * window[2]
        assert all(1 <= w <= n for w, n in zip(window, layout.tile_grid, strict=True))
        assert count <= max(1, density * total + 1e-6) and count >= before
        before = count
    assert resolve_window(1.0, layout) == resolve_window(None, layout) == layout.tile_grid
    if grid == (21, 45, 80):  # tile (7, 9, 4), tiles (3, 5, 20): the middle of docs/schedule.md's example
        assert resolve_window(0.2, layout) == (3, 3, 6)
