"""Taking schedules off and putting them on: copies, pickles, pruned models, wrappers, processors set by others; the Wan family."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import tiny_wan
import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_wan import WanAttnProcessor, WanTransformerBlock
from test_diffusers import MIXED, SWITCHED

import fpsattention as fps
from fpsattention.integrations.adapters import Adapter
from fpsattention.integrations.adapters.wan import video_latents
from fpsattention.integrations.cores import is_swapped


@torch.no_grad()
def test_copies_can_be_freed_and_given_another_schedule():
    student = tiny_wan.transformer()
    plain = tiny_wan.run(student, [300.0])
    handle = fps.apply(student, SWITCHED)
    sparse = tiny_wan.run(student, [300.0])
    ema, teacher = copy.deepcopy(student), copy.deepcopy(student)
    assert torch.equal(tiny_wan.run(ema, [300.0]), sparse)
    assert fps.status(ema)["transformer"].copied and not fps.status(student)["transformer"].copied
    assert {row.calls for row in handle.report().rows} == {0, 1}  # the copy counts for itself

    assert fps.remove(teacher) and not fps.remove(teacher) and not fps.status(teacher)
    assert torch.equal(tiny_wan.run(teacher, [300.0]), plain)
    assert torch.equal(tiny_wan.run(student, [300.0]), sparse)
    with fps.apply(ema, "dense"):  # no handle holds the copy's: it is taken over
        assert torch.equal(tiny_wan.run(ema, [300.0]), plain)
    assert not fps.status(ema) and torch.equal(tiny_wan.run(ema, [300.0]), plain)

    with pytest.raises(fps.ConfigError, match="a schedule is applied already"):
        fps.apply(student, "dense")
    with pytest.raises(fps.ConfigError, match=r"model\.num_heads is 40, expected 2"):
        fps.apply(student, {**SWITCHED, "model": {"num_heads": 40}}, replace=True)
    other = fps.apply(student, "dense", replace=True)
    assert torch.equal(tiny_wan.run(student, [300.0]), plain)
    handle.remove()  # of the one before: nothing is left of it
    assert fps.status(student)["transformer"].schedule == other.schedule
    assert "levels dense" in str(fps.status(student)["transformer"])
    other.remove()


@torch.no_grad()
@pytest.mark.slow
def test_pickles_of_an_applied_model_run():
    """Through a pipeline too, whose scheduler the reader knows."""
    pipe = tiny_wan.pipeline()
    fps.apply(pipe, {**MIXED, "tile": [1, 2, 2]})
    wanted = tiny_wan.run(pipe.transformer, [300.0])
    buffer = io.BytesIO()
    torch.save(pipe.transformer, buffer)
    buffer.seek(0)
    loaded = (torch.load(buffer, weights_only=False), pickle.loads(pickle.dumps(pipe.transformer)))
    for model in (*loaded, copy.deepcopy(pipe).transformer):
        assert torch.equal(tiny_wan.run(model, [300.0]), wanted)
        assert fps.remove(model) and type(model.blocks[0].attn1.processor) is WanAttnProcessor
    assert fps.remove(pipe)
    assert pickle.loads(pickle.dumps(pipe.transformer)).blocks[0].attn1.processor.__class__ is WanAttnProcessor


@torch.no_grad()
def test_blocks_taken_out_of_the_model():
    model = tiny_wan.transformer(num_layers=4)
    handle = fps.apply(model, "fp8")
    taken = model.blocks[1]
    del model.blocks[1]
    tiny_wan.run(model, [300.0])
    assert handle.report().executions == {"transformer": [1, 0, 1, 1]}
    handle.remove()
    for block in (taken, *model.blocks):
        assert type(block.attn1.processor) is WanAttnProcessor
    assert not model._forward_pre_hooks and not model._forward_hooks


@torch.no_grad()
def test_settings_reach_both_processors(monkeypatch):
    """What diffusers sets on a processor outlives remove(), and what was set before stays in force."""
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry as registry

    monkeypatch.setattr(registry, "_active_backend", registry._active_backend)  # diffusers sets that of all models, too
    model = tiny_wan.transformer()
    with fps.apply(model, MIXED):
        model.set_attention_backend("_native_math")
        assert model.blocks[0].attn1.processor._attention_backend.value == "_native_math"
    assert type(model.blocks[0].attn1.processor) is WanAttnProcessor
    assert model.blocks[0].attn1.processor._attention_backend.value == "_native_math"


@torch.no_grad()
def test_a_processor_set_later_is_noticed_and_kept():
    model = tiny_wan.transformer()
    handle = fps.apply(model, SWITCHED)
    mine = WanAttnProcessor()
    model.blocks[1].attn1.set_processor(mine)
    with pytest.warns(
        UserWarning, match=r"blocks\.1\.attn1 has the processor WanAttnProcessor now, which somebody set after apply"
    ):
        tiny_wan.run(model, [300.0])
    report = handle.report()
    assert report.replaced == {"transformer.blocks.1.attn1": "WanAttnProcessor"}
    assert report.executions == {"transformer": [1, 0]}
    assert fps.status(model)["transformer"].layers == ("transformer.blocks.0.attn1",)
    handle.remove()
    assert model.blocks[1].attn1.processor is mine


def test_caches_find_the_swapped_class():
    """diffusers' hooks look processors up by their exact class."""
    from diffusers.hooks._helpers import AttentionProcessorMetadata, AttentionProcessorRegistry

    class Mine(WanAttnProcessor):
        def __call__(self, attn: Any, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
            return hidden_states  # calls no core

    class Known(WanAttnProcessor):
        pass

    metadata = AttentionProcessorMetadata(skip_processor_output_fn=lambda *_: None)
    AttentionProcessorRegistry.register(Known, metadata)
    model = tiny_wan.transformer()
    model.blocks[0].attn1.set_processor(Known())  # subclasses of a processor are swapped like it
    with fps.apply(model, "fp8"):
        assert AttentionProcessorRegistry.get(type(model.blocks[0].attn1.processor)) is metadata
    model.blocks[0].attn1.set_processor(Mine())
    with pytest.raises(
        fps.UnsupportedError, match=r"blocks\.0\.attn1 has the processor Mine, whose code does not call"
    ):
        fps.apply(model, "fp8")


@pytest.mark.slow
@torch.no_grad()
def test_wrappers_in_either_order():
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False)
    for wrap in (lambda m: torch.compile(m, backend="eager"), lambda m: get_peft_model(m, lora), torch.nn.DataParallel):
        first, second = tiny_wan.transformer(), tiny_wan.transformer()
        torch.manual_seed(0)
        fps.apply(first, "fp8")
        first = wrap(first)
        torch.manual_seed(0)
        second = wrap(second)
        handle = fps.apply(second, "fp8")
        arguments = {**tiny_wan.inputs([300.0]), "return_dict": False}
        assert torch.equal(first(**arguments)[0], second(**arguments)[0])
        assert handle.report().forwards == {"transformer": 1} and fps.status(first) and fps.status(second)
        assert fps.remove(first) and fps.remove(second)
    torch._dynamo.reset()


