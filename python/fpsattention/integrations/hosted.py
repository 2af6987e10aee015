"""Schedules in frameworks that call one attention layer after the other, and say themselves where the tokens and the time are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..schedule import Schedule
from .core_calls import CoreCall
from .engine import Engine
from .forward import Forward
from .state import CURRENT
from .tokens import Grid, Tokens


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


class Layers:
    """Layers that a framework builds one by one, each with a name. A name that comes again is that of the next transformer.

    One thread runs the layers of a transformer in their order.

    Args:
        name: of the framework, for messages.
        schedule, on_unsupported: as in :class:`Hosted`.
    """

    def __init__(self, name: str, schedule: Schedule, on_unsupported: str):
        self.name, self.schedule, self.on_unsupported = name, schedule, on_unsupported
        self.transformers: list[Transformer] = []

    def add(self, path: str) -> Layer:
        """A layer, to be kept by whoever calls it."""
        if not self.transformers or path in self.transformers[-1].paths:
            self.transformers.append(Transformer(self))
        transformer = self.transformers[-1]
        transformer.paths.append(path)
        return Layer(transformer, len(transformer.paths) - 1)


class Transformer:
    """The layers of one transformer, and its forward at hand."""

    def __init__(self, layers: Layers):
        self.layers = layers
        self.paths: list[str] = []
        self.hosted: Hosted | None = None
        self.forward: Forward | None = None
        self.told: tuple[object, ...] = ()
        self.last = -1


@dataclass(frozen=True)
class Layer:
    """One of :class:`Layers`."""

    transformer: Transformer
    index: int

    def attend(
        self,
        core: CoreCall,
        grid: Grid,
        sigma: float,
        *,
        text_position: str = "suffix",
        run: Sequence[float] = (),
        refused: str | None = None,
    ) -> Tensor:
        """The output of the layer, ``(B, S, H, D)``, in a forward of which the framework tells every layer; see :meth:`Hosted.begin`."""
        one = self.transformer
        if one.hosted is None:
            layers = one.layers
            one.hosted = Hosted(layers.name, layers.schedule, one.paths, None, layers.on_unsupported)
        batch, device = core.q.shape[0], core.q.device
        told = (grid, sigma, text_position, refused, batch, device, torch.is_grad_enabled())
        if one.forward is None or told != one.told or self.index <= one.last:
            if one.forward is not None:
                one.hosted.count(one.forward)
            one.forward = one.hosted.begin(
                grid, [sigma] * batch, device, text_position=text_position, run=run, refused=refused
            )
            one.told = told
        one.last = self.index
        return one.hosted.attend(self.index, core, one.forward)
