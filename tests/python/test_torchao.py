"""FP8 linears beside torchao's: the same rows quantized by both, what each can do, and models with torchao's weights under a schedule.

``quantize_`` of float8 wants a GPU; its tensors do not: they are made as it makes them, and multiplied by ``torch._scaled_mm`` on the CPU.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import tiny_wan
import torch
from torch import Tensor

import fpsattention as fps
from fpsattention.errors import UnsupportedError
from fpsattention.ops.linear import fp8_linear, quantize_rows

pytest.importorskip("torchao")
from torchao.float8 import Float8LinearConfig, convert_to_float8_training
from torchao.float8.inference import Float8MMConfig
from torchao.quantization import PerRow
from torchao.quantization.quantize_.workflows.float8.float8_tensor import Float8Tensor, QuantizeTensorToFloat8Kwargs

BOTH: dict[str, Any] = {
    "format": "fpsattn-schedule/2", "tile": tiny_wan.TILE, "own_linears": [],
    "levels": {"both": {"precision": "fp8", "linears": "fp8"}}, "phases": [{"sigma": [1.0, 0.0], "level": "both"}],
}  # fmt: skip


@pytest.fixture(scope="module")
def layer() -> torch.nn.Linear:
    torch.manual_seed(0)
    return torch.nn.Linear(512, 768).bfloat16()


@pytest.fixture(scope="module")
def x() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(1000, 512, generator=generator) * torch.logspace(-2, 2, 1000)[:, None]).bfloat16()


def quantized(layer: torch.nn.Linear) -> torch.nn.Linear:
    """What ``quantize_(., Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()))`` makes of a layer, without fast accumulation."""
    twin = copy.deepcopy(layer)
    rows = QuantizeTensorToFloat8Kwargs(torch.float8_e4m3fn, PerRow())
    options = {"mm_config": Float8MMConfig(use_fast_accum=False), "act_quant_kwargs": rows}
    twin.weight = torch.nn.Parameter(
        Float8Tensor.from_hp(layer.weight.detach(), granularity=PerRow(), **options), False
    )
    return twin


def error(y: Tensor, wanted: Tensor) -> float:
    """Relative L2 of a row, mean of the rows."""
    return float(((y.double() - wanted).norm(dim=1) / wanted.norm(dim=1)).mean())


@torch.no_grad()
def test_the_same_rows(layer, x):
    """torchao rounds a scale to the 16 bits of x: the largest value of a row saturates where that is below, and it is off by up to 2^-8. Few
    codes differ, and the product is as exact. A row of zeros is NaN there."""
    theirs = Float8Tensor.from_hp(x, granularity=PerRow())
    x8, scale = quantize_rows(x)
    apart = theirs.scale / scale - 1
    assert 2.0**-10 < float(apart.abs().max()) <= 2.0**-8 and 0.3 < float((apart < 0).float().mean()) < 0.6
    assert 0.95 < float((theirs.qdata.view(torch.uint8) == x8.view(torch.uint8)).float().mean()) < 1.0
    largest = x.abs().argmax(1, keepdim=True)
    exact = x.float().gather(1, largest)
    assert ((x8.float() * scale).gather(1, largest) / exact - 1).abs().max() < 2.0**-22
    assert ((theirs.qdata.float() * theirs.scale).gather(1, largest) / exact - 1).abs().max() > 2.0**-10
    wanted = torch.nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double())
    ours, other = error(fp8_linear(x, layer.weight, layer.bias), wanted), error(quantized(layer)(x), wanted)
    assert ours == pytest.approx(0.0326, rel=0.02) and ours < other < 1.01 * ours
    zeros = torch.zeros(2, 512, dtype=torch.bfloat16)
    assert quantized(layer)(zeros).isnan().all() and torch.equal(fp8_linear(zeros, layer.weight), torch.zeros(2, 768))


def test_what_a_schedule_needs_of_a_layer(layer, x):
    """torchao's inference layer has no 16-bit weights to go back to, another state dict, and no gradient; its training layer keeps both,
    and quantizes what comes back, too."""
    inference, plain = quantized(layer), copy.deepcopy(layer)
    assert inference.weight.qdata.dtype == torch.float8_e4m3fn and plain.weight.dtype == torch.bfloat16
    with pytest.raises(RuntimeError):
        plain.load_state_dict(inference.state_dict())
    with pytest.raises(RuntimeError, match="not implemented"):
        inference(x.clone().requires_grad_()).sum().backward()

    config = replace(Float8LinearConfig.from_recipe_name("rowwise"), emulate=True)
    training = convert_to_float8_training(torch.nn.Sequential(copy.deepcopy(layer)), config=config)
    assert list(training.state_dict()) == ["0.weight", "0.bias"]
    rows = x[450:550]
    up = torch.randn(100, 768, generator=torch.Generator().manual_seed(2)).bfloat16()
    exact = copy.deepcopy(layer).double()
    exact(rows.double()).backward(up.double())
    training(rows).backward(up)
    fp8_linear(rows, plain.weight, plain.bias).backward(up)
    off = [
        float((m.weight.grad.double() - exact.weight.grad).norm() / exact.weight.grad.norm())
        for m in (plain, training[0])
    ]
    assert off[0] < 0.03 < off[1]


def layers(model: torch.nn.Module, make: Any) -> torch.nn.Module:
    for name, module in list(model.blocks.named_modules()):
        if type(module) is torch.nn.Linear and "attn2.to_k" not in name:
            parent, _, leaf = name.rpartition(".")
            model.blocks.get_submodule(parent)._modules[leaf] = make(module)
    return model


@torch.no_grad()
def test_models_with_float8_weights_run_under_a_schedule():
    """Attention, tile order and prepare are ours, the products torchao's, layer by layer in the report."""
    model = layers(tiny_wan.transformer(), quantized)
    own = tiny_wan.run(model, [300.0])
    with pytest.raises(UnsupportedError, match="to_q has weights that are quantized already \\(Float8Tensor\\)"):
        fps.apply(model, BOTH)
    with fps.apply(model, "fp8", prepare=True) as handle:
        attention = tiny_wan.run(model, [300.0])
        assert handle.report().prepared["transformer"] == [1, 1]
    with fps.apply(model, {**BOTH, "tile": None}, on_unsupported="dense", prepare="auto") as handle:
        assert torch.equal(tiny_wan.run(model, [300.0]), attention)
        reasons = [reason for reason in handle.report().fallbacks if "Float8Tensor" in reason]
    assert len(reasons) == 16 and 0 < float((attention - own).norm() / own.norm()) < 0.05
    assert torch.equal(tiny_wan.run(model, [300.0]), own)


def test_models_with_float8_training_layers_train_under_a_schedule():
    config = replace(Float8LinearConfig.from_recipe_name("rowwise"), emulate=True)
    model = tiny_wan.transformer()
    convert_to_float8_training(model.blocks, config=config)
    with pytest.raises(UnsupportedError, match="to_q is a Float8Linear, expected an nn.Linear"):
        fps.apply(model, BOTH)
    with fps.apply(model, "fp8", prepare=True):
        tiny_wan.run(model, [300.0]).square().mean().backward()
    for name in ("attn1.to_q.weight", "attn1.norm_q.weight", "ffn.net.2.weight"):
        gradient = model.blocks[0].get_parameter(name).grad
        assert gradient.isfinite().all() and gradient.any()
