"""What memory one self-attention takes beside its inputs, against dense SDPA's: computed for the GPU, measured on the CPU.

    python -m benchmarks.memory [--tokens 75600 --heads 40 --dim 128 --density 0.2]

Computed: the bytes of the tensors that the ops make (``tests/python/test_length.py`` holds the formula against the ops' own outputs), and of
what SDPA's backends return or keep. Measured: the most that torch's CPU allocator held at once within the call.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa

import fpsattention as fps
from fpsattention.layout.tiles import BLOCK


def memory(tokens: int, heads: int, dim: int, density: float, itemsize: int = 2, tile: int = 252) -> dict[str, int]:
    """Bytes of a forward beside q, k and v: dense SDPA's (flash and memory-efficient: output and log-sum-exp; math: scores and their softmax, too)
    and this library's: what it keeps for a backward, the log-sum-exp, and what smoothing K takes."""
    flash = tokens * heads * (dim * itemsize + 4)
    means = tokens * heads * 4 + heads * dim * 4  # q with the mean of K; that mean
    ours = kept(tokens, heads, dim, density, itemsize, tile)["fpsattention"] + means + tokens * heads * 4
    return {"SDPA, flash": flash, "SDPA, math": flash + 2 * itemsize * tokens * tokens * heads, "fpsattention": ours}


def kept(tokens: int, heads: int, dim: int, density: float, itemsize: int = 2, tile: int = 252) -> dict[str, int]:
    """Bytes that stay between forward and backward, q, k and v included where they are kept: flash SDPA keeps them, the output and the log-sum-exp;
    math SDPA q, k, v and the probabilities; this library, instead of q, k, v, 8-bit copies in blocks of 128 slots (eight more rows of V hold
    ones) with scales per block, beside the output, row maximum and sum, and lists that heads share."""
    elements, tiles = tokens * heads * dim * itemsize, -(-tokens // tile)
    slots = tiles * -(-tile // BLOCK) * BLOCK
    blocks = slots // BLOCK
    ours = slots * heads * (3 * dim + 8) + 4 * heads * (2 * blocks + dim) + elements + 2 * slots * heads * 4
    ours += int(tiles * blocks * density) * 4
    scores = itemsize * tokens * tokens * heads
    return {"SDPA, flash": 4 * elements + tokens * heads * 4, "SDPA, math": 3 * elements + scores, "fpsattention": ours}


def peak(call: Callable[[], object]) -> int:
    """The most bytes that torch's CPU allocator held at once within ``call``, beyond what it held before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    now = most = 0
    for _, change in sorted((e["ts"], e["args"]["Bytes"]) for e in events if e["name"] == "[memory]"):
        now += change
        most = max(most, now)
    return most


@torch.no_grad()
def measured(side: int, heads: int, dim: int, window: tuple[int, int, int]) -> dict[str, int]:
    """Peaks on the CPU in FP32, beside q, k, v: grid (side, 16, 16) in tiles of (4, 4, 8), 128 tokens."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, side * 256, heads, dim, generator=generator) for _ in range(3))
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    found = {}
    for name, backend in (("SDPA, flash", SDPBackend.FLASH_ATTENTION), ("SDPA, math", SDPBackend.MATH)):
        with sdpa_kernel([backend]):
            found[name] = peak(lambda: sdpa(*heads_first))

    def ours() -> torch.Tensor:
        return fps.attention(q, k, v, (side, 16, 16), tile=(4, 4, 8), window=window)

    ours()  # makes its lists
    return {**found, "fpsattention": peak(ours)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, kind, default in (("tokens", int, 75600), ("heads", int, 40), ("dim", int, 128), ("density", float, 0.2)):
        parser.add_argument(f"--{name}", type=kind, default=default)
    args = parser.parse_args()

    def show(what: str, found: dict[str, int]) -> None:
        print(f"{what:>26}: " + ", ".join(f"{name} {size / 1e6:.1f}" for name, size in found.items()))

    inputs = 3 * args.tokens * args.heads * args.dim * 2
    print(
        f"computed, {args.tokens} tokens, {args.heads} heads of {args.dim}, BF16, MB; q, k, v take {inputs / 1e6:.0f}"
    )
    for what, of in (("forward, beside q, k, v", memory), ("kept for a backward", kept)):
        show(what, of(args.tokens, args.heads, args.dim, args.density))
    print(f"measured {date.today()}, CPU, {platform.machine()}, torch {torch.__version__}, FP32, 2 heads of 64, MB")
    for side in (8, 16):
        show(f"{side * 256} tokens", measured(side, 2, 64, (1, 2, 2)))


if __name__ == "__main__":
    main()
