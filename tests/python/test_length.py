"""No cliff: the truncating accumulator loses the same at every length, because it is promoted; and what the memory is (small sizes)."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the benchmarks are no part of the package

from benchmarks.length_error import PROMOTE, add_truncated, errors, memory, weighted_sum


def test_the_accumulator_cuts_thirteen_bits_below_its_largest_addend():
    start, products = torch.tensor([1.0]).double(), torch.zeros(1, 32).double()
    for value, kept in ((2.0**-13, 2.0**-13), (2.0**-14, 0.0), (1.5 * 2.0**-13, 2.0**-13), (-(2.0**-14), 0.0)):
        products[0, 5] = value
        assert add_truncated(start, products).item() == 1.0 + kept
    assert add_truncated(torch.zeros(1).double(), torch.zeros(1, 32).double()).item() == 0.0
    products[0, :] = 2.0**-14  # each is lost by itself: 32 of them, too
    assert add_truncated(start, products).item() == 1.0
    products[0, :] = 2.0**-13
    assert add_truncated(start, products).item() == 1.0 + 32 * 2.0**-13


def test_promotion_is_what_prevents_the_cliff():
    """Equal addends: without promotion the sum stops growing once an addend is below the last kept bit."""
    p, v = torch.full((1, 32768), 0.125), torch.ones(32768, 1)
    assert weighted_sum(p, v, PROMOTE, True).item() == 4096.0 == weighted_sum(p, v, None, False).item()
    stuck = weighted_sum(p, v, None, True).item()
    assert stuck == 2048.0  # from 2^11 on one eighth is more than 13 bits down


def test_error_does_not_grow_with_length():
    """Eight times the keys, the same result: what the accumulator adds stays. benchmarks/length_error.py goes up to half a million."""
    found = {keys: errors(keys, rows=3, base=2048, cliff=True) for keys in (2048, 16384)}
    for error in found.values():
        assert error["truncated"] < 1.05 * error["exact"]
    assert found[16384]["exact"] == pytest.approx(found[2048]["exact"], rel=1e-3)
    assert found[16384]["truncated"] == pytest.approx(found[2048]["truncated"], rel=0.02)
    assert found[16384]["one accumulator"] > 1.3 * found[2048]["one accumulator"]  # the cliff, were there no promotion


def test_computed_memory():
    """By hand, for one head of 64 and one tile of two full blocks: what the kernels allocate beside the inputs."""
    found = memory(256, 1, 64, 1.0, tile=256)
    assert found["SDPA, flash"] == 256 * 64 * 2 + 256 * 4
    eight_bit, scales, out, lse, rows, lists = 256 * (3 * 64 + 8), 8 * 2, 256 * 64 * 2, 256 * 4, 2 * 256 * 4, 2 * 4
    assert found["fpsattention"] == eight_bit + scales + out + lse + rows + lists
    large = memory(75600, 40, 128, 0.2)
    assert large["SDPA, flash"] < large["fpsattention"] < 3 * large["SDPA, flash"] < large["SDPA, math"]
