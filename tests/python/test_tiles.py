"""The planner against a plain-Python one, its quality figures, its tables and its errors."""

import itertools
import math
import sys

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import fpsattention.layout.tiles as tiles
from fpsattention.errors import BuildError, ConfigError
from fpsattention.layout.tiles import BLOCK, clear_plan_cache, plan

# The plain-Python planner ------------------------------------------------------------------------------------------------


def cuts(length, size):
    """The allowed sizes along an axis: clipped, then balanced if its largest size is the one asked for."""
    count = -(-length // size)
    yield [min(size, length - i * size) for i in range(count)]
    balanced = sorted((length // count + (i < length % count) for i in range(count)), reverse=True)
    if balanced[0] == size:
        yield balanced


def slots_of(axes):
    return sum(BLOCK * math.ceil(t * h * w / BLOCK) for t, h, w in itertools.product(*axes))


def best_axes(grid, tile):
    options = (list(cuts(length, min(size, length))) for length, size in zip(grid, tile, strict=True))
    return min(itertools.product(*options), key=slots_of)  # min keeps the first of equals: clipped


def candidates(grid):
    for tile in itertools.product(*(range(1, n + 1) for n in grid)):
        shortest = min((size for size, n in zip(tile, grid, strict=True) if size < n), default=max(tile))
        temporal = min(2, grid[0]) <= tile[0] <= 8
        if math.prod(tile) <= 512 and temporal and max(tile) <= 2.5 * shortest:
            yield tile


def starts(sizes):
    return [0, *itertools.accumulate(sizes)][:-1]


def tokens_of_tiles(grid, axes, text_len, text_position):
    """Token lists, tile by tile."""
    raster = np.arange(math.prod(grid)).reshape(grid) + (text_len if text_position == "prefix" else 0)
    for box in itertools.product(*(list(zip(starts(sizes), sizes, strict=True)) for sizes in axes)):
        yield raster[tuple(slice(start, start + size) for start, size in box)].ravel().tolist()
    text = list(range(text_len)) if text_position == "prefix" else list(range(raster.size, raster.size + text_len))
    for i in range(0, text_len, 512):
        yield text[i : i + 512]


GRIDS = st.tuples(st.integers(1, 11), st.integers(1, 13), st.integers(1, 17))
TILES = st.tuples(*(st.integers(1, 20),) * 3)


@settings(max_examples=60, deadline=None)
@given(GRIDS, st.none() | TILES, st.integers(0, 1100), st.sampled_from(["suffix", "prefix"]))
@example((1, 1, 1), None, 0, "suffix")
@example((7, 11, 13), None, 512, "prefix")
@example((4, 4, 4), (9, 9, 9), 513, "suffix")
def test_tables_equal_the_plain_planner(grid, tile, text_len, text_position):
    layout = plan(grid, tile, text_len, text_position)
    axes = best_axes(grid, layout.tile if tile is None else tile)
    expected = list(tokens_of_tiles(grid, axes, text_len, text_position))

    assert layout.tile_sizes == tuple(map(tuple, axes))
    assert layout.tile == tuple(max(sizes) for sizes in axes)
    assert layout.tile_grid == tuple(map(len, axes))
    assert layout.num_tokens == math.prod(grid) + text_len
    assert layout.tile_tokens.tolist() == list(map(len, expected))
    slots, offsets = [], [0]
    for tokens in expected:
        blocks = math.ceil(len(tokens) / BLOCK)
        slots += tokens + [-1] * (blocks * BLOCK - len(tokens))
        offsets.append(offsets[-1] + blocks)
    assert layout.token_of_slot.tolist() == slots
    assert layout.tile_block_offsets.tolist() == offsets
    assert layout.tile_of_block.tolist() == [t for t in range(len(expected)) for _ in range(offsets[t], offsets[t + 1])]
    assert (layout.num_tiles, layout.num_blocks, layout.num_slots) == (len(expected), offsets[-1], len(slots))
    # Every token in exactly one slot.
    assert sorted(s for s in slots if s >= 0) == list(range(layout.num_tokens))
    assert layout.token_of_slot[layout.slot_of_token.long()].tolist() == list(range(layout.num_tokens))
    for tensor in (layout.token_of_slot, layout.slot_of_token, layout.tile_of_block, layout.tile_block_offsets):
        assert tensor.dtype == torch.int32


@settings(max_examples=25, deadline=None)
@given(GRIDS)
@example((1, 13, 17))
@example((11, 13, 1))
@example((2, 1, 17))
def test_no_candidate_needs_fewer_slots(grid):
    layout = plan(grid)
    assert layout.tile in set(candidates(grid))
    assert layout.num_slots == min(slots_of(best_axes(grid, tile)) for tile in candidates(grid))
    assert plan(grid, layout.tile).same_as(layout)  # the tile alone says how the grid is cut


@pytest.mark.parametrize(
    ("grid", "tile", "limit"),
    [
        ((21, 45, 80), (7, 9, 4), 1.016),
        ((21, 30, 52), (7, 9, 6), 1.020),
        ((33, 45, 80), (7, 9, 8), 1.024),
        ((33, 34, 60), (7, 6, 12), 1.037),
        ((31, 22, 40), (8, 4, 8), 1.033),
    ],
)
def test_planner_quality(grid, tile, limit):
    layout = plan(grid)
    assert layout.tile == tile
    assert layout.num_slots <= limit * layout.num_tokens
    assert layout.utilization == layout.num_tokens / layout.num_slots


def test_explicit_tiles_of_any_size():
    paper = plan((21, 45, 80), (6, 8, 8))
    assert paper.tile_sizes == ((6, 6, 6, 3), (8,) * 5 + (5,), (8,) * 10)
    assert round(paper.num_slots / paper.num_tokens, 3) == 1.050  # 1.219 with every tile padded to (6, 8, 8)
    large = plan((3, 20, 20), (9, 99, 20))
    assert (large.tile, large.num_tiles, large.num_blocks) == ((3, 20, 20), 1, 10)
    assert plan((10, 10, 10), (1, 1, 1)).num_slots == 1000 * BLOCK
    assert plan((1, 1, 385), (1, 1, 129)).tile_sizes[2] == (129, 128, 128)  # balanced: 4 blocks instead of 5


def test_integers_of_numpy_and_torch_sizes_are_integers():
    assert plan(np.array([3, 4, 5])).same_as(plan(torch.Size([3, 4, 5])))


def test_describe():
    text = plan((21, 30, 52), text_len=700).describe()
    assert "grid 21 x 30 x 52 = 32760 video tokens, 700 text tokens (suffix)" in text
    assert "tile 7 x 9 x 6 = 378 tokens in 3 blocks; 3 x 4 x 9 = 108 video tiles, 2 text tiles" in text
    assert "H: 3 x 9 + 3; W: 8 x 6 + 4" in text


def test_plans_are_cached_in_a_bounded_cache_that_can_be_cleared():
    clear_plan_cache()
    first = plan((3, 4, 5))
    assert plan([3, 4, 5]) is first
    for n in range(1, tiles._PLAN_CACHE_SIZE + 10):
        plan((1, 1, n), (1, 1, 1))
    assert tiles._plan.cache_info().currsize == tiles._PLAN_CACHE_SIZE
    assert plan((3, 4, 5)) is not first
    clear_plan_cache()
    assert tiles._plan.cache_info().currsize == 0


def test_copies_on_devices_are_made_once():
    layout = plan((3, 4, 5))
    assert layout.to("cpu") is layout
    moved = layout.to("meta")
    assert moved.device.type == "meta" and moved.tile_of_block.device.type == "meta"
    assert layout.to("meta") is moved and moved.cpu() is layout


def test_permuted_layout_holds_other_tokens_in_the_same_tiles():
    layout = plan((3, 5, 7), (2, 3, 4), text_len=3)
    order = torch.randperm(layout.num_tokens, generator=torch.Generator().manual_seed(0))
    other = layout.permuted(order)
    assert torch.equal(other.token_of_slot[layout.token_of_slot >= 0], order.int())
    assert torch.equal(
        other.token_of_slot[other.slot_of_token.long()], torch.arange(layout.num_tokens, dtype=torch.int32)
    )
    assert torch.equal(other.token_of_slot < 0, layout.token_of_slot < 0)
    assert not other.same_as(layout) and other.to("meta").cpu() is other
    for bad in (order[:-1], torch.zeros_like(order)):
        with pytest.raises(
            ConfigError, match=r"TileLayout.permuted: token_order .* not a permutation of the 108 tokens"
        ):
            layout.permuted(bad)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((0, 3, 4),), r"fpsattention\.plan: grid \(0, 3, 4\), every size must be at least 1"),
        (((5, -3, 4),), r"grid \(5, -3, 4\), every size must be at least 1"),
        (((5, 3),), r"grid \(5, 3\), expected three integers"),
        ((7,), r"grid 7, expected three integers"),
        (("123",), r"grid '123', expected three integers"),
        (((5.0, 3, 4),), r"grid \(5\.0, 3, 4\), expected three integers"),
        (((True, 3, 4),), r"grid \(True, 3, 4\), expected three integers"),
        ((torch.tensor([3, 4, 5]),), r"expected three integers"),
        (((3, 4, 5), (0, 1, 1)), r"fpsattention\.plan: tile \(0, 1, 1\), every size must be at least 1"),
        (((3, 4, 5), (1, 1)), r"tile \(1, 1\), expected three integers"),
        (((3, 4, 5), (1, 1, None)), r"tile \(1, 1, None\), expected three integers"),
        (((3, 4, 5), None, -1), r"text_len -1, expected 0 or more"),
        (((3, 4, 5), None, 1.5), r"text_len 1\.5, expected an integer"),
        (((3, 4, 5), None, 8, "middle"), r"text_position 'middle', expected one of 'suffix', 'prefix', 'none'"),
        (((3, 4, 5), None, 8, None), r"text_position None, expected one of"),
        (((3, 4, 5), None, 8, "none"), r"text_len 8 with text_position 'none', expected 'suffix' or 'prefix'"),
        (((2**31, 1, 1),), r"grid \(2147483648, 1, 1\) is too large"),
        (((10**6, 10**6, 10**6),), r"has too many tokens"),
        (((400, 400, 400), (1, 1, 1)), r"needs 8192000000 slots, at most 2\^31 - 1 .* use a larger tile"),
        (((1, 1, 1), None, 2**31 - 1), r"needs 2147483776 slots"),
    ],
)
def test_errors_say_what_came_and_what_was_wanted(arguments, message):
    with pytest.raises(ConfigError, match=message):
        plan(*arguments)


def test_no_text_needs_no_position():
    assert plan((3, 4, 5), text_position="none").text_position == "none"


def test_a_missing_compiled_module_is_a_build_error_with_the_cure(monkeypatch):
    monkeypatch.delattr(sys.modules["fpsattention"], "_C", raising=False)
    monkeypatch.setitem(sys.modules, "fpsattention._C", None)
    clear_plan_cache()
    with pytest.raises(BuildError, match=r"fpsattention\._C is missing or does not load .*pip install \."):
        plan((3, 4, 5))
