"""End to end: one denoising step of the real Wan2.1 transformers with random weights, dense against ``fps.apply``.

Weights are made on the device, nothing is downloaded. The dense step takes the best SDPA backend and is measured before and
after the sparse one (their difference is the drift of the run). Time is split with torch's profiler: quantize, attention
(self-attention only), rest; Amdahl's law then says what the attention's own speed-up should have made of the whole step.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from ..context import Context, Skip, Unit

NAME, TITLE = "end_to_end", "one denoising step of Wan2.1, random weights"
WEIGHTS = {"quick": 45.0, "full": 220.0, "dry": 14.0}
CORRECTNESS = False
OWN_CODE = False
PRESET = "paper"
CATEGORIES = ("quantize", "attention", "rest")


@dataclass(frozen=True)
class Model:
    """A transformer configuration and a latent size: (frames, height, width) after the VAE."""

    name: str
    config: dict[str, Any]
    latent: tuple[int, int, int]
    text_tokens: int = 512
    all_layers: int = 0  # of the real model, where ``config`` has fewer

    @property
    def layers(self) -> int:
        return self.config["num_layers"]

    def truncated(self, layers: int) -> Model:
        """The same blocks, fewer of them: time per block is unchanged, the step is shorter."""
        return replace(self, config={**self.config, "num_layers": layers}, all_layers=self.layers)

    def describe(self) -> dict[str, Any]:
        grid = [self.latent[0], self.latent[1] // 2, self.latent[2] // 2]
        return {
            "name": self.name, "grid": grid, "tokens": grid[0] * grid[1] * grid[2], "layers": self.layers,
            "layers_of_real_model": self.all_layers or self.layers, "heads": self.config["num_attention_heads"],
            "head_dim": self.config["attention_head_dim"],
        }  # fmt: skip


_14B = dict(num_attention_heads=40, attention_head_dim=128, ffn_dim=13824, num_layers=40)
_1B = dict(num_attention_heads=12, attention_head_dim=128, ffn_dim=8960, num_layers=30)
_720P, _480P = (21, 90, 160), (21, 60, 104)
WAN_14B_720P, WAN_14B_480P = Model("wan2.1-14b-720p", _14B, _720P), Model("wan2.1-14b-480p", _14B, _480P)
WAN_1B_720P, WAN_1B_480P = Model("wan2.1-1.3b-720p", _1B, _720P), Model("wan2.1-1.3b-480p", _1B, _480P)
TINY = Model(
    "tiny",
    dict(num_attention_heads=2, attention_head_dim=64, ffn_dim=64, num_layers=2, text_dim=32),
    (3, 16, 24),
    text_tokens=8,
)


def build(model: Model, device: str) -> Any:
    """The transformer in BF16 with random weights, made on the device."""
    import torch
    from diffusers import WanTransformer3DModel

    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            torch.manual_seed(0)
            transformer = WanTransformer3DModel(**model.config)
    finally:
        torch.set_default_dtype(default)
    return transformer.eval().requires_grad_(False)


def make_step(transformer: Any, model: Model, device: str) -> Callable[[float], Any]:
    """``step(sigma)``: one forward of the transformer at that noise level, batch 1."""
    import torch

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


# Time split ------------------------------------------------------------------------------------------------------------


def category(names: list[str], kernel: str) -> str:
    """Where a kernel's time belongs, by the names of the operations it ran under (innermost first) and its own."""
    if any("fpsattn::quantize" in name for name in names):
        return "quantize"
    if any("fpsattn::forward" in name for name in names):
        return "attention"
    if any("fpsattn::attention" in name for name in names):
        return (
            "attention" if not kernel or "forward" in kernel else "quantize"
        )  # one op: its kernels' names tell them apart
    if "self_attention" in names and any("scaled_dot_product" in name for name in names):
        return "attention"
    return "rest"


