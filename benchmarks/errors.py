"""What rounding costs, simulated on the CPU: tables of docs/numerics.md.

    python -m benchmarks.errors codes [--seeds 6]      # codes by arithmetic, by the share of a block's slots that take P from them
    python -m benchmarks.errors gradients [--seeds 2]  # of q, by the same share, and with power-of-two scales; two minutes
    python -m benchmarks.errors rotation [--seeds 3]   # the Hadamard rotation of q and k; half a minute
    python -m benchmarks.errors length [--seeds 2]     # 8k to half a million keys; four minutes

``--out FILE`` writes what is printed as JSON. Errors are relative L1 against FP64 attention of the unrounded inputs, means of the seeds.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fpsattention as fps
from fpsattention.analysis.environment import environment
from fpsattention.layout.tiles import BLOCK
from fpsattention.ops.reference import CODE_SLOTS, E4M3_MAX, exponent_codes, probabilities, to_e4m3

Row = dict[str, Any]


def relative_l1(out: Tensor, wanted: Tensor) -> float:
    return float((out - wanted).abs().sum() / wanted.abs().sum())


def e4m3(x: Tensor, scale: Tensor) -> Tensor:
    """The value of ``e4m3(x / scale)``, in the dtype of x."""
    return to_e4m3((x / scale).float()).to(x.dtype)


def scores(q: Tensor, k: Tensor, k_mean_stride: int) -> Tensor:
    """``[queries, keys]`` of e4m3 operands, in log2 units; scales per tensor (q) and per block of 128 (K, smoothed)."""
    dim = q.shape[1]
    k = k - k[::k_mean_stride].mean(0)
    q_scale = q.abs().amax() / E4M3_MAX
    k_scale = k.view(-1, BLOCK * dim).abs().amax(1).repeat_interleave(BLOCK) / E4M3_MAX
    return (e4m3(q, q_scale) @ e4m3(k, k_scale[:, None]).T) * (q_scale * k_scale * (dim**-0.5 * math.log2(math.e)))


# Codes by arithmetic ---------------------------------------------------------------------------------------------------

CODE_KINDS = ("normal", "outliers", "locally smooth", "peaked")
K_STEPS = range(5)  # of 32 slots, a k step of P V
LENGTH = 16  # tokens that are alike where inputs are locally smooth


def draw(kind: str, dim: int, seed: int, keys: int = 4096, queries: int = 256) -> tuple[Tensor, Tensor, Tensor]:
    """q ``[queries, dim]``, k and v ``[keys, dim]``, FP64."""
    generator = torch.Generator().manual_seed(seed)

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


def code_errors(kind: str, dim: int, seed: int) -> list[tuple[float, float]]:
    """Error and cosine with 0, 32, ... 128 slots of every block by arithmetic."""
    q, k, v = draw(kind, dim, seed)
    exact = torch.softmax(q @ k.T / math.sqrt(dim), -1) @ v
    v_scale = v.abs().amax(0) / E4M3_MAX
    x, v8 = scores(q, k, 1), e4m3(v, v_scale) * v_scale
    y = (x - x.amax(1, keepdim=True).ceil() + 8).float()
    by_rounding, by_codes = to_e4m3(torch.exp2(y)).double(), exponent_codes(y).view(torch.float8_e4m3fn).double()
    slot, found = torch.arange(len(k)) % BLOCK, []
    for step in K_STEPS:
        p = torch.where(slot < 32 * step, by_codes, by_rounding)
        out = p @ v8 / p.sum(1, keepdim=True)
        cosine = torch.nn.functional.cosine_similarity(out.flatten(), exact.flatten(), 0)
        found.append((relative_l1(out, exact), float(cosine)))
    return found


def codes(seeds: int) -> Iterator[Row]:
    """By share of the slots: error, its growth over rounding everywhere, cosine. Bold: the share that is built."""
    for dim in (64, 128):
        for kind in CODE_KINDS:
            l1, cosine = torch.tensor([code_errors(kind, dim, seed) for seed in range(seeds)]).mean(0).T.tolist()
            row: Row = {"D": dim, "inputs": kind}
            for step in K_STEPS:
                growth = f" ({100 * (l1[step] / l1[0] - 1):+.2f} %)" if step else ""
                cell = f"{l1[step]:.4f}{growth}, {cosine[step]:.5f}"
                row[f"{25 * step} %"] = f"**{cell}**" if 32 * step == CODE_SLOTS[dim] else cell
            yield row


# Gradients -------------------------------------------------------------------------------------------------------------

GRADIENT_KINDS = ((128, "normal"), (128, "with outliers"), (128, "locally smooth"), (64, "locally smooth"))
GRADIENT_GRID = (4, 32, 32)


def gradient_inputs(kind: str, dim: int, seed: int) -> list[Tensor]:
    """q, k, v and the gradient of the output, ``(1, 4096, 1, D)``, FP32, as ``test_accuracy_table`` draws them: normal; 0.1 % of all values
    plus N(0, 100); runs of 16 near-equal tokens, alike in q, k and v."""
    generator = torch.Generator().manual_seed(seed)
    shape = (1, math.prod(GRADIENT_GRID), 1, dim)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    base = normal(1, shape[1] // LENGTH, 1, dim).repeat_interleave(LENGTH, 1)

    def one() -> Tensor:
        if kind == "locally smooth":
            return base + 0.1 * normal(*shape)
        x = normal(*shape)
        if kind == "with outliers":
            x += 10 * normal(*shape) * (torch.rand(shape, generator=generator) < 1e-3)
        return x

    return [one(), one(), one(), normal(*shape)]


def exact_gradients(q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor) -> tuple[Tensor, Tensor]:
    """Output and gradient of q, FP64 ``[tokens, D]``."""
    q, k, v, grad_out = (x[0, :, 0].double() for x in (q, k, v, grad_out))
    p = torch.softmax(q @ k.T / math.sqrt(q.shape[1]), -1)
    out = p @ v
    p *= grad_out @ v.T - (grad_out * out).sum(-1, keepdim=True)
    return out, p @ k / math.sqrt(q.shape[1])


def gradient_errors(kind: str, dim: int, seed: int) -> dict[str, Tensor]:
    """``[error of the output, of dQ, cosine of dQ]`` by the share of slots with codes, and, at the share that is built, with power-of-two scales."""
    q, k, v, grad_out = gradient_inputs(kind, dim, seed)
    out, dq = exact_gradients(q, k, v, grad_out)

    def error(slots: int, pow2_scales: bool = False) -> Tensor:
        built = CODE_SLOTS[dim]
        CODE_SLOTS[dim] = slots
        try:
            leaf = q.clone().requires_grad_()
            with torch.enable_grad():
                got = fps.attention(leaf, k, v, GRADIENT_GRID, pow2_scales=pow2_scales)
                got.backward(grad_out)
        finally:
            CODE_SLOTS[dim] = built
        grad = leaf.grad[0, :, 0].double()
        cosine = torch.nn.functional.cosine_similarity(grad.flatten(), dq.flatten(), 0)
        return torch.tensor([relative_l1(got.detach()[0, :, 0], out), relative_l1(grad, dq), cosine])

    found = {f"{100 * slots // BLOCK} %": error(slots) for slots in (0, 64, 96)}
    return {**found, "powers of two": error(CODE_SLOTS[dim], pow2_scales=True)}


def gradients(seeds: int) -> Iterator[Row]:
    """Error of O, error of dQ, its cosine."""
    for dim, kind in GRADIENT_KINDS:
        draws = [gradient_errors(kind, dim, seed) for seed in range(seeds)]
        row: Row = {"D": dim, "inputs": kind}
        for name in draws[0]:
            out, dq, cosine = torch.stack([draw[name] for draw in draws]).mean(0).tolist()
            row[name] = f"O {out:.4f}, dQ {dq:.4f}, {cosine:.4f}"
        yield row


# Hadamard rotation -----------------------------------------------------------------------------------------------------

GRID = (2, 32, 32)
ROTATION_KINDS = ("normal", "single outliers", "4 channels x 8", "4 channels x 20", "locally smooth")


def rotation_inputs(kind: str, dim: int, seed: int) -> list[Tensor]:
    """q, k, v ``(1, 2048, 2, D)``, FP32: normal; 0.1 % of all values plus N(0, 100); channels that are large in all tokens, as trained
    transformers have them; locally smooth, as video."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, math.prod(GRID), 2, dim, generator=generator) for _ in range(3))
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
        q, k, v = (x[:, ::LENGTH].repeat_interleave(LENGTH, 1) + 0.05 * x for x in (q, k, v))
    return [q, k, v]


