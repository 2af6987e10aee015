"""An exponential moving average of the weights that are trained."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def local(tensor: Any) -> Tensor:
    """This process's shard of a sharded (FSDP2) tensor; any other tensor itself."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


class ExponentialMovingAverage:
    """``average = decay * average + (1 - decay) * weights`` after every optimizer step, in FP32, sharded as the weights are.

    It starts as the weights. Saved and restored by accelerate beside the model.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter], decay: float):
        self.parameters = list(parameters)
        self.decay = decay
        self.averages = [local(p.detach()).float().clone() for p in self.parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Take the current weights in."""
        for average, parameter in zip(self.averages, self.parameters, strict=True):
            average.lerp_(local(parameter.detach()).float(), 1.0 - self.decay)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Inside, the model has the averaged weights."""
        kept = [local(p.detach()).clone() for p in self.parameters]
        self._load(self.averages)
        try:
            yield
        finally:
            self._load(kept)

    @torch.no_grad()
    def _load(self, weights: list[Tensor]) -> None:
        for parameter, weight in zip(self.parameters, weights, strict=True):
            local(parameter.detach()).copy_(weight)

    def state_dict(self) -> dict[str, Any]:
        """The averages, whole: with sharded weights all processes take part, and one writes them."""
        return {"averages": [self._whole(a, p) for a, p in zip(self.averages, self.parameters, strict=True)]}

    @staticmethod
    def _whole(average: Tensor, parameter: Any) -> Tensor:
        if not hasattr(parameter, "full_tensor"):
            return average
        from torch.distributed.tensor import DTensor

        shape, stride = parameter.shape, parameter.stride()
        sharded = DTensor.from_local(average, parameter.device_mesh, parameter.placements, shape=shape, stride=stride)
        return sharded.full_tensor().cpu()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for average, parameter, whole in zip(self.averages, self.parameters, state["averages"], strict=True):
            given: Any = whole.to(average.device)
            if hasattr(parameter, "full_tensor"):
                from torch.distributed.tensor import distribute_tensor

                placed: Any = parameter
                given = distribute_tensor(given, placed.device_mesh, placed.placements)
            average.copy_(local(given))
