"""``fpsattn::lists``: the tables of a planned grid and window as an op, for traced calls (compile, export, fake and meta tensors).

A graph then holds the sizes of the grid, not the tables: with dynamic shapes one graph serves every grid. The tables come from the
caches of ``layout``; the op gives copies, as the compiler may reuse the memory of what an op gave. Eager calls use the caches directly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..layout.masks import Lists, cached_mask
from ..layout.tiles import BLOCK, cached_plan, int3

SCHEMA = (
    "(SymInt[] grid, SymInt[]? tile, SymInt[]? window, SymInt text_len, str text_position, Device device) -> (Tensor token_of_slot, "
    "Tensor tile_of_block, Tensor tile_block_offsets, Tensor kv_num_blocks, Tensor kv_indices, Tensor q_num_blocks, Tensor q_indices)"
)


def planned_lists(
    grid: Sequence[int],
    tile: Sequence[int] | None,
    window: Sequence[int] | None,
    text_len: int,
    text_position: str,
    device: torch.device,
) -> Lists:
    """The tables for a grid, from the caches; ``window`` None: dense."""
    layout = cached_plan(grid, tile, text_len, text_position)
    mask = cached_mask(layout, layout.tile_grid if window is None else int3(window, "sliding_tile_mask: window"))
    return mask.to(device).lists(transposed=True)


def traced(device: torch.device) -> bool:
    """Whether tables must come from the op: while a graph is recorded, under fake tensors, and on the meta device."""
    return torch.compiler.is_compiling() or device.type == "meta" or torch._C._len_torch_dispatch_stack() > 0


def _kernel(*args: Any) -> tuple[Tensor, ...]:
    return tuple(x.clone() for x in planned_lists(*args) if x is not None)


def _fake(
    grid: Sequence[int],
    tile: Sequence[int] | None,
    window: Sequence[int] | None,
    text_len: int,
    text_position: str,
    device: torch.device,
) -> tuple[Tensor, ...]:
    sizes = (*grid, *(tile or ()), *(window or ()), text_len)
    if all(isinstance(size, int) for size in sizes):
        lists = planned_lists(grid, tile, window, text_len, text_position, torch.device("cpu"))
        shapes: list[Any] = [x.shape for x in lists if x is not None]
    else:
        context = torch.library.get_ctx()
        blocks, tiles, max_kv, max_q = (context.new_dynamic_size(min=1) for _ in range(4))
        shapes = [
            (blocks * BLOCK,), (blocks,), (tiles + 1,), (1, 1, tiles), (1, 1, tiles, max_kv), (1, 1, blocks), (1, 1, blocks, max_q)
        ]  # fmt: skip
    return tuple(torch.empty(shape, dtype=torch.int32, device=device) for shape in shapes)


def register() -> None:
    """Define the op."""
    torch.library.define("fpsattn::lists", SCHEMA)
    torch.library.impl("fpsattn::lists", "CompositeExplicitAutograd")(_kernel)
    torch.library.register_fake("fpsattn::lists")(_fake)
