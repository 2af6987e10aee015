"""benchmarks/work_order.py: the order of the forward's items, the bytes it moves, the time it takes, against counts by hand."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import fpsattention as fps

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import work_order
from benchmarks.work_order import Item

BLOCK_BYTES = 128 * (2 * 128 + 8)


def mask_of(lengths):
    """One row of tiles of 3 blocks each; tile i attends the first `lengths[i]` tiles."""
    layout = fps.plan((len(lengths), 16, 24), tile=(1, 16, 24))
    assert layout.num_blocks == 3 * len(lengths)
    return fps.BlockMask.from_tiles(layout, torch.arange(len(lengths)) < torch.tensor(lengths)[:, None])


def test_pairs_come_first_and_long_lists_before_short_ones():
    order = work_order.work_order(mask_of([1, 4, 2, 4]))
    assert [item.query_blocks for item in order] == [(3, 4), (9, 10), (6, 7), (0, 1), (5,), (11,), (8,), (2,)]
    assert [len(item.kv_blocks) for item in order] == [12, 12, 6, 3, 12, 12, 6, 3]
    alone = work_order.work_order(mask_of([1, 4, 2, 4]), clusters=False)
    assert [item.query_blocks[0] for item in alone] == [3, 4, 5, 9, 10, 11, 6, 7, 8, 0, 1, 2]


def test_lengths_that_agree_in_their_leading_bits_keep_the_index_order():
    mask = mask_of([5, 6, 7, 5, 7, 1, 7])  # lists of 15, 18, 21, 15, 21, 3, 21 blocks
    for bits, tiles in ((0, [0, 1, 2, 3, 4, 5, 6]), (2, [1, 2, 4, 6, 0, 3, 5]), (4, [2, 4, 6, 1, 0, 3, 5])):
        order = work_order.work_order(mask, clusters=False, bits=bits)
        assert [item.query_blocks[0] // 3 for item in order[::3]] == tiles


def test_bytes():
    pair, single = Item((0, 1), (0, 1, 2)), Item((2,), (2, 3))
    found = work_order.traffic([pair, single], 128, sms=4)
    assert (found.from_l2, found.from_dram) == (5 * BLOCK_BYTES, 4 * BLOCK_BYTES)
    assert found.unique_per_wave == 4 * BLOCK_BYTES
    waves = work_order.traffic([pair, single], 128, sms=2)  # one after the other: unique 3 and 2
    assert waves.unique_per_wave == 2.5 * BLOCK_BYTES
    tiny = work_order.traffic([pair, single], 128, sms=2, l2_bytes=BLOCK_BYTES)  # block 2 is still there
    assert tiny.from_dram == 4 * BLOCK_BYTES
    none = work_order.traffic([pair, single, pair], 128, sms=2, l2_bytes=BLOCK_BYTES)
    assert none.from_dram == 7 * BLOCK_BYTES


def test_makespan():
    pair, single = Item((0, 1), tuple(range(4))), Item((2,), tuple(range(2)))
    assert work_order.makespan([pair], 3, 10, 1, sms=4) == 2 * 14  # three pairs on two clusters
    assert work_order.makespan([single], 5, 10, 1, sms=4) == 2 * 12
    assert work_order.makespan([pair, single], 1, 10, 1, sms=4) == 14  # the single one runs on the other cluster
    assert work_order.efficiency([pair], 2, 0, 1, sms=4) == 1.0
    assert work_order.efficiency([pair], 2, 4, 1, sms=4) == pytest.approx(0.5)
