"""Pipelines of many families around the tiny transformers of ``tiny_models``: no network, text comes as embeddings.

A family is a function that returns a pipeline and the arguments of its call, without the number of steps.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import diffusers
import tiny_models
import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler
from tiny_models import DIM, FAMILIES, TEXT, rand, wan

Call = tuple[Any, dict[str, Any]]
NO_TEXT: dict[str, Any] = {"text_encoder": None, "tokenizer": None}


class Unchecked(diffusers.ModelMixin):
    """A safety checker that is never asked: there is no prompt in words, and nothing is decoded."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))


def model(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    transformer = FAMILIES[name].make(1)[0].eval()
    with torch.no_grad():
        for parameter in transformer.parameters():
            if parameter.abs().max() == 0:
                parameter.normal_(std=0.1)
    return transformer


def wan_vae(channels: int = 4) -> AutoencoderKLWan:
    torch.manual_seed(0)
    return AutoencoderKLWan(
        base_dim=3, z_dim=channels, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.0] * channels, latents_std=[1.0] * channels,
    ).eval()  # fmt: skip


def text(
    tokens: int = TEXT, negative: bool = True, masked: bool = False, name: str = "attention_mask"
) -> dict[str, Any]:
    result: dict[str, Any] = {"prompt_embeds": rand(1, tokens, DIM)}
    if masked:
        result[f"prompt_{name}"] = torch.arange(tokens)[None] < 13
    if negative:
        result["negative_prompt_embeds"] = rand(1, tokens, DIM).flip(1)
        if masked:
            result[f"negative_prompt_{name}"] = torch.arange(tokens)[None] < 7
    return result


def size(frames: int = 5, height: int = 64, width: int = 96) -> dict[str, int]:
    return {"height": height, "width": width, "num_frames": frames}


def make_wan() -> Call:
    pipe = diffusers.WanPipeline(
        **NO_TEXT, vae=wan_vae(), scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), transformer=model("wan")
    )
    return pipe, {**text(), **size()}


def make_vace() -> Call:
    torch.manual_seed(0)
    transformer = wan("WanVACETransformer3DModel", vace_layers=[0], vace_in_channels=72)(1)[0]
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = diffusers.WanVACEPipeline(**NO_TEXT, vae=wan_vae(), scheduler=scheduler, transformer=transformer.eval())
    return pipe, {**text(), **size()}


def make_skyreels() -> Call:
    scheduler = diffusers.UniPCMultistepScheduler(
        flow_shift=8.0, use_flow_sigmas=True, prediction_type="flow_prediction"
    )
    pipe = diffusers.SkyReelsV2Pipeline(**NO_TEXT, vae=wan_vae(), scheduler=scheduler, transformer=model("skyreels"))
    return pipe, {**text(), **size()}


def make_animate() -> Call:
    import numpy as np
    from PIL import Image
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    noise = np.random.default_rng(0)

    def images(count: int, height: int, width: int) -> list[Image.Image]:
        return [Image.fromarray(noise.integers(0, 256, (height, width, 3), np.uint8)) for _ in range(count)]

    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=4, intermediate_size=8, num_hidden_layers=2, num_attention_heads=1, image_size=16, patch_size=8
    )
    side = {"height": 16, "width": 16}
    pipe = diffusers.WanAnimatePipeline(
        **NO_TEXT, vae=wan_vae(), scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), transformer=model("animate"),
        image_processor=CLIPImageProcessor(size=side, crop_size=side), image_encoder=CLIPVisionModel(config).eval(),
    )  # fmt: skip
    return pipe, {
        **text(negative=False), "image": images(1, 64, 96)[0], "pose_video": images(5, 64, 96), "face_video": images(5, 16, 16),
        "height": 64, "width": 96, "segment_frame_length": 5,
    }  # fmt: skip


def make_anyflow() -> Call:
    scheduler = diffusers.FlowMapEulerDiscreteScheduler(shift=3.0)
    pipe = diffusers.AnyFlowPipeline(**NO_TEXT, vae=wan_vae(), scheduler=scheduler, transformer=model("anyflow"))
    return pipe, {**text(), **size()}


