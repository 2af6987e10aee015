"""Conversion of block masks to and from ``torch.nn.attention.flex_attention.BlockMask`` (blocks of 128 x 128 slots).

FlexAttention then works on slot-ordered q, k, v (``x[:, :, token_of_slot]``, anything finite in padding slots) of ``num_slots``
tokens; rows of padding slots hold nothing of use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import ConfigError
from .tiles import BLOCK, TileLayout, check_layout

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask as FlexBlockMask

    from .masks import BlockMask

_BLOCKS_PER_CHECK = 256  # partial blocks whose 128 x 128 elements are evaluated at once: 4 Mi


class SlotMask:
    """``mask_mod`` of a block mask: the key slot is valid and its block is listed.

    The lists alone are not enough: FlexAttention's eager implementation looks at ``mask_mod`` only.
    """

    def __init__(self, blocks: Tensor, layout: TileLayout) -> None:
        """``blocks`` is bool ``[Bm, Hm, num_tiles, num_blocks]`` on the device of ``layout``."""
        self.blocks = blocks
        self.valid = layout.token_of_slot >= 0
        self.tile_of_block = layout.tile_of_block

    def __call__(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        """Bool: query slot ``q_idx`` attends key slot ``kv_idx`` in batch entry ``b``, head ``h``."""
        b = b if self.blocks.shape[0] > 1 else b * 0
        h = h if self.blocks.shape[1] > 1 else h * 0
        return self.valid[kv_idx] & self.blocks[b, h, self.tile_of_block[q_idx // BLOCK], kv_idx // BLOCK]


def to_flex(mask: BlockMask) -> FlexBlockMask:
    """FlexAttention's form of ``mask``. KV blocks without padding are full blocks, the others partial ones.

    The visiting order is kept within each of the two kinds.
    """
    from torch.nn.attention.flex_attention import BlockMask as FlexBlockMask

    layout = mask.layout.to(mask.device)
    full_block = layout.block_tokens == BLOCK
    listed = torch.arange(mask.kv_indices.shape[-1], device=mask.device) < mask.kv_num_blocks.unsqueeze(-1)
    is_full = full_block[torch.where(listed, mask.kv_indices, 0).long()]

    def lists(chosen: Tensor) -> tuple[Tensor, Tensor]:
        order = chosen.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
        indices = torch.where(chosen, mask.kv_indices, 0).gather(-1, order)
        # A row per query block; FlexAttention takes the number of KV blocks from the width.
        indices = torch.nn.functional.pad(indices, (0, layout.num_blocks - indices.shape[-1]))
        rows = layout.tile_of_block.long()
        return chosen.sum(-1, dtype=torch.int32)[:, :, rows], indices[:, :, rows]

    return FlexBlockMask.from_kv_blocks(
        *lists(listed & ~is_full),
        *lists(listed & is_full),
        BLOCK_SIZE=(BLOCK, BLOCK),
        mask_mod=SlotMask(mask.to_blocks(), layout),
        seq_lengths=(layout.num_slots, layout.num_slots),
    )


def from_flex(layout: TileLayout, block_mask: FlexBlockMask) -> Tensor:
    """The attended blocks of a FlexAttention mask over the slots of ``layout``, bool ``[Bm, Hm, num_tiles, num_blocks]``.

    Raises:
        ConfigError: if sizes differ, if the query blocks of a tile differ, or if ``mask_mod`` drops single keys of an attended
            block (other than padding): block lists cannot say that.
    """
    from torch.nn.attention.flex_attention import BlockMask as FlexBlockMask

    check_layout(layout, "BlockMask.from_flex")
    if not isinstance(block_mask, FlexBlockMask):
        raise ConfigError(
            f"fpsattention.BlockMask.from_flex: block_mask is a {type(block_mask).__name__}, expected one of "
            "torch.nn.attention.flex_attention"
        )
    slots, name = layout.num_slots, "fpsattention.BlockMask.from_flex: block_mask"
    if tuple(block_mask.seq_lengths) != (slots, slots):
        raise ConfigError(
            f"{name} covers {tuple(block_mask.seq_lengths)} tokens, expected the layout's slots {(slots, slots)}"
        )
    if tuple(block_mask.BLOCK_SIZE) != (BLOCK, BLOCK):
        raise ConfigError(f"{name} has BLOCK_SIZE {tuple(block_mask.BLOCK_SIZE)}, expected {(BLOCK, BLOCK)}")
    partial = _to_dense(block_mask.kv_num_blocks, block_mask.kv_indices, layout.num_blocks)
    attended = partial
    if block_mask.full_kv_num_blocks is not None and block_mask.full_kv_indices is not None:
        attended = partial | _to_dense(block_mask.full_kv_num_blocks, block_mask.full_kv_indices, layout.num_blocks)

    first_block = layout.tile_block_offsets[:-1].to(attended.device).long()
    tiles = attended[:, :, first_block]
    unlike = (attended != tiles[:, :, layout.tile_of_block.to(attended.device).long()]).any(-1)
    if unlike.any():
        b, h, block = unlike.nonzero()[0].tolist()
        raise ConfigError(
            f"{name} gives query block {block} another list than the first block of its tile {int(layout.tile_of_block[block])} "
            f"(batch {b}, head {h}), expected one list for all blocks of a tile: use a tile of at most 128 tokens"
        )
    if not isinstance(block_mask.mask_mod, SlotMask):
        _check_mask_mod(layout, block_mask, partial, name)
    return tiles


def _to_dense(num_blocks: Tensor, indices: Tensor, columns: int) -> Tensor:
    """Bool ``[B, H, rows, columns]`` of lists."""
    listed = torch.arange(indices.shape[-1], device=indices.device) < num_blocks.unsqueeze(-1)
    dense = torch.zeros(*num_blocks.shape, columns + 1, dtype=torch.bool, device=indices.device)
    dense = dense.scatter(-1, torch.where(listed, indices, columns).long(), True)[..., :-1]
    return dense.reshape((1,) * (4 - dense.ndim) + dense.shape)


def _check_mask_mod(layout: TileLayout, block_mask: FlexBlockMask, partial: Tensor, name: str) -> None:
    """Every pair of valid slots in a partial block must be attended."""
    valid = layout.token_of_slot.to(partial.device) >= 0
    inside = torch.arange(BLOCK, device=partial.device)
    places = partial.nonzero()
    for start in range(0, len(places), _BLOCKS_PER_CHECK):
        chunk = places[start : start + _BLOCKS_PER_CHECK]
        b, h, q_block, kv_block = chunk.unbind(1)
        q, kv = torch.broadcast_tensors(
            (q_block[:, None] * BLOCK + inside)[:, :, None], (kv_block[:, None] * BLOCK + inside)[:, None, :]
        )
        b, h = (x[:, None, None].expand_as(q) for x in (b, h))
        kept = torch.vmap(block_mask.mask_mod)(b.flatten(), h.flatten(), q.flatten(), kv.flatten()).view(q.shape)
        dropped = ~kept & valid[q] & valid[kv]
        if dropped.any():
            where = dropped.nonzero()[0]
            i, row, column = where.tolist()
            raise ConfigError(
                f"{name} drops key slot {int(kv[i, row, column])} for query slot {int(q[i, row, column])} inside an attended block, "
                "expected whole blocks of 128 x 128 slots: block lists cannot mask single keys"
            )
