"""A tiny Wan pipeline whose weights are set, not learned, so that its attention visibly matters. No network, no files.

It is diffusers' own `WanPipeline`, `WanTransformer3DModel` and `AutoencoderKLWan`; only sizes and weights are ours:

* queries and keys are the same random rotation of a token (plus noise), so a token attends tokens that look like it, and
  RoPE makes nearby ones win: attention is a non-local means filter. Its two heads differ in how sharply they choose;
* values pass through attention unchanged, and the predicted velocity is "token minus what it attends", so each denoising step
  removes what a token does not share with the tokens it attends: noise goes, structure stays;
* all matrices carry random noise, cross-attention tints the picture by the (random) prompt embedding;
* the VAE's decoder is linear: three projections of the latent become red, green and blue, and are upsampled smoothly. Its
  residual branches, which would only add zeros, are left out: they take most of the time on a CPU.

Starting latents are drifting coloured regions plus noise. The videos show what the attention does. They say nothing about
the quality of a trained model.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from ..analysis.optional import require

if TYPE_CHECKING:
    import torch
    from torch import nn

HEADS, HEAD_DIM, LAYERS, CHANNELS, TEXT_DIM, TEXT_TOKENS = 2, 128, 2, 16, 64, 16
FLOW_SHIFT = 3.0
# Tokens. The planner would cut so small a grid into 8 tiles, too few to tell windows apart; this gives 30 on 9x16x24.
TILE = (3, 8, 5)
_PATCH = (1, 2, 2)
_SHARPNESS = (1.1, 1.0)  # gain of q and k after their norm, per head: logits of equal tokens are 11.3 * gain^2
_ATTENDED_SHARE = 1.2  # of the attended mean, subtracted over all layers
_EMBED_GAIN = 2.0
_TINT = 0.05
_WEIGHT_NOISE = 0.1
_REGION = 10  # latent pixels across a coloured region
_NOISE = 0.45  # standard deviation of the starting latents' noise; the regions have 0.8
_REFERENCE = 2.0  # constant channel that keeps the decoder's channel norm nearly linear


def _orthogonal(rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    import torch

    matrix = torch.randn(max(rows, columns), min(rows, columns), generator=generator)
    q, _ = torch.linalg.qr(matrix)
    return q if rows >= columns else q.T


def tiny_transformer(generator: torch.Generator) -> nn.Module:
    """`WanTransformer3DModel` of 2 layers and 2 heads of 128, about 2 million parameters, FP32."""
    import torch

    diffusers = require("diffusers", "demo")
    width = HEADS * HEAD_DIM
    model = diffusers.WanTransformer3DModel(
        patch_size=_PATCH, num_attention_heads=HEADS, attention_head_dim=HEAD_DIM, in_channels=CHANNELS,
        out_channels=CHANNELS, text_dim=TEXT_DIM, freq_dim=256, ffn_dim=256, num_layers=LAYERS, cross_attn_norm=True,
        qk_norm="rms_norm_across_heads", rope_max_seq_len=64,
    ).eval()  # fmt: skip

    def noise(scale: float) -> torch.Tensor:
        return torch.randn(width, width, generator=generator) * (scale / math.sqrt(width))

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                fan_in = parameter[0].numel()
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * (0.3 / math.sqrt(fan_in)))
            elif "norm" not in name:
                parameter.zero_()
        patch = CHANNELS * math.prod(_PATCH)
        embed = _orthogonal(width, patch, generator).view(width, CHANNELS, *_PATCH)
        model.patch_embedding.weight.copy_(_EMBED_GAIN * embed)
        model.proj_out.weight.copy_(
            embed.permute(2, 3, 4, 1, 0).reshape(patch, width) / _EMBED_GAIN
        )  # (t, h, w, channel)
        flat_colors = embed.flatten(2).sum(2) / 2  # a constant patch, per channel: tints without a pattern
        for block in model.blocks:
            _set_block(block, flat_colors, noise, generator)
        model.scale_shift_table.copy_(0.02 * torch.randn(model.scale_shift_table.shape, generator=generator))
        model.condition_embedder.time_embedder.linear_2.weight.mul_(0.07)
    return model


def _set_block(block: Any, flat_colors: torch.Tensor, noise: Any, generator: torch.Generator) -> None:
    import torch

    width = HEADS * HEAD_DIM
    block.scale_shift_table.copy_(0.02 * torch.randn(block.scale_shift_table.shape, generator=generator))
    block.scale_shift_table[:, 2] -= _ATTENDED_SHARE / LAYERS  # gate of self-attention
    rotation = _orthogonal(width, width, generator)
    block.attn1.to_q.weight.copy_(rotation + noise(_WEIGHT_NOISE))
    block.attn1.to_k.weight.copy_(rotation + noise(_WEIGHT_NOISE))
    for head, gain in enumerate(_SHARPNESS):
        channels = slice(head * HEAD_DIM, (head + 1) * HEAD_DIM)
        block.attn1.norm_q.weight[channels] = gain
        block.attn1.norm_k.weight[channels] = gain
    rotation = _orthogonal(width, width, generator)
    block.attn1.to_v.weight.copy_(rotation + noise(_WEIGHT_NOISE))
    block.attn1.to_out[0].weight.copy_(rotation.T + noise(_WEIGHT_NOISE))
    block.attn2.to_out[0].weight.copy_(_TINT * flat_colors @ _orthogonal(CHANNELS, width, generator))


def tiny_vae(generator: torch.Generator) -> nn.Module:
    """`AutoencoderKLWan` with a linear decoder: 8 channels, of which 3 are colour, 1 a constant, 3 the colours negated."""
    import torch

    diffusers = require("diffusers", "demo")
    vae = diffusers.AutoencoderKLWan(
        base_dim=8, z_dim=CHANNELS, dim_mult=[1, 1, 1, 1], num_res_blocks=0, temperal_downsample=[False, True, True],
        latents_mean=[0.0] * CHANNELS, latents_std=[1.0] * CHANNELS,
    ).eval()  # fmt: skip

    class Shortcut(torch.nn.Module):
        """A residual block of the decoder without its residual branch."""

        def __init__(self, shortcut: nn.Module) -> None:
            super().__init__()
            self.shortcut = shortcut

        def forward(self, x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
            return self.shortcut(x)

    smooth = torch.tensor([0.25, 0.5, 0.25])
    smooth = smooth[:, None] * smooth[None]
    with torch.no_grad():
        for name, parameter in vae.named_parameters():
            if not name.endswith("gamma"):
                parameter.zero_()  # residual branches then add nothing
        vae.post_quant_conv.weight[:, :, 0, 0, 0] = torch.eye(CHANNELS)
        decoder = vae.decoder
        decoder.conv_in.weight[:3, :, -1, 1, 1] = _orthogonal(3, CHANNELS, generator)
        decoder.conv_in.bias[3] = _REFERENCE
        kept = range(4)
        decoder.mid_block = Shortcut(torch.nn.Identity())
        for block in decoder.up_blocks:
            for resnet in block.resnets:
                if hasattr(resnet.conv_shortcut, "weight"):
                    for i in kept:
                        resnet.conv_shortcut.weight[i, i, 0, 0, 0] = 1.0
            for upsampler in block.upsamplers or ():
                for i in kept:
                    upsampler.resample[1].weight[i, i] = smooth
                if hasattr(upsampler, "time_conv"):  # two frames from one: half way from the last frame, and this one
                    weight = upsampler.time_conv.weight
                    for i in kept:
                        weight[i, i, 1:] = 0.5
                        weight[weight.shape[1] + i, i, 2] = 1.0
        shortcut = decoder.up_blocks[-1].resnets[-1].conv_shortcut
        for i in range(3):  # silu(x) - silu(-x) = x
            shortcut.weight[4 + i, i, 0, 0, 0] = -1.0
            decoder.conv_out.weight[i, i, -1, 1, 1] = 1.0
            decoder.conv_out.weight[i, 4 + i, -1, 1, 1] = -1.0
        for block in decoder.up_blocks:
            block.resnets = torch.nn.ModuleList(Shortcut(resnet.conv_shortcut) for resnet in block.resnets)
    return vae


def tiny_pipeline(seed: int) -> Any:
    """`WanPipeline` without tokenizer and text encoder (give it `prompt_embeds`); weights fixed by `seed`."""
    import torch

    diffusers = require("diffusers", "demo")
    generator = torch.Generator().manual_seed(seed)
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=FLOW_SHIFT
    )
    return diffusers.WanPipeline(
        tokenizer=None,
        text_encoder=None,
        transformer=tiny_transformer(generator),
        vae=tiny_vae(generator),
        scheduler=scheduler,
    )


def tiny_inputs(seed: int, height: int, width: int, num_frames: int) -> dict[str, torch.Tensor]:
    """`prompt_embeds`, `negative_prompt_embeds` and `latents` [1, 16, T, H / 8, W / 8]: regions that drift, plus noise."""
    import torch
    from torch.nn.functional import interpolate

    generator = torch.Generator().manual_seed(seed + 1)
    frames, rows, columns = (num_frames - 1) // 4 + 1, height // 8, width // 8
    tall, wide = rows + frames, columns + 2 * frames  # a larger picture, across which the frames move
    coarse = torch.randn(1, CHANNELS, tall // _REGION + 2, wide // _REGION + 2, generator=generator)
    picture = torch.tanh(3.0 * interpolate(coarse, size=(tall, wide), mode="bicubic", align_corners=False))
    regions = torch.stack([picture[:, :, t : t + rows, 2 * t : 2 * t + columns] for t in range(frames)], dim=2)
    latents = 0.8 * regions + _NOISE * torch.randn(regions.shape, generator=generator)
    prompt, negative = torch.randn(2, 1, TEXT_TOKENS, TEXT_DIM, generator=generator)
    return {"prompt_embeds": prompt, "negative_prompt_embeds": negative, "latents": latents}
