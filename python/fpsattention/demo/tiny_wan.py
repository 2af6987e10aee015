"""A tiny Wan pipeline whose weights are set, not learned, so that its attention visibly matters. No network, no files.

It is diffusers' own `WanPipeline`, `WanTransformer3DModel` and `AutoencoderKLWan`; only sizes and weights are ours. The
transformer is a non-local means filter:

* a token's 64 latent values lie in one subspace of the 256 channels of the residual stream. Queries and keys are the same random rotation of
  them (plus noise), so a token attends tokens that look like it, and RoPE makes nearby ones win. The heads differ in how sharply they choose;
* values pass through attention unchanged into a second subspace, and the predicted velocity is `_RATE * (token - what it attends)`: noise,
  which a token shares with no other, goes; structure stays. A large constant channel keeps the layer norms nearly linear;
* cross-attention tints the picture by the (random) prompt embedding; the feed-forward layers write to channels that nobody reads.

The VAE's decoder is linear: a latent frame holds the colours of four video frames, which its time convolutions take apart and its
upsamplers enlarge smoothly; a constant channel keeps its norm nearly linear, too. Its residual branches, which would only add zeros, are
left out: they take most of the time on a CPU.

Starting latents are a moving picture (`scene`) plus noise. The videos show what the attention does. They say nothing about the quality
of a trained model.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from ..analysis.optional import require

HEADS, HEAD_DIM, LAYERS, CHANNELS, TEXT_DIM, TEXT_TOKENS = 2, 128, 2, 16, 64, 16
FLOW_SHIFT = 3.0
# Tokens. The planner would cut so small a grid into 8 tiles, too few to tell windows apart; this gives 30 on 9x16x24.
TILE = (3, 8, 5)
_WIDTH = HEADS * HEAD_DIM
_PATCH = (1, 2, 2)
_SUBFRAMES, _COLORS = 4, 3  # a latent frame holds the colours of four video frames (the first: of one)
_SHARPNESS = (1.25, 1.15)  # gain of q and k after their norm, per head: logits of equal tokens are 11.3 * gain^2
_RATE = 2.4  # of denoising: over sigma from 1 to 0 about exp(-rate) of what a token shares with no other is left
_CONSTANT = 32.0  # of the residual stream, against about 7 of a token's latents
_TINT = 0.02
_WEIGHT_NOISE = 0.1  # of queries and keys
_NOISE = 0.35  # standard deviation of the starting latents' noise; the picture's is about 0.5
_GUIDE = 1.7  # amplitude of the latents that say which part of the scene a token shows; the decoder does not read them
_REFERENCE = 4.0  # constant channel of the decoder


def _orthogonal(rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    matrix = torch.randn(max(rows, columns), min(rows, columns), generator=generator)
    q, _ = torch.linalg.qr(matrix)
    return q if rows >= columns else q.T


def _channel_basis(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Orthonormal directions in the latent channels: [CHANNELS, 4, 3] for the colours of four frames, [CHANNELS, 4] for `_GUIDE`."""
    basis = _orthogonal(CHANNELS, CHANNELS, generator)
    colors = _SUBFRAMES * _COLORS
    return basis[:, :colors].reshape(CHANNELS, _SUBFRAMES, _COLORS), basis[:, colors:]


def tiny_transformer(colors: torch.Tensor, generator: torch.Generator) -> nn.Module:
    """`WanTransformer3DModel` of 2 layers and 2 heads of 128, about 2 million parameters, FP32. `colors`: see `_channel_basis`."""
    diffusers = require("diffusers", "demo")
    model = diffusers.WanTransformer3DModel(
        patch_size=_PATCH, num_attention_heads=HEADS, attention_head_dim=HEAD_DIM, in_channels=CHANNELS,
        out_channels=CHANNELS, text_dim=TEXT_DIM, freq_dim=256, ffn_dim=256, num_layers=LAYERS, cross_attn_norm=True,
        qk_norm="rms_norm_across_heads", rope_max_seq_len=64,
    ).eval()  # fmt: skip
    patch = CHANNELS * math.prod(_PATCH)
    # Orthonormal columns; the first is the mean, which layer norm removes.
    basis = torch.randn(_WIDTH, _WIDTH, generator=generator)
    basis[:, 0] = 1.0
    basis = torch.linalg.qr(basis)[0]
    token, attended, constant, free = (basis[:, a:b] for a, b in ((1, 65), (65, 129), (129, 130), (130, _WIDTH)))
    norm = _CONSTANT / math.sqrt(_WIDTH)  # what layer norm divides by
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                fan_in = parameter[0].numel()
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * (0.3 / math.sqrt(fan_in)))
            elif "norm" not in name:
                parameter.zero_()
        model.patch_embedding.weight.copy_(token.reshape(_WIDTH, CHANNELS, *_PATCH))
        model.patch_embedding.bias.copy_(_CONSTANT * constant[:, 0])
        velocity = (_RATE * norm * (token - attended)).view(_WIDTH, CHANNELS, *_PATCH)
        model.proj_out.weight.copy_(velocity.permute(2, 3, 4, 1, 0).reshape(patch, _WIDTH))  # (t, h, w, channel)
        model.scale_shift_table.zero_()
        # The same at every time step: anything added to all tokens alike would be a pattern of one patch's period in the picture.
        model.condition_embedder.time_embedder.linear_2.weight.zero_()
        model.condition_embedder.time_proj.weight.zero_()
        # A constant patch, of one colour in all four frames.
        tint = attended.view(_WIDTH, CHANNELS, -1).sum(2) @ colors.sum(1) / 4
        for block in model.blocks:
            _set_block(block, token, attended, free, tint, norm, generator)
    return model


