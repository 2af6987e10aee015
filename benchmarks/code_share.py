"""What codes by arithmetic cost in accuracy, by the share of a block's slots that take P from them: the tables of docs/numerics.md.

    python -m benchmarks.code_share [--draws 6] [--keys 4096] [--queries 256]

FP64 attention of random inputs against attention of their e4m3 values, scales per tensor (Q), block (K) and channel (V). Simulated on
the CPU; the P of a share is that of the reference (ops/reference.py).
"""

from __future__ import annotations

import argparse
import math

import torch
from torch import Tensor

from fpsattention.layout.tiles import BLOCK
from fpsattention.ops.reference import CODE_SLOTS, exponent_codes, to_e4m3

KINDS = ("normal", "outliers", "locally smooth", "peaked")
STEPS = range(5)  # of 32 slots, a k step of P V
LENGTH = 16  # tokens that are alike where inputs are locally smooth


def draw(kind: str, keys: int, queries: int, dim: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """q ``[queries, dim]``, k and v ``[keys, dim]``, FP64."""

    def normal(rows: int) -> Tensor:
        return torch.randn(rows, dim, generator=generator, dtype=torch.float64)

    def one(rows: int) -> Tensor:
        if kind == "locally smooth":
            return normal(rows // LENGTH).repeat_interleave(LENGTH, 0) + 0.05 * normal(rows)
        x = normal(rows)
        if kind == "outliers":
            x += (torch.rand(rows, dim, generator=generator) < 1e-3) * 10 * normal(rows)
        return x

    q, k, v = one(queries), one(keys), one(keys)
    return (3 * q if kind == "peaked" else q), k, v


def outputs(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, list[Tensor]]:
    """O in FP64, and O of quantized operands with 0, 32, ... 128 slots of every block by arithmetic."""
    dim = q.shape[1]
    exact = torch.softmax(q @ k.T / math.sqrt(dim), -1) @ v

    def rounded(x: Tensor, absmax: Tensor) -> Tensor:
        return to_e4m3((x * (448 / absmax)).float()).double() * (absmax / 448)

    k = k - k.mean(0)
    k_absmax = k.abs().view(-1, BLOCK * dim).amax(1).repeat_interleave(BLOCK)[:, None]
    q8, k8, v8 = rounded(q, q.abs().amax()), rounded(k, k_absmax), rounded(v, v.abs().amax(0))
    x = q8 @ k8.T * (math.log2(math.e) / math.sqrt(dim))
    y = (x - x.amax(1, keepdim=True).ceil() + 8).float()
    by_rounding = to_e4m3(torch.exp2(y)).double()
    by_codes = exponent_codes(y).view(torch.float8_e4m3fn).double()
    slot = torch.arange(len(k)) % BLOCK
    found = []
    for step in STEPS:
        p = torch.where(slot < 32 * step, by_codes, by_rounding)
        found.append(p @ v8 / p.sum(1, keepdim=True))
    return exact, found


def measure(kind: str, dim: int, draws: int, keys: int, queries: int) -> tuple[list[float], list[float]]:
    """Relative L1 error and cosine, by share; means over the draws."""
    l1, cosine = torch.zeros(len(STEPS)), torch.zeros(len(STEPS), dtype=torch.float64)
    for seed in range(draws):
        exact, found = outputs(*draw(kind, keys, queries, dim, torch.Generator().manual_seed(seed)))
        for step, out in enumerate(found):
            l1[step] += (out - exact).abs().sum() / exact.abs().sum() / draws
            cosine[step] += torch.nn.functional.cosine_similarity(out.flatten(), exact.flatten(), 0) / draws
    return l1.tolist(), cosine.tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=6)
    parser.add_argument("--keys", type=int, default=4096)
    parser.add_argument("--queries", type=int, default=256)
    args = parser.parse_args()
    print("| relative L1 (growth), cosine | " + " | ".join(f"{25 * s} %" for s in STEPS) + " |")
    print("| --- |" + " --- |" * len(STEPS))
    for dim in (64, 128):
        for kind in KINDS:
            l1, cosine = measure(kind, dim, args.draws, args.keys, args.queries)
            cells = []
            for step in STEPS:
                growth = f" ({100 * (l1[step] / l1[0] - 1):+.2f} %)" if step else ""
                cell = f"{l1[step]:.4f}{growth}, {cosine[step]:.5f}"
                cells.append(f"**{cell}**" if 32 * step == CODE_SLOTS[dim] else cell)
            print(f"| D = {dim}, {kind} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
