"""Flow matching, as Wan is trained: ``x_sigma = (1 - sigma) x_0 + sigma noise``, the model predicts ``noise - x_0``.

Every sample of a batch has its own sigma, so a batch runs at several schedule levels at once.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sample_sigma(batch: int, generator: torch.Generator, *, shift: float = 1.0, logit_normal: bool = False) -> Tensor:
    """Sigmas in (0, 1), FP32 ``[batch]``: uniform, or logit-normal (denser in the middle), then shifted as the sampler shifts them.

    ``sigma' = shift * sigma / (1 + (shift - 1) * sigma)``: training sees the sigmas that inference with this flow shift visits.
    """
    if logit_normal:
        sigma = torch.sigmoid(torch.randn(batch, generator=generator))
    else:
        sigma = torch.rand(batch, generator=generator).clamp(1e-3, 1 - 1e-3)
    return shift * sigma / (1 + (shift - 1) * sigma)


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
    s = sigma.to(latents.dtype).view(-1, 1, 1, 1, 1)
    noisy = (1 - s) * latents + s * noise
    prediction = model(
        hidden_states=noisy,
        timestep=sigma * num_train_timesteps,
        encoder_hidden_states=prompt_embeds,
        return_dict=False,
    )[0]
    return (prediction.float() - (noise - latents).float()).pow(2).flatten(1).mean(1)
