"""Call shapes of modelscope/DiffSynth-Studio (models/wan_video_dit.py, pipelines/wan_video.py, core/attention/attention.py); the
first was read at commit 01bb567."""

import torch

from . import HEADS, Block, Model, Projections, sdpa


def flash_attention(q, k, v, num_heads, compatibility_mode=False):
    return sdpa(*(x.unflatten(2, (num_heads, -1)) for x in (q, k, v))).flatten(2)


def attention_forward(
    q, k, v, q_pattern="b n s d", k_pattern="b n s d", v_pattern="b n s d", out_pattern="b n s d", dims=None, attn_mask=None,
    scale=None, is_causal=False, compatibility_mode=False, window_size=None, use_flex=False, score_mod=None,
):  # fmt: skip
    heads = (dims or {}).get("n", HEADS)

    def nhd(x, pattern):
        return x.unflatten(2, (heads, -1)) if "(" in pattern else x.transpose(1, 2) if pattern == "b n s d" else x

    out = sdpa(nhd(q, q_pattern), nhd(k, k_pattern), nhd(v, v_pattern), attn_mask)
    return out.flatten(2) if "(" in out_pattern else out.transpose(1, 2) if out_pattern == "b n s d" else out


class AttentionModule(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.num_heads = HEADS

    def forward(self, q, k, v):
        return flash_attention(q=q, k=k, v=v, num_heads=self.num_heads)


class SelfAttention(Projections):
    def __init__(self):
        super().__init__()
        self.attn = AttentionModule()

    def forward(self, x, freqs):
        return self.o(self.attn(self.q(x), self.k(x), self.v(x)))


class PatternAttention(SelfAttention):
    """The core of its newer models."""

    def forward(self, x, freqs):
        q, k = self.q(x), self.k(x)
        v = self.v(x).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
        same = "b s (n d)"
        x = attention_forward(q, k, v, q_pattern=same, k_pattern=same, out_pattern=same, dims={"n": self.num_heads})
        return self.o(x)


class DiTBlock(Block):
    attention = SelfAttention

    def __init__(self):
        super().__init__(self.attention, torch.nn.Identity)

    def forward(self, x, context, t_mod, freqs):
        return x + self.self_attn(self.norm(x), freqs)


class PatternBlock(DiTBlock):
    attention = PatternAttention


class WanModel(Model):
    def __init__(self, block=DiTBlock):
        super().__init__(block)

    def patchify(self, x):
        return self.patch_embedding(x)

    def forward(self, x, timestep, context):
        return model_fn_wan_video(self, latents=x, timestep=timestep, context=context)


def model_fn_wan_video(dit, latents=None, timestep=None, context=None, reference_latents=None, **kwargs):
    """What its pipeline calls: parts of the model, not the model."""
    x = dit.patchify(latents).flatten(2).transpose(1, 2)
    if reference_latents is not None:
        x = torch.cat([reference_latents, x], 1)
    for block in dit.blocks:
        x = block(x, context, None, None)
    return x