@pytest.mark.parametrize("version", [1, 2])
def test_fsdp_in_either_order(version, tmp_path):
    """One process: the wrappers, not the sharding, are what matters here."""
    import torch.distributed as dist
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    def wrap(model: torch.nn.Module) -> torch.nn.Module:
        if version == 1:
            return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)
        mesh = dist.init_device_mesh("cpu", (1,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        results = []
        for before in (True, False):
            model = tiny_wan.transformer().train()
            handle = fps.apply(model, SWITCHED) if before else None
            model = wrap(model)
            handle = handle or fps.apply(model, SWITCHED)
            loss = tiny_wan.run(model, [300.0]).square().mean()
            loss.backward()
            assert handle.report().executions == {"transformer": [1, 1]}
            results.append(loss.item())
            handle.remove()
    finally:
        dist.destroy_process_group()
    assert results[0] == results[1]


@pytest.mark.parametrize("implementation", ["no_reentrant", "reentrant"])
@pytest.mark.parametrize("first", ["apply", "wrap"])
@pytest.mark.slow
def test_blocks_wrapped_for_checkpointing_recompute_their_own_forward(implementation, first):
    """torch's wrapper (FSDP, accelerate), two forwards at other levels and sizes before one backward, in either order of wrapping."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
        CheckpointImpl,
        apply_activation_checkpointing,
        checkpoint_wrapper,
    )

    def gradients(wrapped: bool) -> torch.Tensor:
        model = tiny_wan.transformer().train()
        schedule = {**MIXED, "tile": [2, 4, 4]}

        def wrap() -> None:
            kind = CheckpointImpl[implementation.upper()]
            apply_activation_checkpointing(
                model,
                checkpoint_wrapper_fn=lambda m: checkpoint_wrapper(m, checkpoint_impl=kind),
                check_fn=lambda module: isinstance(module, WanTransformerBlock),
            )

        if wrapped and first == "wrap":
            wrap()
        handle = fps.apply(model, schedule)
        if wrapped and first == "apply":
            wrap()
        forwards = [([900.0, 100.0], tiny_wan.GRID), ([300.0], (2, 6, 8))]
        sum(tiny_wan.run(model, t, grid=grid).square().mean() for t, grid in forwards).backward()
        assert handle.report().executions == {"transformer": [3, 3]}  # recomputation does not count
        handle.remove()
        return torch.cat([p.grad.flatten() for name, p in model.named_parameters() if "attn1.to_" in name])

    torch.testing.assert_close(gradients(True), gradients(False), rtol=1e-4, atol=1e-6)


def family() -> dict[str, tuple[Any, dict[str, torch.Tensor], int]]:
    """Name to (transformer, arguments beside Wan's, attentions)."""
    from diffusers import SkyReelsV2Transformer3DModel, WanAnimateTransformer3DModel, WanVACETransformer3DModel

    torch.manual_seed(0)
    common = {
        "patch_size": (1, 2, 2),
        "num_attention_heads": 2,
        "attention_head_dim": 64,
        "num_layers": 2,
        "ffn_dim": 64,
    }
    common |= {"text_dim": tiny_wan.TEXT, "out_channels": 16, "freq_dim": 64, "rope_max_seq_len": 64}
    vace = WanVACETransformer3DModel(**common, in_channels=16, vace_layers=[0], vace_in_channels=96)
    for block in vace.vace_blocks:
        torch.nn.init.normal_(block.proj_out.weight, std=0.02)
    animate = WanAnimateTransformer3DModel(
        **common, in_channels=36, latent_channels=16, image_dim=None, motion_encoder_size=16, motion_style_dim=8, motion_dim=4,
        motion_encoder_dim=8, face_encoder_hidden_dim=16, face_encoder_num_heads=2, inject_face_latents_blocks=2, motion_encoder_channel_sizes={"4": 8, "8": 8, "16": 8},
    )  # fmt: skip
    generator = torch.Generator().manual_seed(3)
    return {
        "vace": (
            vace.eval(),
            {
                "control_hidden_states": torch.randn(1, 96, 3, 16, 24, generator=generator),
                "control_hidden_states_scale": torch.ones(1),
            },
            3,
        ),
        "animate": (
            animate.eval(),
            {
                "hidden_states": torch.randn(1, 36, 3, 16, 24, generator=generator),
                "pose_hidden_states": torch.randn(1, 16, 2, 16, 24, generator=generator),
                "face_pixel_values": torch.randn(1, 3, 8, 16, 16, generator=generator),
            },
            2,
        ),
        "skyreels": (SkyReelsV2Transformer3DModel(**common, in_channels=16).eval(), {}, 2),
    }


@pytest.mark.parametrize("name", ["vace", "animate", "skyreels"])
@torch.no_grad()
@pytest.mark.slow
def test_the_wan_family(name):
    """All self-attention runs in FP8, near the dense output; a small window is far from it; remove() restores every bit."""
    model, extra, attentions = family()[name]

    def run() -> torch.Tensor:
        arguments = {**tiny_wan.inputs([300.0]), **extra}
        return model(**{k: v.clone() for k, v in arguments.items()}, return_dict=False)[0]

    def error(schedule: Any) -> float:
        with fps.apply(model, schedule) as handle:
            out = run()
            assert sum(row.calls for row in handle.report().rows) == attentions
        return float((out - dense).norm() / dense.norm())

    dense = run()
    narrow = {
        **SWITCHED,
        "tile": [1, 4, 4],  # of one frame: Animate's reference frame, dense both ways, leaves the others sparse
        "levels": {"narrow": {"precision": "fp8", "window": [1, 1, 1]}},
        "phases": [{"sigma": [1, 0], "level": "narrow"}],
    }
    assert 0 < error("fp8") < 0.01
    assert error(narrow) > 2 * error("fp8")
    assert error("dense") == 0 and torch.equal(run(), dense)
    assert not any(is_swapped(module) for module in model.modules())


@torch.no_grad()
def test_causal_skyreels_is_refused_or_dense():
    from diffusers import SkyReelsV2Transformer3DModel

    torch.manual_seed(0)
    model = SkyReelsV2Transformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=64, num_layers=1, ffn_dim=64, text_dim=tiny_wan.TEXT,
        in_channels=16, out_channels=16, freq_dim=64, rope_max_seq_len=64, num_frame_per_block=3,
    ).eval()  # fmt: skip
    plain = tiny_wan.run(model, [300.0])
    with fps.apply(model, "fp8"), pytest.raises(fps.UnsupportedError, match=r"blocks\.0\.attn1 got an attention mask"):
        tiny_wan.run(model, [300.0])
    with fps.apply(model, "fp8", on_unsupported="dense") as handle:
        assert torch.equal(tiny_wan.run(model, [300.0]), plain)
        assert list(handle.report().fallbacks.values()) == [1]


class Processor:
    def __call__(self, attention: Any, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (y.unflatten(2, (2, 64)).transpose(1, 2) for y in attention.qkv(x).chunk(3, dim=-1))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


@torch.no_grad()
def test_an_adapter_of_ones_own():
    """A class that no table names, and an attention that calls SDPA."""

    class Attention(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads, self.inner_dim, self.processor = 2, 128, Processor()
            self.qkv = torch.nn.Linear(128, 384)

    class Model(torch.nn.Module):
        class config:
            patch_size = (1, 1, 1)

        def __init__(self) -> None:
            super().__init__()
            self.blocks = torch.nn.ModuleList([torch.nn.ModuleDict({"attn": Attention()})])
            self.layers = torch.nn.ModuleList([self.blocks[0]["attn"]])

        def forward(self, hidden_states: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            attention = self.layers[0]
            return attention.processor(attention, hidden_states.flatten(2).transpose(1, 2))

    torch.manual_seed(0)
    model, x = Model(), torch.randn(1, 128, 3, 8, 12)
    adapter = Adapter("mine", ("Model",), lambda m: {"layers.0": m.layers[0]}, video_latents, sigma=lambda t, _: 1 - t)
    plain = model(x, torch.tensor([0.9]))
    with pytest.raises(fps.UnsupportedError, match="Model is not supported"):
        fps.apply(model, SWITCHED)
    with fps.apply(model, SWITCHED, adapter=adapter) as handle:
        got = model(x, torch.tensor([0.9]))
        assert {row.level: row.calls for row in handle.report().rows} == {"narrow": 0, "wide": 1}  # sigma 0.1
    assert 0 < float((got - plain).norm() / plain.norm()) < 0.1
