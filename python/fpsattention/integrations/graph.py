"""Tables as inputs of compiled graphs, and launches as branches of them.

Dynamo makes a size dynamic when it changes, unless it is 1: sizes of 1 are compiled for themselves. Small grids have one tile, one
block, lists of one entry, so every combination would be another compilation. :class:`Packed` tables are therefore flat, have
an element too much, and are cut and shaped in the graph, by sizes that are computed there.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..layout.masks import BlockMask, Lists
from ..layout.plain import plain_tensors
from ..layout.scale_groups import ScaleGroups
from ..layout.tiles import BLOCK, TileLayout


class Packed(NamedTuple):
    """:class:`Lists` as flat tensors; all but ``token_of_slot`` and ``tile_block_offsets`` end with an element that means nothing.

    ``per_sample`` and ``per_head`` say whether the lists are for each sample and head, or one for all.
    """

    token_of_slot: Tensor
    tile_of_block: Tensor
    tile_block_offsets: Tensor
    kv_num_blocks: Tensor
    kv_indices: Tensor
    q_num_blocks: Tensor | None
    q_indices: Tensor | None
    per_sample: bool
    per_head: bool

    def unpack(self, batch: int, heads: int) -> Lists:
        """The lists, for q of ``batch`` samples and ``heads`` heads: views only."""
        blocks, tiles = self.token_of_slot.shape[0] // BLOCK, self.tile_block_offsets.shape[0] - 1
        shape = (batch if self.per_sample else 1, heads if self.per_head else 1)
        q_num_blocks = q_indices = None
        if self.q_num_blocks is not None and self.q_indices is not None:
            q_num_blocks, q_indices = _shaped(self.q_num_blocks, self.q_indices, *shape, blocks)
        kv_num_blocks, kv_indices = _shaped(self.kv_num_blocks, self.kv_indices, *shape, tiles)
        tile_of_block = self.tile_of_block.as_strided((blocks,), (1,))
        return Lists(
            self.token_of_slot,
            tile_of_block,
            self.tile_block_offsets,
            kv_num_blocks,
            kv_indices,
            q_num_blocks,
            q_indices,
        )


def _shaped(counts: Tensor, indices: Tensor, batch: int, heads: int, rows: int) -> tuple[Tensor, Tensor]:
    """By strides: unlike ``view``, that asks no questions about sizes."""
    width = (indices.shape[0] - 1) // (batch * heads * rows)
    return (
        counts.as_strided((batch, heads, rows), (heads * rows, rows, 1)),
        indices.as_strided((batch, heads, rows, width), (heads * rows * width, rows * width, width, 1)),
    )


def pack(mask: BlockMask, backward: bool, per_sample: bool, layout: Packed | None = None) -> Packed:
    """The tables of a mask, on its device; ``layout``: of another mask, whose tables of the layout are taken over."""
    lists = mask.lists(backward)
    packed = [None if x is None else dynamic(_longer(x)) for x in lists[3:]]
    if layout is not None:
        return Packed(*layout[:3], *packed, per_sample, mask.shape[1] > 1)  # type: ignore[call-arg, arg-type]
    # Copies, as these are shared with code that takes them for constants, and are marked.
    return Packed(*pack_layout(mask.layout), *packed, per_sample, mask.shape[1] > 1)  # type: ignore[call-arg, arg-type]


def pack_layout(layout: TileLayout, *more: Tensor) -> tuple[Tensor, ...]:
    """``token_of_slot``, ``tile_of_block`` (with an element that means nothing), ``tile_block_offsets``, ``more``: as inputs of graphs."""
    tables = (layout.token_of_slot.clone(), _longer(layout.tile_of_block), layout.tile_block_offsets.clone(), *more)
    return tuple(map(dynamic, tables))


def pack_groups(groups: ScaleGroups) -> ScaleGroups:
    """The same as inputs of graphs."""
    order, place, offsets = groups
    return ScaleGroups(*map(dynamic, (_longer(order), _longer(place), offsets.clone())))


def _longer(x: Tensor) -> Tensor:
    if x.ndim == 4 and x.shape[3] == 1:  # lists of one entry get a second one, which the counts leave out
        x = torch.nn.functional.pad(x, (0, 1))
    return torch.cat([x.flatten(), x.new_zeros(1)])


def dynamic(x: Tensor) -> Tensor:
    """``x``, whose length Dynamo shall take as dynamic from the first compilation on."""
    from torch._dynamo import maybe_mark_dynamic

    if not x.is_inference():
        maybe_mark_dynamic(x, 0)
    return x


@lru_cache(maxsize=1024)
def flag(value: bool, which: tuple[int, int]) -> Tensor:
    """A predicate that the host knows: a branch on it waits for no device.

    ``which``: of a graph's predicates, by group of layers and branch. One tensor for two of them would be another graph than two tensors.
    """
    with plain_tensors():
        return torch.tensor(value)
