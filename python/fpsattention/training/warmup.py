"""Sparsity warm-up: the density falls from 1 to the schedule's own in a few stages.

Starting a pretrained dense model at full sparsity moves its activations abruptly; lowering the density in stages lets the weights
follow (VSA ramps its sparsity likewise, arXiv 2505.13389). A stage is a schedule of its own, applied to the same model.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from ..schedule import Level, Schedule, Window


def relaxed_window(window: Window, progress: float, tile_grid: tuple[int, int, int]) -> Window:
    """The window at ``progress`` in [0, 1] of the warm-up: density ``1 - progress * (1 - density(window))``; at 1 the window itself."""
    if progress >= 1 or window is None:
        return window
    density = window if isinstance(window, float) else math.prod(window) / math.prod(tile_grid)
    return 1.0 - progress * (1.0 - density) if progress > 0 else None


def relaxed(schedule: Schedule, progress: float, tile_grid: tuple[int, int, int]) -> Schedule:
    """``schedule`` with every window relaxed; precisions, granularities, phases and overrides stay.

    A pattern has no size in common with other patterns: its level visits everything until the last stage.
    """

    def level(original: Level) -> Level:
        if original.pattern is not None:
            return original if progress >= 1 else dataclasses.replace(original, pattern=None, refresh=1)
        return dataclasses.replace(original, window=relaxed_window(original.window, progress, tile_grid))

    def head(windows: Window | Mapping[str, Window]) -> Window | Mapping[str, Window]:
        if isinstance(windows, Mapping):
            return {name: relaxed_window(w, progress, tile_grid) for name, w in windows.items()}
        return relaxed_window(windows, progress, tile_grid)

    return dataclasses.replace(
        schedule,
        levels={name: level(original) for name, original in schedule.levels.items()},
        heads={key: head(windows) for key, windows in schedule.heads.items()},
    )


class SparsityWarmup:
    """Keeps the right stage applied: ``at(step)`` before every step, ``remove()`` at the end.

    Args:
        model: the transformer; None for ``schedule`` leaves it dense.
        grid: token grid ``(T, H, W)`` of the training latents.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        schedule: Schedule | None,
        grid: tuple[int, int, int],
        warmup_steps: int,
        stages: int,
        debug: bool = False,
    ):
        from ..layout.tiles import plan

        self.model, self.schedule, self.warmup_steps, self.stages, self.debug = (
            model,
            schedule,
            warmup_steps,
            stages,
            debug,
        )
        self.tile_grid = plan(grid, tile=schedule.tile).tile_grid if schedule is not None else (1, 1, 1)
        self.stage: int | None = None
        self.handle: Any = None

    def stage_at(self, step: int) -> int:
        """Stage 0 is fully dense (FP8), stage ``stages`` the schedule itself."""
        if step >= self.warmup_steps:
            return self.stages
        return step * self.stages // self.warmup_steps

    def at(self, step: int) -> None:
        if self.schedule is None or self.stage == (stage := self.stage_at(step)):
            return
        from ..integrations.diffusers import apply

        self.remove()
        self.handle = apply(self.model, relaxed(self.schedule, stage / self.stages, self.tile_grid), debug=self.debug)
        self.stage = stage

    def off(self) -> AbstractContextManager[None]:
        """A context in which the model runs its own attention."""
        return nullcontext() if self.handle is None else self.handle.disabled()

    def remove(self) -> None:
        if self.handle is not None:
            self.handle.remove()
        self.handle, self.stage = None, None