def split_events(events: Any, device: str) -> dict[str, float]:
    """Milliseconds per category: kernel durations on a GPU, the operations' own time on a CPU."""
    totals = dict.fromkeys(CATEGORIES, 0.0)
    for event in events:
        names, node = [], event
        while node is not None:
            names.append(node.name)
            node = node.cpu_parent
        if device == "cuda":
            for kernel in event.kernels:
                totals[category(names, kernel.name)] += kernel.duration / 1e3
        else:
            totals[category(names, "")] += event.self_cpu_time_total / 1e3
    return totals


def profile(transformer: Any, call: Callable[[], Any], device: str) -> dict[str, float]:
    """The time split of one call. Self-attention modules are marked, so that cross-attention counts as rest."""
    import torch
    from torch.profiler import ProfilerActivity

    ranges: list[Any] = []

    def enter(*_: Any) -> None:
        ranges.append(torch.profiler.record_function("self_attention").__enter__())

    def leave(*_: Any) -> None:
        ranges.pop().__exit__(None, None, None)

    hooks = []
    for block in transformer.blocks:
        hooks += [block.attn1.register_forward_pre_hook(enter), block.attn1.register_forward_hook(leave)]
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])
    try:
        with torch.profiler.profile(activities=activities) as recorded:
            call()
            if device == "cuda":
                torch.cuda.synchronize()
    finally:
        for hook in hooks:
            hook.remove()
    return split_events(recorded.events(), device)


def amdahl(dense: dict[str, float], sparse: dict[str, float]) -> dict[str, float] | None:
    """What the speed-up of attention (quantization included) predicts for the whole step; None without a split."""
    total = sum(dense.values())
    attention = dense["attention"] + dense["quantize"]
    replaced = sparse["attention"] + sparse["quantize"]
    if not (total and attention and replaced):
        return None
    share = attention / total
    speedup = attention / replaced
    return {"attention_share": share, "attention_speedup": speedup, "predicted": 1.0 / (1.0 - share + share / speedup),
            "limit": 1.0 / (1.0 - share) if share < 1.0 else float("inf")}  # fmt: skip


# Measurement -----------------------------------------------------------------------------------------------------------


