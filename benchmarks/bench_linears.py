"""Linear layers of a block: the model's own, FP8 linears, and torchao's float8 dynamic quantization where it is installed.

All calls start from 16-bit activations and, but for torchao's, from 16-bit weights, which FP8 linears quantize in every call.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fpsattention.ops.linear import fp8_linear

from . import timing

# Rows, inputs, outputs: Wan2.1-14B at 720p, its square projections and its feed-forward.
SIZES = {
    "quick": ((75_600, 5120, 13_824),),
    "full": ((75_600, 5120, 5120), (75_600, 5120, 13_824), (75_600, 13_824, 5120)),
    "dry": ((70, 64, 48),),
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    sizes = SIZES[metafunc.config.bench["mode"]]
    metafunc.parametrize("size", sizes, ids=lambda size: "x".join(map(str, size)))


def torchao_linear(layer: torch.nn.Linear) -> torch.nn.Module | None:
    """The layer as torchao's float8 dynamic quantization by rows makes it, or None where torchao is not installed. Without fast accumulation,
    as ours."""
    if importlib.util.find_spec("torchao") is None:
        return None
    from torchao.float8.inference import Float8MMConfig
    from torchao.quantization import PerRow
    from torchao.quantization.quantize_.workflows.float8 import float8_tensor

    rows = float8_tensor.QuantizeTensorToFloat8Kwargs(torch.float8_e4m3fn, PerRow())
    config, weight = Float8MMConfig(use_fast_accum=False), layer.weight.detach()
    weight = float8_tensor.Float8Tensor.from_hp(weight, granularity=PerRow(), mm_config=config, act_quant_kwargs=rows)
    theirs = torch.nn.Linear(1, 1, bias=False, device=layer.weight.device)
    theirs.weight = torch.nn.Parameter(weight, requires_grad=False)
    theirs.bias = layer.bias
    return theirs


@torch.no_grad()
def test_linear(size: tuple[int, int, int], bench, record) -> None:
    device, (m, k, n) = bench["device"], size
    torch.manual_seed(0)
    layer = torch.nn.Linear(k, n, device=device, dtype=torch.bfloat16).requires_grad_(False)
    inputs = [torch.randn(m, k, device=device, dtype=torch.bfloat16) for _ in range(2)]
    fp8: dict[str, Callable[[torch.Tensor], Any]] = {"fps-fp8": lambda x: fp8_linear(x, layer.weight, layer.bias)}
    if (theirs := torchao_linear(layer)) is not None:
        fp8["torchao-fp8"] = theirs
    compiled = {f"{name}-compiled": torch.compile(call) for name, call in fp8.items()} if device == "cuda" else {}
    calls = {"bf16": layer, **fp8, **compiled}
    failed: dict[str, str] = {}
    times = timing.interleaved(
        {name: lambda turn, call=call: call(inputs[turn % 2]) for name, call in calls.items()},
        device, timing.BUDGET_S[bench["mode"]], failed=failed,
    )  # fmt: skip
    rows = inputs[0][:64]
    exact = torch.nn.functional.linear(rows.float(), layer.weight.float(), layer.bias.float())
    for name, ms in times.items():
        off = float((calls[name](rows).float() - exact).norm() / exact.norm())
        record("linear", name=name, size=list(size), ms=ms, rate=2 * m * k * n / ms["median"] / 1e9, error=off)
        assert off < (0.01 if name == "bf16" else 0.05), f"{name}: relative error {off}"
    assert "fps-fp8" in times and "bf16" in times, failed
