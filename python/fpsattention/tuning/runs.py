"""Runs of the pipeline: dense ones, and under a schedule, compared with them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UnsupportedError
from ..integrations.report import Report
from ..schedule import Level, Phase, Schedule
from .settings import Target, cost_of


@dataclass(frozen=True)
class Item:
    """One video: the pipeline's arguments, and the seed of its noise."""

    name: str
    call: Mapping[str, Any]
    seed: int

    def shown(self) -> str:
        """For provenance."""
        prompt = self.call.get("prompt")
        return prompt if isinstance(prompt, str) else "prompt_embeds" if "prompt_embeds" in self.call else self.name


def dense(tile: tuple[int, int, int] | None) -> Schedule:
    """The model's own attention at every sigma."""
    return Schedule({"dense": Level("dense", precision="bf16")}, (Phase(1.0, 0.0, "dense"),), tile=tile)


class Runner:
    """Runs of ``pipe``.

    Attributes:
        seconds: that the last run took.
    """

    def __init__(self, pipe: Any, target: Target, folder: Path):
        self.pipe, self.target, self.folder = pipe, target, folder
        self.seconds = 0.0

    def generate(self, item: Item) -> Tensor:
        """Video ``[F, H, W, C]`` in [0, 1] where the target is a PSNR, else latents; FP32 on the CPU."""
        video = self.target.metric == "psnr"
        begin = time.perf_counter()
        with torch.no_grad():
            result = self.pipe(
                **item.call, generator=torch.Generator().manual_seed(item.seed), output_type="np" if video else "latent"
            )
        self.seconds = time.perf_counter() - begin
        frames = getattr(result, "frames", None)
        if frames is None:
            raise UnsupportedError(
                f"fpsattention.tune: {type(self.pipe).__name__} returns no frames, expected a video pipeline"
            )
        return torch.as_tensor(frames).detach().float().cpu()

    def reference(self, item: Item, during: Any = None) -> Tensor:
        """Of the dense run; kept on disk. ``during``: a context to run it in, where it is not there yet."""
        path = self.folder / item.name / "dense.pt"
        if path.is_file():
            found: Tensor = torch.load(path, weights_only=True)
            return found
        import fpsattention as fps

        handle = nullcontext() if during is not None else fps.apply(self.pipe, dense(None), replace=True)
        with handle, during or nullcontext():
            out = self.generate(item)
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(out, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").rename(path)
        return out

    def distance(self, schedule: Schedule, item: Item) -> tuple[float, dict[str, Any]]:
        """Between the run under ``schedule`` and the dense one, as the target measures it; and what ran."""
        import fpsattention as fps

        reference = self.reference(item)
        with fps.apply(self.pipe, schedule, replace=True) as handle:
            out = self.generate(item)
            ran = handle.report()
        return self.apart(out, reference), {"density": ran.density, "cost": _cost(ran)}

    def apart(self, out: Tensor, reference: Tensor) -> float:
        """Distance of two outputs, as the target measures it."""
        diff = (out - reference).double()
        if self.target.metric == "psnr":
            return float(diff.square().mean().sqrt())
        return float(diff.abs().sum() / reference.double().abs().sum().clamp_min(1e-30))


def _cost(ran: Report) -> float:
    """Mean over calls, in the units of :data:`~.settings.COST`."""
    calls = sum(row.calls for row in ran.rows)
    kinds = [row.pattern["name"] if row.pattern else row.granularity or "bf16" for row in ran.rows]
    return sum(row.calls * row.density * cost_of(kind) for row, kind in zip(ran.rows, kinds, strict=True)) / max(
        calls, 1
    )
