"""Calls of :func:`attend` beyond one grid, one order and as many keys as queries: by other tables, so on every backend.

All are differentiable, copy neither q, k nor v, allow k and v fewer heads, take the options of :func:`attend` (not its layout: tensors are ``(B, S, H, D)``) and return ``(out, lse)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError
from ..layout.masks import BlockMask, Lists
from ..layout.tiles import BLOCK
from .attend import attend


def packed_lists(masks: Sequence[BlockMask]) -> Lists:
    """Tables of several sequences, one after the other: no sequence attends another. ``Bm`` and ``Hm`` of all masks are 1.

    Raises:
        ConfigError: no mask, or one with lists per sample or head.
    """
    if not masks or any(mask.shape != (1, 1) for mask in masks):
        raise ConfigError(
            "fpsattention.packed_lists: masks, expected at least one, each with one list for all samples and heads"
        )
    lists = [mask.lists(transposed=True) for mask in masks]
    tokens = blocks = tiles = 0
    parts: list[list[Tensor]] = [[] for _ in Lists._fields]
    widths = [max(one[field].shape[-1] for one in lists) for field in (4, 6)]  # type: ignore[union-attr]
    for mask, one in zip(masks, lists, strict=True):
        assert one.q_num_blocks is not None and one.q_indices is not None
        slots = one.token_of_slot
        parts[0].append(torch.where(slots < 0, slots, slots + tokens))
        parts[1].append(one.tile_of_block + tiles)
        parts[2].append(one.tile_block_offsets[bool(tokens) :] + blocks)
        parts[3].append(one.kv_num_blocks)
        parts[4].append(torch.nn.functional.pad(one.kv_indices + blocks, (0, widths[0] - one.kv_indices.shape[-1])))
        parts[5].append(one.q_num_blocks)
        parts[6].append(torch.nn.functional.pad(one.q_indices + blocks, (0, widths[1] - one.q_indices.shape[-1])))
        layout = mask.layout
        tokens, blocks, tiles = tokens + layout.num_tokens, blocks + layout.num_blocks, tiles + layout.num_tiles
    return Lists(*(torch.cat(part, 0 if i < 3 else 2) for i, part in enumerate(parts)))


def attend_packed(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Sequence[int], masks: Sequence[BlockMask], **options: Any
) -> tuple[Tensor, Tensor]:
    """Several videos of different grids in one call.

    Args:
        q, k, v: ``(S, H, D)``, the tokens of all videos.
        cu_seqlens: where each video begins, and where the last one ends, on the host.
        masks: one per video, on the device of q or the CPU.

    The mean of K and the maximum of V are those of all tokens (``k_mean`` and ``v_absmax`` give others, ``(1, H, D)``), so
    the result is that of separate calls but for roundings to e4m3, and to the bit where these two are the same.

    Returns:
        ``out (S, H, D)`` and ``lse (H, S)``.
    """
    sizes = [stop - start for start, stop in zip(cu_seqlens, cu_seqlens[1:], strict=False)]
    wanted = [mask.layout.num_tokens for mask in masks]
    if sizes != wanted or cu_seqlens[0] != 0 or cu_seqlens[-1] != q.shape[0]:
        raise ConfigError(
            f"fpsattention.attend_packed: cu_seqlens {list(cu_seqlens)} for {q.shape[0]} tokens, expected videos of {wanted} tokens"
        )
    lists = packed_lists(masks).to(q.device)
    out, lse = attend(q[None], k[None], v[None], lists, **options)
    return out[0], lse[0]


def query_lists(mask: BlockMask, first: int, count: int) -> tuple[Lists, tuple[Tensor, Tensor]]:
    """Tables for the queries of ``count`` tokens, from ``first`` on, and for all keys of ``mask``: what :func:`attend` takes as ``mask``
    and as ``keys``. A tile of these tables holds the asked tokens of a tile of ``mask``; tiles of others are left out. On the device
    of ``mask``, where the places of the tokens are read once.

    Raises:
        ConfigError: tokens that are not there.
    """
    layout = mask.layout.cpu()
    if not (first >= 0 and 1 <= count <= layout.num_tokens - first):
        raise ConfigError(
            f"fpsattention.attend_queries: {count} queries from token {first}, expected them among {layout.num_tokens} keys"
        )
    asked = (layout.token_of_slot >= first) & (layout.token_of_slot < first + count)
    tile_of_slot = layout.tile_of_block.long().repeat_interleave(BLOCK)[asked]  # ascending
    tokens = torch.bincount(tile_of_slot, minlength=layout.num_tiles)
    tiles = tokens.nonzero().squeeze(1)
    tokens = tokens[tiles]
    sizes = (tokens + BLOCK - 1) // BLOCK
    offsets = torch.nn.functional.pad(sizes.cumsum(0), (1, 0))
    rank = torch.arange(count, device="cpu") - (tokens.cumsum(0) - tokens).repeat_interleave(tokens)
    token_of_slot = torch.full((int(offsets[-1]) * BLOCK,), -1, dtype=torch.int32, device="cpu")
    token_of_slot[offsets[:-1].repeat_interleave(tokens) * BLOCK + rank] = layout.token_of_slot[asked] - first
    tile_of_block = torch.arange(tiles.numel(), device="cpu").repeat_interleave(sizes)
    tables = [token_of_slot, tile_of_block.to(torch.int32), offsets.to(torch.int32)]
    token_of_slot, tile_of_block, offsets = (x.to(mask.device) for x in tables)
    kv_lists = (x.index_select(2, tiles.to(mask.device)) for x in (mask.kv_num_blocks, mask.kv_indices))
    kv_num_blocks, kv_indices = kv_lists
    q_lists = torch.ops.fpsattn.transpose_blocks(
        kv_num_blocks, kv_indices, offsets, num_blocks=layout.num_blocks, width=tile_of_block.shape[0]
    )
    whole = mask.layout
    return Lists(token_of_slot, tile_of_block, offsets, kv_num_blocks, kv_indices, *q_lists), (
        whole.token_of_slot,
        whole.tile_block_offsets,
    )


def attend_queries(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, first: int = 0, **options: Any
) -> tuple[Tensor, Tensor]:
    """Keys without queries (a KV cache, history): q has the tokens ``first`` to ``first + Sq`` of the sequence of k and v.

    Only they are quantized, computed and stored. Makes the tables anew in each call; a loop takes them of :func:`query_lists`.
    """
    lists, keys = query_lists(mask.to(q.device), first, q.shape[1])
    return attend(q, k, v, lists, keys=keys, **options)


def attend_permuted(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    order: Tensor,
    k_order: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """A permutation of the tokens per head (clusters, other curves): token i of ``mask.layout`` is token ``order[b, h, i]`` of q, k, v.

    Args:
        order: integers ``[Bm, Hm, S]`` on the device of q, each row a permutation; ``Bm`` and ``Hm`` are 1 or those of q. Its values
            are not read on the host.
        k_order: of k and v, where it is another one; ``Hm`` is then 1 or that of k. None: ``order``, whose ``Hm`` is 1 where k has fewer
            heads than q.

    Nothing is gathered or scattered: the kernels take a table of slots per head, ``[B, H, num_slots]`` integers.
    """
    backward = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    lists = mask.to(q.device).lists(backward)
    of_q, keys = _slots_of_order("order", order, lists.token_of_slot, q), None
    if k_order is not None or (k.shape[2] != q.shape[2] and of_q.dim() == 3):
        name, k_order = ("order", order) if k_order is None else ("k_order", k_order)
        keys = _slots_of_order(name, k_order, lists.token_of_slot, k), lists.tile_block_offsets
    return attend(q, k, v, lists._replace(token_of_slot=of_q), keys=keys, **options)


def _slots_of_order(name: str, order: Tensor, token_of_slot: Tensor, x: Tensor) -> Tensor:
    """A ``token_of_slot`` per head of ``x``, or one for all."""
    batch, tokens, heads, _ = x.shape
    wrong = order.ndim != 3 or order.shape[2] != tokens
    if wrong or order.shape[0] not in (1, batch) or order.shape[1] not in (1, heads):
        rows, columns = (" or ".join(map(str, sorted({1, n}))) for n in (batch, heads))
        wanted = f"[{rows}, {columns}, {tokens}]"
        raise ConfigError(f"fpsattention.attend_permuted: {name} has shape {tuple(order.shape)}, expected {wanted}")
    slots = token_of_slot.long()
    tables = torch.where(slots < 0, -1, order.index_select(2, slots.clamp_min(0))).to(torch.int32)
    return tables[0, 0] if tables.shape[:2] == (1, 1) else tables.expand(batch, heads, -1).contiguous()
