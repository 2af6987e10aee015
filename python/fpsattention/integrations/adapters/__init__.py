"""The table of model families. How to add one:

1. Find out how the model's self-attention over the video calls its core. In diffusers that is ``dispatch_attention_fn`` or
   ``F.scaled_dot_product_attention`` inside the processor; nothing needs to be written for these two. Another core is one
   entry of ``cores.CORES``.
2. Write a row, an :class:`Adapter` of three to six lines, in the file of the family (or a new one), and name it in its ``ADAPTERS``::

       HUNYUAN = Adapter(
           "HunyuanVideo", ("HunyuanVideoTransformer3DModel",),
           submodules(transformer_blocks="attn", single_transformer_blocks="attn"), latents_then_text,
       )

   ``attentions`` names the modules in the order of the layers. ``geometry`` says from the arguments of the forward, by name, which
   grid the tokens form, where other tokens of the same sequence are, and which argument is the noise level. ``sigma`` is only
   needed where that argument is not ``1000 * sigma``: a wrong convention runs a schedule backwards, without an error.
3. Add the class to the parametrized tests of ``tests/python/test_adapters.py``: moving one latent cell moves the predicted token row,
   the noisiest step gets the first phase, ``remove()`` restores every bit.
"""

from __future__ import annotations

from typing import Any

from . import wan
from .adapter import Adapter, Geometry, latents_grid, submodules

__all__ = ["ADAPTERS", "Adapter", "Geometry", "find", "latents_grid", "submodules"]

ADAPTERS: tuple[Adapter, ...] = (*wan.ADAPTERS,)


def find(model: Any) -> Adapter | None:
    """The adapter of ``model``, or None."""
    return next((adapter for adapter in ADAPTERS if adapter.fits(model)), None)


def named(name: str) -> Adapter | None:
    """The adapter of a family, or None."""
    return next((adapter for adapter in ADAPTERS if adapter.name == name), None)
