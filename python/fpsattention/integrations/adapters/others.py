"""Families with one model each: Mochi, Cosmos 1 to 2.5, Cosmos 3, Kandinsky 5 and 6, Helios."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...errors import UnsupportedError
from .adapter import (
    Adapter,
    Arguments,
    Geometry,
    Preparation,
    inverted_sigma,
    latents_grid,
    own_sigma,
    patches,
    read_once,
    submodules,
    thousandths,
)
from .wan import video_latents


def video_then_valid_text(model: Any, arguments: Arguments) -> Geometry:
    """The core is called per sample, without padding: the text length shows there."""
    latents = arguments["hidden_states"]
    return Geometry(latents_grid(latents, patches(model)), latents, arguments["timestep"], None)


def cosmos(model: Any, arguments: Arguments) -> Geometry:
    """Cosmos 2 and 2.5 are told sigma, of each frame in places. Cosmos 1, whose position embedding is learned, is told c = log(s) / 4
    of an EDM scheduler (Karras et al. 2022, table 1), so sigma = s / (s + 1) is the logistic function of 4 c."""
    geometry = video_latents(model, arguments)
    if model.config.extra_pos_embed_type is None:
        return geometry
    return Geometry(geometry.grid, geometry.latents, torch.sigmoid(4 * arguments["timestep"].double()))


def cosmos_run(timesteps: Sequence[float]) -> list[float]:
    """Timesteps are c of an EDM scheduler (Cosmos 1; negative at its end), 1000 s (Cosmos 2; s is 80 at first), or 1000 sigma (2.5)."""
    if min(timesteps) < 0:
        return [1 / (1 + math.exp(-4 * c)) for c in timesteps]
    if max(timesteps) > 1000:
        return [s / (s + 1000) for s in timesteps]
    return thousandths(timesteps)


def _first(places: Tensor) -> int:
    return int(places[0])


def packed(model: Any, arguments: Arguments) -> Geometry:
    """One sample, packed without a batch: text, then the grid of a video, then sound and actions. Timesteps are of noisy tokens: none of
    the video where only actions are made."""
    if model._cp_shard_fn is not None:
        raise UnsupportedError(
            "fpsattention.apply: the transformer cuts its sequence for several devices (_cp_shard_fn), expected it whole"
        )
    shapes, text = arguments["vision_token_shapes"], arguments["und_len"]
    if len(shapes) != 1:
        raise UnsupportedError(f"fpsattention.apply: {len(shapes)} videos or images in one sequence, expected one")
    t, h, w = shapes[0]
    others = arguments["sequence_length"] - text - t * h * w
    if others and (place := read_once(arguments["vision_sequence_indexes"], _first)) != text:
        raise UnsupportedError(
            f"fpsattention.apply: the video begins at token {place}, expected it next to the text, at {text}"
        )
    times = [arguments.get(f"{part}_timesteps") for part in ("vision", "sound", "action")]
    noisy = [time for time in times if time is not None and time.numel()]
    if not noisy:
        raise UnsupportedError("fpsattention.apply: no token has a timestep, expected one that is denoised")
    latents = arguments["vision_tokens"][0]
    latents = latents.reshape(1, *latents.shape[-4:])
    return Geometry((t, h, w), latents, noisy[0][None], text + others, alone=text)


def frames_last_channels(model: Any, arguments: Arguments) -> Geometry:
    """Latents are ``(B, T, H, W, C)``. Fractal order of tokens comes with a mask of the model's own, so it is dense."""
    latents = arguments["hidden_states"]
    t, h, w = (size // patch for size, patch in zip(latents.shape[1:4], model.config.patch_size, strict=True))
    return Geometry((t, h, w), latents, arguments["timestep"])


def history_then_video(model: Any, arguments: Arguments) -> Geometry:
    """Long, middle and short history, in patches 4, 2 and 1 times as large, padded up to whole ones, come before the video."""
    latents = arguments["hidden_states"]
    history = 0
    for name, patch in (("short", (1, 2, 2)), ("mid", (2, 4, 4)), ("long", (4, 8, 8))):
        part, indices = (arguments.get(f"{prefix}_history_{name}") for prefix in ("latents", "indices_latents"))
        if part is not None and indices is not None:
            t, h, w = (-(-size // p) for size, p in zip(part.shape[2:], patch, strict=True))
            history += t * h * w
    grid = latents_grid(latents, model.config.patch_size)
    return Geometry(grid, latents, arguments["timestep"], history, "prefix")


def tables_per_head(tables: tuple[Tensor, Tensor], heads: int) -> tuple[Tensor, Tensor]:
    """``(S, H, D/2)``."""
    cos, sin = (x.transpose(0, 1)[None] for x in tables)
    return cos, sin


MOCHI = Adapter(
    "Mochi", ("MochiTransformer3DModel",), submodules(transformer_blocks="attn1"), video_then_valid_text, inverted_sigma,
    per_sample=True, note="time runs from noise to clean; one attention per sample; not under torch.compile",
    prepare=Preparation("rms", "image_rotary_emb", tables_per_head),
)  # fmt: skip
COSMOS = Adapter(
    "Cosmos 1, 2, 2.5",
    ("CosmosTransformer3DModel",),
    submodules(transformer_blocks="attn1"),
    cosmos,
    own_sigma,
    scheduled=cosmos_run,
)
COSMOS3 = Adapter(
    "Cosmos 3", ("Cosmos3OmniTransformer",), submodules(layers="self_attn"), packed, scheduled=thousandths, causal_text=True,
    note="one video or image per sequence; text and, after the video, sound and actions are dense; the causal attention of the text stays the "
    "model's own: it is over the text alone, in one direction",
)  # fmt: skip
KANDINSKY = Adapter(
    "Kandinsky 5", ("Kandinsky5Transformer3DModel",), submodules(visual_transformer_blocks="self_attention"),
    frames_last_channels, note="dense where the model uses its own sparse attention (NABLA)",
)  # fmt: skip
KANDINSKY6 = Adapter(
    "Kandinsky 6", ("Kandinsky6Transformer3DModel",), submodules(visual_transformer_blocks="video_dec_block.self_attention"),
    frames_last_channels, note="video self-attention; audio, and attention between audio and video, stay the model's own",
)  # fmt: skip
HELIOS = Adapter(
    "Helios", ("HeliosTransformer3DModel",), submodules(blocks="attn1"), history_then_video,
    note="history tokens are dense in both directions",
)  # fmt: skip

ADAPTERS = (MOCHI, COSMOS, COSMOS3, KANDINSKY, KANDINSKY6, HELIOS)
