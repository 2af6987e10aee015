"""LTX-Video and LTX-2: latents come as tokens ``(B, S, C)``, their grid as arguments."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...errors import UnsupportedError
from .adapter import Adapter, Arguments, Geometry, Preparation, submodules


def grid_of_arguments(model: Any, arguments: Arguments) -> Geometry:
    """Tokens beyond the grid are keyframes and references that a pipeline appended."""
    latents = arguments["hidden_states"]
    sizes = [arguments.get(name) for name in ("num_frames", "height", "width")]
    if None in sizes:
        raise UnsupportedError(
            "fpsattention.apply: the transformer got the coordinates of its tokens, expected num_frames, height and width: conditions "
            "before the video (LTXConditionPipeline) are not supported"
        )
    t, h, w = (int(size) for size in sizes)  # type: ignore[arg-type]
    others = latents.shape[1] - t * h * w
    if others < 0:
        raise UnsupportedError(
            f"fpsattention.apply: {latents.shape[1]} tokens, expected at least those of the grid {(t, h, w)}"
        )
    return Geometry((t, h, w), latents, arguments["timestep"], others)


def tables_of_all_heads(tables: tuple[Tensor, Tensor], heads: int) -> tuple[Tensor, Tensor]:
    """``(B, S, H D)`` with every angle twice, side by side."""
    cos, sin = (x[..., 0::2].unflatten(2, (heads, -1)).transpose(1, 2) for x in tables)
    return cos, sin


LTX = Adapter(
    "LTX-Video", ("LTXVideoTransformer3DModel",), submodules(transformer_blocks="attn1"), grid_of_arguments,
    prepare=Preparation("rms_across_heads", "image_rotary_emb", tables_of_all_heads, twice=True),
)  # fmt: skip
LTX2 = Adapter(
    "LTX-2", ("LTX2VideoTransformer3DModel",), submodules(transformer_blocks="attn1"), grid_of_arguments,
    note="video self-attention; audio, and attention between audio and video, stay the model's own",
)  # fmt: skip

ADAPTERS = (LTX, LTX2)
