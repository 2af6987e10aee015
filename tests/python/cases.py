"""Problems that several test files share: small odd grids, windows, text, and their inputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fpsattention.layout import masks, tiles


@dataclass(frozen=True)
class Case:
    name: str
    grid: tuple[int, int, int]
    tile: tuple[int, int, int] | None = None
    window: tuple[int, int, int] | None = None
    text_len: int = 0
    text_position: str = "suffix"
    batch: int = 1
    heads: int = 2
    dim: int = 64

    def layout(self):
        return tiles.plan(self.grid, self.tile, self.text_len, self.text_position)

    def mask(self):
        layout = self.layout()
        return masks.dense_mask(layout) if self.window is None else masks.sliding_tile_mask(layout, self.window)

    def inputs(self, dtype=torch.float32, seed=0):
        """q, k, v ``(B, S, H, D)``; K has an offset per channel, which the smoothing removes."""
        generator = torch.Generator().manual_seed(seed)
        shape = (self.batch, self.layout().num_tokens, self.heads, self.dim)
        q, k, v = (torch.randn(shape, generator=generator) for _ in range(3))
        k = k + torch.randn(1, 1, self.heads, self.dim, generator=generator)
        return tuple(x.to(dtype) for x in (q, k, v))

    def kwargs(self):
        return {
            "grid": self.grid, "tile": self.tile, "window": self.window,
            "text_len": self.text_len, "text_position": self.text_position,
        }  # fmt: skip


CASES = [
    Case("one_token", (1, 1, 1)),
    Case("primes_dense", (3, 5, 7)),
    Case("windowed", (5, 11, 13), (2, 4, 5), (2, 2, 1)),
    Case("clipped_d128", (5, 6, 10), (4, 4, 8), (1, 2, 2), dim=128),
    Case("text_suffix", (3, 7, 11), (3, 4, 4), (1, 1, 2), text_len=17),
    Case("text_prefix_batch", (4, 6, 6), (2, 3, 6), (1, 2, 1), text_len=131, text_position="prefix", batch=2, heads=1),
    Case("big_tile", (9, 9, 9), (9, 9, 9), None, heads=1),  # 729 tokens in one tile of 6 blocks
]
NARROW = Case("narrow_d96", (3, 5, 7), (3, 4, 4), (1, 1, 2), text_len=3, dim=96)  # codes of 128 columns
IDS = [case.name for case in CASES]


def same_bytes(a, b):
    """Of e4m3 codes, any NaN being NaN."""
    a, b = a.view(torch.uint8), b.view(torch.uint8)
    return torch.equal(torch.where(a % 128 == 127, 127, a), torch.where(b % 128 == 127, 127, b))


def assert_quantized(got, want):
    """The outputs of an op against those of the reference, ``want``, given its mean of K: to the bit, but for sums whose order is free."""
    for name, a, b in zip(want._fields, got, want, strict=True):
        if a.dtype == torch.float8_e4m3fn:
            assert same_bytes(a, b), name
        elif name == "q_k_mean":
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)
        else:
            assert torch.equal(a, b), name
