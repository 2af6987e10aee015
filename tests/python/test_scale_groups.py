"""Scale groups of several tiles: the bytes are those of tiles as large as the group, the pattern is the mask's."""

from __future__ import annotations

import pytest
import torch

import fpsattention as fps
from fpsattention import ConfigError
from fpsattention.layout.scale_groups import scale_groups
from fpsattention.ops.attend import attend

GRID, TILE, GROUP, TEXT = (5, 9, 14), (2, 3, 4), (4, 6, 8), 19  # clipped tiles and groups


def inputs(layout, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, 2, layout.num_tokens, 64, generator=generator) for _ in range(3))
    q *= torch.rand(1, 2, layout.num_tokens, 1, generator=generator) * 4  # so that scales differ from group to group
    return q, k, v


def quantized(tables, q, k, v):
    """q8 and k8 as FP32 and their scales, token by token: ``(B, H, S, ...)``."""
    result = torch.ops.fpsattn.quantize(
        q, k, v, tables.token_of_slot, tables.tile_block_offsets, granularity=0, smooth_k=True, pow2_scales=False
    )
    slots = tables.token_of_slot.long()
    place = torch.empty(q.shape[2], dtype=torch.long)
    place[slots[slots >= 0]] = (slots >= 0).nonzero().squeeze(1)
    q8, k8 = (x.float().flatten(2, 3)[:, :, place] for x in result[:2])
    q_scale, k_scale = (x[:, :, place // 128] for x in result[3:5])
    return q8, k8, q_scale, k_scale


def test_bytes_and_scales_are_those_of_tiles_of_the_groups_size():
    mask = fps.dense_mask(fps.plan(GRID, TILE, TEXT))
    large = fps.dense_mask(fps.plan(GRID, GROUP, TEXT))
    assert large.layout.tile_sizes == ((4, 1), (6, 3), (8, 6))  # as the groups are cut
    tensors = inputs(mask.layout)
    tables = scale_groups(mask, GROUP)
    got, want = quantized(tables, *tensors), quantized(large.lists(False), *tensors)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
    assert got[2].unique().numel() > 2 * 4  # not one scale for all
    small = quantized(mask.lists(False), *tensors)
    assert not torch.equal(small[2], got[2])


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_the_pattern_stays_the_masks(backend):
    """Same tokens attended, forward and backward: with the group of a single tile the result is that of the mask, up to the order of sums."""
    layout = fps.plan(GRID, TILE, TEXT)
    mask = fps.sliding_tile_mask(layout, (1, 2, 3))
    tensors = [x.requires_grad_() for x in inputs(layout)]
    plain = attend(*tensors, mask, tensor_layout="HND", backend=backend)[0]
    grouped = attend(*tensors, scale_groups(mask, TILE, backward=True), tensor_layout="HND", backend=backend)[0]
    torch.testing.assert_close(grouped, plain, rtol=1e-4, atol=1e-5)
    gradients = [torch.autograd.grad(out.square().sum(), tensors) for out in (plain, grouped)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)

    coarse = attend(*tensors, scale_groups(mask, GROUP, backward=True), tensor_layout="HND", backend=backend)[0]
    exact = torch.nn.functional.scaled_dot_product_attention(*tensors, mask.to_token_mask())
    assert (coarse - plain).abs().max() > 0
    assert (coarse - exact).abs().sum() / exact.abs().sum() < 0.09  # FP8, q over a range of 4
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(coarse.sum(), tensors))


def test_lists_of_the_user_may_hold_anything_beyond_their_length():
    layout = fps.plan(GRID, TILE)
    mask = fps.sliding_tile_mask(layout, (1, 2, 3))
    indices = torch.nn.functional.pad(mask.kv_indices, (0, 3), value=-7)
    padded = fps.BlockMask(layout, mask.kv_num_blocks, indices)
    tensors = inputs(layout)
    a, b = (attend(*tensors, scale_groups(m, GROUP), tensor_layout="HND")[0] for m in (mask, padded))
    assert torch.equal(a, b)


@pytest.mark.parametrize("size", [(3, 6, 8), (2, 3, 6), (1, 3, 4)])
def test_sizes_that_cut_tiles_are_refused(size):
    with pytest.raises(ConfigError, match=r"scale_groups: size .* expected multiples of the tile \(2, 3, 4\)"):
        scale_groups(fps.dense_mask(fps.plan(GRID, TILE)), size)
