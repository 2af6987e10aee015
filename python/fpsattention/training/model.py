"""The transformer to train: loaded from disk or hub, or a tiny random one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError
from .data import LatentFolder


def load_transformer(model: str) -> torch.nn.Module:
    """A ``WanTransformer3DModel`` from its own folder or from the ``transformer`` folder of a pipeline (path or hub id)."""
    from diffusers import WanTransformer3DModel

    errors: list[str] = []
    for kwargs in ({"subfolder": "transformer"}, {}):
        try:
            return WanTransformer3DModel.from_pretrained(model, **kwargs)
        except (OSError, ValueError) as error:
            errors.append(str(error).splitlines()[0])
    raise ConfigError(f"fpsattention.train: model '{model}' holds no WanTransformer3DModel: {'; '.join(errors)}")


def tiny_transformer(data: LatentFolder, *, seed: int = 0, **changes: Any) -> torch.nn.Module:
    """A two-layer random Wan transformer (head_dim 64) that fits the shapes of ``data``; trains on a CPU in minutes."""
    from diffusers import WanTransformer3DModel

    channels = data.latent_shape[0]
    settings: dict[str, Any] = {
        "patch_size": (1, 2, 2),
        "num_attention_heads": 2,
        "attention_head_dim": 64,
        "in_channels": channels,
        "out_channels": channels,
        "text_dim": data.text_shape[1],
        "freq_dim": 64,
        "ffn_dim": 256,
        "num_layers": 2,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 64,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: Any = WanTransformer3DModel(**{**settings, **changes})
    return model


def token_grid(transformer: Any, latent_shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Token grid ``(T, H, W)`` of latents ``[C, T, H, W]``."""
    t, h, w = (size // patch for size, patch in zip(latent_shape[1:], transformer.config.patch_size, strict=True))
    return t, h, w


def weights_folder(output: str | Path) -> Path:
    """Where a run left its weights: ``transformer`` (full) or ``lora``."""
    for name in ("transformer", "lora"):
        if (Path(output) / name).is_dir():
            return Path(output) / name
    raise ConfigError(f"fpsattention.train: '{output}' holds neither 'transformer' nor 'lora': the run did not finish")
