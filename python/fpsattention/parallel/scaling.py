"""Steps of training on many GPUs, computed from a cost model of computation and collectives: nothing was measured. See ``docs/scale.md``."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ..errors import ConfigError
from ..layout.tiles import plan
from .choose import BACKWARD_FLOPS, FORWARD_FLOPS, NETWORKS, Network, choose

LINEAR_FLOPS = 0.6e15  # BF16 matrix products per second: an assumption, 60 % of the data sheet


@dataclass(frozen=True)
class Model:
    """A video transformer and its sequence."""

    name: str
    parameters: float
    layers: int
    heads: int
    head_dim: int
    grid: tuple[int, int, int]

    @property
    def tokens(self) -> int:
        """Of a sample."""
        return math.prod(self.grid)

    @property
    def width(self) -> int:
        """Of a token."""
        return self.heads * self.head_dim


WAN_14B = Model("Wan2.1-14B, 720p, 81 frames", 14.3e9, 40, 40, 128, (21, 45, 80))
WAN_1_3B = Model("Wan2.1-1.3B, 480p, 81 frames", 1.42e9, 30, 12, 128, (21, 30, 52))
NODE = 8  # GPUs behind one NVLink switch


@dataclass(frozen=True)
class Step:
    """One optimizer step: seconds of its parts, per GPU, and what a GPU holds."""

    gpus: int
    sequence_parallel: int
    samples: int
    linear: float
    attention: float
    exchange: float  # of tokens, not hidden
    weights: float  # gathers and reductions that do not fit behind the computation
    memory: float  # bytes

    @property
    def seconds(self) -> float:
        """Of all parts."""
        return self.linear + self.attention + self.exchange + self.weights

    @property
    def samples_per_second(self) -> float:
        """Of all GPUs."""
        return self.samples / self.seconds


def training_step(
    model: Model, gpus: int, sequence_parallel: int, samples: int, *, density: float = 0.2, hybrid: bool = True
) -> Step:
    """Full training with checkpointed blocks, BF16 weights and FP32 optimizer states, on nodes of 8 GPUs with one 400 Gb/s port each.

    Args:
        samples: of the whole step.
        density: of the attention.
        hybrid: weights sharded within a node and replicated over nodes (HSDP); False: sharded over all GPUs (FSDP).

    The model, per GPU: linear layers take 6 FLOPs per parameter and token, 2 more for the recomputation; attention a forward twice and a backward, at
    ``FORWARD_FLOPS`` and ``BACKWARD_FLOPS``; tokens are exchanged by FP8 Ulysses (twice forward, once backward), never hidden, over NVLink within a node,
    beyond it over the port. Weights are gathered twice and gradients reduced once, in BF16, in rings: bytes / bandwidth + latency per message; what does
    not fit behind the computation counts. Optimizer, data and stragglers are left out.

    Raises:
        ConfigError: numbers that do not divide.
    """
    groups, rest = divmod(gpus, sequence_parallel)
    if rest or samples % groups:
        raise ConfigError(
            f"fpsattention.parallel.training_step: {gpus} gpus, sequence_parallel {sequence_parallel}, {samples} samples, expected samples to be a "
            "multiple of gpus / sequence_parallel"
        )
    own = samples // groups / sequence_parallel  # samples of a GPU
    linear = 8.0 * model.parameters * model.tokens * own / LINEAR_FLOPS
    pairs = 4.0 * model.tokens**2 * density * model.width * model.layers * own
    attention = pairs * (2 / FORWARD_FLOPS + 2.5 / BACKWARD_FLOPS)
    exchange = 0.0
    if sequence_parallel > 1:
        network = "nvlink" if sequence_parallel <= NODE else "400g"
        layer = partial(
            choose, plan(model.grid), sequence_parallel, heads=model.heads, head_dim=model.head_dim, network=network
        )
        ulysses = (layer(backward=backward).estimates[1] for backward in (False, True))
        exchange = sum(each.exchange_seconds for each in ulysses) * model.layers * samples / groups
    weights = max(0.0, _weights(model, gpus, hybrid) - linear - attention)
    sharded = min(gpus, NODE) if hybrid else gpus
    states = model.parameters * 16 / sharded  # BF16 weight and gradient, FP32 weight, two moments
    tokens = model.tokens / sequence_parallel
    whole = 2 * model.parameters / model.layers * 2  # the block at work and the next one
    activations = tokens * model.width * 2 * (model.layers + 34)  # inputs of blocks; those of one block, recomputed
    return Step(gpus, sequence_parallel, samples, linear, attention, exchange, weights, states + whole + activations)


def _weights(model: Model, gpus: int, hybrid: bool) -> float:
    """Seconds of two gathers and a reduction of all weights, by layers."""
    size = 2 * model.parameters
    if gpus == 1:
        return 0.0
    if gpus <= NODE:
        return _ring(size, gpus, model.layers, NETWORKS["nvlink"]) * 3
    if not hybrid:
        return _ring(size, gpus, model.layers, NETWORKS["400g"]) * 3
    across = (
        _ring(size / NODE, gpus // NODE, model.layers, NETWORKS["400g"]) * 2
    )  # an all-reduce is a reduction and a gather
    return _ring(size, NODE, model.layers, NETWORKS["nvlink"]) * 3 + across


def _ring(size: float, ranks: int, layers: int, network: Network) -> float:
    return size * (ranks - 1) / ranks / network.bandwidth + layers * (ranks - 1) * network.latency


# Tables of docs/scale.md -----------------------------------------------------------------------------------------------------


def layer_table(
    network: str, window: tuple[int, int, int] | None = None, tile: tuple[int, int, int] | None = None, frames: int = 21
) -> str:
    """Bytes, time and memory per layer and rank of Wan2.1-14B at 720p, forward, as Markdown."""
    layout, model = plan((frames, *WAN_14B.grid[1:]), tile), WAN_14B
    lines = [
        "| P | attention | Ulysses BF16 | Ulysses FP8 | halo | ring | memory: Ulysses, halo | choose (exact) |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for ranks in (2, 4, 8, 16, 32, 64):
        choice = choose(layout, ranks, heads=model.heads, head_dim=model.head_dim, window=window, network=network)
        cells = ["-" if e.problem else f"{e.sent / 1e6:.0f} MB, {e.seconds * 1e3:.2f} ms" for e in choice.estimates]
        ulysses, halo = choice.estimates[1], choice.estimates[2]
        memory = ", ".join("-" if e.problem else f"{e.memory / 1e6:.0f} MB" for e in (ulysses, halo))
        compute = f"{choice.estimates[3].compute_seconds * 1e3:.2f} ms"
        lines.append(f"| {ranks} | {compute} | {' | '.join(cells)} | {memory} | {choice.best.name} |")
    return "\n".join(lines)


def training_table(model: Model = WAN_14B, ranks: int = NODE) -> str:
    """Steps on up to 1,024 GPUs, as Markdown."""
    lines = [
        "| GPUs | P | samples | linear | attention | tokens exchanged | weights, not hidden | step | samples/s | efficiency | memory per GPU |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    weak = [(gpus, ranks, gpus // ranks, True) for gpus in (8, 64, 256, 1024)]
    flat = [(gpus, ranks, gpus // ranks, False) for gpus in (256, 1024)]
    strong = [(gpus, sp, 64, True) for gpus, sp in ((64, 1), (128, 2), (256, 4), (512, 8), (1024, 16))]
    for title, cases in (("weak, HSDP", weak), ("weak, FSDP over all", flat), ("strong, HSDP", strong)):
        base: Step | None = None
        for gpus, sp, samples, hybrid in cases:
            step = training_step(model, gpus, sp, samples, hybrid=hybrid)
            base = base or (training_step(model, *weak[0][:3]) if cases is flat else step)
            efficiency = step.samples_per_second / gpus / (base.samples_per_second / base.gpus)
            parts = " | ".join(
                f"{x:.2f} s" for x in (step.linear, step.attention, step.exchange, step.weights, step.seconds)
            )
            lines.append(
                f"| {gpus} ({title}) | {sp} | {samples} | {parts} | {step.samples_per_second:.3f} | {efficiency:.0%} | {step.memory / 1e9:.0f} GB |"
            )
    return "\n".join(lines)


#: The tables of docs/scale.md by the names of their markers.
TABLES = {
    "dense, NVLink": lambda: layer_table("nvlink"),
    "dense, 400 Gb/s": lambda: layer_table("400g"),
    "window, NVLink": lambda: layer_table("nvlink", (3, 5, 5), (3, 5, 8)),
    "window, 400 Gb/s": lambda: layer_table("400g", (3, 5, 5), (3, 5, 8)),
    "long, 400 Gb/s": lambda: layer_table("400g", (3, 5, 5), (3, 5, 8), frames=84),
    "training, 14B": training_table,
    "training, 1.3B": lambda: training_table(WAN_1_3B, 4),
}


def with_tables(text: str) -> str:
    """A document whose tables, between ``<!-- table: NAME -->`` and ``<!-- end -->``, are computed anew."""
    for name, make in TABLES.items():
        begin, rest = text.split(f"<!-- table: {name} -->\n")
        text = f"{begin}<!-- table: {name} -->\n{make()}\n<!-- end -->{rest.split('<!-- end -->', 1)[1]}"
    return text


if __name__ == "__main__":  # python -m fpsattention.parallel.scaling docs/scale.md
    document = Path(sys.argv[1])
    document.write_text(with_tables(document.read_text()))
