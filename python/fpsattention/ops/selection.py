"""Attention whose lists a content pattern makes. Shapes depend on the sizes alone, so one graph serves all grids; nothing waits for the device.

``attention_selected`` quantizes, makes the lists from the sums by block that this leaves behind, and runs the forward: patterns that read
means over blocks only, in graphs and outside. ``pattern_lists`` makes the lists of the others from q, k and v, for graphs that
are being traced; eager calls use :mod:`fpsattention.patterns` directly.
"""

from __future__ import annotations

import json
from typing import NamedTuple

import torch
from torch import Tensor

from ..layout.exact import exact_keep
from ..layout.masks import BlockMask, _transpose_on_device
from ..layout.tiles import BLOCK, TileLayout, cached_plan

SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor token_of_slot, Tensor tile_block_offsets, Tensor sizes, *, str pattern, str granularity, "
    "bool transposed) -> (Tensor kv_num_blocks, Tensor kv_indices, Tensor q_num_blocks, Tensor q_indices)"
)

ATTENTION_SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor token_of_slot, Tensor tile_of_block, Tensor tile_block_offsets, Tensor sizes, Tensor? k_mean, "
    "Tensor? v_absmax, Tensor? hidden, *, str pattern, bool transposed, SymInt head_dim, int granularity, float softmax_scale, bool smooth_k, "
    "bool pow2_scales, SymInt k_mean_stride=1, bool deterministic=False) -> (Tensor out, Tensor lse, Tensor q8, Tensor k8, Tensor v8t, "
    "Tensor q_scale, Tensor k_scale, Tensor v_scale, Tensor row_max, Tensor row_sum, Tensor kv_num_blocks, Tensor kv_indices, "
    "Tensor q_num_blocks, Tensor q_indices, Tensor densities)"
)

_NUM_SIZES = 8


def width_of(sizes: Tensor) -> int:
    """Width of the lists that :func:`sizes_of` was told."""
    return sizes.shape[0] - _NUM_SIZES


class Selection(NamedTuple):
    """In the place of lists: the pattern that makes them from sums over blocks.

    Attributes:
        token_of_slot, tile_of_block, tile_block_offsets: of the layout, on the device of q.
        sizes: :func:`sizes_of`.
        pattern: as JSON; one of ``patterns.pattern.pooling()``.
        transposed: lists for a backward, too.
    """

    token_of_slot: Tensor
    tile_of_block: Tensor
    tile_block_offsets: Tensor
    sizes: Tensor
    pattern: str
    transposed: bool


def sizes_of(layout: TileLayout, width: int, exact: Tensor | None = None) -> Tensor:
    """A layout and the width of lists, as an input of graphs: int64 ``[8 + width]`` on the CPU, whose length says the width. With
    ``exact``, bool ``[num_blocks]``, the width is that of all blocks, and which of them are exact is told behind the numbers.

    Numbers would be constants of a graph, and every grid a compilation.
    """
    width = width if exact is None else layout.num_blocks
    numbers = (*layout.grid, *layout.tile, layout.text_len, layout.text_position == "prefix")
    sizes = torch.zeros(_NUM_SIZES + width, dtype=torch.int64, device="cpu")
    sizes[:_NUM_SIZES] = torch.tensor([int(number) for number in numbers], device="cpu")
    if exact is not None:
        sizes[_NUM_SIZES:] = exact.cpu()
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

    layout = _layout(sizes, q.device)
    exact = _exact(sizes, q.device)
    mask, _ = measured(from_dict(json.loads(pattern)), granularity, layout, q, k, v, exact)
    return _lists(mask, sizes, transposed)


