"""The ComfyUI node, against a stub with ComfyUI's call shapes."""

from __future__ import annotations

import importlib.util
import json
import logging
import shutil
import sys
from pathlib import Path

import pytest
import torch
from outside import GRID, HEADS, comfy
from test_outside import SPARSE, close_to_masked_and_far_from_dense, rand

from fpsattention.errors import ConfigError, UnsupportedError
from fpsattention.integrations import comfyui
from fpsattention.integrations.comfyui.override import OVERRIDE

FLOW = torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0])


@pytest.fixture(autouse=True)
def no_gradients():
    comfy.CALLS.clear()
    with torch.no_grad():
        yield


@pytest.fixture
def schedule_file(tmp_path):
    path = tmp_path / "schedule.json"
    path.write_text(json.dumps(SPARSE))
    return str(path)


def node():
    return comfyui.NODE_CLASS_MAPPINGS["FPSAttention"]()


def video(batch: int = 2, grid: tuple[int, int, int] = GRID) -> torch.Tensor:
    return rand(batch, 4, grid[0], 2 * grid[1], 2 * grid[2])


def text(batch: int = 2, tokens: int = 5) -> torch.Tensor:
    return rand(batch, tokens, HEADS * 64)


def observed(model) -> tuple[list, object]:
    override = model.model_options["transformer_options"][OVERRIDE]
    seen: list = []
    for site in override.hosted.sites:
        site.observers.append(lambda *call: seen.append(call))
    return seen, override


def test_a_clone_runs_sparse_and_the_model_itself_does_not(schedule_file):
    model = comfy.ModelPatcher(comfy.WanModel())
    plain = model.sample(video(), text(), FLOW)
    (clone,) = node().apply(model, schedule_file=schedule_file)
    seen, override = observed(clone)
    outs = clone.sample(video(), text(), FLOW)
    assert len(seen) == 2 * 4  # layers x steps
    close_to_masked_and_far_from_dense(seen[:4])
    assert not torch.equal(outs[0], plain[0]) and not torch.equal(outs[1], plain[1])
    assert torch.equal(outs[2], plain[2]) and torch.equal(outs[3], plain[3])  # dense from sigma 0.5 on: the very call
    calls = {(row.layer, row.level): row.calls for row in override.report().rows}
    assert calls == {(0, "narrow"): 4, (0, "dense"): 4, (1, "narrow"): 4, (1, "dense"): 4}
    assert not override.report().fallbacks
    assert all(torch.equal(a, b) for a, b in zip(model.sample(video(), text(), FLOW), plain, strict=True))
    assert model.model_options == {"transformer_options": {}} and not model.wrappers


def test_blocks_are_known_where_the_model_does_not_tell(schedule_file):
    """LTX-Video. Hooks are on the blocks while a forward runs, and gone after it."""
    model = comfy.ModelPatcher(comfy.LTXVModel())
    (clone,) = node().apply(model, schedule_file=schedule_file)
    seen, override = observed(clone)
    clone.sample(video(), text(), FLOW[[0, 4]])
    assert [name for name, *_ in seen] == [
        "diffusion_model.transformer_blocks.0",
        "diffusion_model.transformer_blocks.1",
    ]
    close_to_masked_and_far_from_dense(seen)
    assert not override.report().fallbacks
    assert not any(block._forward_pre_hooks for block in model.diffusion_model.transformer_blocks)


def test_an_override_that_was_there_stays_the_dense_path(schedule_file):
    def other(func, *args, **kwargs):
        assert kwargs["_inside_attn_wrapper"]
        comfy.CALLS.append("other")
        return func(*args, **kwargs)

    model = comfy.ModelPatcher(comfy.WanModel())
    model.model_options["transformer_options"][OVERRIDE] = other
    (clone,) = node().apply(model, schedule_file=schedule_file)
    clone.sample(video(), text(), FLOW[[0, 4]])
    assert comfy.CALLS == ["other", "own"] * 2  # cross-attention of two layers
    comfy.CALLS.clear()
    clone.sample(video(), text(), FLOW[[3, 4]])
    assert comfy.CALLS == ["other", "own"] * 4  # and self-attention
    (again,) = node().apply(clone, schedule="dense")  # a second node takes the place of the first
    assert again.model_options["transformer_options"][OVERRIDE].previous is other
    assert [len(keys["fpsattention"]) for keys in again.wrappers.values()] == [1, 1]


