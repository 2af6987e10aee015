"""What needs no GPU to be timed: the CPU path against torch's dense SDPA in FP32, planning, and the host's part of ``fpsattention.apply``.

    python -m benchmarks.cpu [--only speed | planning | host]      # prints a JSON object

``host`` replaces SDPA, and our op, by functions that return at once, so that only Python is left: of the model's attention processor as it is,
of the same with ``fpsattention.apply``, and of the hooks of the transformer.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Callable
from datetime import date
from typing import Any
from unittest import mock

import torch

import fpsattention as fps
from fpsattention.analysis.environment import environment
from fpsattention.layout.tiles import clear_plan_cache

from .plugin import commit
from .timing import interleaved

HEADS, DIM = 4, 128
GRID, WINDOW = (21, 15, 26), (1, 2, 2)  # 8190 tokens
PLANNED = {  # grid: window in tiles of the planned layout. Cold; the goal on 21 x 45 x 80 is 50 ms
    (21, 45, 80): (3, 3, 6), (21, 30, 52): (3, 2, 4), (33, 45, 80): (3, 3, 3), (33, 34, 60): (3, 3, 3), (31, 22, 40): (2, 3, 3)
}  # fmt: skip
LAYERS = 40
REPEATS = 5


def speed() -> dict[str, Any]:
    """fps.attention, quantization included, and dense SDPA, in turns; FP32."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, math.prod(GRID), HEADS, DIM, generator=generator) for _ in range(3))
    heads_first = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
    calls = {
        "fps": lambda _: fps.attention(q, k, v, GRID, window=WINDOW),
        "dense_fp32": lambda _: torch.nn.functional.scaled_dot_product_attention(*heads_first),
    }
    times = interleaved(calls, "cpu", 0.0, min_repeats=REPEATS)
    density = fps.sliding_tile_mask(fps.plan(GRID), WINDOW).density
    return {"grid": GRID, "tokens": q.shape[1], "heads": HEADS, "dim": DIM, "window": WINDOW, "density": density, "ms": times,
            "speedup": times["dense_fp32"]["median"] / times["fps"]["median"]}  # fmt: skip


def planning() -> list[dict[str, Any]]:
    """Plan, mask and its transpose, nothing cached."""

    def cold(grid: tuple[int, int, int], window: tuple[int, int, int]) -> fps.BlockMask:
        clear_plan_cache()
        return fps.sliding_tile_mask(fps.plan(grid), window)

    calls = {}
    for grid, window in PLANNED.items():
        calls[f"{grid} plan and mask"] = lambda _, grid=grid, window=window: cold(grid, window)
        calls[f"{grid} with transpose"] = lambda _, grid=grid, window=window: cold(grid, window).transpose()
    return [{"case": name, "ms": ms} for name, ms in interleaved(calls, "cpu", 0.0, min_repeats=REPEATS).items()]


def best(function: Callable[[], Any], calls: int, repeats: int = 40) -> float:
    """Microseconds of CPU time per call: the best of some repeats, since everything else only adds."""
    times = []
    for _ in range(repeats):
        begin = time.process_time()
        for _ in range(calls):
            function()
        times.append((time.process_time() - begin) / calls * 1e6)
    return min(times)


def host_cost(schedule: str, batch: int) -> dict[str, float]:
    """On the cached path, for ``batch`` samples of one sigma and 40 tiny layers: a call of a self-attention's processor without its linear
    layers and norms, the model's own and ours; hooks of one forward of the transformer."""
    from diffusers import WanTransformer3DModel

    from fpsattention.integrations.state import CURRENT
    from fpsattention.ops import autograd

    model = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=64, num_layers=LAYERS, ffn_dim=64, text_dim=32,
        in_channels=16, out_channels=16, freq_dim=64, rope_max_seq_len=64,
    ).eval()  # fmt: skip
    arguments = {"hidden_states": torch.randn(batch, 16, 3, 4, 6), "timestep": torch.tensor([300.0]).expand(batch)}
    arguments["encoder_hidden_states"] = torch.randn(batch, 8, 32)
    hidden, attn = torch.randn(batch, 18, 128), model.blocks[0].attn1
    for name in ("to_q", "to_k", "to_v", "norm_q", "norm_k"):
        setattr(attn, name, torch.nn.Identity())
    attn.to_out = torch.nn.ModuleList([torch.nn.Identity(), torch.nn.Identity()])

    def layer() -> torch.Tensor:
        return attn.processor(attn, hidden, None, None, None)

    def sdpa(query: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return query

    def op(_name: str, q: torch.Tensor, *_: Any, **__: Any) -> tuple[Any, Any]:
        return q, None

    with torch.no_grad(), mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", sdpa):
        dense = best(layer, calls=300)
    with torch.no_grad(), fps.apply(model, schedule) as handle, mock.patch.object(autograd, "call", op):
        installation = handle.installations[0]

        def hooks() -> None:
            installation._before_forward(model, (), arguments)
            installation._after_forward(model, (), None)

        hooks()
        installation._before_forward(model, (), arguments)
        ours = best(layer, calls=300)
        CURRENT.forward = None
        per_forward = best(hooks, calls=100)
    extra = {"dense_layer_us": dense, "layer_us": ours, "extra_us": ours - dense}
    return {**extra, "hooks_us": per_forward, "hooks_us_per_layer": per_forward / LAYERS}


def host() -> dict[str, dict[str, float]]:
    torch.set_num_threads(1)
    schedules = ("paper", "training_free")
    return {f"{schedule}, batch {batch}": host_cost(schedule, batch) for schedule in schedules for batch in (1, 2)}


PARTS: dict[str, Callable[[], Any]] = {
    "speed": speed,
    "planning": planning,
    "host": host,
}  # host last: it leaves one thread


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PARTS)
    only = parser.parse_args().only
    about = {"date": str(date.today()), **commit(), "load": os.getloadavg()[0], "environment": environment("cpu")}
    print(json.dumps({**about, **{name: part() for name, part in PARTS.items() if only in (None, name)}}, indent=1))


if __name__ == "__main__":
    main()
