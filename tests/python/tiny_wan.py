"""A random Wan transformer and pipeline, small enough for tests: no network, no text encoder."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel

GRID = (3, 8, 12)  # 288 tokens: several tiles, more than one block in all
TILE = [3, 4, 4]
HEADS, LAYERS, TEXT = 2, 2, 32


def transformer(seed: int = 0, head_dim: int = 64, **config: object) -> WanTransformer3DModel:
    torch.manual_seed(seed)
    settings = {"num_attention_heads": HEADS, "attention_head_dim": head_dim, "num_layers": LAYERS, "ffn_dim": 64}
    settings |= {"text_dim": TEXT, "in_channels": 16, "out_channels": 16, "freq_dim": 64, "rope_max_seq_len": 64}
    return WanTransformer3DModel(patch_size=(1, 2, 2), cross_attn_norm=True, **{**settings, **config}).eval()


def inputs(timestep: list[float], grid: tuple[int, int, int] = GRID, seed: int = 1) -> dict[str, torch.Tensor]:
    """Arguments of a transformer forward, one sample per timestep."""
    generator = torch.Generator().manual_seed(seed)
    batch = len(timestep)
    return {
        "hidden_states": torch.randn(batch, 16, grid[0], grid[1] * 2, grid[2] * 2, generator=generator),
        "timestep": torch.tensor(timestep),
        "encoder_hidden_states": torch.randn(batch, 16, TEXT, generator=generator),
    }


def run(model: torch.nn.Module, timestep: list[float], **kwargs: object) -> torch.Tensor:
    return model(**inputs(timestep, **kwargs), return_dict=False)[0]


def pipeline(experts: int = 1) -> WanPipeline:
    torch.manual_seed(0)
    vae = AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    return WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=vae.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=transformer(),
        transformer_2=transformer(seed=1) if experts == 2 else None,
        boundary_ratio=0.8 if experts == 2 else None,
    )


def sample(pipe: WanPipeline, steps: int = 4) -> torch.Tensor:
    """Latents of a 9-frame 64x96 video with classifier-free guidance: grid (3, 4, 6)."""
    generator = torch.Generator().manual_seed(2)
    embeds = torch.randn(2, 1, 16, TEXT, generator=generator)
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        prompt_embeds=embeds[0],
        negative_prompt_embeds=embeds[1],
        height=64,
        width=96,
        num_frames=9,
        num_inference_steps=steps,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(3),
        output_type="latent",
    ).frames
