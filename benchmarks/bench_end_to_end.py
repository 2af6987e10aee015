"""End to end: one denoising step of the real Wan2.1 transformers with random weights, dense against ``fps.apply``.

Weights are made on the device, nothing is downloaded. The dense step takes the best SDPA backend and is measured before and
after the sparse ones (their difference is the drift of the run). Each density runs with the model's own linears, with FP8 linears, and
with norms and RoPE in the quantizer too. Amdahl's law says what the attention's own speed-up should have made of the whole step;
``benchmarks.tables`` prints the parts in the table of ``fpsattn estimate``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

import fpsattention as fps
from fpsattention import estimate
from fpsattention.analysis.time_split import coarse, time_split
from fpsattention.estimate.forward import DENSITIES

from . import timing


@dataclass(frozen=True)
class Model:
    """A transformer configuration and a latent size: (frames, height, width) after the VAE."""

    name: str
    config: dict[str, Any]
    latent: tuple[int, int, int]
    text_tokens: int = 512
    all_layers: int = 0  # of the real model, where ``config`` has fewer
    known: str = ""  # to fpsattention.estimate

    def truncated(self, layers: int) -> Model:
        """The same blocks, fewer of them: time per block is unchanged, the step is shorter."""
        config = {**self.config, "num_layers": layers}
        return replace(self, config=config, all_layers=self.config["num_layers"])

    @property
    def grid(self) -> tuple[int, int, int]:
        return self.latent[0], self.latent[1] // 2, self.latent[2] // 2

    def describe(self) -> dict[str, Any]:
        layers = self.config["num_layers"]
        return {"name": self.name, "grid": self.grid, "layers": layers, "layers_of_real_model": self.all_layers or layers,
                "heads": self.config["num_attention_heads"], "head_dim": self.config["attention_head_dim"]}  # fmt: skip


_14B = dict(num_attention_heads=40, attention_head_dim=128, ffn_dim=13824, num_layers=40)
_1B = dict(num_attention_heads=12, attention_head_dim=128, ffn_dim=8960, num_layers=30)
_720P, _480P = (21, 90, 160), (21, 60, 104)
WAN_14B_720P = Model("wan2.1-14b-720p", _14B, _720P, known="wan-14b")
WAN_14B_480P = Model("wan2.1-14b-480p", _14B, _480P, known="wan-14b")
WAN_1B_720P = Model("wan2.1-1.3b-720p", _1B, _720P, known="wan-1.3b")
WAN_1B_480P = Model("wan2.1-1.3b-480p", _1B, _480P, known="wan-1.3b")
_TINY = dict(num_attention_heads=2, attention_head_dim=64, ffn_dim=64, num_layers=2, text_dim=32)
MODELS = {
    "quick": (WAN_14B_720P.truncated(2), WAN_1B_480P.truncated(4)),
    "full": (WAN_1B_480P, WAN_14B_720P, WAN_14B_480P.truncated(8), WAN_1B_720P),
    "dry": (Model("tiny", _TINY, (3, 16, 24), text_tokens=8),),
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    metafunc.parametrize("model", MODELS[metafunc.config.bench["mode"]], ids=lambda model: model.name)


def build(model: Model, device: str) -> Any:
    """The transformer in BF16 with random weights, made on the device."""
    diffusers = pytest.importorskip("diffusers")
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            torch.manual_seed(0)
            transformer = diffusers.WanTransformer3DModel(**model.config)
    finally:
        torch.set_default_dtype(default)
    return transformer.eval().requires_grad_(False)


def make_step(transformer: Any, model: Model, device: str) -> Callable[[float], Any]:
    """``step(sigma)``: one forward of the transformer at that noise level, batch 1."""
    generator = torch.Generator(device).manual_seed(1)
    random = lambda *shape: torch.randn(*shape, device=device, dtype=torch.bfloat16, generator=generator)  # noqa: E731
    latents = random(1, transformer.config.in_channels, *model.latent)
    text = random(1, model.text_tokens, transformer.config.text_dim)
    timesteps: dict[float, torch.Tensor] = {}

    def step(sigma: float) -> Any:
        if sigma not in timesteps:
            timesteps[sigma] = torch.tensor([sigma * 1000.0], device=device)
        with torch.no_grad():
            return transformer(latents, timesteps[sigma], text, return_dict=False)[0]

    return step


@contextlib.contextmanager
def sdpa_backend(name: str | None) -> Iterator[None]:
    """Restricts torch's SDPA to one backend; None leaves the choice to torch."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(getattr(SDPBackend, name)) if name else contextlib.nullcontext():
        yield


def schedule_of(density: float, linears: str) -> dict[str, Any]:
    """One level at all sigmas, in all layers."""
    level = {"precision": "fp8", "granularity": "block", "window": {"density": density}, "linears": linears}
    phases = [{"sigma": [1.0, 0.0], "level": "it"}]
    return {"format": "fpsattn-schedule/2", "own_linears": [], "levels": {"it": level}, "phases": phases}


