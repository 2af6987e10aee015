"""What training minimizes: flow matching, the velocity of a teacher, or two of a teacher's steps in one.

Flow matching is how Wan is trained: ``x_sigma = (1 - sigma) x_0 + sigma noise``, and the model predicts ``noise - x_0``. The other two need
no data: a teacher, which runs another schedule or none, says what the model should predict. Every sample of a batch has its own
sigma, so a batch runs at several schedule levels at once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

#: ``velocity(x [B, C, T, H, W], sigma [B], prompt_embeds [B, N, text_dim]) -> [B, C, T, H, W]``
Velocity = Callable[[Tensor, Tensor, Tensor], Tensor]


def sample_sigma(batch: int, generator: torch.Generator, *, shift: float = 1.0, logit_normal: bool = False) -> Tensor:
    """Sigmas in (0, 1), FP32 ``[batch]``: uniform, or logit-normal (denser in the middle), then shifted as the sampler shifts them.

    ``sigma' = shift * sigma / (1 + (shift - 1) * sigma)``: training sees the sigmas that inference with this flow shift visits.
    """
    if logit_normal:
        sigma = torch.sigmoid(torch.randn(batch, generator=generator))
    else:
        sigma = torch.rand(batch, generator=generator).clamp(1e-3, 1 - 1e-3)
    return shift * sigma / (1 + (shift - 1) * sigma)


def predict(
    model: torch.nn.Module, x: Tensor, sigma: Tensor, prompt_embeds: Tensor, num_train_timesteps: int = 1000
) -> Tensor:
    """The velocity that a ``WanTransformer3DModel`` (possibly wrapped) predicts at ``x``, like ``x``."""
    velocity: Tensor = model(
        hidden_states=x, timestep=sigma * num_train_timesteps, encoder_hidden_states=prompt_embeds, return_dict=False
    )[0]
    return velocity


def noisy(latents: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """``(1 - sigma) latents + sigma noise``, with ``sigma [B]``."""
    s = _each(sigma, latents)
    return (1 - s) * latents + s * noise


def flow_matching_loss(
    model: torch.nn.Module,
    latents: Tensor,
    prompt_embeds: Tensor,
    sigma: Tensor,
    noise: Tensor,
    *,
    num_train_timesteps: int = 1000,
) -> Tensor:
    """Mean squared error of the predicted velocity per sample, FP32 ``[B]``.

    Args:
        model: a ``WanTransformer3DModel`` (possibly wrapped).
        latents, noise: ``[B, C, T, H, W]``.
        prompt_embeds: ``[B, N, text_dim]``.
        sigma: ``[B]`` in (0, 1); the model's timestep is ``sigma * num_train_timesteps``.
    """
    prediction = predict(model, noisy(latents, noise, sigma), sigma, prompt_embeds, num_train_timesteps)
    return _mean_square(prediction, noise - latents)


def rollout(teacher: Velocity, noise: Tensor, sigma: Tensor, prompt_embeds: Tensor, steps: int) -> Tensor:
    """Where the teacher's own sampler is at ``sigma``: ``steps`` equal Euler steps from ``noise``, which is sigma 1. No gradients.

    These are inputs that inference meets, made without data.
    """
    with torch.no_grad():
        x, begin = noise, torch.ones_like(sigma)
        stride = (sigma - 1) / steps
        for step in range(steps):
            x = x + _each(stride, x) * teacher(x, begin + step * stride, prompt_embeds)
    return x


def velocity_loss(
    student: Velocity, teacher: Velocity, x: Tensor, sigma: Tensor, prompt_embeds: Tensor,
    *, data: Tensor | None = None, data_share: float = 0.0,
) -> Tensor:  # fmt: skip
    """Mean squared difference of two models' velocities at the same ``x``, per sample, FP32 ``[B]``; gradients in the student only.

    Where the teacher is the dense model, its velocity is what flow matching's noisy target ``noise - x_0`` is on average, as the
    student's weights know it: the loss has nothing to learn but what the schedule changed. ``data``, that noisy target, may be a
    ``data_share`` of what is predicted: what the teacher does not know, too, with so much of the noise.
    """
    with torch.no_grad():
        target = teacher(x, sigma, prompt_embeds)
        if data is not None:
            target = torch.lerp(target, data.to(target.dtype), data_share)
    return _mean_square(student(x, sigma, prompt_embeds), target)


def step_distillation_loss(
    student: Velocity, teacher: Velocity, x: Tensor, sigma: Tensor, sigma_next: Tensor, prompt_embeds: Tensor, teacher_steps: int = 2
) -> Tensor:  # fmt: skip
    """Progressive distillation (Salimans and Ho, arXiv 2202.00512), for flow matching: one step of the student stands for ``teacher_steps``
    equal Euler steps of the teacher from ``sigma`` to ``sigma_next``. Per sample, FP32 ``[B]``; gradients in the student only.

    Teacher and student may be one architecture under two schedules, or none, in one process: each reads its own at its own sigma.
    """
    with torch.no_grad():
        y, stride = x, (sigma_next - sigma) / teacher_steps
        for step in range(teacher_steps):
            y = y + _each(stride, x) * teacher(y, sigma + step * stride, prompt_embeds)
        target = (y - x) / _each(sigma_next - sigma, x)
    return _mean_square(student(x, sigma, prompt_embeds), target)


def _each(values: Tensor, like: Tensor) -> Tensor:
    """``values [B]``, to be multiplied with ``like [B, C, T, H, W]``."""
    return values.to(like.dtype).view(-1, 1, 1, 1, 1)


def _mean_square(a: Tensor, b: Tensor) -> Tensor:
    return (a.float() - b.float()).pow(2).flatten(1).mean(1)
