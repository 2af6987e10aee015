"""What people put on top of a model, with a schedule under it: caches, offloading, casting, LoRA, torchao, guidance, conditions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tiny_wan
import torch
from diffusers import hooks
from diffusers.hooks import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)

import fpsattention as fps
from fpsattention.errors import UnsupportedError

LAYERS, STEPS = 4, 6
FP8 = "fp8"

pytestmark = pytest.mark.filterwarnings("ignore:.*preset.*:UserWarning")


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def model(**config: Any) -> torch.nn.Module:
    return tiny_wan.transformer(num_layers=LAYERS, **config)


def denoise(transformer: torch.nn.Module) -> torch.Tensor:
    """All outputs of a run with guidance, each branch in a cache context of its own, as pipelines do."""
    outs = []
    given = tiny_wan.inputs([0.0])
    negative = {**given, "encoder_hidden_states": given["encoder_hidden_states"].flip(1)}
    for step in range(STEPS):
        for name, arguments in (("cond", given), ("uncond", negative)):
            arguments["timestep"] = torch.tensor([900.0 - 5 * step])
            current["timestep"] = int(arguments["timestep"])
            with transformer.cache_context(name):
                outs.append(transformer(**arguments, return_dict=False)[0])
    transformer._reset_stateful_cache()
    return torch.stack(outs)


current = {"timestep": 0}
CACHES: dict[str, Callable[[], Any]] = {
    "first block": lambda: FirstBlockCacheConfig(threshold=0.5),
    "faster": lambda: FasterCacheConfig(
        spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(-1, 891), tensor_format="BCFHW",
        attention_weight_callback=lambda _: 0.3, is_guidance_distilled=True, current_timestep_callback=lambda: current["timestep"],
    ),
    "pyramid broadcast": lambda: PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(100, 950),
        current_timestep_callback=lambda: current["timestep"],
    ),
    "mag": lambda: MagCacheConfig(threshold=1.0, num_inference_steps=STEPS, retention_ratio=0.1, mag_ratios=[1.0] * STEPS),
    "taylor": lambda: TaylorSeerCacheConfig(cache_interval=3, disable_cache_before_step=1, max_order=1, taylor_factors_dtype=torch.float32, cache_identifiers=[r"blocks\.\d+\.attn1"]),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("schedule_first", [True, False])
@pytest.mark.parametrize("name", list(CACHES))
def test_caches(name, schedule_first):
    """A cache over a dense schedule is the cache alone, to the bit; over FP8 it skips what it skipped, and stays near its own result."""
    transformer = model()
    without = denoise(transformer)
    transformer.enable_cache(CACHES[name]())
    plain = denoise(transformer)
    assert not torch.equal(plain, without)  # it does skip
    transformer.disable_cache()
    results = {}
    for schedule in ("dense", FP8):
        if schedule_first:
            handle = fps.apply(transformer, schedule)
            transformer.enable_cache(CACHES[name]())
        else:
            transformer.enable_cache(CACHES[name]())
            handle = fps.apply(transformer, schedule)
        results[schedule] = denoise(transformer)
        report = handle.report()
        runs = report.executions["transformer"]
        assert runs is not None and min(runs) < 2 * STEPS, "layers that a cache skips do not count"
        assert not report.fallbacks and not report.replaced
        handle.remove()
        transformer.disable_cache()
    assert torch.equal(results["dense"], plain)
    error = (results[FP8] - plain).abs().mean() / plain.abs().mean()
    assert 0 < error < 0.05
    assert torch.equal(denoise(transformer), without)


def run(transformer: torch.nn.Module, timesteps: list[float] = [900.0]) -> torch.Tensor:  # noqa: B006
    return tiny_wan.run(transformer, timesteps)


@pytest.mark.parametrize("schedule_first", [True, False])
@pytest.mark.slow
def test_group_offloading_and_layerwise_casting(schedule_first):
    """Weights that come and go, and change their dtype, around each block: the hooks replace forwards, not processors."""
    for attach in (
        lambda m: m.enable_group_offload(
            onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1
        ),
        lambda m: m.enable_layerwise_casting(storage_dtype=torch.float16, compute_dtype=torch.float32),
    ):  # fmt: skip
        alone, both = model(), model()
        attach(alone)
        if schedule_first:
            handle = fps.apply(both, "dense")
            attach(both)
        else:
            attach(both)
            handle = fps.apply(both, "dense")
        want = run(alone)
        assert torch.equal(run(both), want)
        handle.remove()
        handle = fps.apply(both, FP8)
        assert 0 < (run(both) - want).abs().mean() < 0.05 * want.abs().mean()
        assert not handle.report().fallbacks
        handle.remove()
        assert torch.equal(run(both), want)
    assert hooks  # the names above are its


@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
@pytest.mark.parametrize("schedule_first", [True, False])
@pytest.mark.slow
def test_group_offloading_of_fp8_linears_and_prepared_attention(kind, schedule_first):
    """The bits of the same schedule without offloading, whichever came first: weights are where they are read. Norms that are offloaded
    by themselves run with their own code, and the report says so."""
    plain, offloaded = model(), model()
    prepare = "auto" if kind == "block_level" else False
    with fps.apply(plain, FP8, linears="fp8", prepare=prepare) as handle:
        want = run(plain)
        assert handle.report().rows[1].linears == 8
    settings: dict[str, Any] = {"num_blocks_per_group": 1} if kind == "block_level" else {}

    def attach() -> None:
        cpu = torch.device("cpu")
        offloaded.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type=kind, **settings)

    if not schedule_first:
        attach()
    with fps.apply(offloaded, FP8, linears="fp8", prepare="auto") as handle:
        if schedule_first:
            attach()
        assert torch.equal(run(offloaded), want)
        report = handle.report()
        assert report.rows[1].linears == 8
        assert report.prepared["transformer"] == [kind == "block_level"] * LAYERS
        assert len(report.fallbacks) == (0 if kind == "block_level" else LAYERS), report.fallbacks
    assert torch.equal(run(offloaded), run(plain))


def test_accelerate_offloads_a_pipeline():
    """enable_model_cpu_offload puts hooks of accelerate around the transformer's forward."""
    from accelerate import cpu_offload_with_hook

    transformer = model()
    want = run(transformer)
    handle = fps.apply(transformer, FP8)
    sparse = run(transformer)
    transformer, hook = cpu_offload_with_hook(transformer, torch.device("cpu"))
    assert torch.equal(run(transformer), sparse)
    assert handle.report().forwards["transformer"] == 2
    hook.remove()
    handle.remove()
    assert torch.equal(run(transformer), want)


