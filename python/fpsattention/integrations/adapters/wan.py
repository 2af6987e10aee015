"""Wan 2.1 and 2.2 and the models built on them: video tokens only, latents ``(B, C, T, H, W)``."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from .adapter import Adapter, Arguments, Geometry, latents_grid, submodules


def video_latents(model: Any, arguments: Arguments) -> Geometry:
    """The whole sequence is the grid of ``hidden_states`` under ``config.patch_size``."""
    latents = arguments["hidden_states"]
    return Geometry(latents_grid(latents, model.config.patch_size), latents, arguments["timestep"])


def frames_first(model: Any, arguments: Arguments) -> Geometry:
    """Latents are ``(B, T, C, H, W)``."""
    latents = arguments["hidden_states"]
    grid = latents_grid(latents.transpose(1, 2), model.config.patch_size)
    return Geometry(grid, latents, arguments["timestep"])


def reference_first(model: Any, arguments: Arguments) -> Geometry:
    """The first frame is a reference image."""
    return replace(video_latents(model, arguments), exact=(0,))


WAN = Adapter("Wan 2.1, 2.2", ("WanTransformer3DModel",), submodules(blocks="attn1"), video_latents)
VACE = Adapter(
    "Wan VACE", ("WanVACETransformer3DModel",), submodules(blocks="attn1", vace_blocks="attn1"), video_latents
)
ANIMATE = Adapter(
    "Wan Animate", ("WanAnimateTransformer3DModel",), submodules(blocks="attn1"), reference_first,
    note="the reference frame is dense in both directions",
)  # fmt: skip
SKYREELS = Adapter(
    "SkyReels-V2", ("SkyReelsV2Transformer3DModel",), submodules(blocks="attn1"), video_latents,
    note="dense under the mask of diffusion forcing (num_frame_per_block > 1)",
)  # fmt: skip
CHRONOEDIT = Adapter("ChronoEdit", ("ChronoEditTransformer3DModel",), submodules(blocks="attn1"), video_latents)
ANYFLOW = Adapter("AnyFlow", ("AnyFlowTransformer3DModel",), submodules(blocks="attn1"), frames_first)

ADAPTERS = (WAN, VACE, ANIMATE, SKYREELS, CHRONOEDIT, ANYFLOW)
