"""Where the tokens of a model are cut and put together: at the entry of its block stacks, and before its output leaves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

#: Arguments of blocks that hold a row per video token, in some models or some calls: tables of RoPE, modulation per token.
PER_TOKEN = (
    "rotary_emb",
    "image_rotary_emb",
    "freqs_cis",
    "rope",
    "temb",
    "embedded_timestep",
    "extra_pos_emb",
    "timestep_proj",
)
MODULATION = ("temb", "embedded_timestep", "timestep_proj")


@dataclass(frozen=True)
class Stack:
    """Blocks in a row.

    Attributes:
        blocks: path of their list.
        entry: arguments of its first block that hold the tokens of the video, whole.
        text: its first block also gets text tokens that the attention joins with the video's (``encoder_hidden_states``).
        every: video tokens that every block gets whole.
    """

    blocks: str
    entry: tuple[str, ...] = ()
    text: bool = False
    every: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """Of a model: its stacks, in order, and the module whose output is put together ("": the last block)."""

    stacks: tuple[Stack, ...]
    output: str = "proj_out"


_WAN = Plan((Stack("blocks", ("hidden_states",)),))
_VIDEO = Plan((Stack("transformer_blocks", ("hidden_states",)),))
_JOINT = Plan((Stack("transformer_blocks", ("hidden_states",), text=True),))

PLANS: dict[str, Plan] = {
    "WanTransformer3DModel": _WAN,
    "SkyReelsV2Transformer3DModel": _WAN,
    "ChronoEditTransformer3DModel": _WAN,
    "WanVACETransformer3DModel": Plan(
        (
            Stack("vace_blocks", ("control_hidden_states",), every=("hidden_states",)),
            Stack("blocks", ("hidden_states",)),
        )
    ),
    "LTXVideoTransformer3DModel": _VIDEO,
    "CosmosTransformer3DModel": _VIDEO,
    "AllegroTransformer3DModel": _VIDEO,
    "CogVideoXTransformer3DModel": _JOINT,
    "EasyAnimateTransformer3DModel": _JOINT,
    "HunyuanVideoTransformer3DModel": Plan((*_JOINT.stacks, Stack("single_transformer_blocks"))),
    "Kandinsky5Transformer3DModel": Plan((Stack("visual_transformer_blocks", ("visual_embed",)),), output=""),
}

#: Families that cannot be cut like this, and why.
REFUSED: dict[str, str] = {
    "HunyuanVideo15Transformer3DModel": "its processor pads the mask of the text to the tokens that it sees",
    "MotifVideoTransformer3DModel": "its decoder blocks attend to the encoded video a second time",
    "MochiTransformer3DModel": "it calls attention sample by sample, with the tokens of each",
    "WanAnimateTransformer3DModel": "its face blocks work on whole frames between the blocks",
    "ConsisIDTransformer3DModel": "its face features are mixed in between the blocks",
    "AnyFlowTransformer3DModel": "its blocks get a row of modulation per frame",
    "HeliosTransformer3DModel": "its plan of diffusers serves it: enable_parallelism()",
    "LTX2VideoTransformer3DModel": "its plan of diffusers serves it, with cross_attn_rope added (docs/scale.md): enable_parallelism()",
    "Cosmos3OmniTransformer": "its text has keys, but no queries, where the video attends",
    "FluxTransformer2DModel": "its plan of diffusers serves it: enable_parallelism()",
    "Flux2Transformer2DModel": "its plan of diffusers serves it: enable_parallelism()",
    "QwenImageTransformer2DModel": "its plan of diffusers serves it: enable_parallelism()",
}


def class_name(model: Any, known: Any) -> str | None:
    """The name of the class of ``model`` (FSDP2 and users subclass it) that ``known`` holds."""
    return next((cls.__name__ for cls in type(model).__mro__ if cls.__name__ in known), None)
