"""A problem whose queries and keys differ in all that they may: heads, tokens, blocks, and an order per head. For ops and reference."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from fpsattention.layout import masks
from fpsattention.ops import reference


def repeated(x: Tensor, axis: int, group: int) -> Tensor:
    return x.repeat_interleave(group, axis)


def distance(a: Tensor, b: Tensor) -> float:
    """Relative, in the 2-norm; where b is -inf (the lse of an empty row) a must be."""
    a, b = a.detach().float(), b.detach().float()
    assert torch.equal(a.isinf(), b.isinf())
    a, b = (x.nan_to_num(neginf=0.0) for x in (a, b))
    return float((a - b).norm() / b.norm())


class Sides:
    """Two samples, two heads of K and V, ``group`` query heads of each. 200 queries in 3 tiles and 211 keys in 4, one of two blocks."""

    NAMES: ClassVar = (*reference.Quantized._fields, *reference.Forward._fields, "dq", "dk", "dv")

    def __init__(self, group: int, dim: int, granularity: int, dtype: torch.dtype = torch.float32):
        generator = torch.Generator().manual_seed(group)
        batch, heads, self.tokens, self.kv_tokens = 2, 2 * group, 200, 211

        def randn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(dtype)

        def table(sizes: tuple[int, ...], heads: int) -> tuple[Tensor, Tensor]:
            """An order per (batch, head) of tokens in tiles of these sizes, and where tiles begin."""
            blocks = torch.tensor([-(-size // 128) for size in sizes])
            offsets = torch.nn.functional.pad(blocks.cumsum(0), (1, 0))
            slots = torch.full((batch, heads, 128 * int(offsets[-1])), -1, dtype=torch.int32)
            places = torch.cat([128 * offsets[i] + torch.arange(size) for i, size in enumerate(sizes)])
            for b in range(batch):
                for h in range(heads):
                    slots[b, h, places] = torch.randperm(sum(sizes), generator=generator).to(torch.int32)
            return slots, offsets.to(torch.int32)

        kv_shape = (batch, 2, self.kv_tokens, dim)
        self.qkv = (randn(batch, heads, self.tokens, dim), randn(*kv_shape) + 0.5, randn(*kv_shape))
        self.tangents = [randn(*x.shape) for x in self.qkv]
        self.grad = randn(*self.qkv[0].shape)
        self.tables = (*table((97, 1, 102), heads), *table((3, 17, 130, 61), 2))
        keep = torch.rand(1, heads, 3, 5, generator=generator) < 0.6
        keep[:, :, 0] = True
        keep[:, :, 1] = False  # a tile that attends nothing
        no_first = torch.zeros(3, 5, dtype=torch.bool)
        self.lists = masks._lists_of_keep(keep, no_first, 5)
        self.q_lists = masks._lists_of_keep(keep.transpose(-1, -2), no_first.T, 3)  # a query tile is a block
        self.granularity, self.dtype, self.scale = granularity, dtype, dim**-0.5

    def quantize(self, ops: Any, device: str = "cpu", k_mean: Tensor | None = None) -> tuple[Tensor, ...]:
        q, k, v, slots, offsets, kv_slots, kv_offsets = (x.to(device) for x in (*self.qkv, *self.tables))
        mean = k_mean if k_mean is None else k_mean.to(device)
        made: tuple[Tensor, ...] = ops.quantize(
            q, k, v, slots, offsets, mean, None, kv_slots, kv_offsets,
            granularity=self.granularity, smooth_k=True, pow2_scales=False, k_mean_stride=3, block_sums=True,
        )  # fmt: skip
        return made

    def forward(self, ops: Any, z: tuple[Tensor, ...], device: str = "cpu") -> tuple[Tensor, ...]:
        """Of operands from whichever ops, on the CPU."""
        made: tuple[Tensor, ...] = ops.forward(
            *(x.to(device) for x in (*z[:6], *self._row_tables(), z[7])),
            num_tokens=self.tokens, softmax_scale=self.scale, out_dtype=self.dtype,
        )  # fmt: skip
        return made

    def backward(
        self, ops: Any, z: tuple[Tensor, ...], f: tuple[Tensor, ...], device: str = "cpu", **options: Any
    ) -> tuple[Tensor, ...]:
        args = [x.to(device) for x in (self.grad, f[0], *z[:6], f[2], f[3], *self._row_tables())]
        q_lists, kv_slots = (x.to(device) for x in self.q_lists), self.tables[2].to(device)
        made: tuple[Tensor, ...]
        if ops is reference:
            made = ops.backward(*args, kv_slots, softmax_scale=self.scale)
        else:
            made = ops.backward(
                *args, *q_lists, kv_slots, softmax_scale=self.scale, num_kv_tokens=self.kv_tokens, **options
            )
        return made

    def jvp(self, ops: Any, z: tuple[Tensor, ...], f: tuple[Tensor, ...], device: str = "cpu") -> Tensor:
        args = (*self.tangents, f[0], *z[:6], f[2], f[3], *self._row_tables(), self.tables[2])
        made: Tensor = ops.jvp(*(x.to(device) for x in args), softmax_scale=self.scale)
        return made

    def _row_tables(self) -> tuple[Tensor, ...]:
        return (self.tables[0], torch.arange(3, dtype=torch.int32), *self.lists)
