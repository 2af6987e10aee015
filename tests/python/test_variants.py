"""Packed videos, grouped heads, keys without queries, orders per head: against separate, repeated and masked attention.

Heads that share K and V, keys of their own and tables per head are one thing to the ops; ``Sides`` has all three at once.
"""

from __future__ import annotations

import pytest
import torch
from variants import Sides, distance, repeated

import fpsattention as fps
from fpsattention import patterns
from fpsattention.errors import ConfigError, UnsupportedError
from fpsattention.layout import masks, tiles
from fpsattention.ops import reference
from fpsattention.ops.attend import attend
from fpsattention.ops.variants import attend_packed, attend_permuted, attend_queries, query_lists

GRID, TILE = (3, 7, 10), (1, 4, 5)


def rand(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def mask_of(grid=GRID, window=(1, 1, 2), text=0, tile=TILE) -> masks.BlockMask:
    return masks.sliding_tile_mask(tiles.plan(grid, tile=tile, text_len=text), window)


def triple(*shape: int) -> list[torch.Tensor]:
    return [rand(*shape[:-1], shape[-1] + i)[..., : shape[-1]].contiguous().requires_grad_() for i in range(3)]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.slow
def test_packed_videos_are_separate_calls(backend):
    """Of different grids, windows, tiles and text, to the bit where the statistics of K and V are shared; gradients too."""
    each = [mask_of(), mask_of((2, 8, 8), (1, 2, 1), text=5), mask_of((1, 3, 3), (1, 1, 1), tile=(1, 3, 3))]
    sizes = [mask.layout.num_tokens for mask in each]
    ends = [sum(sizes[:i]) for i in range(4)]
    q, k, v = triple(sum(sizes), 2, 64)
    absmax = v.detach().abs().amax(0)[None]
    shared = {"smooth_k": False, "v_absmax": absmax, "backend": backend}
    out, lse = attend_packed(q, k, v, ends, each, **shared)
    packed_grads = torch.autograd.grad(out.square().sum(), (q, k, v))
    for i, mask in enumerate(each):
        part = slice(ends[i], ends[i + 1])
        alone = [x[part][None].detach().requires_grad_() for x in (q, k, v)]
        one, one_lse = attend(*alone, mask, **shared)
        assert torch.equal(out[part], one[0]) and torch.equal(lse[:, part], one_lse[0])
        for got, want in zip(packed_grads, torch.autograd.grad(one.square().sum(), alone), strict=True):
            assert torch.allclose(got[part], want[0], atol=1e-6, rtol=1e-5)
    free, _ = attend_packed(q, k, v, ends, each, backend=backend)
    assert 0 < (free - out).abs().mean() < 0.06 * out.abs().mean()
    with pytest.raises(ConfigError, match="expected videos of"):
        attend_packed(q, k, v, [0, 5, ends[3]], each[:2])
    with pytest.raises(ConfigError, match="one list for all"):
        attend_packed(q[:210], k[:210], v[:210], [0, 210], [masks.BlockMask.stack([each[0]] * 2)])


@pytest.mark.slow
@pytest.mark.parametrize("group", [1, 2, 3])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_grouped_heads_are_repeated_ones(group, backend):
    """To the bit, with lists per query head; gradients of a head of K and V are the sums over its query heads. K is quantized once."""
    if backend == "reference" and group != 3:
        pytest.skip("one group is enough of the slow one")
    q, k, v = (x.requires_grad_() for x in (rand(1, 210, 2 * group, 40), rand(1, 210, 2, 40), rand(1, 210, 2, 40) + 1))
    windows = [(1, 1, 2), (3, 2, 1), (1, 2, 2)]
    mask = masks.BlockMask.stack([mask_of(window=windows[h % 3]) for h in range(2 * group)])
    mask = masks.BlockMask(mask.layout, *(x.transpose(0, 1) for x in (mask.kv_num_blocks, mask.kv_indices)))
    out, lse = fps.attention(q, k, v, GRID, block_mask=mask, return_lse=True, backend=backend)
    many = [repeated(x, 2, group) for x in (k, v)]
    want, want_lse = fps.attention(q, *many, GRID, block_mask=mask, return_lse=True, backend=backend)
    assert torch.equal(out, want) and torch.equal(lse, want_lse)
    weight = rand(*out.shape)
    got, wanted = (torch.autograd.grad((x * weight).sum(), (q, k, v)) for x in (out, want))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(got, wanted, strict=True))
    if backend == "cpu":
        tangents = tuple(rand(*x.shape) for x in (q, k, v))

        def tangent_of(times: int) -> torch.Tensor:
            def run(q_, k_, v_):
                return fps.attention(q_, repeated(k_, 2, times), repeated(v_, 2, times), GRID, block_mask=mask)

            return torch.func.jvp(run, (q, k, v), tangents)[1]

        tangent, one = tangent_of(1), tangent_of(group)
        assert torch.allclose(tangent, one, atol=1e-5) and tangent.any()


