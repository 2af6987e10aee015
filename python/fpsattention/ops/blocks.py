"""``fpsattn::select_blocks`` and ``fpsattn::transpose_blocks``: block lists made on the device, with fixed shapes and without a wait.

``select_blocks(values, tile_block_offsets, block_tokens, *, num_video_tiles, count=-1, mass=0.0, min_count=0, max_count,
own_first=False, width) -> (kv_num_blocks, kv_indices, attended)``
    values f32 ``[B, H, tiles, blocks]``; tile_block_offsets int32 ``[tiles + 1]``, block_tokens int32 ``[blocks]``. A video row keeps its largest
    video blocks: ``count`` of them, or (``count`` < 0) the smallest set that holds ``mass`` of the row (weights in [0, 1], summed as
    ``floor(w * 2^40)``), within min_count and max_count. Larger values first, of equal ones the lower block, NaN before all. Own blocks and
    text, both ways, are kept in any case; with ``own_first`` own blocks are counted, before all others.
    kv lists int32 ``[B, H, tiles]``, ``[B, H, tiles, width]``: own blocks, then the others, each ascending. attended int32 ``[B, H, tiles, 2]``:
    tokens of what the rule keeps (text included), and of that with the own blocks.
``transpose_blocks(kv_num_blocks, kv_indices, tile_block_offsets, *, num_blocks, width) -> (q_num_blocks, q_indices)``
    int32 ``[Bm, Hm, blocks]``, ``[Bm, Hm, blocks, width]``: per KV block the query blocks that visit it, ascending.

Entries beyond a list's length mean nothing. The code below serves CPU tensors and is the law for ``csrc/patterns``: the same lists.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError

MAX_BLOCKS = 4096  # of a row; as in include/fpsattn/patterns.h
_FIXED = 2.0**40
_NAN_KEY, _FIRST_KEY = 0xFFFFFFFE, 0xFFFFFFFF


def _keys(values: Tensor) -> Tensor:
    """int64, growing with the value: the bits of a float as an unsigned number, sign turned over; NaN above all numbers."""
    bits = values.contiguous().view(torch.int32).long() & 0xFFFFFFFF
    keys = torch.where(bits >= 1 << 31, 0xFFFFFFFF - bits, bits + (1 << 31))
    return torch.where(values.isnan(), _NAN_KEY, keys)


def select_blocks(
    values: Tensor,
    tile_block_offsets: Tensor,
    block_tokens: Tensor,
    *,
    num_video_tiles: int,
    count: int = -1,
    mass: float = 0.0,
    min_count: int = 0,
    max_count: int,
    own_first: bool = False,
    width: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """On the CPU."""
    tiles, blocks = values.shape[2:]
    offsets = tile_block_offsets.long()
    video = int(offsets[num_video_tiles])
    columns = torch.arange(blocks, device="cpu")
    own = (columns >= offsets[:-1, None]) & (columns < offsets[1:, None])
    text = (torch.arange(tiles, device="cpu")[:, None] >= num_video_tiles) | (columns >= video)

    keys = _keys(values[..., :video])
    if own_first:
        keys = keys.masked_fill(own[:, :video], _FIRST_KEY)
    order = (-keys).argsort(dim=-1, stable=True)
    if count >= 0:
        counts = torch.full((*values.shape[:3], 1), count, device="cpu")
    else:
        weights = (values[..., :video].nan_to_num(0.0, 1.0, 0.0).clamp(0.0, 1.0) * _FIXED).long().gather(-1, order)
        before = weights.cumsum(-1) - weights
        counts = (before < math.ceil(max(mass, 0.0) * _FIXED)).sum(-1, keepdim=True)
    counts = counts.clamp_min(min_count).clamp_max(min(max_count, video))
    chosen = torch.arange(video, device="cpu") < counts
    rule = torch.zeros(values.shape, dtype=torch.bool, device="cpu")
    rule[..., :video] = torch.zeros_like(chosen).scatter(-1, order, chosen)
    rule |= text
    kept = rule | own

    place = torch.where(own, columns - offsets[:-1, None], own.sum(-1, keepdim=True) + (kept & ~own).cumsum(-1) - 1)
    place = torch.where(kept & (place < width), place, width)
    lists = torch.zeros(*values.shape[:3], width + 1, dtype=torch.int32, device="cpu")
    lists.scatter_(-1, place, columns.int().expand(values.shape))
    attended = torch.stack([(keep * block_tokens).sum(-1) for keep in (rule, kept)], -1)
    lengths = kept.sum(-1).clamp_max(width)
    return lengths.int(), lists[..., :-1].contiguous(), attended.int()


def transpose_blocks(
    kv_num_blocks: Tensor, kv_indices: Tensor, tile_block_offsets: Tensor, *, num_blocks: int, width: int
) -> tuple[Tensor, Tensor]:
    """On the CPU."""
    from ..layout.masks import _lists_of_keep

    sizes = tile_block_offsets.long().diff()
    listed = torch.arange(kv_indices.shape[-1], device="cpu") < kv_num_blocks.unsqueeze(-1)
    places = torch.where(listed, kv_indices, num_blocks).long()
    visits = torch.zeros(*kv_num_blocks.shape, num_blocks + 1, dtype=torch.bool, device="cpu").scatter(-1, places, True)
    rows = visits[..., :-1].repeat_interleave(sizes, dim=2).transpose(-1, -2)  # [Bm, Hm, KV block, query block]
    lengths, lists = _lists_of_keep(rows, torch.zeros_like(rows[..., :1, :]), width)
    return lengths.clamp_max(width), lists


# Checks ------------------------------------------------------------------------------------------------------------------


def _fail(op: str, text: str) -> None:
    raise ConfigError(f"fpsattention.{op}: {text}")


def _check_tables(op: str, like: Tensor, **tables: tuple[Tensor, int]) -> None:
    for name, (x, size) in tables.items():
        if x.dtype != torch.int32 or tuple(x.shape) != (size,) or x.device != like.device:
            _fail(op, f"{name} is {x.dtype} {tuple(x.shape)} on {x.device}, expected int32 ({size},) on {like.device}")


def _check_width(op: str, blocks: Any, width: Any) -> None:
    if not 1 <= blocks <= MAX_BLOCKS:
        _fail(op, f"{blocks} blocks, expected 1 to {MAX_BLOCKS}")
    if not 1 <= width <= blocks:
        _fail(op, f"width {width}, expected 1 to the number of blocks, {blocks}")


def check_select_blocks(
    values: Tensor,
    tile_block_offsets: Tensor,
    block_tokens: Tensor,
    *,
    num_video_tiles: int,
    count: int = -1,
    mass: float = 0.0,
    min_count: int = 0,
    max_count: int,
    own_first: bool = False,
    width: int,
) -> None:
    """Metadata only."""
    op = "select_blocks"
    if values.dtype != torch.float32 or values.ndim != 4 or 0 in values.shape:
        _fail(op, f"values is {values.dtype} {tuple(values.shape)}, expected float32 (B, H, tiles, blocks)")
    tiles, blocks = values.shape[2:]
    _check_tables(op, values, tile_block_offsets=(tile_block_offsets, tiles + 1), block_tokens=(block_tokens, blocks))
    _check_width(op, blocks, width)
    if not 1 <= num_video_tiles <= tiles:
        _fail(op, f"num_video_tiles {num_video_tiles}, expected 1 to {tiles}")
    if own_first and count < 0:
        _fail(op, "own_first with a mass, expected it with a count")
    if count < 0 and not abs(mass) <= 2.0:
        _fail(op, f"mass {mass}, expected a share")


def check_transpose_blocks(
    kv_num_blocks: Tensor, kv_indices: Tensor, tile_block_offsets: Tensor, *, num_blocks: int, width: int
) -> None:
    """Metadata only."""
    op = "transpose_blocks"
    if kv_num_blocks.dtype != torch.int32 or kv_indices.dtype != torch.int32 or kv_num_blocks.ndim != 3:
        _fail(op, f"lists are {kv_num_blocks.dtype} {tuple(kv_num_blocks.shape)}, expected int32 (Bm, Hm, tiles)")
    if kv_indices.ndim != 4 or kv_indices.shape[:3] != kv_num_blocks.shape or kv_indices.device != kv_num_blocks.device:
        _fail(op, f"kv_indices has shape {tuple(kv_indices.shape)}, expected {(*kv_num_blocks.shape, 'max')}")
    _check_tables(op, kv_num_blocks, tile_block_offsets=(tile_block_offsets, kv_num_blocks.shape[2] + 1))
    _check_width(op, num_blocks, width)


def _fake_select(values: Tensor, *tables: Tensor, width: int, **options: Any) -> tuple[Tensor, ...]:
    check_select_blocks(values, *tables, width=width, **options)
    rows = values.shape[:3]
    return tuple(values.new_empty(shape, dtype=torch.int32) for shape in (rows, (*rows, width), (*rows, 2)))


def _fake_transpose(kv_num_blocks: Tensor, *tables: Tensor, num_blocks: int, width: int) -> tuple[Tensor, ...]:
    check_transpose_blocks(kv_num_blocks, *tables, num_blocks=num_blocks, width=width)
    rows = (*kv_num_blocks.shape[:2], num_blocks)
    return tuple(kv_num_blocks.new_empty(shape, dtype=torch.int32) for shape in (rows, (*rows, width)))


def register(on_host: bool) -> None:
    """CPU kernels (unless device code runs on the host) and fakes of ops that ``csrc/torch/schemas.h`` defines."""
    for name, kernel, check in (
        ("select_blocks", select_blocks, check_select_blocks),
        ("transpose_blocks", transpose_blocks, check_transpose_blocks),
    ):

        def run(*args: Any, kernel: Any = kernel, check: Any = check, **options: Any) -> Any:
            check(*args, **options)
            return kernel(*args, **options)

        if not on_host:
            torch.library.impl(f"fpsattn::{name}", "CPU")(run)
    torch.library.register_fake("fpsattn::select_blocks")(_fake_select)
    torch.library.register_fake("fpsattn::transpose_blocks")(_fake_transpose)
