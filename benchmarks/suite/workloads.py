"""Shapes, random inputs, masks of a wanted density, and operation counts."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from typing import Any

import torch

BLOCK = 128  # token slots of a block


@dataclass(frozen=True)
class Shape:
    """One attention call of a video model: a latent grid in tokens, heads, head dimension."""

    name: str
    grid: tuple[int, int, int]
    heads: int
    head_dim: int = 128
    batch: int = 1
    tile: tuple[int, int, int] | None = None  # None: the planner chooses

    @property
    def tokens(self) -> int:
        return math.prod(self.grid)

    def describe(self) -> dict[str, Any]:
        return {
            "name": self.name, "grid": list(self.grid), "tokens": self.tokens, "batch": self.batch, "heads": self.heads,
            "head_dim": self.head_dim, "dtype": "bfloat16",
        }  # fmt: skip

    def dense_flops(self) -> int:
        """Two products over all pairs of tokens, 2 FLOP per multiply-add: 4 B H L^2 D."""
        return 4 * self.batch * self.heads * self.tokens**2 * self.head_dim


# 81 frames at 720 x 1280 and 480 x 832 are 21 latent frames of 45 x 80 and 30 x 52 tokens in Wan2.1.
WAN_14B_720P = Shape("wan2.1-14b-720p", (21, 45, 80), 40)
WAN_1B_480P = Shape("wan2.1-1.3b-480p", (21, 30, 52), 12)
D64_480P = Shape("d64-480p", (21, 30, 52), 24, head_dim=64)
STA_GRID = Shape("hunyuan-30x48x80", (30, 48, 80), 24, tile=(6, 8, 8))  # a grid and tile that FastVideo's STA accepts
TINY = Shape("tiny", (4, 8, 12), 2, head_dim=64)
TINY_ODD = Shape("tiny-odd", (3, 7, 11), 1, head_dim=128)

DENSITIES = (1.0, 0.5, 0.3, 0.194, 0.1)  # 0.194: what the paper's 5.15x of its sparse kernel amounts to


@dataclass
class Workload:
    """A shape with a tile layout and a block mask of about the wanted density (``mask.density`` says which)."""

    shape: Shape
    target_density: float
    layout: Any  # fpsattention TileLayout
    mask: Any  # fpsattention BlockMask, on the device
    window: tuple[int, int, int] | None
    device: str
    tables: dict[str, torch.Tensor] = field(default_factory=dict)  # the layout's tables, on the device

    @property
    def name(self) -> str:
        return f"{self.shape.name}/density={self.target_density:g}"

    @property
    def dense(self) -> bool:
        return self.window is None

    @property
    def softmax_scale(self) -> float:
        return self.shape.head_dim**-0.5

    def computed_pairs(self) -> int:
        """(query block, KV block) pairs that the kernel multiplies, summed over batch and heads."""
        counts = self.mask.kv_num_blocks.to("cpu", torch.int64)  # [Bm, Hm, tiles]
        blocks_of_tile = self.layout.tile_block_offsets.to("cpu", torch.int64).diff()
        batches = self.shape.batch if counts.shape[0] == 1 else 1
        heads = self.shape.heads if counts.shape[1] == 1 else 1
        return int((counts * blocks_of_tile).sum()) * batches * heads

    def computed_flops(self) -> int:
        """FLOP of the blocks that are multiplied, padding slots included: 4 * 128 * 128 * D per pair."""
        return 4 * BLOCK * BLOCK * self.shape.head_dim * self.computed_pairs()

    def describe(self) -> dict[str, Any]:
        return {
            **self.shape.describe(), "target_density": self.target_density, "density": float(self.mask.density),
            "window": list(self.window) if self.window else None, "tile": list(self.layout.tile),
            "utilization": float(self.layout.utilization), "num_blocks": int(self.layout.num_blocks),
        }  # fmt: skip


def window_for_density(tile_grid: tuple[int, int, int], target: float) -> tuple[int, int, int]:
    """The window, in tiles, whose share of the tiles is closest to ``target``; among equals the most cube-like one.

    Cube-like is measured by the spread of the shares that the window takes of each axis.
    """

    def badness(window: tuple[int, ...]) -> tuple[float, float]:
        shares = [w / n for w, n in zip(window, tile_grid, strict=True)]
        return round(abs(math.prod(shares) - target), 4), max(shares) - min(shares)

    return min(itertools.product(*(range(1, n + 1) for n in tile_grid)), key=badness)  # type: ignore[return-value]


def build(shape: Shape, density: float, device: str) -> Workload:
    """Plans the tiles and makes the mask. ``density`` 1 is the dense mask over the same blocks."""
    import fpsattention as fps

    layout = fps.plan(shape.grid, tile=shape.tile)
    window = None if density >= 1.0 else window_for_density(tuple(layout.tile_grid), density)
    if window is None:
        from fpsattention.layout.masks import dense_mask

        mask = dense_mask(layout)
    else:
        mask = fps.sliding_tile_mask(layout, window)
    tables = {
        name: getattr(layout, name).to(device)
        for name in ("token_of_slot", "slot_of_token", "tile_of_block", "tile_block_offsets")
    }
    return Workload(shape, density, layout, mask.to(device), window, device, tables)


@dataclass
class Inputs:
    """One set of q, k, v: (B, H, S, D) views of (B, S, H, D) memory, as a diffusion transformer hands them over."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    index: int = 0

    def nhd(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The same memory as (B, S, H, D)."""
        return self.q.transpose(1, 2), self.k.transpose(1, 2), self.v.transpose(1, 2)


def random_inputs(shape: Shape, device: str, sets: int, *, requires_grad: bool = False, seed: int = 0) -> list[Inputs]:
    """``sets`` different standard normal sets in BF16, made on the device."""
    generator = torch.Generator(device).manual_seed(seed)
    result = []
    for index in range(sets):
        q, k, v = (
            torch.randn(shape.batch, shape.tokens, shape.heads, shape.head_dim, device=device, generator=generator)
            .to(torch.bfloat16).transpose(1, 2)
            for _ in range(3)
        )  # fmt: skip
        for tensor in (q, k, v):
            tensor.requires_grad_(requires_grad)
        result.append(Inputs(q, k, v, index))
    return result


def sets_needed(shape: Shape, l2_bytes: int | None) -> int:
    """Sets to rotate so that none is still in the L2 cache when its turn comes: at least two, together over twice the L2."""
    set_bytes = 3 * shape.batch * shape.tokens * shape.heads * shape.head_dim * 2
    return max(2, min(8, math.ceil(2 * (l2_bytes or 0) / set_bytes) + 1))


def set_bytes(shape: Shape) -> int:
    """Bytes of q, k and v in BF16."""
    return 3 * shape.batch * shape.tokens * shape.heads * shape.head_dim * 2