def test_lora_is_added_fused_and_unloaded():
    from peft import LoraConfig

    transformer, reference = model(), model()
    handle = fps.apply(transformer, "dense")
    for one in (transformer, reference):
        torch.manual_seed(1)
        one.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_v"], init_lora_weights=False))
    adapted = run(reference)
    assert torch.equal(run(transformer), adapted)
    for one in (transformer, reference):
        one.fuse_lora(lora_scale=0.5)
    fused = run(reference)
    assert torch.equal(run(transformer), fused) and not torch.equal(fused, adapted)
    for one in (transformer, reference):
        one.unfuse_lora()
        one.unload_lora()
    assert torch.equal(run(transformer), run(reference))
    handle.remove()
    assert torch.allclose(run(transformer), run(model()), atol=1e-5)  # unfusing rounds
    with fps.apply(transformer, FP8) as handle:
        run(transformer)
        assert not handle.report().fallbacks


@pytest.mark.parametrize("config", ["Int8WeightOnlyConfig", "Float8WeightOnlyConfig"])
def test_torchao_weights(config):
    """Weights quantized before the schedule comes or under it; nothing of them is touched, and FP8 linears refuse them by name."""
    from torchao import quantization

    def quantize(module: torch.nn.Module) -> None:
        quantization.quantize_(module, getattr(quantization, config)())

    transformer, later = (tiny_wan.transformer(num_layers=3) for _ in range(2))  # first and last keep their linears
    full = run(transformer)
    quantize(transformer)
    weight = transformer.blocks[0].attn1.to_q.weight
    want = run(transformer)
    assert not torch.equal(want, full)  # it does quantize
    with fps.apply(transformer, "dense"):
        assert torch.equal(run(transformer), want)
    with fps.apply(transformer, FP8) as handle:
        sparse = run(transformer)
        assert 0 < (sparse - want).abs().mean() < 0.05 * want.abs().mean()
        assert not handle.report().fallbacks
    assert torch.equal(run(transformer), want) and transformer.blocks[0].attn1.to_q.weight is weight

    handle = fps.apply(later, FP8)
    run(later)
    quantize(later)
    assert torch.equal(run(later), sparse)
    handle.remove()
    assert torch.equal(run(later), want)

    with pytest.raises(
        UnsupportedError, match=r"attn1.to_q has weights that are quantized already \((Int8|Float8)Tensor\)"
    ):
        fps.apply(transformer, FP8, linears="fp8")
    with fps.apply(transformer, FP8, linears="fp8", on_unsupported="dense") as handle:
        assert torch.equal(run(transformer), sparse)
        report = handle.report()
        assert all(row.linears == 0 for row in report.rows) and "quantized already" in next(iter(report.fallbacks))