class EndToEnd:
    def __init__(self, context: Context, model: Model):
        self.context, self.model, self.device = context, model, context.device

    def _time(self, calls: dict[str, Callable[[int], Any]], seconds: float) -> dict[str, Any]:
        from .. import timing

        repeats = (2, 2) if self.context.dry else (3, 12)
        return timing.interleaved(
            calls, self.device, seconds, min_repeats=repeats[0], max_repeats=repeats[1], on_error=self._note_failure
        )

    def _note_failure(self, name: str, error: Exception) -> None:
        from ..worker import device_is_sound

        if not device_is_sound(self.device):
            raise error
        self._case(name, "failed", reason=f"{type(error).__name__}: {error}"[:600])

    def _case(self, name: str, status: str = "ok", **fields: Any) -> None:
        self.context.journal.case(
            f"{self.model.name}/{name}", status, kind="end_to_end", model=self.model.describe(), **fields
        )

    def _peak(self, call: Callable[[], Any]) -> int | None:
        import torch

        if self.device != "cuda":
            call()
            return None
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()

    def run(self, budget_s: float) -> None:
        import fpsattention as fps

        transformer = build(self.model, self.device)
        step = make_step(transformer, self.model, self.device)
        weights = sum(p.numel() * p.element_size() for p in transformer.parameters())
        backends = (
            {"dense-cudnn": "CUDNN_ATTENTION", "dense-flash": "FLASH_ATTENTION"}
            if self.device == "cuda"
            else {"dense": None}
        )

        def dense(name: str) -> Any:
            with sdpa_backend(backends[name]):
                return step(0.5)

        before = self._time({name: lambda _, name=name: dense(name) for name in backends}, budget_s * 0.3)  # type: ignore[misc]
        if not before:
            return
        best = min(before, key=lambda name: before[name]["median"])
        dense_split = profile(transformer, lambda: dense(best), self.device)
        dense_peak = self._peak(lambda: dense(best))

        schedule = fps.Schedule.preset(PRESET)
        sigmas = {f"fps-{phase.level}": (phase.high + phase.low) / 2 for phase in schedule.phases}
        handle = fps.apply(transformer, schedule)
        try:
            with sdpa_backend(backends[best]):  # cross-attention and any dense level run as they did before
                times = self._time({name: lambda _, s=s: step(s) for name, s in sigmas.items()}, budget_s * 0.4)  # type: ignore[misc]
                splits = {
                    name: profile(transformer, lambda s=s: step(s), self.device)
                    for name, s in sigmas.items()
                    if name in times
                }  # type: ignore[misc]
                peaks = {name: self._peak(lambda s=s: step(s)) for name, s in sigmas.items() if name in times}  # type: ignore[misc]
                finite = {name: bool(step(s).isfinite().all()) for name, s in sigmas.items() if name in times}
        finally:
            handle.remove()
        after = self._time({best: lambda _: dense(best)}, budget_s * 0.15)
        drift = after[best]["median"] / before[best]["median"] - 1.0 if best in after else None
        for name, summary in before.items():
            chosen = name == best
            self._case(
                name, time_ms=summary, split_ms=dense_split if chosen else None, baseline=chosen, weights_bytes=weights,
                peak_bytes=dense_peak if chosen else None, drift=drift if chosen else None,
            )  # fmt: skip
        for name, summary in times.items():
            self._case(
                name, time_ms=summary, split_ms=splits[name], peak_bytes=peaks[name], weights_bytes=weights, sigma=sigmas[name],
                level=name.removeprefix("fps-"), preset=PRESET, amdahl=amdahl(dense_split, splits[name]),
                speedup=before[best]["median"] / summary["median"], correct=finite[name],
                reason=None if finite[name] else "the transformer's output is not finite",
            )  # fmt: skip


def models(context: Context) -> list[Model]:
    if context.dry:
        return [TINY]
    if context.mode == "quick":
        return [WAN_14B_720P.truncated(2), WAN_1B_480P.truncated(4)]
    return [WAN_1B_480P, WAN_14B_720P, WAN_14B_480P.truncated(8), WAN_1B_720P]


def estimate_s(model: Model) -> float:
    """Very rough duration of a unit on a Hopper GPU: about 14 steps at 400 TFLOP/s, and 10 s to make the weights."""
    tokens, width = model.describe()["tokens"], model.config["num_attention_heads"] * model.config["attention_head_dim"]
    per_layer = 4 * tokens**2 * width + tokens * (16 * width**2 + 4 * width * model.config["ffn_dim"])
    return 10.0 + 14 * per_layer * model.layers / 400e12


def units(context: Context) -> Iterator[Unit]:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        import torch
        from diffusers import WanTransformer3DModel  # noqa: F401
    except Exception as error:
        raise Skip(f"diffusers with WanTransformer3DModel is needed: {type(error).__name__}: {error}"[:400]) from error
    try:
        import fpsattention

        fpsattention.apply  # noqa: B018
    except Exception as error:
        raise Skip(f"fpsattention.apply: {type(error).__name__}: {error}"[:400]) from error
    if context.device == "cuda" and not torch.cuda.is_available():
        raise Skip("torch sees no CUDA device (--dry-run works on a CPU)")
    todo = models(context)
    for position, model in enumerate(todo):

        def run(model: Model = model, left: int = len(todo) - position) -> None:
            with context.journal.culprit(f"fpsattn end to end, {model.name}"):
                EndToEnd(context, model).run(0.6 * context.remaining() / left)
            if context.device == "cuda":
                torch.cuda.empty_cache()

        yield Unit(model.name, run, estimate_s=1.0 if context.dry else estimate_s(model))
