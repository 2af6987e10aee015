"""Tiny models with the call shapes of code bases outside of diffusers, each with its own ``flash_attention`` or ``attention``."""

import torch
from torch import Tensor

HEADS, DIM, GRID = 2, 64, (2, 8, 12)


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """``(B, S, H, D)``."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


class Projections(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.num_heads = HEADS
        width = HEADS * DIM
        self.q, self.k, self.v, self.o = (torch.nn.Linear(width, width) for _ in range(4))


class Block(torch.nn.Module):
    """Self-attention over the video, then cross-attention to the text, by the same code."""

    def __init__(self, attention: type[torch.nn.Module], cross: type[torch.nn.Module]):
        super().__init__()
        self.self_attn, self.cross_attn = attention(), cross()
        self.norm = torch.nn.LayerNorm(HEADS * DIM)


class Model(torch.nn.Module):
    def __init__(self, block: type[Block]):
        super().__init__()
        torch.manual_seed(0)
        self.patch_size = (1, 2, 2)
        self.patch_embedding = torch.nn.Conv3d(4, HEADS * DIM, self.patch_size, self.patch_size)
        self.blocks = torch.nn.ModuleList(block() for _ in range(2))
