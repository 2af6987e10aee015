"""Sizes of the models that ``fpsattn estimate`` knows: those of their public configurations."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Model:
    """One video transformer and what surrounds it.

    Attributes:
        name: on the command line.
        heads, head_dim: of the self-attention; the width is their product.
        ffn: width inside the feed-forward.
        blocks: "cross" (Wan: self-attention, cross-attention to text, feed-forward), or "joint": HunyuanVideo's ``double`` blocks with a
            stream for text, then ``single`` ones.
        layers: of the first kind, and of the second.
        text: tokens of one prompt.
        encoder: parameters of the text encoder.
        vae_flops: of the decoder, per pixel of the video: counted by torch's FlopCounterMode on the configuration of diffusers.
        stride: frames, rows and columns of the video per token. The first frame has a token of its own in time.
    """

    name: str
    heads: int
    head_dim: int
    ffn: int
    blocks: str
    layers: tuple[int, int]
    text: int
    encoder: float
    vae_flops: float
    stride: tuple[int, int, int] = (4, 16, 16)

    @property
    def width(self) -> int:
        """Channels of a token."""
        return self.heads * self.head_dim

    @property
    def num_layers(self) -> int:
        """Blocks of both kinds."""
        return sum(self.layers)

    @property
    def joint_text(self) -> int:
        """Text tokens in the self-attention."""
        return self.text if self.blocks == "joint" else 0

    def pixels(self, grid: tuple[int, int, int]) -> int:
        """Of the video that a grid of tokens stands for."""
        t, h, w = self.stride
        return ((grid[0] - 1) * t + 1) * grid[1] * h * grid[2] * w


_UMT5_XXL, _LLAMA_8B = 5.68e9, 8.03e9
_WAN_VAE, _HUNYUAN_VAE = 8.56e6, 2.32e7  # counted on 21 frames of 128 x 128, and on 17 of 256 x 256

MODELS: dict[str, Model] = {
    model.name: model
    for model in (
        Model("wan-14b", 40, 128, 13824, "cross", (40, 0), 512, _UMT5_XXL, _WAN_VAE),
        Model("wan-1.3b", 12, 128, 8960, "cross", (30, 0), 512, _UMT5_XXL, _WAN_VAE),
        Model("hunyuanvideo", 24, 128, 12288, "joint", (20, 40), 256, _LLAMA_8B, _HUNYUAN_VAE),
    )
}
