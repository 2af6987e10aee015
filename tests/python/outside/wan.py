"""Call shapes of Wan-Video/Wan2.1 (wan/modules/model.py, attention.py)."""

import torch
from torch import Tensor

from . import Block, Model, Projections, sdpa


def flash_attention(
    q, k, v, q_lens=None, k_lens=None, dropout_p=0.0, softmax_scale=None, q_scale=None, causal=False,
    window_size=(-1, -1), deterministic=False, dtype=torch.bfloat16, version=None,
):  # fmt: skip
    mask = None
    if k_lens is not None:
        mask = (torch.arange(k.shape[1]) < torch.as_tensor(k_lens)[:, None])[:, None, None]
    return sdpa(q, k, v.to(q.dtype), mask)


class WanSelfAttention(Projections):
    window_size = (-1, -1)

    def forward(self, x, seq_lens, grid_sizes, freqs):
        q, k, v = (layer(x).unflatten(2, (self.num_heads, -1)) for layer in (self.q, self.k, self.v))
        x = flash_attention(q=q, k=k, v=v, k_lens=seq_lens, window_size=self.window_size)
        return self.o(x.flatten(2))


class WanCrossAttention(WanSelfAttention):
    def forward(self, x, context, context_lens):
        q = self.q(x).unflatten(2, (self.num_heads, -1))
        k, v = (layer(context).unflatten(2, (self.num_heads, -1)) for layer in (self.k, self.v))
        return self.o(flash_attention(q, k, v, k_lens=context_lens).flatten(2))


class WanBlock(Block):
    def __init__(self):
        super().__init__(WanSelfAttention, WanCrossAttention)

    def forward(self, x, context, **arguments):
        x = x + self.self_attn(self.norm(x), **arguments)
        return x + self.cross_attn(x, context, None)


class WanModel(Model):
    def __init__(self, block=WanBlock):
        super().__init__(block)

    def forward(self, x, t, context, seq_len, clip_fea=None, y=None) -> list[Tensor]:
        x = [self.patch_embedding(u.unsqueeze(0)) for u in x]
        grid_sizes = torch.stack([torch.tensor(u.shape[2:], dtype=torch.long) for u in x])
        x = [u.flatten(2).transpose(1, 2) for u in x]
        seq_lens = torch.tensor([u.size(1) for u in x], dtype=torch.long)
        x = torch.cat([torch.nn.functional.pad(u, (0, 0, 0, seq_len - u.size(1))) for u in x])
        for block in self.blocks:
            x = block(x, torch.stack(context), seq_lens=seq_lens, grid_sizes=grid_sizes, freqs=None)
        return [u[:length] for u, length in zip(x, seq_lens, strict=True)]
