"""Wan 2.1 and 2.2 and the models built on them: video tokens only, latents ``(B, C, T, H, W)``."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from .adapter import (
    Adapter,
    Arguments,
    Geometry,
    Move,
    Place,
    Preparation,
    attention_linears,
    feed_forward_linears,
    first_argument,
    latents_grid,
    submodules,
)


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


def _patches(x: Tensor, move: Move) -> Tensor:
    """``(B, C, T, H, W)``, which the model flattens next."""
    return move(x.flatten(2), 2).view_as(x)


def _rope(tables: tuple[Tensor, ...], move: Move) -> tuple[Tensor, ...]:
    """``(1, S, 1, D)``."""
    return tuple(move(table, 1) for table in tables)


def _modulation(outputs: tuple[Any, ...], move: Move) -> tuple[Any, ...]:
    """The blocks' modulation is ``(B, 6 C)``, or with a timestep per token ``(B, S, 6 C)``; that of the output comes after them."""
    embedding, modulation, *others = outputs
    return (embedding, move(modulation, 1) if modulation.ndim == 3 else modulation, *others)


def patches_to_blocks(model: Any) -> tuple[Place, ...]:
    """Tokens come from the patch embedding and leave at the output norm."""
    return (
        Place("patch_embedding", _patches),
        Place("rope", _rope),
        Place("condition_embedder", _modulation),
        Place("norm_out", first_argument, back=True),
    )


def rotary_tables(tables: tuple[Tensor, Tensor], heads: int) -> tuple[Tensor, Tensor]:
    """``(1, S, 1, D)``, of which the code takes every other column."""
    cos, sin = tables
    return cos[..., 0::2].transpose(1, 2), sin[..., 1::2].transpose(1, 2)


PREPARE = Preparation("rms_across_heads", "rotary_emb", rotary_tables)

#: Keys and values of the cross-attention are of the text.
LINEARS = (*attention_linears("attn1"), "attn2.to_q", "attn2.to_out.0", *feed_forward_linears("ffn"))

WAN = Adapter(
    "Wan 2.1, 2.2",
    ("WanTransformer3DModel",),
    submodules(blocks="attn1"),
    video_latents,
    linears=LINEARS,
    token_order=patches_to_blocks,
    prepare=PREPARE,
)
VACE = Adapter(
    "Wan VACE", ("WanVACETransformer3DModel",), submodules(blocks="attn1", vace_blocks="attn1"), video_latents,
    linears=LINEARS, prepare=PREPARE,
)  # fmt: skip
ANIMATE = Adapter(
    "Wan Animate", ("WanAnimateTransformer3DModel",), submodules(blocks="attn1"), reference_first, linears=LINEARS, prepare=PREPARE,
    note="the reference frame is dense in both directions",
)  # fmt: skip
SKYREELS = Adapter(
    "SkyReels-V2", ("SkyReelsV2Transformer3DModel",), submodules(blocks="attn1"), video_latents,
    note="dense under the mask of diffusion forcing (num_frame_per_block > 1)", linears=LINEARS, prepare=PREPARE,
)  # fmt: skip
CHRONOEDIT = Adapter(
    "ChronoEdit", ("ChronoEditTransformer3DModel",), submodules(blocks="attn1"), video_latents, linears=LINEARS,
    prepare=PREPARE,
)  # fmt: skip
ANYFLOW = Adapter("AnyFlow", ("AnyFlowTransformer3DModel",), submodules(blocks="attn1"), frames_first, linears=LINEARS)

ADAPTERS = (WAN, VACE, ANIMATE, SKYREELS, CHRONOEDIT, ANYFLOW)
