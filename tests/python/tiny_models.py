"""Random transformers of every family of ``integrations.adapters``, small enough for tests, and arguments of their forwards.

A family is a function of the number of samples: it returns a transformer and the arguments of its forward. Sizes are the least
at which positions can be told apart: head dimension 64, one layer of each kind, a grid of 2 x 8 x 12 tokens.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import diffusers
import torch
from torch import Tensor

GRID = (2, 8, 12)
TILE = [1, 4, 4]
TEXT, DIM = 20, 32  # text tokens, and their width
VALID = (13, 7)  # text tokens of two samples that are not padding

Arguments = dict[str, Any]


@dataclass(frozen=True)
class Family:
    """How the tests of all families see one of them.

    Attributes:
        make: number of samples to model and arguments.
        time: sigma to what the model is told.
        cell: ``(arguments, sample, (t, h, w))``: writes to one patch of the latents.
        grid: tokens.
        before: tokens before the video.
        after: tokens after it, of each of two samples.
        exact: frames that are references.
    """

    make: Callable[[int], tuple[torch.nn.Module, Arguments]]
    time: Callable[[float], float] = lambda sigma: 1000.0 * sigma
    cell: Callable[[Tensor, int, tuple[int, int, int]], None] | None = None
    grid: tuple[int, int, int] = GRID
    before: int = 0
    after: tuple[int, int] = (0, 0)
    exact: tuple[int, ...] = ()


def rand(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def mask(batch: int, length: int = TEXT) -> Tensor:
    return torch.stack([torch.arange(length) < VALID[sample % 2] for sample in range(batch)])


def latents(batch: int, channels: int = 4) -> Tensor:
    return rand(batch, channels, GRID[0], 2 * GRID[1], 2 * GRID[2])


def timestep(batch: int) -> Tensor:
    return torch.full((batch,), 500.0)


def wan(name: str, **config: Any) -> Callable[[int], tuple[torch.nn.Module, Arguments]]:
    def make(batch: int) -> tuple[torch.nn.Module, Arguments]:
        settings: dict[str, Any] = {"num_attention_heads": 1, "attention_head_dim": 64, "num_layers": 1, "ffn_dim": 64}
        settings |= {"text_dim": DIM, "in_channels": 4, "out_channels": 4, "freq_dim": 64, "rope_max_seq_len": 64}
        model = getattr(diffusers, name)(**{k: v for k, v in {**settings, **config}.items() if v is not None})
        arguments = {
            "hidden_states": latents(batch),
            "timestep": timestep(batch),
            "encoder_hidden_states": rand(batch, TEXT, DIM),
        }
        if name == "WanVACETransformer3DModel":
            arguments["control_hidden_states"] = rand(batch, 6, GRID[0], 2 * GRID[1], 2 * GRID[2])
        if name == "AnyFlowTransformer3DModel":
            arguments["hidden_states"] = arguments["hidden_states"].transpose(1, 2)
            arguments["timestep"] = arguments["r_timestep"] = timestep(batch)[:, None].repeat(1, GRID[0])
        return model, arguments

    return make


def animate(batch: int) -> tuple[torch.nn.Module, Arguments]:
    """The reference frame is the first of the grid: the latents have a frame more than the pose."""
    model, arguments = wan(
        "WanAnimateTransformer3DModel", in_channels=12, latent_channels=4, image_dim=4, rope_max_seq_len=32,
        motion_encoder_channel_sizes={"4": 16, "8": 16, "16": 16}, motion_encoder_size=16, motion_style_dim=8, motion_dim=4,
        motion_encoder_dim=16, face_encoder_hidden_dim=16, face_encoder_num_heads=2, inject_face_latents_blocks=1,
    )(batch)  # fmt: skip
    arguments["hidden_states"] = rand(batch, 12, 3, 16, 24)
    arguments |= {"pose_hidden_states": rand(batch, 4, 2, 16, 24), "face_pixel_values": rand(batch, 3, 5, 16, 16)}
    return model, {**arguments, "encoder_hidden_states_image": rand(batch, 5, 4)}


def helios(batch: int) -> tuple[torch.nn.Module, Arguments]:
    model, arguments = wan("HeliosTransformer3DModel", rope_dim=(20, 22, 22), rope_max_seq_len=None)(batch)
    frames = {"short": 2, "mid": 2, "long": 4}
    for i, (name, count) in enumerate(frames.items()):
        arguments[f"latents_history_{name}"] = rand(batch, 4, count, 2 * GRID[1], 2 * GRID[2])
        arguments[f"indices_latents_history_{name}"] = (torch.arange(count) + 4 * (2 - i))[None].repeat(batch, 1)
    arguments["indices_hidden_states"] = (torch.arange(GRID[0]) + 12)[None].repeat(batch, 1)
    return model, arguments


def hunyuan(batch: int) -> tuple[torch.nn.Module, Arguments]:
    model = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=1, attention_head_dim=64, num_layers=1, num_single_layers=1, num_refiner_layers=1,
        patch_size=2, patch_size_t=1, guidance_embeds=False, text_embed_dim=DIM, pooled_projection_dim=8, rope_axes_dim=(16, 24, 24),
    )  # fmt: skip
    text = {"encoder_hidden_states": rand(batch, TEXT, DIM), "encoder_attention_mask": mask(batch)}
    return model, {
        "hidden_states": latents(batch),
        "timestep": timestep(batch),
        **text,
        "pooled_projections": rand(batch, 8),
    }


def hunyuan15(batch: int) -> tuple[torch.nn.Module, Arguments]:
    model = diffusers.HunyuanVideo15Transformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=1, attention_head_dim=64, num_layers=1, num_refiner_layers=1, patch_size=2,
        patch_size_t=1, text_embed_dim=DIM, text_embed_2_dim=16, image_embed_dim=16, rope_axes_dim=(16, 24, 24), target_size=64,
    )  # fmt: skip
    return model, {
        "hidden_states": latents(batch),
        "timestep": timestep(batch),
        "encoder_hidden_states": rand(batch, TEXT, DIM),
        "encoder_attention_mask": mask(batch),
        "encoder_hidden_states_2": rand(batch, 8, 16),
        "encoder_attention_mask_2": torch.arange(8).expand(batch, 8) < 5,
        "image_embeds": torch.zeros(batch, 6, 16),
    }


def motif(batch: int) -> tuple[torch.nn.Module, Arguments]:
    model = diffusers.MotifVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=1, attention_head_dim=64, num_layers=1, num_single_layers=2, num_decoder_layers=1,
        patch_size=2, patch_size_t=1, text_embed_dim=DIM, image_embed_dim=16, rope_axes_dim=(16, 24, 24),
    )  # fmt: skip
    text = {"encoder_hidden_states": rand(batch, TEXT, DIM), "encoder_attention_mask": mask(batch)}
    return model, {
        "hidden_states": latents(batch),
        "timestep": timestep(batch),
        **text,
        "image_embeds": rand(batch, 6, 16),
    }


def cogvideox(
    batch: int, name: str = "CogVideoXTransformer3DModel", **config: Any
) -> tuple[torch.nn.Module, Arguments]:
    model = getattr(diffusers, name)(
        num_attention_heads=1, attention_head_dim=64, in_channels=4, out_channels=4, time_embed_dim=8, text_embed_dim=DIM, num_layers=1,
        sample_width=24, sample_height=16, sample_frames=5, patch_size=2, max_text_seq_length=TEXT,
        use_rotary_positional_embeddings=True, **config,
    )  # fmt: skip
    angles = rand(GRID[0] * GRID[1] * GRID[2], 32).repeat_interleave(2, 1)
    return model, {
        "hidden_states": latents(batch).transpose(1, 2),
        "timestep": timestep(batch),
        "encoder_hidden_states": rand(batch, TEXT, DIM),
        "image_rotary_emb": (angles.cos(), angles.sin()),
    }


def easyanimate(batch: int) -> tuple[torch.nn.Module, Arguments]:
    model = diffusers.EasyAnimateTransformer3DModel(
        num_attention_heads=1, attention_head_dim=64, in_channels=4, out_channels=4, patch_size=2, sample_width=24, sample_height=16,
        num_layers=1, mmdit_layers=1, time_embed_dim=8, text_embed_dim=DIM,
    )  # fmt: skip
    return model, {
        "hidden_states": latents(batch),
        "timestep": timestep(batch),
        "encoder_hidden_states": rand(batch, TEXT, DIM),
    }


def allegro(batch: int) -> tuple[torch.nn.Module, Arguments]:
    model = diffusers.AllegroTransformer3DModel(
        num_attention_heads=1, attention_head_dim=96, in_channels=4, out_channels=4, num_layers=1, cross_attention_dim=96, sample_width=24,
        sample_height=16, sample_frames=2, caption_channels=DIM,
    )  # fmt: skip
    thirds = [rand(n, 32) for n in GRID]
    grids = torch.cartesian_prod(*(torch.arange(n) for n in GRID)).T
    rope = (tuple((x.cos(), x.sin()) for x in thirds), tuple(g[None] for g in grids))
    return model, {
        "hidden_states": latents(batch),
        "timestep": timestep(batch),
        "encoder_hidden_states": rand(batch, 1, TEXT, DIM).flatten(0, 1),
        "encoder_attention_mask": mask(batch).float(),
        "image_rotary_emb": rope,
    }


def ltx(batch: int) -> tuple[torch.nn.Module, Arguments]:
    model = diffusers.LTXVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=1,
        attention_head_dim=64,
        cross_attention_dim=64,
        num_layers=1,
        caption_channels=DIM,
    )
    text = {"encoder_hidden_states": rand(batch, TEXT, DIM), "encoder_attention_mask": mask(batch).long()}
    sizes = dict(zip(("num_frames", "height", "width"), GRID, strict=True))
    return model, {
        "hidden_states": rand(batch, GRID[0] * GRID[1] * GRID[2], 4),
        "timestep": timestep(batch),
        **text,
        **sizes,
    }


def ltx2(batch: int) -> tuple[torch.nn.Module, Arguments]:
    model = diffusers.LTX2VideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=1, attention_head_dim=64, cross_attention_dim=64, audio_in_channels=4,
        audio_out_channels=4, audio_num_attention_heads=1, audio_attention_head_dim=32, audio_cross_attention_dim=32, num_layers=1,
        caption_channels=DIM,
    )  # fmt: skip
    _, arguments = ltx(batch)
    arguments |= {"audio_hidden_states": rand(batch, 5, 4), "audio_encoder_hidden_states": rand(batch, TEXT, DIM)}
    arguments |= {"audio_encoder_attention_mask": mask(batch).long(), "audio_num_frames": 5}
    return model, arguments


def mochi(batch: int) -> tuple[torch.nn.Module, Arguments]:
    model = diffusers.MochiTransformer3DModel(
        patch_size=2, num_attention_heads=1, attention_head_dim=64, num_layers=2, pooled_projection_dim=16, in_channels=4, text_embed_dim=DIM,
        time_embed_dim=4, max_sequence_length=TEXT,
    )  # fmt: skip
    torch.nn.init.normal_(model.pos_frequencies, generator=torch.Generator().manual_seed(0))
    text = {"encoder_hidden_states": rand(batch, TEXT, DIM), "encoder_attention_mask": mask(batch)}
    return model, {"hidden_states": latents(batch), "timestep": timestep(batch), **text}


def cosmos(extra: str | None) -> Callable[[int], tuple[torch.nn.Module, Arguments]]:
    def make(batch: int) -> tuple[torch.nn.Module, Arguments]:
        model = diffusers.CosmosTransformer3DModel(
            in_channels=4, out_channels=4, num_attention_heads=1, attention_head_dim=64, num_layers=1, mlp_ratio=1, text_embed_dim=DIM,
            adaln_lora_dim=4, max_size=(4, 32, 32), patch_size=(1, 2, 2), concat_padding_mask=False, extra_pos_embed_type=extra,
        )  # fmt: skip
        times = torch.full((batch,), 0.5) if extra else torch.full((batch, 1, GRID[0], 1, 1), 0.5)
        return model, {
            "hidden_states": latents(batch),
            "timestep": times,
            "encoder_hidden_states": rand(batch, TEXT, DIM),
        }

    return make


def kandinsky(batch: int) -> tuple[torch.nn.Module, Arguments]:
    model = diffusers.Kandinsky5Transformer3DModel(
        in_visual_dim=4, in_text_dim=DIM, in_text_dim2=8, time_dim=16, out_visual_dim=4, model_dim=64, ff_dim=64, num_text_blocks=1,
        num_visual_blocks=1, axes_dims=(16, 24, 24),
    )  # fmt: skip
    return model, {
        "hidden_states": latents(batch).permute(0, 2, 3, 4, 1).contiguous(),
        "timestep": timestep(batch),
        "encoder_hidden_states": rand(batch, TEXT, DIM),
        "pooled_projections": rand(batch, 8),
        "visual_rope_pos": tuple(torch.arange(n) for n in GRID),
        "text_rope_pos": torch.arange(TEXT),
    }


def kandinsky6(batch: int) -> tuple[torch.nn.Module, Arguments]:
    model = diffusers.Kandinsky6Transformer3DModel(
        in_visual_dim=4, in_text_dim=DIM, in_text_dim2=8, time_dim=16, out_visual_dim=4, model_dim=64, ff_dim=64, num_text_blocks=1,
        num_visual_blocks=1, axes_dims=(16, 24, 24), visual_cond=False, in_audio_dim=4, out_audio_dim=4, model_dim_a=32, time_dim_a=16,
        ff_dim_a=32, axes_dims_a=(8, 12, 12),
    )  # fmt: skip
    return model, {
        "hidden_states": latents(batch).permute(0, 2, 3, 4, 1).contiguous(),
        "timestep": timestep(batch),
        "encoder_hidden_states": rand(batch, TEXT, DIM),
        "pooled_projections": rand(batch, 8),
        "audio_hidden_states": rand(batch, 9, 4),
    }


IMAGE = (1, 12, 16)


def flux(
    batch: int, name: str = "FluxTransformer2DModel", columns: int = 3, **config: Any
) -> tuple[torch.nn.Module, Arguments]:
    model = getattr(diffusers, name)(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=64,
        num_attention_heads=1,
        joint_attention_dim=DIM,
        **config,
    )
    ids = torch.zeros(*IMAGE, columns)
    ids[..., 1], ids[..., 2] = torch.arange(IMAGE[1])[:, None], torch.arange(IMAGE[2])
    arguments = {
        "hidden_states": rand(batch, IMAGE[1] * IMAGE[2], 4),
        "timestep": torch.full((batch,), 0.5),
        "encoder_hidden_states": rand(batch, TEXT, DIM),
        "img_ids": ids.reshape(-1, columns),
        "txt_ids": torch.zeros(TEXT, columns),
    }
    if columns == 3:
        arguments["pooled_projections"] = rand(batch, 8)
    return model, arguments


def qwen(batch: int) -> tuple[torch.nn.Module, Arguments]:
    model = diffusers.QwenImageTransformer2DModel(
        in_channels=4, out_channels=4, patch_size=1, num_layers=1, attention_head_dim=64, num_attention_heads=1, joint_attention_dim=DIM,
        axes_dims_rope=(16, 24, 24),
    )  # fmt: skip
    text = {"encoder_hidden_states": rand(batch, TEXT, DIM), "encoder_hidden_states_mask": mask(batch)}
    arguments = {"hidden_states": rand(batch, IMAGE[1] * IMAGE[2], 4), "timestep": torch.full((batch,), 0.5), **text}
    return model, {**arguments, "img_shapes": [[IMAGE]] * batch}


def consisid(batch: int) -> tuple[torch.nn.Module, Arguments]:
    return cogvideox(batch, "ConsisIDTransformer3DModel")


def flux2(batch: int) -> tuple[torch.nn.Module, Arguments]:
    config = {"timestep_guidance_channels": 8, "axes_dims_rope": (16, 16, 16, 16), "guidance_embeds": False}
    return flux(batch, "Flux2Transformer2DModel", 4, **config)


def flux1(batch: int) -> tuple[torch.nn.Module, Arguments]:
    return flux(batch, pooled_projection_dim=8, axes_dims_rope=(16, 24, 24))


def flux3(batch: int) -> tuple[torch.nn.Module, Arguments]:
    """Without blocks of the image alone, in which a cell would move all tokens."""
    model = diffusers.Flux3Transformer2DModel(
        in_channels=4, cond_in_channels=4, num_layers=0, num_single_layers=2, attention_head_dim=64, num_attention_heads=1,
        joint_attention_dim=DIM, timestep_channels=8, axes_dims_rope=(16, 16, 16, 16),
    )  # fmt: skip
    rows, columns = (torch.arange(n).float() for n in IMAGE[1:])
    ids = torch.cartesian_prod(torch.zeros(1), rows, columns, torch.zeros(1))
    return model, {
        "hidden_states": rand(batch, len(ids), 4),
        "encoder_hidden_states": rand(batch, TEXT, DIM),
        "timestep": timestep(batch) / 1000,
        "img_ids": ids,
        "txt_ids": torch.zeros(TEXT, 4),
    }


def bcthw(x: Tensor, sample: int, at: tuple[int, int, int]) -> None:
    t, h, w = at
    x[sample, :, t, 2 * h, 2 * w + 1] += 1.0


def btchw(x: Tensor, sample: int, at: tuple[int, int, int]) -> None:
    bcthw(x.transpose(1, 2), sample, at)


def bthwc(x: Tensor, sample: int, at: tuple[int, int, int]) -> None:
    bcthw(x.movedim(-1, 1), sample, at)


def rows_of(grid: tuple[int, int, int]) -> Callable[[Tensor, int, tuple[int, int, int]], None]:
    def cell(x: Tensor, sample: int, at: tuple[int, int, int]) -> None:
        x[sample, (at[0] * grid[1] + at[1]) * grid[2] + at[2]] += 1.0

    return cell


def itself(sigma: float) -> float:
    return sigma


FAMILIES: dict[str, Family] = {
    "wan": Family(wan("WanTransformer3DModel"), cell=bcthw),
    "vace": Family(wan("WanVACETransformer3DModel", vace_layers=[0], vace_in_channels=6), cell=bcthw),
    "animate": Family(animate, cell=bcthw, grid=(3, 8, 12), exact=(0,)),
    "skyreels": Family(wan("SkyReelsV2Transformer3DModel"), cell=bcthw),
    "chronoedit": Family(wan("ChronoEditTransformer3DModel"), cell=bcthw),
    "anyflow": Family(wan("AnyFlowTransformer3DModel"), cell=btchw),
    "helios": Family(helios, cell=bcthw, before=2 * 8 * 12 + 1 * 4 * 6 + 1 * 2 * 3),
    "hunyuan": Family(hunyuan, cell=bcthw, after=VALID),
    "hunyuan15": Family(hunyuan15, cell=bcthw, after=(VALID[0] + 5, VALID[1] + 5)),
    "motif": Family(motif, cell=bcthw, after=(VALID[0] + 6, VALID[1] + 6)),
    "cogvideox": Family(cogvideox, cell=btchw, before=TEXT),
    "consisid": Family(consisid, cell=btchw, before=TEXT),
    "easyanimate": Family(easyanimate, cell=bcthw, before=TEXT),
    "allegro": Family(allegro, cell=bcthw),
    "ltx": Family(ltx, cell=rows_of(GRID)),
    "ltx2": Family(ltx2, cell=rows_of(GRID)),
    "mochi": Family(mochi, lambda sigma: 1000.0 * (1.0 - sigma), cell=bcthw, after=VALID),
    "cosmos1": Family(cosmos("learnable"), lambda sigma: 0.25 * float(torch.logit(torch.tensor(sigma))), cell=bcthw),
    "cosmos2": Family(cosmos(None), itself, cell=bcthw),
    "kandinsky": Family(kandinsky, cell=bthwc),
    "flux": Family(flux1, itself, rows_of(IMAGE), IMAGE, TEXT),
    "kandinsky6": Family(kandinsky6, cell=bthwc),
    "flux3": Family(flux3, itself, rows_of(IMAGE), IMAGE, TEXT),
    "flux2": Family(flux2, itself, rows_of(IMAGE), IMAGE, TEXT),
    "qwen": Family(qwen, itself, rows_of(IMAGE), IMAGE, TEXT),
}