def test_guidance_in_one_batch_is_guidance_in_two_calls():
    """Prompt and negative prompt as a batch of two: each sample is what it is alone."""
    transformer = model()
    arguments = tiny_wan.inputs([900.0, 900.0])
    arguments["hidden_states"] = arguments["hidden_states"][:1].expand(2, -1, -1, -1, -1)
    with fps.apply(transformer, FP8):
        both = transformer(**arguments, return_dict=False)[0]
        for sample in range(2):
            alone = {name: x[sample : sample + 1] for name, x in arguments.items()}
            one = transformer(**alone, return_dict=False)[0]
            assert (one - both[sample : sample + 1]).abs().mean() < 0.005 * one.abs().mean()  # GEMMs of another size


def test_conditions_by_timesteps_per_token_and_by_image():
    """TI2V: tokens of the first frame are told 0; I2V: latents with the image beside the noise, its embedding in cross-attention."""
    t, h, w = tiny_wan.GRID
    transformer = model()
    arguments = tiny_wan.inputs([900.0])
    per_token = torch.full((1, t * h * w), 900.0)
    per_token[:, : h * w] = 0.0
    arguments["timestep"] = per_token
    schedule = {
        "format": "fpsattn-schedule/1",
        "levels": {"a": {"precision": "fp8", "window": "dense"}, "b": {"precision": "bf16"}},
        "phases": [{"sigma": [1.0, 0.5], "level": "a"}, {"sigma": [0.5, 0.0], "level": "b"}],
    }
    plain = transformer(**arguments, return_dict=False)[0]
    with fps.apply(transformer, schedule) as handle:
        out = transformer(**arguments, return_dict=False)[0]
        assert {row.level: row.calls for row in handle.report().rows if row.layer == 0} == {
            "a": 1,
            "b": 0,
        }  # the noisiest counts
    assert 0 < (out - plain).abs().mean() < 0.05 * plain.abs().mean()

    image = model(in_channels=20, image_dim=24, added_kv_proj_dim=128)
    given = tiny_wan.inputs([900.0])
    given["hidden_states"] = torch.cat([given["hidden_states"], given["hidden_states"][:, :4]], 1)
    given["encoder_hidden_states_image"] = torch.randn(1, 5, 24, generator=torch.Generator().manual_seed(4))
    plain = image(**given, return_dict=False)[0]
    with fps.apply(image, FP8, exact=(0,)) as handle:
        out = image(**given, return_dict=False)[0]
        assert not handle.report().fallbacks
    assert 0 < (out - plain).abs().mean() < 0.05 * plain.abs().mean()
