"""Shapes, random inputs, masks of a wanted density, and operation counts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

import fpsattention as fps
from fpsattention.integrations.tokens import resolve_window
from fpsattention.layout.masks import BlockMask
from fpsattention.layout.tiles import BLOCK, TileLayout
from fpsattention.ops.attend import k_mean_stride
from fpsattention.ops.checks import GRANULARITIES


@dataclass(frozen=True)
class Shape:
    """One attention call of a video model: a latent grid in tokens, heads, head dimension."""

    name: str
    grid: tuple[int, int, int]
    heads: int
    head_dim: int = 128
    tile: tuple[int, int, int] | None = None  # None: the planner chooses

    @property
    def tokens(self) -> int:
        return math.prod(self.grid)

    @property
    def dense_flops(self) -> int:
        """Two products over all pairs of tokens, 2 FLOP per multiply-add: 4 H L^2 D."""
        return 4 * self.heads * self.tokens**2 * self.head_dim

    @property
    def set_bytes(self) -> int:
        """Bytes of q, k and v in BF16."""
        return 3 * self.tokens * self.heads * self.head_dim * 2


# 81 frames at 720 x 1280 and 480 x 832 are 21 latent frames of 45 x 80 and 30 x 52 tokens in Wan2.1.
WAN_14B_720P = Shape("wan2.1-14b-720p", (21, 45, 80), 40)
WAN_1B_480P = Shape("wan2.1-1.3b-480p", (21, 30, 52), 12)
D64_480P = Shape("d64-480p", (21, 30, 52), 24, head_dim=64)
STA_GRID = Shape("hunyuan-30x48x80", (30, 48, 80), 24, tile=(6, 8, 8))  # a grid and tile that FastVideo's STA accepts
TINY = Shape("tiny", (4, 8, 12), 2, head_dim=64)
TINY_ODD = Shape("tiny-odd", (3, 7, 11), 1)
PAPER_DENSITY = 0.194  # what the paper's 5.15x of its sparse kernel amounts to
DENSITIES = (1.0, 0.5, 0.3, PAPER_DENSITY, 0.1)


@dataclass(frozen=True)
class Workload:
    """A shape with its tiles and a block mask, both on the device; batch 1. A window of None is the dense mask over the same blocks."""

    shape: Shape
    target_density: float
    layout: TileLayout
    mask: BlockMask
    window: tuple[int, int, int] | None
    device: str

    @property
    def name(self) -> str:
        return f"{self.shape.name}-{self.target_density:g}"

    @property
    def dense(self) -> bool:
        return self.window is None

    @property
    def softmax_scale(self) -> float:
        return self.shape.head_dim**-0.5

    @property
    def k_mean_stride(self) -> int:
        """As ``fps.attention`` has it."""
        return k_mean_stride(self.shape.tokens)

    def quantize(self, x: Inputs, granularity: str = "tile", *, pow2_scales: bool = False) -> tuple[torch.Tensor, ...]:
        """The op, as ``fps.attention`` calls it."""
        return torch.ops.fpsattn.quantize(
            x.q, x.k, x.v, self.layout.token_of_slot, self.layout.tile_block_offsets, granularity=GRANULARITIES[granularity],
            smooth_k=True, pow2_scales=pow2_scales, k_mean_stride=self.k_mean_stride,
        )  # fmt: skip

    def forward(
        self, quantized: Sequence[torch.Tensor], lists: Sequence[torch.Tensor] = ()
    ) -> tuple[torch.Tensor, ...]:
        """The op on what ``quantize`` returned. lists: tile_of_block, kv_num_blocks and kv_indices where they are not the mask's."""
        lists = lists or (self.layout.tile_of_block, self.mask.kv_num_blocks, self.mask.kv_indices)
        return torch.ops.fpsattn.forward(
            *quantized[:6], self.layout.token_of_slot, *lists, num_tokens=self.shape.tokens, softmax_scale=self.softmax_scale,
            out_dtype=torch.bfloat16, q_k_mean=quantized[7],
        )  # fmt: skip

    def query_blocks(self) -> torch.Tensor:
        """bool [num_blocks, num_blocks]: which KV blocks each query block multiplies."""
        return self.mask.to_blocks()[0, 0][self.layout.tile_of_block.long()]

    @property
    def computed_flops(self) -> int:
        """FLOP of the blocks that are multiplied, padding slots included: 4 * 128 * 128 * D per pair."""
        return 4 * BLOCK * BLOCK * self.shape.head_dim * self.shape.heads * int(self.query_blocks().sum())

    def describe(self) -> dict[str, Any]:
        s = self.shape
        return {
            "name": s.name, "grid": s.grid, "tokens": s.tokens, "heads": s.heads, "head_dim": s.head_dim, "tile": self.layout.tile,
            "window": self.window, "density": self.mask.density, "utilization": self.layout.utilization,
            "num_blocks": self.layout.num_blocks, "computed_flops": self.computed_flops, "dense_flops": s.dense_flops,
        }  # fmt: skip


def build(shape: Shape, density: float, device: str) -> Workload:
    """Plans the tiles and makes the mask: the largest window of at most ``density``, as a schedule would choose it."""
    layout = fps.plan(shape.grid, tile=shape.tile)
    window = None if density >= 1.0 else resolve_window(float(density), layout)
    mask = fps.sliding_tile_mask(layout, window or layout.tile_grid).to(device)
    return Workload(shape, density, mask.layout, mask, window, device)


@dataclass
class Inputs:
    """One set of q, k, v: (1, H, S, D) views of (1, S, H, D) memory, as a diffusion transformer hands them over."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    index: int = 0

    def nhd(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The same memory as (1, S, H, D)."""
        return self.q.transpose(1, 2), self.k.transpose(1, 2), self.v.transpose(1, 2)


def random_inputs(shape: Shape, device: str, *, requires_grad: bool = False, seed: int = 0) -> list[Inputs]:
    """Standard normal BF16 sets, made on the device: at least two, together over twice the L2 cache, so that none is left in it when
    its turn comes again."""
    l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size if device == "cuda" else 0
    generator = torch.Generator(device).manual_seed(seed)
    result = []
    for index in range(max(2, min(8, math.ceil(2 * l2_bytes / shape.set_bytes) + 1))):
        q, k, v = (
            torch.randn(1, shape.tokens, shape.heads, shape.head_dim, device=device, generator=generator)
            .to(torch.bfloat16).transpose(1, 2).requires_grad_(requires_grad)
            for _ in range(3)
        )  # fmt: skip
        result.append(Inputs(q, k, v, index))
    return result