def _set_block(
    block: Any, token: torch.Tensor, attended: torch.Tensor, free: torch.Tensor, tint: torch.Tensor, norm: float,
    generator: torch.Generator,
) -> None:  # fmt: skip
    block.scale_shift_table.zero_()
    block.scale_shift_table[:, 2] = 1.0  # gate of self-attention
    block.scale_shift_table[:, 5] = 1.0  # gate of the feed-forward layer
    rotation = _orthogonal(_WIDTH, _WIDTH, generator) @ token
    for weight in (block.attn1.to_q.weight, block.attn1.to_k.weight):
        noise = torch.randn(rotation.shape, generator=generator) * (_WEIGHT_NOISE / math.sqrt(_WIDTH))
        weight.copy_((rotation + noise) @ token.T)
    for head, gain in enumerate(_SHARPNESS):
        channels = slice(head * HEAD_DIM, (head + 1) * HEAD_DIM)
        block.attn1.norm_q.weight[channels] = gain
        block.attn1.norm_k.weight[channels] = gain
    rotation = _orthogonal(_WIDTH, _WIDTH, generator) @ token
    block.attn1.to_v.weight.copy_(norm * rotation @ token.T)
    block.attn1.to_out[0].weight.copy_(attended @ rotation.T / LAYERS)
    block.attn2.to_out[0].weight.copy_(_TINT * tint @ _orthogonal(_COLORS, _WIDTH, generator))
    block.ffn.net[2].weight.copy_(free @ free.T @ block.ffn.net[2].weight)


class _Shortcut(nn.Module):
    """A residual block of the decoder without its residual branch."""

    def __init__(self, shortcut: nn.Module) -> None:
        super().__init__()
        self.shortcut = shortcut

    def forward(self, x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return self.shortcut(x)


def _keep(weight: torch.Tensor, channels: int, value: torch.Tensor | float = 1.0) -> None:
    for i in range(channels):
        weight[i, i] = value


def tiny_vae(colors: torch.Tensor) -> nn.Module:
    """`AutoencoderKLWan` with a linear decoder: channel 0 is a constant, then come the colours of 4, 2, 1 frames, stage by stage."""
    diffusers = require("diffusers", "demo")
    vae = diffusers.AutoencoderKLWan(
        base_dim=8, z_dim=CHANNELS, dim_mult=[1, 1, 2, 2], num_res_blocks=0, temperal_downsample=[False, True, True],
        latents_mean=[0.0] * CHANNELS, latents_std=[1.0] * CHANNELS,
    ).eval()  # fmt: skip
    smooth = torch.tensor([0.25, 0.5, 0.25])
    smooth = smooth[:, None] * smooth[None]
    with torch.no_grad():
        for name, parameter in vae.named_parameters():
            if not name.endswith("gamma"):
                parameter.zero_()
        decoder, frames = vae.decoder, _SUBFRAMES
        vae.post_quant_conv.weight[1 : 1 + frames * _COLORS, :, 0, 0, 0] = colors.reshape(CHANNELS, -1).T
        vae.post_quant_conv.bias[0] = _REFERENCE
        # Zero padding dims a border, the constant included, whose norm undoes that.
        _keep(decoder.conv_in.weight[:, :, -1], 1 + frames * _COLORS, smooth)
        decoder.mid_block = _Shortcut(nn.Identity())
        for block in decoder.up_blocks:
            for resnet in block.resnets:
                if hasattr(resnet.conv_shortcut, "weight"):
                    _keep(resnet.conv_shortcut.weight[:, :, 0, 0, 0], 1 + frames * _COLORS)
            for upsampler in block.upsamplers or ():
                if hasattr(upsampler, "time_conv"):  # of the colours of 2n frames the first half, then the second
                    frames //= 2
                    weight = upsampler.time_conv.weight[:, :, -1, 0, 0]
                    for part in range(2):
                        first = part * weight.shape[1]
                        weight[first, 0] = 1.0
                        for i in range(frames * _COLORS):
                            weight[first + 1 + i, 1 + part * frames * _COLORS + i] = 1.0
                _keep(upsampler.resample[1].weight, 1 + frames * _COLORS, smooth)
        shortcut = decoder.up_blocks[-1].resnets[-1].conv_shortcut
        gain = _REFERENCE / math.sqrt(shortcut.weight.shape[0])  # what the norm divides by
        for i in range(_COLORS):  # silu(x) - silu(-x) = x
            shortcut.weight[4 + i, 1 + i, 0, 0, 0] = -1.0
            decoder.conv_out.weight[i, 1 + i, -1, 1, 1] = gain
            decoder.conv_out.weight[i, 4 + i, -1, 1, 1] = -gain
        for block in decoder.up_blocks:
            block.resnets = nn.ModuleList(_Shortcut(resnet.conv_shortcut) for resnet in block.resnets)
    return vae


def tiny_pipeline(seed: int) -> Any:
    """`WanPipeline` without tokenizer and text encoder (give it `prompt_embeds`); weights fixed by `seed`."""
    diffusers = require("diffusers", "demo")
    generator = torch.Generator().manual_seed(seed)
    colors, _ = _channel_basis(generator)
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=FLOW_SHIFT
    )
    return diffusers.WanPipeline(
        tokenizer=None, text_encoder=None, transformer=tiny_transformer(colors, generator), vae=tiny_vae(colors), scheduler=scheduler
    )  # fmt: skip


