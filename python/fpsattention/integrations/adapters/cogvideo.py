"""CogVideoX and models with its block: text, then video, through ``F.scaled_dot_product_attention``; Allegro, video only.

They are told the index of a DDPM step; index / steps is not sigma, but falls with it, which is all that phases need.
"""

from __future__ import annotations

from typing import Any

from ...errors import ConfigError
from .adapter import Adapter, Arguments, Geometry, Preparation, each_twice, latents_grid, patches, submodules

PROXY = "phases go by the index of the DDPM step, which stands for sigma"


def text_then_frames(model: Any, arguments: Arguments) -> Geometry:
    """Latents are ``(B, T, C, H, W)``."""
    latents = arguments["hidden_states"]
    if latents.ndim != 5:
        raise ConfigError(
            f"fpsattention.apply: hidden_states has shape {tuple(latents.shape)}, expected latents (B, T, C, H, W)"
        )
    grid = latents_grid(latents.transpose(1, 2), patches(model))
    return Geometry(grid, latents, arguments["timestep"], arguments["encoder_hidden_states"].shape[1], "prefix")


def two_texts_then_video(model: Any, arguments: Arguments) -> Geometry:
    """The tokens of a second text encoder, if there is one, follow those of the first."""
    latents = arguments["hidden_states"]
    texts = (arguments.get("encoder_hidden_states"), arguments.get("encoder_hidden_states_t5"))
    text_len = sum(text.shape[1] for text in texts if text is not None)
    return Geometry(latents_grid(latents, patches(model)), latents, arguments["timestep"], text_len, "prefix")


def video_only(model: Any, arguments: Arguments) -> Geometry:
    """Patches are ``config.patch_size_t`` and ``config.patch_size``."""
    latents = arguments["hidden_states"]
    return Geometry(latents_grid(latents, patches(model)), latents, arguments["timestep"])


PREPARE = Preparation("layer", "image_rotary_emb", each_twice, twice=True)

COGVIDEOX = Adapter(
    "CogVideoX 1.0, 1.5", ("CogVideoXTransformer3DModel",), submodules(transformer_blocks="attn1"), text_then_frames, note=PROXY,
    prepare=PREPARE,
)  # fmt: skip
CONSISID = Adapter(
    "ConsisID", ("ConsisIDTransformer3DModel",), submodules(transformer_blocks="attn1"), text_then_frames, note=PROXY,
    prepare=PREPARE,
)  # fmt: skip
EASYANIMATE = Adapter(
    "EasyAnimate", ("EasyAnimateTransformer3DModel",), submodules(transformer_blocks="attn1"), two_texts_then_video
)
ALLEGRO = Adapter(
    "Allegro", ("AllegroTransformer3DModel",), submodules(transformer_blocks="attn1"), video_only,
    note="head dimension 96: the matmuls cost what 128 does; with an attention_mask: dense; " + PROXY,
)  # fmt: skip

ADAPTERS = (COGVIDEOX, CONSISID, EASYANIMATE, ALLEGRO)