def test_what_grouped_heads_refuse():
    q, k, v = triple(1, 210, 6, 64)
    with pytest.raises(ConfigError, match="or fewer heads that divide those of q"):
        fps.attention(q, k[:, :, :4], v[:, :, :4], GRID)
    with pytest.raises(ConfigError, match=r"quantize: k has 4 heads, expected a divisor of the 6 of q"):
        attend(q, k[:, :, :4], v[:, :, :4], mask_of())
    with pytest.raises(ConfigError, match="prepare: k has shape"):
        fps.attention(q, k[:, :, :2], v[:, :, :2], GRID, norm=fps.Norm("rms"))


def test_keys_without_queries():
    """Rows that are asked are those of the whole call; K and V get the gradients of these rows only; other rows are nowhere."""
    mask = mask_of(text=9)
    q, k, v = triple(1, 219, 2, 64)
    whole, whole_lse = attend(q, k, v, mask)
    first, count = 70, 149  # the last two frames and the text
    asked = q[:, first:].detach().requires_grad_()
    out, lse = attend_queries(asked, k, v, mask, first)
    assert out.shape[1] == count
    # Scales of Q are those of its tiles, which hold queries of both kinds nowhere here.
    assert torch.equal(out, whole[:, first:]) and torch.equal(lse, whole_lse[:, :, first:])
    got = torch.autograd.grad(out.square().sum(), (asked, k, v))
    wanted = torch.autograd.grad(whole[:, first:].square().sum(), (q, k, v))
    assert torch.allclose(got[0], wanted[0][:, first:], atol=1e-6)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(got[1:], wanted[1:], strict=True))
    odd, _ = attend_queries(q[:, 31:40], k, v, mask, 31)  # within a tile
    assert (odd - whole[:, 31:40]).abs().mean() < 0.06 * whole.abs().mean()  # another scale for Q
    lists, (kv_slots, _offsets) = query_lists(mask, 31, 9)
    assert (lists.token_of_slot.numel(), kv_slots.numel()) == (2 * 128, mask.layout.num_slots)  # tokens of two tiles
    for first, count in ((1, 219), (-1, 3), (0, 0)):
        with pytest.raises(ConfigError, match="among 219 keys"):
            query_lists(mask, first, count)


def test_keys_without_queries_of_a_tile_of_several_blocks():
    """Tokens of a tile move up, block after block: 250 of 300 lie in two blocks, not in three."""
    mask = mask_of((2, 15, 20), (1, 1, 1), tile=(1, 15, 20))
    q, k, v = triple(1, 600, 1, 64)
    lists, _ = query_lists(mask, 30, 250)
    assert lists.tile_of_block.tolist() == [0, 0] and lists.token_of_slot[:250].tolist() == list(range(250))
    out, _ = attend_queries(q[:, 30:280], k, v, mask, 30, granularity="token")
    assert torch.equal(out, attend(q, k, v, mask, granularity="token")[0][:, 30:280])


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_an_order_per_head(backend):
    """To the bit what each head gets alone from the layout in its order, and so are the gradients."""
    mask = mask_of()
    q, k, v = triple(2, 210, 2, 64)
    generator = torch.Generator().manual_seed(0)
    order = torch.stack([torch.randperm(210, generator=generator) for _ in range(4)]).view(2, 2, 210)
    out, lse = attend_permuted(q, k, v, mask, order, backend=backend)
    grads = torch.autograd.grad(out.square().sum(), (q, k, v))
    in_slots = mask.layout.token_of_slot[mask.layout.token_of_slot >= 0].long()
    for b, h in [(0, 0), (0, 1), (1, 0), (1, 1)] if backend == "cpu" else [(1, 0)]:
        layout = mask.layout.permuted(order[b, h][in_slots])
        alone = [x[b : b + 1, :, h : h + 1].detach().requires_grad_() for x in (q, k, v)]
        of_head = masks.BlockMask(layout, mask.kv_num_blocks, mask.kv_indices)
        want, want_lse = attend(*alone, of_head, backend=backend)
        assert torch.equal(out[b, :, h], want[0, :, 0])
        assert torch.allclose(lse[b, h], want_lse[0, 0], atol=1e-5)  # q . k_mean: a product of another shape
        for got, wanted in zip(grads, torch.autograd.grad(want.square().sum(), alone), strict=True):
            assert torch.allclose(got[b, :, h], wanted[0, :, 0], atol=1e-6)
    if backend == "cpu":
        one, _ = attend_permuted(q, k, v, mask, torch.arange(210)[None, None])
        assert torch.equal(one, attend(q, k, v, mask)[0])
        few = [x[:, :, :1] for x in (k, v)]  # a head of K and V for both, and an order per sample
        grouped, _ = attend_permuted(q, *few, mask, order[:, :1])
        many, _ = attend_permuted(q, *(repeated(x, 2, 2) for x in few), mask, order[:, :1])
        assert torch.equal(grouped, many)
        for wrong, match in (
            (order[:, :, :5], r"expected \[1 or 2, 1 or 2, 210\]"),
            (order, r"expected \[1 or 2, 1, 210\]"),
        ):
            with pytest.raises(ConfigError, match=match):
                attend_permuted(q, *(few if wrong is order else (k, v)), mask, wrong)