def rotation(seeds: int) -> Iterator[Row]:
    def error(kind: str, dim: int, granularity: str, hadamard: bool, seed: int) -> float:
        q, k, v = rotation_inputs(kind, dim, seed)
        out = fps.attention(q, k, v, GRID, granularity=granularity, hadamard=hadamard).double().transpose(1, 2)
        heads_first = (x.double().transpose(1, 2) for x in (q, k, v))
        return relative_l1(out, torch.nn.functional.scaled_dot_product_attention(*heads_first))

    for dim in (64, 128):
        for kind in ROTATION_KINDS:
            for granularity in ("block", "token"):
                row: Row = {"dim": dim, "inputs": kind, "scales": granularity}
                for name, hadamard in (("plain", False), ("rotated", True)):
                    found = [error(kind, dim, granularity, hadamard, seed) for seed in range(seeds)]
                    row[name] = sum(found) / seeds
                yield row


# Length ----------------------------------------------------------------------------------------------------------------
# A few query rows of one head against N keys, step by step as the kernel does it: FP8 of q, k, v; blocks of 128 keys with a running
# integer maximum; P in e4m3, by codes in the first slots of a block; P V and sum P in accumulators that keep 13 bits below their largest
# addend, promoted to FP32 every 256 keys. It is the model of tests/python/fp8_accumulator.py, computed instead of bounded; a device
# that keeps more bits loses less.