def scene(frames: int, rows: int, columns: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Colour fields in slow motion: waves that bend one another, seen through a palette.

    Returns:
        colours [frames, 3, rows, columns] in [-1, 1]; the two angles behind them, [frames, 2, rows, columns].
    """
    t = torch.arange(frames)[:, None, None] / 32.0
    y = torch.linspace(0.0, 1.0, rows)[None, :, None]
    x = torch.linspace(0.0, columns / rows, columns)[None, None, :]
    phase = 2.0 * math.pi * torch.rand(6, generator=generator)
    bend_x = 0.16 * torch.sin(5.0 * y + 2.2 * t + phase[0]) + 0.10 * torch.sin(4.0 * (x + y) - 1.7 * t + phase[1])
    bend_y = 0.16 * torch.sin(4.0 * x - 2.0 * t + phase[2]) + 0.10 * torch.sin(5.0 * (x - y) + 1.4 * t + phase[3])
    hue = 2.0 * math.pi * (0.45 * (x + bend_x) + 0.5 * (y + bend_y) + 0.12 * t) + phase[4]
    light = 5.0 * (y + bend_y) - 3.5 * (x + bend_x) + 1.2 * t + phase[5]
    palette = torch.tensor([0.0, 1.1, 2.4])[:, None, None]  # amber, rose, violet, blue, teal
    hues = 0.5 + 0.5 * torch.cos(hue[:, None] + palette)
    shade = torch.sin(light)[:, None]
    colors = 0.18 + 0.06 * shade + (0.60 + 0.20 * shade) * hues
    return 2.0 * colors - 1.0, torch.stack([hue, light], dim=1)


def tiny_inputs(
    seed: int, height: int, width: int, num_frames: int, scene_seed: int | None = None
) -> dict[str, torch.Tensor]:
    """`prompt_embeds`, `negative_prompt_embeds` and `latents` [1, 16, T, H / 8, W / 8]: a scene plus noise.

    `seed` is the pipeline's; `scene_seed` picks another scene, noise and prompt for it.
    """
    colors, guide = _channel_basis(torch.Generator().manual_seed(seed))  # the first that `tiny_pipeline` draws
    generator = torch.Generator().manual_seed((seed if scene_seed is None else scene_seed) + 1)
    latent_frames, rows, columns = (num_frames - 1) // 4 + 1, height // 8, width // 8
    fields = scene(num_frames, rows, columns, generator)
    # The first latent frame is one video frame.
    video, angles = (torch.cat([x[:1].expand(_SUBFRAMES - 1, *x.shape[1:]), x]) for x in fields)
    video = video.view(latent_frames, _SUBFRAMES, _COLORS, rows, columns)
    angles = angles.view(latent_frames, _SUBFRAMES, 2, rows, columns).mean(1)
    circles = _GUIDE * torch.cat([angles.cos(), angles.sin()], dim=1)
    latents = torch.einsum("csk,tskyx->ctyx", colors, video) + torch.einsum("ck,tkyx->ctyx", guide, circles)
    latents = (latents + _NOISE * torch.randn(latents.shape, generator=generator))[None]
    prompt, negative = torch.randn(2, 1, TEXT_TOKENS, TEXT_DIM, generator=generator)
    return {"prompt_embeds": prompt, "negative_prompt_embeds": negative, "latents": latents}
