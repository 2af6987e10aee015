"""HunyuanVideo 1.0 and 1.5, and Motif-Video, which is built like it: video tokens, then text, padded at its end."""

from __future__ import annotations

from typing import Any

from .adapter import Adapter, Arguments, Geometry, latents_grid, patches, submodules


def video_then_text(model: Any, arguments: Arguments) -> Geometry:
    """The model masks as many text tokens as its mask has zeros, from the end on."""
    latents, text = arguments["hidden_states"], arguments["encoder_hidden_states"]
    return Geometry(latents_grid(latents, patches(model)), latents, arguments["timestep"], text.shape[1])


def video_then_three_texts(model: Any, arguments: Arguments) -> Geometry:
    """The model sorts the tokens of the image, ByT5 and the language model: those that count come first, and the others are masked."""
    latents = arguments["hidden_states"]
    lengths = (
        arguments[name].shape[1] for name in ("encoder_attention_mask", "encoder_attention_mask_2", "image_embeds")
    )
    return Geometry(latents_grid(latents, patches(model)), latents, arguments["timestep"], sum(lengths))


def video_then_image_and_text(model: Any, arguments: Arguments) -> Geometry:
    """Image tokens, which all count, precede the text; its mask may have any pattern."""
    latents, text, image = arguments["hidden_states"], arguments["encoder_hidden_states"], arguments.get("image_embeds")
    text_len = text.shape[1] + (0 if image is None else image.shape[1])
    return Geometry(latents_grid(latents, patches(model)), latents, arguments["timestep"], text_len)


def encoder_blocks(model: Any) -> dict[str, Any]:
    """Motif's decoder blocks attend to the encoded video a second time, as if it were text: they stay dense."""
    attentions = submodules(transformer_blocks="attn", single_transformer_blocks="attn")(model)
    decoders = getattr(model.config, "num_decoder_layers", 0)
    return dict(list(attentions.items())[: len(attentions) - decoders])


HUNYUAN = Adapter(
    "HunyuanVideo", ("HunyuanVideoTransformer3DModel",),
    submodules(transformer_blocks="attn", single_transformer_blocks="attn"), video_then_text,
    text_mask=True, note="padding of the text is left out, sample by sample",
)  # fmt: skip
HUNYUAN_15 = Adapter(
    "HunyuanVideo 1.5", ("HunyuanVideo15Transformer3DModel",), submodules(transformer_blocks="attn"), video_then_three_texts,
    text_mask=True, note="as HunyuanVideo; the model itself builds two S x S masks per layer",
)  # fmt: skip
MOTIF = Adapter(
    "Motif-Video", ("MotifVideoTransformer3DModel",), encoder_blocks, video_then_image_and_text,
    text_mask=True, note="padding as HunyuanVideo; decoder blocks (num_decoder_layers) stay dense",
)  # fmt: skip

ADAPTERS = (HUNYUAN, HUNYUAN_15, MOTIF)