def gathered(x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    return x.gather(1, order.transpose(1, 2)[..., None].expand(*x.shape))


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"precision": "int8"}, {"precision": "paper"}, {"hadamard": True}])
def test_orders_of_queries_and_of_keys_differ(options):
    """What tensors in these orders give, put back: outputs to the bit, and gradients. A head of K and V serves three of the queries."""
    mask = mask_of()
    q, k, v = (x.requires_grad_() for x in (rand(2, 210, 6, 64), rand(2, 210, 2, 64), rand(2, 210, 2, 64) + 1))
    generator = torch.Generator().manual_seed(1)
    q_order, k_order = (torch.rand(2, heads, 210, generator=generator).argsort(-1) for heads in (6, 2))
    options = {"smooth_k": False, **options}
    out, lse = attend_permuted(q, k, v, mask, q_order, k_order, **options)
    moved = gathered(q, q_order), gathered(k, k_order), gathered(v, k_order)
    want, want_lse = attend(*moved, mask, **options)
    back = q_order.argsort(-1)
    want, want_lse = gathered(want, back), want_lse.gather(2, back)
    assert torch.equal(out, want) and torch.equal(lse, want_lse)
    got, wanted = (torch.autograd.grad(x.square().sum(), (q, k, v)) for x in (out, want))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("options", [{"precision": "int8"}, {"precision": "paper"}])
def test_keys_without_queries_in_other_precisions(options):
    mask = mask_of()
    q, k, v = rand(1, 210, 4, 64), rand(1, 210, 2, 64), rand(1, 210, 2, 64) + 1
    out, lse = attend_queries(q[:, 70:], k, v, mask, 70, **options)
    want, want_lse = attend(q, k, v, mask, **options)
    assert torch.equal(out, want[:, 70:]) and torch.equal(lse, want_lse[:, :, 70:])


@pytest.mark.parametrize("kind", ["rms", "rms_across_heads"])
def test_an_order_per_head_of_raw_projections(kind):
    """Rotations go by tokens, not by places: each head gets what it gets alone, from the layout in its order."""
    mask = mask_of()
    q, k, v = triple(1, 210, 2, 64)
    angles = rand(210, 32)
    raw = {"norm": fps.Norm(kind), "rope": fps.Rope(angles.cos(), angles.sin()), "smooth_k": False}
    order = torch.rand(1, 2, 210, generator=torch.Generator().manual_seed(2)).argsort(-1)
    out, _ = attend_permuted(q, k, v, mask, order, **raw)
    grads = torch.autograd.grad(out.square().sum(), (q, k, v))
    in_slots = mask.layout.token_of_slot[mask.layout.token_of_slot >= 0].long()
    total = 0.0
    for h in range(2):
        layout = mask.layout.permuted(order[0, h][in_slots])
        of_head, _ = attend(q, k, v, masks.BlockMask(layout, mask.kv_num_blocks, mask.kv_indices), **raw)
        assert torch.equal(out[:, :, h], of_head[:, :, h])
        total = total + of_head[:, :, h].square().sum()
    wanted = torch.autograd.grad(total, (q, k, v))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(grads, wanted, strict=True))


@pytest.mark.parametrize(
    "pattern",
    [
        ("topk_mean", {"ratio": 0.3}),
        ("cdf_mean", {"mass": 0.5}),
        ("sparge", {"mass": None, "ratio": 0.5, "similarity": -0.1}),
        ("exact", {"mass": 0.5}),
    ],
)
def test_patterns_of_grouped_heads(pattern):
    """The lists of repeated keys, also from sums over blocks; and of Sparse-VideoGen 2 its clusters, once per head of K."""
    layout = mask_of().layout
    q, k, v = (rand(1, heads, 210, 64) for heads in (6, 2, 2))
    bound = patterns.get(pattern[0], **pattern[1])
    lse = torch.logsumexp(q @ repeated(k, 1, 3).transpose(2, 3) / 8, -1)
    made, want = (bound(q, repeated(k, 1, times), layout, lse=lse) for times in (1, 3))
    assert torch.equal(made.kv_num_blocks, want.kv_num_blocks) and torch.equal(made.to_blocks(), want.to_blocks())
    assert 0 < want.density < 1
    if bound.pattern.pools:
        sums = [reference.block_sum(x, layout.token_of_slot) for x in (q, k)]
        of_sums, _ = bound.pattern.of_sums(*sums, layout, **bound.hyperparameters)
        assert torch.equal(of_sums.to_blocks(), want.to_blocks())
    else:
        with pytest.raises(ConfigError, match="k has shape"):
            bound(q, torch.cat([k, k], 1), layout, lse=lse)


