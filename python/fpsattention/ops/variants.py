"""Calls of :func:`attend` beyond one grid, one order and as many keys as queries: by other tables and views, so on every backend.

All are differentiable, take the options of :func:`attend` (not its layout: tensors are ``(B, S, H, D)``) and return ``(out, lse)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError
from ..layout.masks import BlockMask, Lists
from .attend import attend


def packed_lists(masks: Sequence[BlockMask]) -> Lists:
    """Tables of several sequences, one after the other: no sequence attends another. ``Bm`` and ``Hm`` of all masks are 1.

    Raises:
        ConfigError: no mask, or one with lists per sample or head.
    """
    if not masks or any(mask.shape != (1, 1) for mask in masks):
        raise ConfigError(
            "fpsattention.packed_lists: masks, wanted at least one, each with one list for all samples and heads"
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
            f"fpsattention.attend_packed: cu_seqlens {list(cu_seqlens)} for {q.shape[0]} tokens, wanted videos of {wanted} tokens"
        )
    lists = packed_lists(masks).to(q.device)
    out, lse = attend(q[None], k[None], v[None], lists, **options)
    return out[0], lse[0]


def attend_grouped(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, **options: Any) -> tuple[Tensor, Tensor]:
    """Grouped-query attention: k and v have ``H / g`` heads, and query head h attends head ``h // g``. Nothing is repeated: the
    queries are cut into g calls."""
    heads, kv_heads = q.shape[2], k.shape[2]
    if heads % kv_heads or k.shape != v.shape or (q.shape[:2], q.shape[3]) != (k.shape[:2], k.shape[3]):
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise ConfigError(
            f"fpsattention.attend_grouped: q, k, v of shapes {shapes}, wanted (B, S, H, D) with H of k dividing that of q"
        )
    if mask.shape[1] != 1:
        raise ConfigError(
            f"fpsattention.attend_grouped: mask with {mask.shape[1]} heads, wanted one list for all heads"
        )
    groups = q.unflatten(2, (kv_heads, heads // kv_heads))
    calls = [attend(groups[:, :, :, i], k, v, mask, **options) for i in range(heads // kv_heads)]
    out, lse = (torch.stack([call[i] for call in calls], 3 - i) for i in range(2))
    return out.flatten(2, 3), lse.flatten(1, 2)


def attend_queries(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, first: int = 0, **options: Any
) -> tuple[Tensor, Tensor]:
    """Keys without queries (a KV cache, history): q has the tokens ``first`` to ``first + Sq`` of the sequence of k and v.

    Tiles without a query attend nothing, and cost nothing but their zeros.
    """
    count, keys = q.shape[1], k.shape[1]
    if not 0 <= first <= keys - count:
        raise ConfigError(
            f"fpsattention.attend_queries: {count} queries from token {first}, wanted them among {keys} keys"
        )
    layout = mask.layout
    asked = torch.zeros(layout.num_tokens, dtype=torch.bool, device=mask.device)
    asked[first : first + count] = True
    tile_of_token = layout.tile_of_block.long()[layout.slot_of_token.long() // 128]
    tiles = torch.zeros(layout.num_tiles, dtype=torch.bool, device=mask.device).index_fill_(
        0, tile_of_token[asked], True
    )
    some = BlockMask.from_keep(layout, mask.to_blocks() & tiles[:, None])
    q = torch.nn.functional.pad(q, (0, 0, 0, 0, first, keys - count - first))
    out, lse = attend(q, k, v, some, **options)
    return out[:, first : first + count], lse[:, :, first : first + count]


def attend_permuted(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, order: Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    """A permutation of the tokens per head (clusters, other curves): token i of ``mask.layout`` is token ``order[b, h, i]`` of q, k, v.

    Args:
        order: int64 ``[Bm, Hm, S]``, each row a permutation; ``Bm`` and ``Hm`` are 1 or those of q. Its values are not read on the host.

    Costs a gather of q, k, v and a scatter of the output.
    """
    batch, tokens, heads, _ = q.shape
    if (
        order.ndim != 3
        or order.shape[2] != tokens
        or order.shape[0] not in (1, batch)
        or order.shape[1] not in (1, heads)
    ):
        raise ConfigError(
            f"fpsattention.attend_permuted: order has shape {tuple(order.shape)}, wanted [1 or {batch}, 1 or {heads}, {tokens}]"
        )
    index = order.expand(batch, heads, tokens).transpose(1, 2)
    q, k, v = (x.gather(1, index[..., None].expand_as(x)) for x in (q, k, v))
    out, lse = attend(q, k, v, mask, **options)
    back = index.argsort(1)
    return out.gather(1, back[..., None].expand_as(out)), lse.gather(2, back.transpose(1, 2))
