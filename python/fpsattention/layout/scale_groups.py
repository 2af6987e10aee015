"""FP8 scale groups of several tiles: granularity as a size such as (12, 16, 16) or (24, 32, 32) tokens.

The paper's granularity is a size (arXiv 2506.04648, Table 3), and its coarse one may span many tiles of the kernel, while windows go on counting tiles. The
ops take a group as a run of blocks, so tiles of a group only have to lie together: blocks are put in another order, and the lists name
them by their new places. No kernel changes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import ConfigError
from .masks import BlockMask, Lists
from .plain import on_default_stream, plain_tensors
from .tiles import _CLEAR_WITH_PLANS, BLOCK, Int3, TileLayout, int3


class ScaleGroups(NamedTuple):
    """The blocks of a layout in the order of their scale groups; tensors of blocks may end with an element that means nothing."""

    order: Tensor  # int32 [num_blocks]: the block at each new place
    place: Tensor  # int32 [num_blocks]: the new place of each block
    offsets: Tensor  # int32 [groups + 1]: first place of each group

    def of(self, lists: Lists) -> Lists:
        """Tables for an op of granularity "tile", whose scales are then shared by groups; views and copies on the device of ``lists``."""
        blocks = lists.token_of_slot.shape[0] // BLOCK
        order = self.order.as_strided((blocks,), (1,))

        def renamed(indices: Tensor) -> Tensor:  # entries beyond a list's length may hold anything
            return self.place[indices.long().clamp(0, blocks - 1)]

        return Lists(
            token_of_slot=lists.token_of_slot.view(-1, BLOCK)[order].flatten(),
            tile_of_block=lists.tile_of_block[order],
            tile_block_offsets=self.offsets,
            kv_num_blocks=lists.kv_num_blocks,
            kv_indices=renamed(lists.kv_indices),
            q_num_blocks=None if lists.q_num_blocks is None else lists.q_num_blocks[:, :, order],
            q_indices=None if lists.q_indices is None else renamed(lists.q_indices[:, :, order]),
        )


def group_of_tile(layout: TileLayout, size: Sequence[int]) -> Tensor:
    """The scale group of every tile, int64 ``[num_tiles]`` on the CPU; arguments and errors as of :func:`scale_groups`."""
    size = int3(size, "patterns.scale_groups: size")
    if math.prod(layout.tile_grid) != layout.num_video_tiles:
        raise ConfigError(
            "fpsattention.patterns.scale_groups: layout is no grid of tiles, expected one of fpsattention.plan"
        )
    if any(s < t or (s % t and s < n) for s, t, n in zip(size, layout.tile, layout.grid, strict=True)):
        raise ConfigError(
            f"fpsattention.patterns.scale_groups: size {size}, expected multiples of the tile {layout.tile}"
        )
    with plain_tensors():
        index = torch.cartesian_prod(*(torch.arange(n) for n in layout.tile_grid)).view(-1, 3)
        per_axis = [-(-s // t) for s, t in zip(size, layout.tile, strict=True)]
        groups = [-(-n // p) for n, p in zip(layout.tile_grid, per_axis, strict=True)]
        frame, row, column = (index[:, axis] // per_axis[axis] for axis in range(3))
        of_video = (frame * groups[1] + row) * groups[2] + column
        of_text = torch.arange(layout.num_tiles - len(index)) + math.prod(groups)
        return torch.cat([of_video, of_text])


@lru_cache(maxsize=64)
def groups_of(layout: TileLayout, size: Int3) -> ScaleGroups:
    """The scale groups of a layout, on its device; arguments and errors as of :func:`scale_groups`."""
    with plain_tensors():
        group_of_block = group_of_tile(layout, size)[layout.cpu().tile_of_block.long()]
        order = group_of_block.argsort(stable=True)
        offsets = torch.nn.functional.pad(group_of_block.bincount().cumsum(0), (1, 0))
        with on_default_stream(layout.device):
            return ScaleGroups(*(x.int().to(layout.device) for x in (order, order.argsort(), offsets)))


_CLEAR_WITH_PLANS.append(groups_of.cache_clear)


def scale_groups(mask: BlockMask, size: Sequence[int], backward: bool = False) -> Lists:
    """Tables for ``ops.attend.attend(q, k, v, tables, granularity="tile")`` with one scale of Q and K per box of ``size`` tokens.

    Args:
        mask: whom the tokens attend; stays as it is.
        size: ``(sT, sH, sW)``, multiples of the mask's tile on every axis (where it is no smaller than the grid, any number).
        backward: also make the transposed lists.

    A text tile is a group of its own. Groups at the far borders are smaller.
    """
    return groups_of(mask.layout, int3(size, "patterns.scale_groups: size")).of(mask.lists(backward))