STEP, FRACTION_BITS, PROMOTE = 32, 13, 256
LENGTHS, ONE_ACCUMULATOR_UP_TO = (8192, 65536, 262144, 524288), 65536  # one accumulator is slow to compute


def cut(numbers: Tensor, largest: Tensor) -> Tensor:
    """``numbers``, cut to multiples of 2^(e - 13), e the exponent of ``largest`` (0: left alone)."""
    _, exponent = torch.frexp(largest)
    one = torch.ones_like(largest)
    unit = torch.where(largest != 0, torch.ldexp(one, exponent - 1 - FRACTION_BITS), one)
    return torch.trunc(numbers / unit) * unit


def add_truncated(start: Tensor, products: Tensor) -> Tensor:
    """``start [...]`` plus ``products [..., 32]``: all aligned to the largest and cut 13 bits below its leading bit, and so is the sum."""
    numbers = torch.cat([start.unsqueeze(-1), products], -1)
    total = cut(numbers, numbers.abs().amax(-1, keepdim=True)).sum(-1)
    return cut(total, total)


def weighted_sum(p: Tensor, v: Tensor, promote: int | None, truncated: bool) -> Tensor:
    """``p v`` ``(rows, columns)``, in FP64 beside the model. ``p (rows, N)``, ``v (N, columns)``; ``promote``: keys of an accumulator, None: all."""
    if not truncated:
        return p.double() @ v.double()
    chunk = promote or p.shape[1]
    total = torch.zeros(p.shape[0], v.shape[1], dtype=torch.float64)
    many = max(1, 2**19 // chunk)  # chunks at a time, so that half a million keys fit
    p_chunks, v_chunks = p.unflatten(1, (-1, chunk)), v.unflatten(0, (-1, chunk))
    for first in range(0, p_chunks.shape[1], many):
        ps, vs = p_chunks[:, first : first + many].double(), v_chunks[first : first + many].double()
        accumulator = torch.zeros(p.shape[0], ps.shape[1], v.shape[1], dtype=torch.float64)
        for key in range(0, chunk, STEP):
            products = ps[:, :, None, key : key + STEP] * vs[:, key : key + STEP].transpose(1, 2)[None]
            accumulator = add_truncated(accumulator, products)
        for i in range(accumulator.shape[1]):  # promotion: FP32 adds, one after the other
            total = (total.float() + accumulator[:, i].float()).double()
    return total


def attention_rows(q: Tensor, k: Tensor, v: Tensor, promote: int | None, truncated: bool) -> Tensor:
    """``(rows, D)``, FP64, of queries ``q (rows, D)`` over all keys."""
    v_scale = v.abs().amax(0) / E4M3_MAX
    blocks = scores(q, k, 8).unflatten(1, (-1, BLOCK))
    running = blocks.amax(-1).ceil().cummax(1).values  # integer, as the kernel's
    p = probabilities(blocks - running[..., None] + 8, q.shape[1]).float()
    # FP32 sums of another maximum are rescaled by powers of two, which is exact: P may as well be.
    p = (p * torch.exp2(running - running[:, -1:])[..., None]).flatten(1)
    columns = torch.cat([e4m3(v, v_scale), torch.ones(v.shape[0], 1)], 1)
    sums = weighted_sum(p, columns, promote, truncated)
    return sums[:, :-1] * v_scale.double() / sums[:, -1:]


def length_errors(keys: int, seed: int = 0, dim: int = 64, rows: int = 8, base: int = 8192, one_accumulator: bool = False) -> dict[str, float]:  # fmt: skip
    """``truncated``, ``exact`` (sums) and, where wanted, ``one accumulator``: no promotion, the cliff that there would be.

    The keys are ``base`` keys over and over, so that the right result, and what FP8 does to it, is the same at every length: what
    grows is the number of addends alone. Each query has 64 keys among the base that it attends and a crowd that it does not; values
    share a mean, whose error would add up.
    """
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(n, dim, generator=generator) for n in (rows, base, base))
    v = v + torch.randn(dim, generator=generator)
    chosen = torch.randint(0, base, (rows, 64), generator=generator)
    strength = 6.0 * dim**0.5 / q.square().sum(1)  # in nats above the crowd
    k[chosen] = 0.5 * k[chosen] + (strength[:, None] * q)[:, None]
    exact = torch.softmax(q.double() @ k.double().T * dim**-0.5, 1) @ v.double()
    k, v = k.repeat(keys // base, 1), v.repeat(keys // base, 1)
    models = {"truncated": (PROMOTE, True), "exact": (PROMOTE, False)}
    if one_accumulator:
        models["one accumulator"] = (None, True)  # type: ignore[assignment]
    return {name: relative_l1(attention_rows(q, k, v, *model), exact) for name, model in models.items()}


def length(seeds: int) -> Iterator[Row]:
    for keys in LENGTHS:
        one = keys <= ONE_ACCUMULATOR_UP_TO
        found = [length_errors(keys, seed, one_accumulator=one and seed == 0) for seed in range(seeds)]
        mean = {name: sum(f[name] for f in found) / seeds for name in ("exact", "truncated")}
        yield {"keys": keys, **mean, "one accumulator": found[0].get("one accumulator", "-")}


EXPERIMENTS = {
    "codes": (codes, 6),
    "gradients": (gradients, 2),
    "rotation": (rotation, 3),
    "length": (length, 2),
}  # how many seeds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    experiment, seeds = EXPERIMENTS[args.experiment]
    rows: list[Row] = []
    with torch.no_grad():
        for row in experiment(args.seeds or seeds):
            rows.append(row)
            if len(rows) == 1:
                print("| " + " | ".join(row) + " |\n|" + " --- |" * len(row))
            cells = (f"{x:.5f}" if isinstance(x, float) else str(x) for x in row.values())
            print("| " + " | ".join(cells) + " |", flush=True)
    if args.out:
        about = {"date": str(date.today()), "experiment": args.experiment, "seeds": args.seeds or seeds}
        args.out.write_text(json.dumps({**about, "environment": environment("cpu"), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