def test_svg2_of_grouped_heads():
    layout = mask_of().layout
    q, k, v = (rand(1, heads, 210, 64) for heads in (6, 2, 2))
    made, want = (
        patterns.svg2(q, repeated(k, 1, times), layout, q_clusters=4, k_clusters=5, mass=0.5, iterations=3)
        for times in (1, 3)
    )
    assert made.k_order.shape == (1, 2, 210) and torch.equal(repeated(made.k_order, 1, 3), want.k_order)
    assert torch.equal(made.mask.to_blocks(), want.mask.to_blocks()) and torch.equal(made.pairs, want.pairs)
    out = patterns.clustered_attention(q, k, v, made)
    assert torch.equal(out, patterns.clustered_attention(q, *(repeated(x, 1, 3) for x in (k, v)), want))


@pytest.mark.parametrize("granularity", [0, 2])
@pytest.mark.parametrize("group", [1, 3])
def test_the_ops_with_two_sides_equal_the_reference(group, granularity):
    """Forward, backward and jvp of the CPU kernels, and the shapes of the fakes."""
    sides = Sides(group=group, dim=64, granularity=granularity)
    results = []
    for ops, device in ((reference, "cpu"), (torch.ops.fpsattn, "cpu"), (torch.ops.fpsattn, "meta")):
        z = sides.quantize(ops, device)
        f = sides.forward(ops, z, device)
        results.append([*z, *f, *sides.backward(ops, z, f, device), sides.jvp(ops, z, f, device)])
    want, got, fakes = results
    for name, a, b in zip((*sides.NAMES, "tangent"), got, want, strict=True):
        assert a.shape == b.shape and distance(a, b) <= 1e-3, name
    assert all(a.shape == b.shape and a.dtype == b.dtype for a, b in zip(fakes, got, strict=True))
    adjoint = sum(float((a.double() * b.double()).sum()) for a, b in zip(got[-4:-1], sides.tangents, strict=True))
    assert adjoint == pytest.approx(float((sides.grad.double() * got[-1].double()).sum()), rel=1e-4)


def test_opcheck_of_two_sides():
    sides = Sides(group=2, dim=64, granularity=0)
    q_slots, q_offsets, *keys = sides.tables
    lists = (q_slots, torch.arange(3, dtype=torch.int32), q_offsets, *sides.lists, *sides.q_lists)
    options = {"granularity": 0, "softmax_scale": sides.scale, "smooth_k": True, "pow2_scales": False}
    args = (*(x.requires_grad_() for x in sides.qkv), *lists, None, None, *keys)
    # e4m3 outputs have no sum, which the others would compute.
    torch.library.opcheck(
        torch.ops.fpsattn.attention.default,
        args,
        options,
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


def test_what_two_sides_refuse():
    sides = Sides(group=2, dim=64, granularity=0)
    options = {"granularity": 0, "smooth_k": True, "pow2_scales": False}
    args = (*sides.qkv, *sides.tables[:2], None, None)
    with pytest.raises(ConfigError, match="kv_tile_block_offsets is missing"):
        torch.ops.fpsattn.quantize(*args, sides.tables[2], **options)
    with pytest.raises(ConfigError, match="k has shape"):
        torch.ops.fpsattn.quantize(*args, **options)
    q, k, v = (x[:, :, :200] for x in sides.qkv)
    with pytest.raises(ConfigError, match="kv_token_of_slot is missing, but token_of_slot differs from head to head"):
        torch.ops.fpsattn.quantize(q, k, v, *sides.tables[:2], **options)
    broken = sides.tables[2].clone()
    broken[1, 0, 1] = broken[1, 0, 0]
    with pytest.raises(ConfigError, match="kv_token_of_slot holds token"):
        torch.ops.fpsattn.quantize(*args, broken, sides.tables[3], **options)
    with pytest.raises(UnsupportedError, match="keys of their own were given with norm, rope, hidden"):
        x = rand(1, 210, 1, 64)
        lists, keys = query_lists(mask_of(), 0, 210)
        attend(x, x, x, lists, keys=keys, norm=fps.Norm("rms"))