def make_helios() -> Call:
    pipe = diffusers.HeliosPipeline(
        **NO_TEXT,
        vae=wan_vae(),
        scheduler=diffusers.HeliosScheduler(stages=1, stage_range=[0, 1], gamma=1 / 3),
        transformer=model("helios"),
    )
    return pipe, {**text(), **size(33), "num_latent_frames_per_chunk": 3}


def make_hunyuan() -> Call:
    pipe = diffusers.HunyuanVideoPipeline(
        **NO_TEXT, text_encoder_2=None, tokenizer_2=None, vae=None, scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        transformer=model("hunyuan"),
    )  # fmt: skip
    pooled = {"pooled_prompt_embeds": rand(1, 8), "negative_pooled_prompt_embeds": rand(1, 8)}
    return pipe, {**text(masked=True), **pooled, **size(), "true_cfg_scale": 2.0}


def make_hunyuan15() -> Call:
    torch.manual_seed(0)
    transformer = diffusers.HunyuanVideo15Transformer3DModel(
        in_channels=9, out_channels=4, num_attention_heads=1, attention_head_dim=64, num_layers=1, num_refiner_layers=1, patch_size=1,
        patch_size_t=1, text_embed_dim=DIM, text_embed_2_dim=16, image_embed_dim=16, rope_axes_dim=(16, 24, 24), target_size=64,
    )  # fmt: skip
    vae = diffusers.AutoencoderKLHunyuanVideo15(
        latent_channels=4,
        block_out_channels=(16,) * 5,
        layers_per_block=1,
        spatial_compression_ratio=16,
        temporal_compression_ratio=4,
    )
    pipe = diffusers.HunyuanVideo15Pipeline(
        **NO_TEXT, text_encoder_2=None, tokenizer_2=None, vae=vae, scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        transformer=transformer.eval(), guider=diffusers.ClassifierFreeGuidance(guidance_scale=2.0),
    )  # fmt: skip
    second = {"prompt_embeds_2": rand(1, 8, 16), "negative_prompt_embeds_2": rand(1, 8, 16)}
    for prefix in ("", "negative_"):
        second[f"{prefix}prompt_embeds_mask_2"] = (torch.arange(8)[None] < 5).long()
    first = text()
    first["prompt_embeds_mask"] = (torch.arange(TEXT)[None] < 13).long()
    first["negative_prompt_embeds_mask"] = (torch.arange(TEXT)[None] < 7).long()
    return pipe, {**first, **second, **size()}


def make_motif() -> Call:
    torch.manual_seed(0)
    transformer = diffusers.MotifVideoTransformer3DModel(
        in_channels=9, out_channels=4, num_attention_heads=1, attention_head_dim=64, num_layers=1, num_single_layers=1, patch_size=2,
        patch_size_t=1, text_embed_dim=DIM, rope_axes_dim=(16, 24, 24),
    )  # fmt: skip
    pipe = diffusers.MotifVideoPipeline(
        **NO_TEXT, vae=wan_vae(), scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0), transformer=transformer.eval(),
        guider=diffusers.ClassifierFreeGuidance(guidance_scale=2.0),
    )  # fmt: skip
    return pipe, {**text(masked=True), **size()}


def make_cogvideox() -> Call:
    scheduler = diffusers.CogVideoXDDIMScheduler()
    pipe = diffusers.CogVideoXPipeline(**NO_TEXT, vae=None, transformer=model("cogvideox"), scheduler=scheduler)
    return pipe, {**text(), **size()}


def make_easyanimate() -> Call:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    vae = diffusers.AutoencoderKLMagvit(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), norm_num_groups=2, layers_per_block=1,
        down_block_types=("SpatialDownBlock3D",) + ("SpatialTemporalDownBlock3D",) * 3,
        up_block_types=("SpatialUpBlock3D",) + ("SpatialTemporalUpBlock3D",) * 3,
    )  # fmt: skip
    pipe = diffusers.EasyAnimatePipeline(**NO_TEXT, vae=vae, transformer=model("easyanimate"), scheduler=scheduler)
    return pipe, {**text(masked=True), **size()}


