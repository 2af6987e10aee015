"""Precomputed video latents for training: a folder of safetensors files, and a small synthetic data set of moving shapes.

One file is one sample: ``latents`` ``[C, T, H, W]`` (VAE latents, already scaled for the transformer) and ``prompt_embeds``
``[N, text_dim]`` (text encoder states). All samples of a folder have the same shapes; encode other sizes to another folder.
Where prompts are to be dropped, ``empty_prompt/prompt_embeds.safetensors`` holds the ``prompt_embeds`` of the empty prompt.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError

EMPTY_PROMPT = "empty_prompt/prompt_embeds.safetensors"  # in a folder of its own: the files beside it are samples


def _load_file(path: Path, wanted: tuple[str, ...] = ("latents", "prompt_embeds")) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    try:
        sample = load_file(path)
    except Exception as error:  # safetensors raises its own exception types on broken headers
        raise ConfigError(f"fpsattention.train: {path} is not a readable safetensors file: {error}") from error
    if set(wanted) - sample.keys():
        names = " and ".join(map(repr, wanted))
        raise ConfigError(f"fpsattention.train: {path} holds {sorted(sample)}, expected {names}")
    return sample


class LatentFolder:
    """The samples of a folder, in name order.

    Args:
        latent_shape: ``(C, T, H, W)`` of latents that are made elsewhere: none are read, samples are ``prompt_embeds`` alone.

    Raises ConfigError where the folder has no ``*.safetensors`` file, or a file of another shape than the first.
    """

    def __init__(self, folder: str | Path, latent_shape: tuple[int, ...] | None = None):
        self.folder = Path(folder)
        self.names = ("latents", "prompt_embeds") if latent_shape is None else ("prompt_embeds",)
        self.files = sorted(self.folder.glob("*.safetensors"))
        if not self.files:
            raise ConfigError(
                f"fpsattention.train: no *.safetensors files in '{folder}': precompute latents or pass --synthetic"
            )
        first = _load_file(self.files[0], self.names)
        self.latent_shape = tuple(first["latents"].shape) if latent_shape is None else tuple(latent_shape)
        self.text_shape = tuple(first["prompt_embeds"].shape)
        if len(self.latent_shape) != 4 or len(self.text_shape) != 2:
            raise ConfigError(
                f"fpsattention.train: {self.files[0]} has latents {self.latent_shape} and prompt_embeds {self.text_shape}, "
                "expected [C, T, H, W] and [N, text_dim]"
            )

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        sample = _load_file(self.files[index], self.names)
        shapes = {"latents": self.latent_shape, "prompt_embeds": self.text_shape}
        for name in self.names:
            expected = shapes[name]
            if tuple(sample[name].shape) != expected:
                raise ConfigError(
                    f"fpsattention.train: {self.files[index]} has {name} {tuple(sample[name].shape)}, the folder's first file has "
                    f"{expected}: one shape a folder"
                )
        return sample

    def empty_prompt(self) -> Tensor:
        """``prompt_embeds`` of the empty prompt, ``[N, text_dim]``."""
        path = self.folder / EMPTY_PROMPT
        if not path.is_file():
            raise ConfigError(
                f"fpsattention.train: no {EMPTY_PROMPT} in '{self.folder}', expected the prompt_embeds of the empty prompt: it takes "
                "the place of dropped prompts (prompt_dropout)"
            )
        embeds = _load_file(path, ("prompt_embeds",))["prompt_embeds"]
        if tuple(embeds.shape) != self.text_shape:
            raise ConfigError(
                f"fpsattention.train: {path} has prompt_embeds {tuple(embeds.shape)}, expected {self.text_shape} like the samples"
            )
        return embeds

    def batch(self, indices: list[int]) -> dict[str, Tensor]:
        samples = [self[i] for i in indices]
        return {name: torch.stack([s[name] for s in samples]) for name in self.names}


def shuffled(length: int, seed: int, start: int, count: int) -> list[int]:
    """``count`` sample indices from position ``start`` of an endless sequence of shuffled epochs, determined by ``seed``."""
    orders: dict[int, list[int]] = {}
    indices = []
    for position in range(start, start + count):
        epoch, offset = divmod(position, length)
        if epoch not in orders:
            generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
            orders[epoch] = torch.randperm(length, generator=generator).tolist()
        indices.append(orders[epoch][offset])
    return indices


def synthetic_folder(parent: str | Path, **settings: Any) -> Path:
    """Where under ``parent`` the samples of :func:`write_synthetic` with these settings belong: the name has a hash of all of them."""
    parameters = inspect.signature(write_synthetic).parameters.values()
    settings = {p.name: p.default for p in parameters if p.default is not p.empty} | settings
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    return Path(parent) / f"synthetic_latents-{digest}"


def write_synthetic(
    folder: str | Path,
    *,
    num_samples: int = 64,
    latent_shape: tuple[int, int, int, int] = (16, 5, 16, 24),
    text_shape: tuple[int, int] = (8, 64),
    lighting: float = 0.35,
    seed: int = 0,
) -> Path:
    """Write a learnable data set: soft discs that move across the latent at constant speed, bouncing off the borders.

    The channels of a disc are a fixed random mixture chosen by its class; the class and the velocity are told to the model through
    ``prompt_embeds``. Far-away tokens matter: a disc has to be continued across frames and tiles, and every video has a lighting (a
    smooth random field, the same in all frames, of strength ``lighting``) that is told nowhere and drowns in a single token's noise.
    Returns the folder.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    channels, frames, height, width = latent_shape
    classes = 4
    palette = torch.randn(classes, channels, generator=generator)
    palette = palette / palette.norm(dim=1, keepdim=True) * channels**0.5
    words = torch.randn(classes + 2, text_shape[1], generator=generator)
    y, x = torch.meshgrid(torch.arange(height).float(), torch.arange(width).float(), indexing="ij")
    for index in range(num_samples):
        latents = torch.zeros(latent_shape)
        prompt = torch.zeros(text_shape)
        coarse = torch.randn(1, channels, 3, 4, generator=generator)
        light = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bicubic", align_corners=True)
        latents += lighting * light[0][:, None]
        for disc in range(2):
            kind = int(torch.randint(classes, (), generator=generator))
            start, velocity = torch.rand(2, generator=generator), torch.rand(2, generator=generator) * 2 - 1
            radius = 1.5 + 2.0 * torch.rand((), generator=generator)
            for frame in range(frames):
                # A triangle wave of period 2 reflects the position at the borders.
                centre = 1 - (1 - (start + 0.25 * velocity * frame).remainder(2)).abs()
                distance = ((y - centre[0] * (height - 1)) ** 2 + (x - centre[1] * (width - 1)) ** 2).sqrt()
                latents[:, frame] += palette[kind][:, None, None] * torch.sigmoid(2 * (radius - distance))
            prompt[disc] = words[kind] + velocity[0] * words[-1] + velocity[1] * words[-2]
        latents += 0.02 * torch.randn(latent_shape, generator=generator)
        save_file({"latents": latents, "prompt_embeds": prompt}, folder / f"sample_{index:05d}.safetensors")
    (folder / EMPTY_PROMPT).parent.mkdir(exist_ok=True)
    save_file({"prompt_embeds": torch.zeros(text_shape)}, folder / EMPTY_PROMPT)
    return folder
