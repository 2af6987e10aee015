"""Schedules in frameworks that call one attention layer after the other, and say themselves where the tokens and the time are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..schedule import Schedule
from .core_calls import CoreCall
from .engine import Engine
from .forward import Forward
from .levels import Grid, Tokens
from .state import CURRENT


class Hosted(Engine):
    """A schedule on layers that a framework calls.

    Args:
        name, schedule, on_unsupported: as in :class:`Engine`.
        paths: names of the layers, in their order.
        heads: of all layers, where the schedule has windows per head.
    """

    def __init__(self, name: str, schedule: Schedule, paths: Sequence[str], heads: int | None, on_unsupported: str):
        schedule.check_model(None, len(paths), heads)
        super().__init__(name, schedule, paths, heads, [""] * len(paths), on_unsupported)
        self.reads = 0

    def host_reads(self) -> int:
        """Reads of a noise level from the device, as far as whoever read them counts them in ``reads``."""
        return self.reads

    def reset(self) -> None:
        """Forget all counts."""
        super().reset()
        self.reads = 0

    def begin(
        self,
        grid: Grid,
        sigmas: Sequence[float],
        device: torch.device,
        *,
        text_position: str = "suffix",
        run: Sequence[float] = (),
        refused: str | None = None,
    ) -> Forward:
        """A forward of the transformer, to be handed to :meth:`attend` and :meth:`count`.

        Args:
            grid: tokens ``(T, H, W)``; what a layer's sequence has beyond them are other tokens, dense in both directions, at
                ``text_position``.
            sigmas: of every sample, 1 is noise.
            run: the sigmas of all steps of the sampling run, noisiest first, as far as known: where phases are fractions of steps.
            refused: why all of this forward is dense.
        """
        schedule, edges = self.tables.schedule, self.tables.edges
        if schedule.axis == "steps" and edges and len(run) > 1:
            edges = schedule.edges_of(run)
        segments = tuple(schedule.segment(min(max(sigma, 0.0), 1.0), edges) for sigma in sigmas)
        video = Tokens(grid, 0, text_position)
        executed = [0] * len(self.sites)
        return Forward(
            self, None, segments, device, torch.is_grad_enabled(), executed=executed, video=video, refused=refused
        )

    def attend(self, layer: int, core: CoreCall, forward: Forward) -> Tensor:
        """The output of a layer, ``(B, S, H, D)``."""
        before, CURRENT.forward = CURRENT.forward, forward
        try:
            return self.sites[layer].attend(core)
        finally:
            CURRENT.forward = before