def floors(
    model: Model, device: str, density: float, configuration: str, prepare: bool = False
) -> dict[str, float | None]:
    """ms at the peaks of this GPU's datasheet, by part; empty for models and GPUs that the estimate does not know."""
    title = torch.cuda.get_device_name() if device == "cuda" else ""
    gpu = next((name for name in ("h200", "h100", "h20") if name.upper() in title), None)
    if gpu is None or not model.known:
        return {}
    sizes = replace(estimate.MODELS[model.known], layers=(model.config["num_layers"], 0))
    found = estimate.estimate(sizes, model.grid, gpu, density=density, own_linears=False, prepare=prepare)
    return {part: time.floor for part, time in found.columns[configuration].items()}


def amdahl(dense: dict[str, float], sparse: dict[str, float]) -> dict[str, float]:
    """What the speed-up of attention (quantization included) predicts for the whole step.

    ValueError where a split has no attention: the ops go by other names than ``time_split`` knows.
    """
    attention, replaced = (split["attention"] + split["quantize"] for split in (dense, sparse))
    if not (attention and replaced):
        raise ValueError(f"no self-attention was seen: dense {dense}, sparse {sparse}")
    share, speedup = attention / sum(dense.values()), attention / replaced
    return {"attention_share": share, "attention_speedup": speedup, "predicted": 1.0 / (1.0 - share + share / speedup),
            "limit": 1.0 / (1.0 - share)}  # fmt: skip


def peak_bytes(call: Callable[[], Any], device: str) -> int | None:
    if device != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def test_step(model: Model, bench, record) -> None:
    device, dry = bench["device"], bench["mode"] == "dry"
    transformer = build(model, device)
    step = make_step(transformer, model, device)
    about = {"model": model.describe(), "weights_bytes": sum(p.nbytes for p in transformer.parameters())}
    backends: dict[str, str | None] = {"dense-cudnn": "CUDNN_ATTENTION", "dense-flash": "FLASH_ATTENTION"}
    if device == "cpu":
        backends = {"dense": None}
    failed: dict[str, str] = {}

    def dense(name: str) -> Any:
        with sdpa_backend(backends[name]):
            return step(0.5)

    def measure(calls: dict[str, Callable[[], Any]], seconds: float) -> dict[str, Any]:
        return timing.interleaved(
            {name: lambda _, call=call: call() for name, call in calls.items()}, device, seconds,
            min_repeats=2 if dry else 3, max_repeats=2 if dry else 12, failed=failed,
        )  # fmt: skip

    def split(call: Callable[[], Any]) -> dict[str, float]:
        return {part: 1e3 * seconds for part, seconds in time_split(call, device, fine=True)[1].items()}

    budget = {"quick": 6.0, "full": 30.0, "dry": 0.1}[bench["mode"]]
    before = measure({name: lambda name=name: dense(name) for name in backends}, budget)
    assert before, failed
    best = min(before, key=lambda name: before[name]["median"])
    dense_split = split(lambda: dense(best))
    dense_peak = peak_bytes(lambda: dense(best), device)

    times, splits, peaks, finite, about_run = {}, {}, {}, {}, {}
    for linears, prepare in (("bf16", False), ("fp8", False), ("fp8", True)):
        for density in DENSITIES:
            name = f"fps-{density:g}" + ("-fp8-prepare" if prepare else "-fp8-linears" if linears == "fp8" else "")
            # cross-attention runs as it did before
            with fps.apply(transformer, schedule_of(density, linears), prepare=prepare), sdpa_backend(backends[best]):
                found = measure({name: lambda: step(0.5)}, budget / 6)
                if name in found:
                    times[name], splits[name] = found[name], split(lambda: step(0.5))
                    peaks[name], finite[name] = peak_bytes(lambda: step(0.5), device), bool(step(0.5).isfinite().all())
                    configuration = "FP8 linears too" if linears == "fp8" else "attention only"
                    floor = floors(model, device, density, configuration, prepare)
                    about_run[name] = {"density": density, "linears": linears, "prepare": prepare, "floor_ms": floor}
    after = measure({best: lambda: dense(best)}, budget / 2)
    for name, ms in before.items():
        baseline = {}
        if name == best:
            baseline = {"split_ms": coarse(dense_split), "parts_ms": dense_split, "floor_ms": floors(model, device, 1.0, "baseline"),
                        "peak_bytes": dense_peak, "drift": after[best]["median"] / ms["median"] - 1.0}  # fmt: skip
        record("step", **about, name=name, ms=ms, **baseline)
    for name, ms in times.items():
        record(
            "step", **about, **about_run[name], name=name, ms=ms, split_ms=coarse(splits[name]), parts_ms=splits[name],
            peak_bytes=peaks[name], speedup=before[best]["median"] / ms["median"], finite=finite[name],
            amdahl=amdahl(coarse(dense_split), coarse(splits[name])),
        )  # fmt: skip
    assert all(finite.values()), f"the transformer's output is not finite: {finite}"
    assert not {name for name in failed if name.startswith("fps")}, failed
