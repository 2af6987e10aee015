"""Models outside of diffusers. Class names such as ``WanModel`` are used by many, so their adapters are never taken by name: hand one
to ``fps.apply(model, adapter=...)``.
"""

from __future__ import annotations

from typing import Any

from ...errors import UnsupportedError
from .adapter import Adapter, Arguments, Geometry, latents_grid, submodules


def list_of_videos(model: Any, arguments: Arguments) -> Geometry:
    """``x`` is a list of latents ``(C, T, H, W)``, one per sample; tokens are padded to ``seq_len``, which lengths mask."""
    videos = arguments["x"]
    if any(video.shape[1:] != videos[0].shape[1:] for video in videos):
        shapes = [tuple(video.shape) for video in videos]
        raise UnsupportedError(f"fpsattention.apply: samples of shapes {shapes} in one batch, expected one size")
    latents = videos[0].unsqueeze(0).expand(len(videos), -1, -1, -1, -1)
    t, h, w = latents_grid(latents, model.patch_size)
    padding = arguments["seq_len"] - t * h * w
    return Geometry((t, h, w), latents, arguments["t"], padding)


def reference_then_video(model: Any, arguments: Arguments) -> Geometry:
    """Arguments of ``model_fn``; tokens of a reference image come before the video."""
    latents = arguments["latents" if "latents" in arguments else "x"]
    return Geometry(latents_grid(latents, model.patch_size), latents, arguments["timestep"], None, "prefix")


WAN_ORIGINAL = Adapter(
    "Wan (original code, musubi-tuner)", ("WanModel",), submodules(blocks="self_attn"), list_of_videos, core="flash_attention", text_mask=True,
    note="`adapters.WAN_ORIGINAL`; samples of one size in a batch; not under torch.compile",
)  # fmt: skip
WAN_DIFFSYNTH = Adapter(
    "Wan (DiffSynth-Studio)", ("WanModel",), submodules(blocks="self_attn.attn"), reference_then_video, core="flash_attention",
    note="`adapters.WAN_DIFFSYNTH`; then `pipe.model_fn = handle.around(pipe.model_fn)`",
)  # fmt: skip

OUTSIDE = (WAN_ORIGINAL, WAN_DIFFSYNTH)
