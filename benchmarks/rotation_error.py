"""What the Hadamard rotation of q and k gains: relative L1 of the output against FP64, on the CPU, half a minute.

    python -m benchmarks.rotation_error [--out benchmarks/results/rotation_error.json]

Inputs, 2048 tokens, 2 heads, mean of the seeds: normal; single outliers (0.1 % of all values plus N(0, 100)); a few outlier channels, the same in all tokens
(a share of the channels of q and k times `gain`), as trained transformers have them; locally smooth, as video.
"""

from __future__ import annotations

import argparse
import json
import platform
from datetime import date
from pathlib import Path

import torch

import fpsattention as fps

GRID = (2, 32, 32)
KINDS = ("normal", "single outliers", "4 channels x 8", "4 channels x 20", "locally smooth")


def inputs(kind: str, dim: int, seed: int) -> list[torch.Tensor]:
    """q, k, v ``(1, 2048, 2, D)``, FP32."""
    generator = torch.Generator().manual_seed(seed)
    tokens, heads = GRID[0] * GRID[1] * GRID[2], 2
    q, k, v = (torch.randn(1, tokens, heads, dim, generator=generator) for _ in range(3))
    if kind == "single outliers":
        for x in (q, k, v):
            hit = torch.rand(x.shape, generator=generator) < 1e-3
            x += hit * 10.0 * torch.randn(x.shape, generator=generator)
    elif "channels" in kind:
        gain = float(kind.split()[-1])
        for x in (q, k):  # the scores keep their spread: what grows in some channels is taken from all
            channels = torch.randperm(dim, generator=generator)[:4]
            x[..., channels] *= gain
            x *= (dim / (dim - 4 + 4 * gain**2)) ** 0.5
    elif kind == "locally smooth":
        q, k, v = (x[:, ::16].repeat_interleave(16, 1) + 0.05 * x for x in (q, k, v))
    return [q, k, v]


def error(kind: str, dim: int, granularity: str, hadamard: bool, seeds: int) -> float:
    """Mean over seeds of ``sum |x - y| / sum |y|``."""
    total = 0.0
    for seed in range(seeds):
        q, k, v = inputs(kind, dim, seed)
        out = fps.attention(q, k, v, GRID, granularity=granularity, hadamard=hadamard).double()
        wanted = torch.nn.functional.scaled_dot_product_attention(
            *(x.double().transpose(1, 2) for x in (q, k, v))
        ).transpose(1, 2)
        total += float((out - wanted).abs().sum() / wanted.abs().sum())
    return total / seeds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="benchmarks/results/rotation_error.json")
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    rows = []
    for dim in (64, 128):
        for kind in KINDS:
            for granularity in ("block", "token"):
                plain, rotated = (error(kind, dim, granularity, flag, args.seeds) for flag in (False, True))
                rows.append({"dim": dim, "inputs": kind, "scales": granularity, "plain": plain, "rotated": rotated})
                print(f"D = {dim}, {kind}, scales per {granularity}: {plain:.4f} -> {rotated:.4f}", flush=True)
    result = {
        "date": str(date.today()),
        "machine": f"CPU, {platform.machine()}",
        "torch": torch.__version__,
        "seeds": args.seeds,
        "rows": rows,
    }
    Path(args.out).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
