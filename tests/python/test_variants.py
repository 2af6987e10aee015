"""Packed videos, grouped heads, keys without queries, orders per head: against separate, repeated and masked attention."""

from __future__ import annotations

import pytest
import torch

from fpsattention.errors import ConfigError
from fpsattention.layout import masks, tiles
from fpsattention.ops.attend import attend
from fpsattention.ops.variants import attend_grouped, attend_packed, attend_permuted, attend_queries

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
    with pytest.raises(ConfigError, match="wanted videos of"):
        attend_packed(q, k, v, [0, 5, ends[3]], each[:2])
    with pytest.raises(ConfigError, match="one list for all"):
        attend_packed(q[:210], k[:210], v[:210], [0, 210], [masks.BlockMask.stack([each[0]] * 2)])


def test_grouped_heads_are_repeated_ones():
    q, k, v = (
        rand(2, 210, 6, 64).requires_grad_(),
        *(x.requires_grad_() for x in (rand(2, 210, 2, 64), rand(2, 210, 2, 63 + 1) + 1)),
    )
    out, lse = attend_grouped(q, k, v, mask_of())
    repeated = [x.repeat_interleave(3, 2) for x in (k, v)]
    want, want_lse = attend(q, *repeated, mask_of())
    assert torch.equal(out, want) and torch.equal(lse, want_lse)
    weight = rand(*out.shape)
    for got, wanted in zip(
        torch.autograd.grad((out * weight).sum(), (q, k, v)),
        torch.autograd.grad((want * weight).sum(), (q, k, v)),
        strict=True,
    ):
        assert torch.allclose(got, wanted, atol=1e-5)
    with pytest.raises(ConfigError, match="dividing"):
        attend_grouped(q[:, :, :5], k, v, mask_of())


def test_keys_without_queries():
    """Rows that are asked are those of the whole call; K and V get the gradients of these rows only."""
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
    with pytest.raises(ConfigError, match="among 219 keys"):
        attend_queries(q, k, v, mask, 1)


def test_an_order_per_head():
    mask = mask_of()
    q, k, v = triple(2, 210, 2, 64)
    order = torch.stack(
        [
            torch.stack([torch.randperm(210, generator=torch.Generator().manual_seed(2 * b + h)) for h in range(2)])
            for b in range(2)
        ]
    )
    out, lse = attend_permuted(q, k, v, mask, order, smooth_k=False)  # a mean in another order would round otherwise
    in_slots = mask.layout.token_of_slot[mask.layout.token_of_slot >= 0].long()
    for b in range(2):
        for h in range(2):
            layout = mask.layout.permuted(order[b, h][in_slots])
            alone = [x[b : b + 1, :, h : h + 1] for x in (q, k, v)]
            want, want_lse = attend(
                *alone, masks.BlockMask(layout, mask.kv_num_blocks, mask.kv_indices), smooth_k=False
            )
            assert (out[b, :, h] - want[0, :, 0]).abs().max() < 1e-5
            assert (lse[b, h] - want_lse[0, 0]).abs().max() < 1e-4
    assert all(bool(g.isfinite().all()) and g.any() for g in torch.autograd.grad(out.square().sum(), (q, k, v)))
    one, _ = attend_permuted(q, k, v, mask, torch.arange(210)[None, None])
    assert torch.equal(one, attend(q, k, v, mask)[0])
    with pytest.raises(ConfigError, match="order has shape"):
        attend_permuted(q, k, v, mask, order[:, :, :5])