def lists_of_sums(
    q_block_sum: Tensor,
    k_block_sum: Tensor,
    sizes: Tensor,
    *,
    pattern: str,
    transposed: bool,
    tile_block_offsets: Tensor,
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Lists as of ``pattern_lists`` from sums f32 ``[B, H, blocks, D]``, and their densities f64 ``[B, 2]``, means over the batch in each row."""
    from ..patterns import from_dict

    layout, bound = _layout(sizes, q_block_sum.device), from_dict(json.loads(pattern))
    # Autocast reaches into the products of a rule, whose scores must stay FP32.
    with torch.no_grad(), torch.autocast(q_block_sum.device.type, enabled=False):
        mask, densities = bound.pattern.of_sums(q_block_sum, k_block_sum, layout, **bound.hyperparameters)
        mask, densities = _with_exact(mask, densities, layout, _exact(sizes, layout.device))
        return _lists(mask, sizes, transposed), densities.repeat(q_block_sum.shape[0], 1)


def _layout(sizes: Tensor, device: torch.device) -> TileLayout:
    numbers = sizes[:_NUM_SIZES].tolist()
    position = "prefix" if numbers[7] else "suffix"
    return cached_plan(tuple(numbers[:3]), tuple(numbers[3:6]), numbers[6], position).to(device)


def _exact(sizes: Tensor, device: torch.device) -> Tensor | None:
    flags = sizes[_NUM_SIZES:].bool()
    return flags.to(device) if flags.any() else None


def _with_exact(
    made: BlockMask, densities: Tensor, layout: TileLayout, exact: Tensor | None
) -> tuple[BlockMask, Tensor]:
    """Every block of the rows, and every row of the columns, of ``exact``; what they add counts as selected."""
    if exact is None:
        return made, densities
    kept, whole = made.to_blocks(), exact_keep(layout, exact)
    pairs = ((whole & ~kept).float() @ layout.block_tokens.float()).double() @ layout.tile_tokens.double()
    return BlockMask.from_keep(layout, kept | whole), densities + pairs.mean() / layout.num_tokens**2


def _lists(mask: BlockMask, sizes: Tensor, transposed: bool) -> tuple[Tensor, ...]:
    lists = [mask.kv_num_blocks, mask.kv_indices[..., : sizes.shape[0] - _NUM_SIZES].contiguous()]
    lists += _transpose_on_device(mask) if transposed else [lists[0].new_empty(0) for _ in range(2)]
    return tuple(lists)


def measured(bound, granularity, layout, q, k, v, exact=None, **given):  # type: ignore[no-untyped-def]
    """What a bound pattern makes of q, k, v ``(B, H, S, D)``, and its densities, f64 ``[2]``.

    ``exact``: bool ``[num_blocks]`` on the device of q, blocks that are dense in both directions whatever the pattern finds; what
    they add counts as selected.
    A rule that reads ``lse`` is given that of dense attention at ``granularity``, "tile", "block" or "token" (others: "tile"): a search costs as much
    as a dense step.
    """
    from ..layout.masks import dense_mask
    from .attend import attend
    from .checks import GRANULARITIES

    # Autocast reaches into the products of a rule, whose scores must stay FP32.
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        tensors = {"q": q, "k": k, "v": v}
        if "lse" in bound.pattern.inputs:
            granularity = granularity if granularity in GRANULARITIES else "tile"
            tensors["lse"] = attend(q, k, v, dense_mask(layout), granularity=granularity, tensor_layout="HND")[1]
        wanted = {name: tensors[name] for name in bound.pattern.inputs}
        made, densities = bound.pattern.measured(layout=layout, **wanted, **bound.hyperparameters, **given)
        return _with_exact(made, densities, layout, exact)


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
    blocks = token_of_slot.shape[0] // BLOCK
    return _empty(q, blocks, sizes, tile_block_offsets, transposed)


def fake_lists_of_sums(
    q_block_sum: Tensor,
    k_block_sum: Tensor,
    sizes: Tensor,
    *,
    pattern: str,
    transposed: bool,
    tile_block_offsets: Tensor,
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Shapes of :func:`lists_of_sums`."""
    lists = _empty(q_block_sum, q_block_sum.shape[2], sizes, tile_block_offsets, transposed)
    return lists, q_block_sum.new_empty((q_block_sum.shape[0], 2), dtype=torch.float64)


def _empty(
    like: Tensor, blocks: int, sizes: Tensor, tile_block_offsets: Tensor, transposed: bool
) -> tuple[Tensor, ...]:
    rows, tiles = tuple(like.shape[:2]), tile_block_offsets.shape[0] - 1
    shapes = [(*rows, tiles), (*rows, tiles, sizes.shape[0] - _NUM_SIZES)]
    shapes += [(*rows, blocks), (*rows, blocks, blocks)] if transposed else [(0,), (0,)]
    return tuple(like.new_empty(shape, dtype=torch.int32) for shape in shapes)


def register() -> None:
    """Define the op."""
    torch.library.define("fpsattn::pattern_lists", SCHEMA)
    torch.library.impl("fpsattn::pattern_lists", "CompositeExplicitAutograd")(_kernel)
    torch.library.register_fake("fpsattn::pattern_lists")(_fake)
