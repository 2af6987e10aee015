"""Wan 2.1 and 2.2 and the models built on them: video tokens only, latents ``(B, C, T, H, W)``."""

from __future__ import annotations

from typing import Any

from .adapter import Adapter, Arguments, Geometry, attention_linears, feed_forward_linears, latents_grid, submodules


def video_latents(model: Any, arguments: Arguments) -> Geometry:
    """The whole sequence is the grid of ``hidden_states`` under ``config.patch_size``."""
    latents = arguments["hidden_states"]
    return Geometry(latents_grid(latents, model.config.patch_size), latents, arguments["timestep"])


def frames_first(model: Any, arguments: Arguments) -> Geometry:
    """Latents are ``(B, T, C, H, W)``."""
    latents = arguments["hidden_states"]
    grid = latents_grid(latents.transpose(1, 2), model.config.patch_size)
    return Geometry(grid, latents, arguments["timestep"])


#: Keys and values of the cross-attention are of the text.
LINEARS = (*attention_linears("attn1"), "attn2.to_q", "attn2.to_out.0", *feed_forward_linears("ffn"))

WAN = Adapter("Wan 2.1, 2.2", ("WanTransformer3DModel",), submodules(blocks="attn1"), video_latents, linears=LINEARS)
VACE = Adapter(
    "Wan VACE", ("WanVACETransformer3DModel",), submodules(blocks="attn1", vace_blocks="attn1"), video_latents,
    linears=LINEARS,
)  # fmt: skip
ANIMATE = Adapter(
    "Wan Animate", ("WanAnimateTransformer3DModel",), submodules(blocks="attn1"), video_latents, linears=LINEARS
)
SKYREELS = Adapter(
    "SkyReels-V2", ("SkyReelsV2Transformer3DModel",), submodules(blocks="attn1"), video_latents,
    note="dense under the mask of diffusion forcing (num_frame_per_block > 1)", linears=LINEARS,
)  # fmt: skip
CHRONOEDIT = Adapter(
    "ChronoEdit", ("ChronoEditTransformer3DModel",), submodules(blocks="attn1"), video_latents, linears=LINEARS
)
ANYFLOW = Adapter("AnyFlow", ("AnyFlowTransformer3DModel",), submodules(blocks="attn1"), frames_first, linears=LINEARS)

ADAPTERS = (WAN, VACE, ANIMATE, SKYREELS, CHRONOEDIT, ANYFLOW)
