"""The table of model families. How to add one:

1. Find out how the model's self-attention over the video calls its core. In diffusers that is ``dispatch_attention_fn`` or
   ``F.scaled_dot_product_attention`` inside the processor; nothing needs to be written for these two. Other code calls
   ``flash_attention``, ``attention``, ... in the forward of its attention modules: ``core=`` names it, and one that is not known yet is
   an entry of ``core_calls.CORES``.
2. Write a row, an :class:`Adapter` of three to six lines, in the file of the family (or a new one), and name it in its ``ADAPTERS``::

       HUNYUAN = Adapter(
           "HunyuanVideo", ("HunyuanVideoTransformer3DModel",),
           submodules(transformer_blocks="attn", single_transformer_blocks="attn"), video_then_text,
       )

   ``attentions`` names the modules in the order of the layers. ``geometry`` says from the arguments of the forward, by name, which
   grid the tokens form, where other tokens of the same sequence are, and which argument is the noise level. ``sigma`` is only
   needed where that argument is not ``1000 * sigma``: a wrong convention runs a schedule backwards, without an error.
3. Add a tiny random model to ``FAMILIES`` of ``tests/python/tiny_models.py``, which ``tests/python/test_adapters.py`` runs through: moving
   one latent cell moves the predicted token row, the noisiest step gets the first phase, ``remove()`` restores every bit.
"""

from __future__ import annotations

from typing import Any

from . import cogvideo, hunyuan, images, ltx, others, wan
from .adapter import Adapter, Geometry, Place, Preparation, latents_grid, submodules
from .outside import OUTSIDE, WAN_DIFFSYNTH, WAN_ORIGINAL

__all__ = [
    "ADAPTERS", "OUTSIDE", "REFUSED", "WAN_DIFFSYNTH", "WAN_ORIGINAL", "Adapter", "Geometry", "Place", "Preparation", "find",
    "latents_grid", "refusal", "submodules",
]  # fmt: skip

ADAPTERS: tuple[Adapter, ...] = (
    *wan.ADAPTERS, *hunyuan.ADAPTERS, *cogvideo.ADAPTERS, *ltx.ADAPTERS, *others.ADAPTERS, *images.ADAPTERS,
)  # fmt: skip

#: Classes that are known and do not run under a schedule, and why.
REFUSED: dict[str, str] = {
    "SanaVideoTransformer3DModel": "its self-attention is linear: there is no softmax to make sparse",
    "AnyFlowFARTransformer3DModel": "its attention is frame-causal FlexAttention over a KV cache and compressed history",
    "LatteTransformer3DModel": "it attends within frames and along time apart: sequences are short, and no 3D grid",
    "HunyuanVideoFramepackTransformer3DModel": "the video is between history and text, expected other tokens on one side",
    "WanAnimate2Transformer3DModel": "its samples are lists of videos of different grids, padded to one length",
    "MiniMaxH3Transformer3DModel": "video, audio and text are packed in an order that only position ids on the device tell",
    "Kandinsky6SRTransformer3DModel": "its attention is sparse already (NABLA), by FlexAttention over tokens in fractal order",
    "ZImageTransformer2DModel": "its samples are lists of images of different sizes, each padded to a multiple of 32 tokens before its caption",
}

#: Classes outside of diffusers whose name does not say enough.
ELSEWHERE: dict[str, str] = {
    "WanModel": "several projects have a class of this name: pass adapter=adapters.WAN_ORIGINAL or adapters.WAN_DIFFSYNTH "
    "(fpsattention.integrations.adapters); in ComfyUI take the node",
}


def find(model: Any) -> Adapter | None:
    """The adapter of ``model``, or None."""
    return next((adapter for adapter in ADAPTERS if adapter.fits(model)), None)


def refusal(model: Any) -> str | None:
    """Why a model that is known does not run under a schedule, or None."""
    known = REFUSED | ELSEWHERE
    return next((known[cls.__name__] for cls in type(model).__mro__ if cls.__name__ in known), None)


def named(name: str) -> Adapter | None:
    """The adapter of a family, or None."""
    return next((adapter for adapter in (*ADAPTERS, *OUTSIDE) if adapter.name == name), None)
