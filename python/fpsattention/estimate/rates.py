"""What GPUs do per second: datasheets, what others measured, and what is predicted, each with its source."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError

BASELINES = {"cudnn": "cuDNN", "fa3": "FlashAttention-3", "fa2": "FlashAttention-2"}
_OPTIMISM = 1.10  # of tools/sasstime, mean over six kernels of FlashAttention-3: docs/speed_model.md


@dataclass(frozen=True)
class Rate:
    """Per second, in FLOP or bytes. ``kind`` is "measured" (by whom ``source`` names, not here) or "predicted" (how, it says)."""

    value: float
    kind: str
    source: str


@dataclass(frozen=True)
class Gpu:
    """Peaks of the datasheet (FLOP/s without sparsity, bytes/s), and rates that kernels reach.

    Attributes:
        bf16, fp8: matrix products of the linear layers.
        memory: of kernels that only move data.
        baselines: dense BF16 attention, D = 128, by name.
        attention: FP8 attention of this library over computed blocks, by head dimension.
    """

    name: str
    title: str
    peak_bf16: float
    peak_fp8: float
    peak_memory: float
    bf16: Rate
    fp8: Rate
    memory: Rate
    baselines: dict[str, Rate]
    attention: dict[int, Rate]


def predictions() -> dict[str, Any]:
    """What ``tests/static/predictions.py`` records of the kernels' main loops; docs/speed_model.md shows the same file."""
    return json.loads(Path(__file__).with_name("predictions.json").read_text(encoding="utf-8"))


def _forward() -> dict[int, Rate]:
    data = predictions()
    rates = {}
    for dim in (64, 128):
        tflops = data["kernels"][f"fpsattn_forward_d{dim}"]["tflops"]
        source = f"{tflops} TFLOP/s of the main loop (docs/speed_model.md; {data['calibration']}) less the model's mean optimism of 10 %"
        rates[dim] = Rate(tflops * 1e12 / _OPTIMISM, "predicted", source)
    return rates


def _hopper(name: str, memory: float) -> Gpu:
    def predicted(tflops: float, source: str) -> Rate:
        return Rate(tflops * 1e12, "predicted", source)

    def measured(tflops: float, source: str) -> Rate:
        return Rate(tflops * 1e12, "measured", source)

    cudnn = "cuDNN 9.19, H200, 16k tokens (cudnn-frontend's benchmark files, 2026-02)"
    return Gpu(
        name, name.upper(), 989.5e12, 1979e12, memory,
        bf16=predicted(770, "0.78 of peak, the share of peak that DeepGEMM measured for FP8"),
        fp8=predicted(1240, "0.8 of DeepGEMM's 1550 (H800, its README, 2025-04), for torch's row-wise kernel"),
        memory=Rate(0.9 * memory, "predicted", "0.9 of the datasheet's bandwidth"),
        baselines={
            "cudnn": measured(702, cudnn) if name == "h200" else predicted(702, f"as {cudnn}"),
            "fa3": measured(639, "Hopper, 8k tokens (tritonbench pull request 1254, 2026-09)"),
            "fa2": measured(346, "35 % of an H100's peak (arXiv 2407.08608)"),
        },
        attention=_forward(),
    )  # fmt: skip


def _h20() -> Gpu:
    share = "0.94 of peak, the share that FlashAttention-3 measured on an H20"
    fp8 = Rate(278e12, "predicted", share)
    return Gpu(
        "h20", "H20", 148e12, 296e12, 4.0e12,
        bf16=Rate(139e12, "predicted", share), fp8=fp8,
        memory=Rate(3.6e12, "predicted", "0.9 of the datasheet's bandwidth"),
        baselines={
            "cudnn": Rate(129e12, "measured", "2k tokens (flash-attention issue 1310)"),
            "fa3": Rate(139e12, "measured", "flex-block-attn's benchmark files, 2025-11"),
            "fa2": Rate(88.5e12, "measured", "flex-block-attn's benchmark files, 2025-11"),
        },
        attention={64: fp8, 128: fp8},
    )  # fmt: skip


GPUS = {gpu.name: gpu for gpu in (_hopper("h200", 4.8e12), _hopper("h100", 3.35e12), _h20())}


def gpu_named(name: str) -> Gpu:
    """ConfigError where it is unknown."""
    if name not in GPUS:
        raise ConfigError(f"fpsattention.estimate: gpu {name!r}, expected one of {', '.join(GPUS)}")
    return GPUS[name]
