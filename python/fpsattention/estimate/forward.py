"""A whole forward and a whole video: kernels of all blocks, added up by part, in every configuration that is compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from ..errors import ConfigError
from .kernels import PARTS, Kernel, Shape, block_kernels
from .models import MODELS, Model
from .rates import BASELINES, Gpu, Rate, gpu_named
from .table import Time

DENSITIES = (0.10, 0.143, 0.194)  # readings of the paper's best window: docs/paper.md
PAPER_GPU, PAPER_BASELINE, PAPER_SPEEDUP = "h20", "fa2", 4.96  # arXiv 2506.04648: an H20; its baseline is not named
VAE_SHARE = 0.2  # of the rate of BF16 products, for convolutions in three dimensions


@dataclass(frozen=True)
class Configuration:
    """What the blocks run in."""

    name: str
    attention: str
    linears: str


CONFIGURATIONS = (
    Configuration("baseline", "bf16", "bf16"),
    Configuration("attention only", "fp8", "bf16"),
    Configuration("FP8 linears too", "fp8", "fp8"),
)


@dataclass(frozen=True)
class Estimate:
    """One model, grid and GPU.

    Attributes:
        density: computed share of the block pairs; asked: the density that the window was chosen for.
        columns: configuration to part to :class:`Time`, of one forward with batch 1.
        apart: likewise, with norms and RoPE of q and k in kernels of their own: what stays where attention takes no time.
        video: configuration to part to seconds: all forwards, the VAE's decoder, the text encoder.
        sources: every rate that was used, by name.
    """

    model: Model
    grid: tuple[int, int, int]
    gpu: Gpu
    baseline: str
    asked: float
    density: float
    columns: dict[str, dict[str, Time]]
    apart: dict[str, dict[str, Time]]
    video: dict[str, dict[str, float]]
    sources: dict[str, Rate]
    prepare: bool

    def total(self, configuration: str) -> float:
        """Predicted ms of a forward."""
        return sum(time.ms for time in self.columns[configuration].values())

    def speedup(self, configuration: str) -> float:
        """Of a forward, over the baseline."""
        return self.total("baseline") / self.total(configuration)

    def limit(self, configuration: str) -> float:
        """The speed-up if self-attention and its quantization took no time."""
        rest = sum(time.ms for part, time in self.apart[configuration].items() if part not in ("attention", "quantize"))
        return self.total("baseline") / rest


def estimate(
    model: str | Model,
    grid: tuple[int, int, int],
    gpu: str = "h200",
    baseline: str = "cudnn",
    density: float = DENSITIES[1],
    steps: int = 50,
    forwards: int = 2,
    own_linears: bool = True,
    prepare: bool = True,
) -> Estimate:
    """Floor and predicted time of every part, before and after.

    Args:
        model: a name of ``MODELS``. grid: tokens (T, H, W). gpu: of ``GPUS``. baseline: of ``BASELINES``.
        density: the largest window of whole tiles within it is taken, as a schedule takes it.
        steps, forwards: of a video; classifier-free guidance has 2 forwards a step.
        own_linears: the first and the last block keep BF16 linears, as they do by default.
        prepare: norms and RoPE of q and k run in the quantizer of FP8 attention.

    Raises:
        ConfigError: an unknown name, or a size below 1.
    """
    if isinstance(model, str):
        if model not in MODELS:
            raise ConfigError(f"fpsattention.estimate: model {model!r}, expected one of {', '.join(MODELS)}")
        model = MODELS[model]
    if baseline not in BASELINES:
        raise ConfigError(f"fpsattention.estimate: baseline {baseline!r}, expected one of {', '.join(BASELINES)}")
    if not 0.0 < density <= 1.0:
        raise ConfigError(f"fpsattention.estimate: density {density}, expected a number in (0, 1]")
    if steps < 1 or forwards < 1:
        raise ConfigError(f"fpsattention.estimate: {steps} steps of {forwards} forwards, expected at least 1")
    device = gpu_named(gpu)
    shape, computed = shape_of(model, grid, density)
    rates = {
        "bf16": device.bf16, "fp8": device.fp8, "memory": device.memory,
        "attention bf16": device.baselines[baseline], "attention fp8": device.attention[model.head_dim],
    }  # fmt: skip
    columns, apart, video = {}, {}, {}
    for configuration in CONFIGURATIONS:
        columns[configuration.name], apart[configuration.name] = (
            _forward(model, shape, configuration, device, rates, own_linears, inside) for inside in (prepare, False)
        )
        seconds = sum(time.ms for time in columns[configuration.name].values()) / 1e3
        video[configuration.name] = {
            "transformer": steps * forwards * seconds,
            "VAE": model.vae_flops * model.pixels(grid) / (VAE_SHARE * device.bf16.value),
            "text": forwards
            * max(2 * model.encoder * model.text / device.bf16.value, 2 * model.encoder / device.memory.value),
        }
    names = {"bf16": "BF16 products", "fp8": "FP8 products", "memory": "memory", "attention bf16": BASELINES[baseline],
             "attention fp8": "FP8 attention"}  # fmt: skip
    sources = {names[key]: rate for key, rate in rates.items()}
    return Estimate(model, grid, device, baseline, density, computed, columns, apart, video, sources, prepare)


@lru_cache(maxsize=64)
def shape_of(model: Model, grid: tuple[int, int, int], density: float) -> tuple[Shape, float]:
    """What the sparse kernel multiplies on this grid, and the attended share of the (query, key) pairs."""
    from ..integrations.tokens import resolve_window
    from ..layout.masks import sliding_tile_mask
    from ..layout.tiles import BLOCK, plan

    layout = plan(grid, text_len=model.joint_text)
    window = layout.tile_grid if density >= 1.0 else resolve_window(float(density), layout)
    mask = sliding_tile_mask(layout, window)
    blocks_of_tile = layout.tile_block_offsets.diff()
    pairs = int((mask.kv_num_blocks[0, 0] * blocks_of_tile).sum()) * BLOCK * BLOCK
    video = grid[0] * grid[1] * grid[2]
    return Shape(video, layout.num_slots, pairs), mask.density


def kernels_of(
    model: Model, shape: Shape, configuration: Configuration, own_linears: bool, prepare: bool = False
) -> list[tuple[int, list[Kernel]]]:
    """(number of such blocks, kernels of one) for all blocks."""
    own = Configuration("", configuration.attention, "bf16")
    counts: dict[tuple[bool, Configuration], int] = {}
    for layer in range(model.num_layers):
        kept = own_linears and layer in (0, model.num_layers - 1)
        key = (layer >= model.layers[0], own if kept else configuration)
        counts[key] = counts.get(key, 0) + 1
    return [
        (count, block_kernels(model, shape, attention=c.attention, linears=c.linears, single=single, prepare=prepare))
        for (single, c), count in counts.items()
    ]


def _forward(
    model: Model,
    shape: Shape,
    configuration: Configuration,
    gpu: Gpu,
    rates: dict[str, Rate],
    own_linears: bool,
    prepare: bool,
) -> dict[str, Time]:
    parts = {part: Time(0.0, 0.0, "predicted") for part in PARTS}
    for count, kernels in kernels_of(model, shape, configuration, own_linears, prepare):
        for kernel in kernels:
            floor = kernel.floor(gpu.peak_bf16, gpu.peak_fp8, gpu.peak_memory)
            seconds = max(kernel.flops / rates[kernel.engine].value, kernel.bytes / gpu.memory.value)
            before = parts[kernel.part]
            parts[kernel.part] = Time(
                before.ms + 1e3 * count * seconds, (before.floor or 0.0) + 1e3 * count * floor, "predicted"
            )
    return parts


def three_lines(estimates: Sequence[Estimate], paper: Sequence[Estimate]) -> list[tuple[str, list[float], float]]:
    """(what, speed-ups by density, limit): attention only, with FP8 linears, and both against the paper's kind of baseline."""
    attention, both = CONFIGURATIONS[1].name, CONFIGURATIONS[2].name
    return [
        ("attention only", [e.speedup(attention) for e in estimates], estimates[0].limit(attention)),
        ("with FP8 linears", [e.speedup(both) for e in estimates], estimates[0].limit(both)),
        (
            f"both, on an {paper[0].gpu.title} over {BASELINES[paper[0].baseline]}",
            [e.speedup(both) for e in paper],
            paper[0].limit(both),
        ),
    ]
