"""``fpsattn::pattern_lists``: the lists of a content pattern as an op, for graphs that are being traced.

Its shapes depend on the sizes alone, so one graph serves all grids; nothing waits for the device. Eager calls use
:mod:`fpsattention.patterns` directly.
"""

from __future__ import annotations

import json

import torch
from torch import Tensor

from ..layout.masks import _lists_of_keep
from ..layout.tiles import BLOCK, TileLayout, cached_plan

SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor token_of_slot, Tensor tile_block_offsets, Tensor sizes, *, str pattern, str granularity, "
    "bool transposed) -> (Tensor kv_num_blocks, Tensor kv_indices, Tensor q_num_blocks, Tensor q_indices)"
)


_NUM_SIZES = 8


def sizes_of(layout: TileLayout, width: int) -> Tensor:
    """A layout and the width of lists, as an input of graphs: int64 ``[8 + width]`` on the CPU, whose length says the width.

    Numbers would be constants of a graph, and every grid a compilation.
    """
    numbers = (*layout.grid, *layout.tile, layout.text_len, layout.text_position == "prefix")
    sizes = torch.zeros(_NUM_SIZES + width, dtype=torch.int64, device="cpu")
    sizes[:_NUM_SIZES] = torch.tensor([int(number) for number in numbers], device="cpu")
    return sizes


def _kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    token_of_slot: Tensor,
    tile_block_offsets: Tensor,
    sizes: Tensor,
    *,
    pattern: str,
    granularity: str,
    transposed: bool,
) -> tuple[Tensor, ...]:
    """q, k, v ``(B, H, S, D)``; lists int32 ``[B, H, tiles, width]``, transposed ``[B, H, blocks, query blocks]`` or empty."""
    from ..patterns import from_dict

    numbers, width = sizes[:_NUM_SIZES].tolist(), sizes.shape[0] - _NUM_SIZES
    position = "prefix" if numbers[7] else "suffix"
    layout = cached_plan(tuple(numbers[:3]), tuple(numbers[3:6]), numbers[6], position).to(q.device)
    mask, _ = measured(from_dict(json.loads(pattern)), granularity, layout, q, k, v)
    lists = [mask.kv_num_blocks, mask.kv_indices[..., :width].contiguous()]
    if transposed:
        visits = mask.to_blocks()[:, :, layout.tile_of_block].transpose(-1, -2)
        lists += _lists_of_keep(visits, torch.zeros_like(visits[..., :1, :]), visits.shape[-1])
    else:
        lists += [q.new_empty(0, dtype=torch.int32) for _ in range(2)]
    return tuple(lists)


def measured(bound, granularity, layout, q, k, v, **given):  # type: ignore[no-untyped-def]
    """What a bound pattern makes of q, k, v ``(B, H, S, D)``, and its densities, f64 ``[2]``.

    A rule that reads ``lse`` is given that of dense attention at ``granularity``: a search costs as much as a dense step.
    """
    from ..layout.masks import dense_mask
    from .attend import attend

    # Autocast reaches into the products of a rule, whose scores must stay FP32.
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        tensors = {"q": q, "k": k, "v": v}
        if "lse" in bound.pattern.inputs:
            tensors["lse"] = attend(q, k, v, dense_mask(layout), granularity=granularity, tensor_layout="HND")[1]
        wanted = {name: tensors[name] for name in bound.pattern.inputs}
        return bound.pattern.measured(layout=layout, **wanted, **bound.hyperparameters, **given)


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    token_of_slot: Tensor,
    tile_block_offsets: Tensor,
    sizes: Tensor,
    *,
    transposed: bool,
    **_: object,
) -> tuple[Tensor, ...]:
    batch, heads = q.shape[:2]
    width = sizes.shape[0] - _NUM_SIZES
    tiles, blocks = tile_block_offsets.shape[0] - 1, token_of_slot.shape[0] // BLOCK
    shapes = [(batch, heads, tiles), (batch, heads, tiles, width)]
    shapes += [(batch, heads, blocks), (batch, heads, blocks, blocks)] if transposed else [(0,), (0,)]
    return tuple(q.new_empty(shape, dtype=torch.int32) for shape in shapes)


def register() -> None:
    """Define the op."""
    torch.library.define("fpsattn::pattern_lists", SCHEMA)
    torch.library.impl("fpsattn::pattern_lists", "CompositeExplicitAutograd")(_kernel)
    torch.library.register_fake("fpsattn::pattern_lists")(_fake)
