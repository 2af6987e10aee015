"""HunyuanVideo 1.0 and 1.5, and Motif-Video, which is built like it: video tokens, then text, padded at its end."""

from __future__ import annotations

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
    each_twice,
    feed_forward_linears,
    first_argument,
    latents_grid,
    patches,
    submodules,
)


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


def _tokens(x: Tensor, move: Move) -> Tensor:
    """``(B, S, C)``."""
    return move(x, 1)


def _rope(tables: tuple[Tensor, ...], move: Move) -> tuple[Tensor, ...]:
    """``(S, D)``."""
    return tuple(move(table, 0) for table in tables)


def embedder_to_norm(model: Any) -> tuple[Place, ...]:
    """The video tokens alone are moved. Where the first frame is modulated apart, blocks look for it in front."""
    if getattr(model.config, "image_condition_type", None) == "token_replace":
        return ()
    return (Place("x_embedder", _tokens), Place("rope", _rope), Place("norm_out", first_argument, back=True))


#: Of both kinds of blocks: a single block has the feed-forward's second layer and the output projection in one.
LINEARS = (*attention_linears("attn"), *feed_forward_linears("ff"), "proj_mlp", "proj_out")

PREPARE = Preparation("rms", "image_rotary_emb", each_twice, twice=True)

HUNYUAN = Adapter(
    "HunyuanVideo", ("HunyuanVideoTransformer3DModel",),
    submodules(transformer_blocks="attn", single_transformer_blocks="attn"), video_then_text,
    text_mask=True, note="padding of the text is left out, sample by sample", linears=LINEARS, token_order=embedder_to_norm,
    prepare=PREPARE,
)  # fmt: skip
HUNYUAN_15 = Adapter(
    "HunyuanVideo 1.5", ("HunyuanVideo15Transformer3DModel",), submodules(transformer_blocks="attn"), video_then_three_texts,
    text_mask=True, note="as HunyuanVideo; the model itself builds two S x S masks per layer", linears=LINEARS, prepare=PREPARE,
)  # fmt: skip
MOTIF = Adapter(
    "Motif-Video", ("MotifVideoTransformer3DModel",), encoder_blocks, video_then_image_and_text,
    text_mask=True, note="padding as HunyuanVideo; decoder blocks (num_decoder_layers) stay dense", linears=LINEARS, prepare=PREPARE,
)  # fmt: skip

ADAPTERS = (HUNYUAN, HUNYUAN_15, MOTIF)
