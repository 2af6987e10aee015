"""What diffusers' schedulers say about the steps they take."""

from __future__ import annotations

import copy
from typing import Any

from ..errors import ConfigError


def step_sigmas(scheduler: Any, num_steps: int) -> list[float]:
    """The sigmas, noisiest first, that a diffusers scheduler visits in ``num_steps`` steps. The scheduler is left as it is.

    Raises:
        ConfigError: it takes another number of steps, or its sigmas do not fall.
    """
    if num_steps < 1:
        raise ConfigError(f"fpsattention.Schedule: {num_steps} steps, expected at least 1")
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(num_steps)
    total = scheduler.config.num_train_timesteps
    sigmas = [min(float(t) / total, 1.0) for t in scheduler.timesteps.tolist()]
    if len(sigmas) > 1 and sigmas[0] < sigmas[-1]:  # Mochi counts the other way
        sigmas = [1.0 - sigma for sigma in sigmas]
    if len(sigmas) != num_steps or any(a <= b for a, b in zip(sigmas, sigmas[1:], strict=False)):
        raise ConfigError(
            f"fpsattention.Schedule: {type(scheduler).__name__} gives sigmas {sigmas} for {num_steps} steps, "
            f"expected {num_steps} strictly falling ones: use a first-order scheduler or fewer steps"
        )
    return sigmas


def shifts_dynamically(scheduler: Any) -> bool:
    """Whether the shift of the scheduler depends on the size of the video, so that it is known in a run only."""
    return bool(getattr(getattr(scheduler, "config", None), "use_dynamic_shifting", False))


def flow_shift_of(scheduler: Any) -> float:
    """The shift ``s`` of ``sigma = s u / (1 + (s - 1) u)`` that the scheduler follows: its own, or that of its sigma halfway.

    Raises:
        ConfigError: it cannot be read.
    """
    config = getattr(scheduler, "config", {})
    curved = any(config.get(f"use_{kind}_sigmas") for kind in ("karras", "exponential", "beta"))
    if not shifts_dynamically(scheduler) and not curved:
        shift = config.get("flow_shift") if config.get("use_flow_sigmas") else getattr(scheduler, "shift", None)
        if isinstance(shift, (int, float)) and shift > 0:
            return float(shift)
    try:
        middle = step_sigmas(scheduler, 64)[32]
    except Exception as error:  # whatever a scheduler of another kind throws
        raise ConfigError(f"fpsattention: the steps of {type(scheduler).__name__} cannot be read: {error}") from error
    if not 0.0 < middle < 1.0:
        raise ConfigError(
            f"fpsattention: {type(scheduler).__name__} is at sigma {middle} halfway, expected one in (0, 1)"
        )
    return middle / (1.0 - middle)
