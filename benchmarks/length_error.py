"""Does the error grow with the length? Up to half a million keys, with the accumulator of Hopper's FP8 tensor cores as it is modelled.

    python -m benchmarks.length_error [--out benchmarks/results/length_error.json] [--keys 8192,65536,262144,524288]

A few query rows of one head against N keys, step by step as the kernel does it (docs/numerics.md): FP8 of q, k, v; scores; blocks of 128 keys with a running
integer maximum; P in e4m3, by codes in the first slots of a block; P V and sum P in accumulators that keep 13 bits below their largest addend, promoted to FP32 every 256
keys. The accumulator: 32 products and what was there are cut to a multiple of 2^(e - 13), e the exponent of the largest of them, and added. It is the model of
`tests/python/fp8_accumulator.py`, computed instead of bounded; a device that keeps more bits loses less.

`exact` is the same with exact sums, `one accumulator` the same without promotion: the cliff that there would be.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from datetime import date
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.memory import memory
from fpsattention.ops.reference import probabilities

STEP, FRACTION_BITS, PROMOTE, BLOCK = 32, 13, 256, 128
LOG2E = 1.4426950408889634
P_SHIFT = 8


def add_truncated(start: Tensor, products: Tensor) -> Tensor:
    """``start [...]`` plus ``products [..., 32]``: all aligned to the largest and cut ``FRACTION_BITS`` bits below its leading bit."""
    numbers = torch.cat([start.unsqueeze(-1), products], -1)
    largest = numbers.abs().amax(-1)
    _, exponent = torch.frexp(largest)
    unit = torch.where(
        largest > 0, torch.ldexp(torch.ones_like(largest), exponent - 1 - FRACTION_BITS), torch.ones_like(largest)
    ).unsqueeze(-1)
    total = (torch.trunc(numbers / unit) * unit).sum(-1)
    _, exponent = torch.frexp(total)
    unit = torch.where(
        total != 0, torch.ldexp(torch.ones_like(total), exponent - 1 - FRACTION_BITS), torch.ones_like(total)
    )
    return torch.trunc(total / unit) * unit


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


def e4m3(x: Tensor, scale: Tensor) -> Tensor:
    """The value of ``e4m3(x / scale)``, as FP32."""
    return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float()


def attention_rows(q: Tensor, k: Tensor, v: Tensor, promote: int | None, truncated: bool) -> Tensor:
    """``(rows, D)``, FP64, of queries ``q (rows, D)`` over all keys; scales per block of 128, K smoothed."""
    dim = q.shape[1]
    k = k - k[::8].mean(0)
    q_scale = q.abs().amax() / 448
    k_scale = k.view(-1, BLOCK, dim).abs().amax((1, 2)) / 448
    v_scale = v.abs().amax(0) / 448
    q8, v8 = e4m3(q, q_scale), e4m3(v, v_scale)
    k8 = e4m3(k, k_scale.repeat_interleave(BLOCK)[:, None])
    x = (q8 @ k8.T) * (q_scale * k_scale.repeat_interleave(BLOCK) * (dim**-0.5 * LOG2E))
    blocks = x.unflatten(1, (-1, BLOCK))
    running = blocks.amax(-1).ceil().cummax(1).values  # integer, as the kernel's
    m = running[:, -1:]
    y = blocks - running[..., None] + P_SHIFT
    p = (probabilities(y, dim).float() * torch.exp2(running - m)[..., None]).flatten(1)
    # FP32 sums of another maximum are rescaled by powers of two, which is exact: P may as well be.
    columns = torch.cat([v8, torch.ones(v8.shape[0], 1)], 1)
    sums = weighted_sum(p, columns, promote, truncated)
    return sums[:, :-1] * v_scale.double() / sums[:, -1:]


def errors(
    keys: int, dim: int = 64, rows: int = 8, seed: int = 0, base: int = 8192, cliff: bool = False
) -> dict[str, float]:
    """Relative L1 against FP64: ``truncated``, ``exact`` and, with ``cliff``, ``one accumulator``.

    The keys are ``base`` keys over and over, so that the right result, and what FP8 does to it, is the same at every length: what
    grows is the number of addends alone. Each query has 64 keys among the base that it attends and a crowd that it does not; values share a mean, whose error would
    add up.
    """
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(n, dim, generator=generator) for n in (rows, base, base))
    v = v + torch.randn(dim, generator=generator)
    chosen = torch.randint(0, base, (rows, 64), generator=generator)
    strength = 6.0 * dim**0.5 / q.square().sum(1)  # in nats above the crowd
    k[chosen] = 0.5 * k[chosen] + (strength[:, None] * q)[:, None]
    exact = torch.softmax(q.double() @ k.double().T * dim**-0.5, 1) @ v.double()
    k, v = k.repeat(keys // base, 1), v.repeat(keys // base, 1)

    def error(out: Tensor) -> float:
        return float((out - exact).abs().sum() / exact.abs().sum())

    found = {
        "truncated": error(attention_rows(q, k, v, PROMOTE, True)),
        "exact": error(attention_rows(q, k, v, PROMOTE, False)),
    }
    if cliff:
        found["one accumulator"] = error(attention_rows(q, k, v, None, True))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="benchmarks/results/length_error.json")
    parser.add_argument("--keys", default="8192,65536,262144,524288")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument(
        "--cliff-up-to", type=int, default=65536, help="keys up to which one accumulator is computed, too: it is slow"
    )
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    started, rows = time.perf_counter(), []
    for keys in map(int, args.keys.split(",")):
        found = [errors(keys, seed=seed, cliff=keys <= args.cliff_up_to and seed == 0) for seed in range(args.seeds)]
        row: dict[str, float] = {"keys": keys}
        row |= {name: sum(f[name] for f in found) / len(found) for name in ("truncated", "exact")}
        if "one accumulator" in found[0]:
            row["one accumulator"] = found[0]["one accumulator"]
        row["memory"] = memory(keys, 40, 128, 0.2)  # type: ignore[assignment]
        rows.append(row)
        print(row, flush=True)
    result = {
        "date": str(date.today()), "machine": f"CPU, {platform.machine()}", "torch": torch.__version__, "seeds": args.seeds,
        "seconds": round(time.perf_counter() - started), "rows": rows,
    }  # fmt: skip
    Path(args.out).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
