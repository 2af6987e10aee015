"""Learning rate: linear warm-up, then halved whenever the smoothed loss stops falling, or falling linearly to nothing.

Training through FP8 and sparsity is noisier than dense training; the method needs gradient accumulation and a learning rate that
adapts to the loss (FPSAttention, arXiv 2506.04648, training details). torch's ReduceLROnPlateau does the adapting.
"""

from __future__ import annotations

from typing import Any

import torch


class AdaptiveLearningRate:
    """``step(loss)`` once per optimizer step; ``state_dict`` / ``load_state_dict`` for exact resumption.

    Args:
        decay_steps: after the warm-up the rate falls linearly, to 0 after so many steps in all; None: it is halved on plateaus.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        warmup_steps: int = 20,
        smoothing: float = 0.98,
        patience: int = 200,
        factor: float = 0.5,
        minimum: float = 1e-7,
        decay_steps: int | None = None,
    ):
        self.optimizer = optimizer
        self.warmup_steps = max(1, warmup_steps)
        self.smoothing = smoothing
        self.decay_steps = decay_steps
        self.steps = 0
        self.smoothed: float | None = None
        self.peak = [group["lr"] for group in optimizer.param_groups]
        self.plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer, factor=factor, patience=patience, threshold=1e-3, min_lr=minimum
        )
        self._scale()

    def _scale(self) -> None:
        share = min(1.0, (self.steps + 1) / self.warmup_steps)
        if self.decay_steps is not None and self.steps >= self.warmup_steps:
            share = max(0.0, (self.decay_steps - self.steps) / (self.decay_steps - self.warmup_steps))
        for group, peak in zip(self.optimizer.param_groups, self.peak, strict=True):
            group["lr"] = peak * share

    def step(self, loss: float) -> None:
        self.steps += 1
        self.smoothed = loss if self.smoothed is None else self.smoothing * self.smoothed + (1 - self.smoothing) * loss
        if self.steps < self.warmup_steps or self.decay_steps is not None:
            self._scale()
        else:
            self.plateau.step(self.smoothed)

    @property
    def value(self) -> float:
        return self.optimizer.param_groups[0]["lr"]

    def state_dict(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in ("steps", "smoothed", "peak")}
        return {**own, "plateau": self.plateau.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in ("steps", "smoothed", "peak"):
            setattr(self, name, state[name])
        self.plateau.load_state_dict(state["plateau"])
