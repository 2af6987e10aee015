"""No cliff: the truncating accumulator loses the same at every length, because it is promoted; and what the memory is (small sizes)."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the benchmarks are no part of the package

import fpsattention as fps
from benchmarks.errors import PROMOTE, add_truncated, length_errors, weighted_sum
from benchmarks.memory import kept as kept_bytes
from benchmarks.memory import memory, peak


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
    """Eight times the keys, the same result: what the accumulator adds stays. `benchmarks.errors length` goes up to half a million."""
    found = {keys: length_errors(keys, rows=3, base=2048, one_accumulator=True) for keys in (2048, 16384)}
    for error in found.values():
        assert error["truncated"] < 1.05 * error["exact"]
    assert found[16384]["exact"] == pytest.approx(found[2048]["exact"], rel=1e-3)
    assert found[16384]["truncated"] == pytest.approx(found[2048]["truncated"], rel=0.02)
    assert found[16384]["one accumulator"] > 1.3 * found[2048]["one accumulator"]  # the cliff, were there no promotion


@pytest.mark.parametrize("dim", [64, 128])
def test_computed_memory_is_what_the_ops_make(dim):
    """To the byte: what the op returns and makes on the way, what autograd keeps; the same of SDPA with scores in memory, and of torch's flash."""
    grid, tile, heads = (3, 10, 14), (3, 5, 7), 3  # four tiles of 105 tokens, each a block
    shape = (1, heads, 420, dim)
    q, k, v = (torch.randn(shape).bfloat16().requires_grad_() for _ in range(3))
    sizes = (420, heads, dim, 1.0, 2, 105)
    mask = fps.dense_mask(fps.plan(grid, tile))
    lists = mask.lists(False)
    z = torch.ops.fpsattn.quantize(q, k, v, lists[0], lists[2], granularity=1, smooth_k=True, pow2_scales=False)
    f = torch.ops.fpsattn.forward(
        *z[:6], lists[0], lists[1], lists[3], lists[4], z[7], num_tokens=420, softmax_scale=0.1, out_dtype=q.dtype
    )
    assert sum(x.nbytes for x in (*z, *f, lists[4])) == memory(*sizes)["fpsattention"]
    tables = {x.data_ptr() for x in mask.lists(True) if x is not None} - {lists[4].data_ptr()}

    def saved(call):
        found = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda x: found.update({x.data_ptr(): x.nbytes}), lambda x: x):
            call()
        return sum(size for where, size in found.items() if where not in tables)

    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    assert (
        saved(lambda: fps.attention(q, k, v, grid, block_mask=mask, granularity="block", tensor_layout="HND"))
        == kept_bytes(*sizes)["fpsattention"]
    )
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel([SDPBackend.FLASH_ATTENTION]):
        flash = saved(lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v))
    assert flash == kept_bytes(*sizes)["SDPA, flash"]


def test_memory_at_720p():
    """docs/numerics.md: a forward takes more than twice flash SDPA's memory beside its inputs; training keeps a third less."""
    sizes = (75600, 40, 128, 0.2)
    forward, training = memory(*sizes), kept_bytes(*sizes)
    assert 2.5 < forward["fpsattention"] / forward["SDPA, flash"] < 2.6 < forward["SDPA, math"] / forward["SDPA, flash"]
    assert training["fpsattention"] < 0.66 * training["SDPA, flash"] < 0.01 * training["SDPA, math"]


def test_the_cpu_holds_no_scores():
    """Twice the tokens: its peak grows by a few megabytes. Scores of all pairs would be 33 and 134 MB; first, that peaks are seen at all."""
    assert peak(lambda: [torch.empty(1000, 1000) for _ in range(2)]) == 8_000_000

    def of(side):
        q, k, v = (torch.randn(1, side * 256, 2, 64) for _ in range(3))
        return peak(lambda: fps.attention(q, k, v, (side, 16, 16), tile=(4, 4, 8), window=(1, 2, 2)))

    assert of(16) - of(8) < 20e6
