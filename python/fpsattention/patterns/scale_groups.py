"""FP8 scale groups of several tiles: granularity as a size such as (12, 16, 16) or (24, 32, 32) tokens.

The paper's granularity is a size (arXiv 2506.04648, Table 3), and its coarse one may span many tiles of the kernel, while windows go on counting tiles. The
ops take a group as a run of blocks, so tiles of a group only have to lie together: blocks are put in another order, and the lists name
them by their new places. No kernel changes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ..errors import ConfigError
from ..layout.masks import BlockMask, Lists
from ..layout.tiles import BLOCK, int3


def scale_groups(mask: BlockMask, size: Sequence[int], backward: bool = False) -> Lists:
    """Tables for ``ops.attend.attend(q, k, v, tables, granularity="tile")`` with one scale of Q and K per box of ``size`` tokens.

    Args:
        mask: whom the tokens attend; stays as it is.
        size: ``(sT, sH, sW)``, multiples of the mask's tile on every axis (an axis that one tile spans may have any size from it on).
        backward: also make the transposed lists.

    A text tile is a group of its own. Groups at the far borders are smaller.
    """
    layout, size = mask.layout, int3(size, "patterns.scale_groups: size")
    if math.prod(layout.tile_grid) != layout.num_video_tiles:
        raise ConfigError(
            "fpsattention.patterns.scale_groups: layout is no grid of tiles, expected one of fpsattention.plan"
        )
    per_axis = []
    for s, t, n in zip(size, layout.tile, layout.tile_grid, strict=True):
        if s < t or (n > 1 and s % t):
            raise ConfigError(
                f"fpsattention.patterns.scale_groups: size {size}, expected multiples of the tile {layout.tile}"
            )
        per_axis.append(max(s // t, 1))
    index = torch.cartesian_prod(*(torch.arange(n) for n in layout.tile_grid)).view(-1, 3)
    groups = [-(-n // p) for n, p in zip(layout.tile_grid, per_axis, strict=True)]
    frame, row, column = (index[:, axis] // per_axis[axis] for axis in range(3))
    group_of_tile = torch.cat(
        [
            (frame * groups[1] + row) * groups[2] + column,
            torch.arange(layout.num_tiles - len(index)) + math.prod(groups),
        ]
    )
    on_cpu = layout.cpu()
    group_of_block = group_of_tile[on_cpu.tile_of_block.long()]
    order = group_of_block.argsort(stable=True)  # new place -> block
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order))
    offsets = torch.nn.functional.pad(group_of_block.bincount().cumsum(0), (1, 0)).int()

    order, place, offsets = (x.to(mask.device) for x in (order, place, offsets))
    lists = mask.lists(backward)
    moved = place.int()

    def renamed(indices: torch.Tensor) -> torch.Tensor:  # entries beyond a list's length may hold anything
        return moved[indices.long().clamp(0, len(order) - 1)]

    return Lists(
        token_of_slot=lists.token_of_slot.view(-1, BLOCK)[order].reshape(-1),
        tile_of_block=lists.tile_of_block[order],
        tile_block_offsets=offsets,
        kv_num_blocks=lists.kv_num_blocks,
        kv_indices=renamed(lists.kv_indices),
        q_num_blocks=None if lists.q_num_blocks is None else lists.q_num_blocks[:, :, order],
        q_indices=None if lists.q_indices is None else renamed(lists.q_indices[:, :, order]),
    )
