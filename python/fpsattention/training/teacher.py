"""The dense teacher of the objective ``velocity``: the model as it was before training, with its own attention."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from .objective import predict


class Teacher:
    """Call it with ``(x, sigma, prompt_embeds)``: the velocity, without gradients.

    Where all weights are trained, a frozen copy. Where an adapter is trained, the student itself with the adapter and the schedule switched
    off for the call: no memory.

    Args:
        transformer: before training, and before a schedule is applied to it.
        adapter: only an adapter of it is trained.
        schedule_off: returns a context in which the student's schedule is off.
        autocast: returns the context of mixed precision.
    """

    def __init__(
        self,
        transformer: Any,
        adapter: bool,
        schedule_off: Callable[[], AbstractContextManager[None]] = nullcontext,
        autocast: Callable[[], AbstractContextManager[None]] = nullcontext,
    ):
        self.adapter, self.schedule_off, self.autocast = adapter, schedule_off, autocast
        self.model: Any = transformer if adapter else copy.deepcopy(transformer).requires_grad_(False).eval()

    def to(self, device: torch.device) -> Teacher:
        """A copy goes to the device of the student."""
        if not self.adapter:
            self.model.to(device)
        return self

    def __call__(self, x: Tensor, sigma: Tensor, prompt_embeds: Tensor) -> Tensor:
        with torch.no_grad(), self.autocast(), self._as_it_was():
            return predict(self.model, x, sigma, prompt_embeds)

    @contextmanager
    def _as_it_was(self) -> Iterator[None]:
        if not self.adapter:
            yield
            return
        self.model.disable_adapters()
        try:
            with self.schedule_off():
                yield
        finally:
            self.model.enable_adapters()
