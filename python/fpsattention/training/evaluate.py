"""The gap of a model under a schedule, before and after an adapter that was trained through it; also merged, and under another adapter."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError
from ..schedule import Schedule
from .config import TrainConfig
from .data import LatentFolder
from .trainer import validation_loss

CLOSING, OTHER = "closing", "other"


@dataclass(frozen=True)
class Gap:
    """``loss`` (flow matching) under the schedule, ``dense``: of the same weights without, ``base``: of the dense model that it should
    equal. ``percent``: of ``loss`` above ``base``."""

    name: str
    loss: float
    dense: float
    base: float

    @property
    def percent(self) -> float:
        return 100.0 * (self.loss / self.base - 1.0)


def evaluate(
    transformer: torch.nn.Module,
    data: LatentFolder,
    schedule: Schedule,
    *,
    adapter: str | Path | None = None,
    other: str | Path | None = None,
    samples: int = 8,
) -> list[Gap]:
    """Gaps of ``transformer`` as it is; with ``adapter``; with ``adapter`` merged into the weights; and, of these two weights, with ``other`` on top.

    Args:
        transformer: a Wan transformer; it is left as it is.
        adapter: LoRA folder that ``fpsattn train`` wrote: trained through the schedule, to close the gap.
        other: a LoRA of another purpose (a style, few steps) that knows nothing of the schedule.
        samples: the last ones of ``data``, with fixed noise and evenly spread sigmas; held out if training left them out (``validate_every``).

    Raises:
        ConfigError: an adapter cannot be loaded.
    """
    config = TrainConfig(data=str(data.folder), output="unused", validation_samples=samples, schedule=None)

    def loss(model: torch.nn.Module, sparse: bool) -> float:
        import fpsattention as fps

        if not sparse:
            return validation_loss(model, data, config, samples)
        with fps.apply(model, schedule, replace=True):
            return validation_loss(model, data, config, samples)

    base = loss(transformer, sparse=False)
    gaps = [Gap("before", loss(transformer, sparse=True), base, base)]
    merged: Any = None
    if adapter is not None:
        model: Any = copy.deepcopy(transformer)
        _load(model, adapter, CLOSING)
        gaps.append(Gap("with the adapter", loss(model, sparse=True), loss(model, sparse=False), base))
        merged = model
        merged.fuse_lora(adapter_names=[CLOSING])
        merged.unload_lora()
        gaps.append(Gap("adapter merged", loss(merged, sparse=True), loss(merged, sparse=False), base))
    if other is not None:
        plain: Any = copy.deepcopy(transformer)
        _load(plain, other, OTHER)
        other_base = loss(plain, sparse=False)
        gaps.append(Gap("before, another adapter on top", loss(plain, sparse=True), other_base, other_base))
        if merged is not None:
            _load(merged, other, OTHER)
            gap = Gap(
                "merged, another adapter on top", loss(merged, sparse=True), loss(merged, sparse=False), other_base
            )
            gaps.append(gap)
    return gaps


def _load(model: Any, folder: str | Path, name: str) -> None:
    files = sorted(Path(folder).glob("*.safetensors"))
    if len(files) != 1:
        raise ConfigError(
            f"fpsattention.evaluate: the adapter '{folder}' holds {len(files)} *.safetensors files, expected one"
        )
    try:
        model.load_lora_adapter(str(folder), weight_name=files[0].name, prefix=None, adapter_name=name)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(
            f"fpsattention.evaluate: the adapter '{folder}' cannot be loaded ({reason}), expected a LoRA folder of this model"
        ) from error
