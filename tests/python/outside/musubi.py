"""Call shapes of kohya-ss/musubi-tuner (wan/modules, modules/attention.py): q, k, v in lists that the callee
empties, as in hunyuan_model/attention.py, which was read at commit 1b21831."""

import torch

from . import Block, Projections, sdpa, wan


class AttentionParams:
    def __init__(self, attn_mode=None, split_attn=False, seqlens=None):
        self.attn_mode, self.split_attn, self.seqlens = attn_mode, split_attn, seqlens


def attention(qkv_or_q, k=None, v=None, attn_params=None, drop_rate=0.0):
    if isinstance(qkv_or_q, list):
        q, k, v = qkv_or_q
        qkv_or_q.clear()
    else:
        q = qkv_or_q
    mask = None
    if attn_params.seqlens is not None:
        mask = (torch.arange(k.shape[1]) < attn_params.seqlens[:, None])[:, None, None]
    return sdpa(q, k, v, mask).flatten(2)


def flash_attention(
    qkv, q_lens=None, k_lens=None, dropout_p=0.0, softmax_scale=None, q_scale=None, causal=False, window_size=(-1, -1),
    deterministic=False, dtype=torch.bfloat16, version=None, attn_mode="torch", split_attn=False,
):  # fmt: skip
    q, k, v = qkv
    qkv.clear()
    return sdpa(q, k, v)


class WanSelfAttention(Projections):
    def forward(self, x, seq_lens, grid_sizes, freqs):
        qkv = [layer(x).unflatten(2, (self.num_heads, -1)) for layer in (self.q, self.k, self.v)]
        x = flash_attention(qkv, k_lens=seq_lens, window_size=(-1, -1), attn_mode="torch", split_attn=False)
        assert not qkv  # the memory of q, k and v is free now
        return self.o(x.flatten(2))


class WanBlock(Block):
    def __init__(self):
        super().__init__(WanSelfAttention, wan.WanCrossAttention)

    forward = wan.WanBlock.forward


class WanModel(wan.WanModel):
    def __init__(self):
        super().__init__(WanBlock)


class JointAttention(Projections):
    """As in its HunyuanVideo 1.5: video, then padded text."""

    def forward(self, x, attn_params):
        qkv = [layer(x).unflatten(2, (self.num_heads, -1)) for layer in (self.q, self.k, self.v)]
        return self.o(attention(qkv, attn_params=attn_params))


class JointBlock(Block):
    def __init__(self):
        super().__init__(JointAttention, torch.nn.Identity)


class JointModel(wan.Model):
    def __init__(self):
        super().__init__(JointBlock)

    def forward(self, x, timestep, text, text_mask):
        x = self.patch_embedding(x).flatten(2).transpose(1, 2)
        params = AttentionParams("torch", False, text_mask.sum(1) + x.shape[1])
        video = x.shape[1]
        x = torch.cat([x, text], 1)
        for block in self.blocks:
            x = x + block.self_attn(block.norm(x), params)
        return x[:, :video]