def test_presets_take_their_share_of_the_steps(schedule_file):
    """ "training_free" starts dense; a sampler that runs part of the steps places the phases by sigma."""
    model = comfy.ModelPatcher(comfy.WanModel())
    (clone,) = node().apply(model, schedule="training_free", flow_shift=1.0)
    _, override = observed(clone)
    clone.sample(video(1), text(1), torch.linspace(1.0, 0.0, 11))
    whole = {row.level: row.calls for row in override.report().rows if row.layer == 0}
    want = override.hosted.tables.schedule.segment_levels(0)[-1]
    assert 1 <= whole[want.name] < 10 == sum(whole.values())
    clone.sample(video(1), text(1), torch.linspace(0.5, 0.0, 6))
    late = {row.level: row.calls for row in override.report().rows if row.layer == 0}
    assert late[want.name] == 0 and sum(late.values()) == 5


def test_other_samplers_tell_unbounded_sigmas(schedule_file):
    (clone,) = node().apply(comfy.ModelPatcher(comfy.WanModel()), schedule_file=schedule_file)
    _, override = observed(clone)
    clone.sample(video(1), text(1), torch.tensor([80.0, 3.0, 0.5, 0.0]))  # noise shares 0.99, 0.75, 0.33
    assert {row.level: row.calls for row in override.report().rows if row.layer == 0} == {"narrow": 2, "dense": 1}


def test_reference_image_and_joint_text(schedule_file):
    (clone,) = node().apply(comfy.ModelPatcher(comfy.WanModel()), schedule_file=schedule_file)
    seen, _ = observed(clone)
    reference = rand(2, 4, 1, 2 * GRID[1], 2 * GRID[2])
    clone.sample(video(), text(), FLOW[[0, 4]], reference_latent=reference)
    close_to_masked_and_far_from_dense(seen, others=GRID[1] * GRID[2], position="prefix")
    (clone,) = node().apply(comfy.ModelPatcher(comfy.HunyuanVideo()), schedule_file=schedule_file)
    seen, override = observed(clone)
    clone.sample(video(), text(), FLOW[[0, 4]])
    assert [name for name, *_ in seen] == ["diffusion_model.double_blocks.0", "diffusion_model.single_blocks.0"]
    close_to_masked_and_far_from_dense(seen, others=5)
    assert comfy.CALLS.count("own") == 2 + 1  # cross-attention of Wan, the refiner


def test_what_it_cannot_serve_is_dense_and_said(schedule_file, caplog):
    model = comfy.ModelPatcher(comfy.WanModel())
    plain = model.sample(video(), text(tokens=192), FLOW[[0, 4]])
    (clone,) = node().apply(model, schedule_file=schedule_file)
    with caplog.at_level(logging.WARNING, "fpsattention"):
        outs = clone.sample(video(), text(tokens=192), FLOW[[0, 4]])
    assert torch.equal(outs[0], plain[0])
    assert "so many keys cross-attention has" in caplog.text
    (clone,) = node().apply(model, schedule_file=schedule_file, on_unsupported="raise")
    with pytest.raises(UnsupportedError, match="time_dim_concat"):
        clone.sample(video(), text(), FLOW[[0, 4]], time_dim_concat=video())
    hunyuan = comfy.ModelPatcher(comfy.HunyuanVideo())
    (clone,) = node().apply(hunyuan, schedule_file=schedule_file, on_unsupported="raise")
    with pytest.raises(UnsupportedError, match="attention mask"):
        clone.sample(video(), text(), FLOW[[0, 4]], attention_mask=torch.zeros(1, 1, 1, 197))
    with pytest.raises(UnsupportedError, match="Linear is not supported, expected a model of class WanModel"):
        node().apply(comfy.ModelPatcher(torch.nn.Linear(1, 1)))
    with pytest.raises(ConfigError, match="on_unsupported"):
        node().apply(model, on_unsupported="maybe")


def test_the_folder_is_a_custom_node(tmp_path):
    """ComfyUI loads folders of ``custom_nodes`` by path, as modules with the name of their path."""
    folder = tmp_path / "custom_nodes" / "fpsattention_node"
    shutil.copytree(Path(comfyui.__file__).parent, folder, ignore=shutil.ignore_patterns("__pycache__"))
    name = str(folder).replace(".", "_x_")
    spec = importlib.util.spec_from_file_location(name, folder / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
        cls = module.NODE_CLASS_MAPPINGS["FPSAttention"]
        assert module.NODE_DISPLAY_NAME_MAPPINGS.keys() == module.NODE_CLASS_MAPPINGS.keys()
        inputs = cls.INPUT_TYPES()
        assert cls.RETURN_TYPES == ("MODEL",) and inputs["required"]["model"] == ("MODEL",)
        (clone,) = getattr(cls(), cls.FUNCTION)(comfy.ModelPatcher(comfy.WanModel()))
        assert OVERRIDE in clone.model_options["transformer_options"]
    finally:
        del sys.modules[name]