def make_allegro() -> Call:
    pipe = diffusers.AllegroPipeline(
        **NO_TEXT, vae=None, transformer=model("allegro"), scheduler=diffusers.DDIMScheduler(num_train_timesteps=1000)
    )
    return pipe, {**text(masked=True), **size(2), "negative_prompt": None}


def make_ltx() -> Call:
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.1)
    pipe = diffusers.LTXPipeline(**NO_TEXT, vae=None, transformer=model("ltx"), scheduler=scheduler)
    return pipe, {**text(masked=True), **size(17, 256, 384)}


def make_mochi() -> Call:
    scheduler = FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    pipe = diffusers.MochiPipeline(**NO_TEXT, vae=None, transformer=model("mochi"), scheduler=scheduler)
    return pipe, {**text(masked=True), **size(7)}


def make_cosmos1() -> Call:
    scheduler = diffusers.EDMEulerScheduler(
        sigma_min=0.002, sigma_max=80, sigma_data=0.5, sigma_schedule="karras", num_train_timesteps=1000, prediction_type="epsilon",
        rho=7.0, final_sigmas_type="sigma_min",
    )  # fmt: skip
    pipe = diffusers.CosmosTextToWorldPipeline(
        **NO_TEXT, vae=None, transformer=model("cosmos1"), scheduler=scheduler, safety_checker=Unchecked()
    )
    return pipe, {**text(), **size()}


def make_cosmos2() -> Call:
    scheduler = FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)
    pipe = diffusers.Cosmos2TextToImagePipeline(
        **NO_TEXT, vae=wan_vae(), transformer=model("cosmos2"), scheduler=scheduler, safety_checker=Unchecked()
    )
    return pipe, {**text(), "height": 64, "width": 96}


def make_kandinsky() -> Call:
    pipe = diffusers.Kandinsky5T2VPipeline(
        **NO_TEXT, text_encoder_2=None, tokenizer_2=None, vae=None, scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        transformer=model("kandinsky"),
    )  # fmt: skip
    arguments: dict[str, Any] = dict(size())
    for prefix in ("", "negative_"):
        arguments[f"{prefix}prompt_embeds_qwen"] = rand(1, TEXT, DIM)
        arguments[f"{prefix}prompt_embeds_clip"] = rand(1, 8)
        arguments[f"{prefix}prompt_cu_seqlens"] = torch.tensor([0, TEXT], dtype=torch.int32)
    return pipe, arguments


def make_flux() -> Call:
    torch.manual_seed(0)
    transformer = tiny_models.flux(1, pooled_projection_dim=8, axes_dims_rope=(16, 24, 24))[0]
    pipe = diffusers.FluxPipeline(
        **NO_TEXT, text_encoder_2=None, tokenizer_2=None, vae=None, scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        transformer=transformer.eval(),
    )  # fmt: skip
    return pipe, {"prompt_embeds": rand(1, TEXT, DIM), "pooled_prompt_embeds": rand(1, 8), "height": 192, "width": 256}


def make_qwen() -> Call:
    pipe = diffusers.QwenImagePipeline(
        **NO_TEXT,
        vae=None,
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        transformer=model("qwen"),
    )
    arguments = {**text(), "height": 192, "width": 256}
    arguments["prompt_embeds_mask"] = (torch.arange(TEXT)[None] < 13).long()
    arguments["negative_prompt_embeds_mask"] = (torch.arange(TEXT)[None] < 7).long()
    return pipe, arguments


PIPELINES: dict[str, Callable[[], Call]] = {
    name.removeprefix("make_"): make for name, make in list(globals().items()) if name.startswith("make_")
}


def sample(pipe: Any, arguments: dict[str, Any], steps: int) -> torch.Tensor:
    """Latents, from a fixed seed."""
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = pipe(**arguments, num_inference_steps=steps, generator=generator, output_type="latent", return_dict=False)
    return out[0]
