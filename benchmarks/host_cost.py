"""What ``fpsattention.apply`` costs the host: microseconds per attention layer and per transformer forward, on the cached path.

The kernels are replaced by a function that returns at once, so that only this library's Python is left: from the core call of the
model's processor to the call of the op, and the hooks of the transformer. ``python -m benchmarks.host_cost``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import time
from collections.abc import Callable
from datetime import date
from typing import Any
from unittest import mock

import torch

import fpsattention as fps
from fpsattention.analysis.environment import environment
from fpsattention.integrations.core_calls import CoreCall
from fpsattention.integrations.state import CURRENT
from fpsattention.ops import autograd

LAYERS = 40
SCHEDULES = ("paper", "training_free")


def best(function: Callable[[], Any], calls: int, repeats: int = 15) -> float:
    """Microseconds of CPU time per call: the best of some repeats, since everything else only adds."""
    times = []
    for _ in range(repeats):
        begin = time.process_time()
        for _ in range(calls):
            function()
        times.append((time.process_time() - begin) / calls * 1e6)
    return min(times)


def measure(schedule: str, batch: int) -> dict[str, float]:
    """Costs under one schedule, for ``batch`` samples of one sigma, in a transformer of 40 tiny layers."""
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=64, num_layers=LAYERS, ffn_dim=64, text_dim=32,
        in_channels=16, out_channels=16, freq_dim=64, rope_max_seq_len=64,
    ).eval()  # fmt: skip
    arguments = {"hidden_states": torch.randn(batch, 16, 3, 16, 24), "timestep": torch.tensor([300.0]).expand(batch)}
    arguments["encoder_hidden_states"] = torch.randn(batch, 8, 32)
    q = torch.randn(batch, 288, 2, 64)

    def kernel(_op: str, q: torch.Tensor, *_: Any, **__: Any) -> tuple[Any, Any]:
        return q, None

    schedule_of_name = fps.Schedule.preset(schedule)
    with torch.no_grad(), fps.apply(model, schedule_of_name) as handle, mock.patch.object(autograd, "call", kernel):
        installation = handle.installations[0]

        def hooks() -> None:
            installation._before_forward(model, (), arguments)
            installation._after_forward(model, (), None)

        hooks()
        installation._before_forward(model, (), arguments)
        site = installation.sites[0]
        core = CoreCall(q, q, q, dense=lambda q, k, v: q)
        layer = best(lambda: site.attend(core), calls=1000)
        CURRENT.forward = None
        per_forward = best(hooks, calls=100)
        return {"layer_us": layer, "hooks_us": per_forward, "hooks_us_per_layer": per_forward / LAYERS}


def main() -> None:
    """Prints a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="machine-readable output")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = {f"{schedule}, batch {batch}": measure(schedule, batch) for schedule in SCHEDULES for batch in (1, 2)}
    if arguments.json:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
        facts = {
            "date": date.today().isoformat(),
            "command": "python -m benchmarks.host_cost --json",
            "commit": commit.stdout.strip(),
            "load": os.getloadavg()[0],
            "environment": environment("cpu"),
        }
        print(json.dumps({**facts, "results": results}, indent=1))
        return
    for name, row in results.items():
        print(
            f"{name:<24} {row['layer_us']:6.1f} us per layer call, {row['hooks_us']:7.1f} us per forward for the hooks "
            f"({row['hooks_us_per_layer']:.1f} us per layer of {LAYERS})"
        )


if __name__ == "__main__":
    main()
