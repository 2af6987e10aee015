"""The sm_90a kernels on tokens that are in tile order already: the same bits, row by row. Where: see test_sm90_ops.py."""

import pytest
import torch
from test_sm90_ops import SM90, on_device  # skips where there are no kernels

import fpsattention as fps


@pytest.mark.parametrize("text", [(0, "suffix"), (19, "suffix"), (19, "prefix")], ids=["video", "suffix", "prefix"])
def test_tile_order_is_the_same_to_the_bit(text):
    layout = fps.plan((3, 7, 11), (2, 7, 6), *text)
    first = text[0] if text[1] == "prefix" else 0
    index = torch.arange(layout.num_tokens)
    index[first : first + layout.num_video_tokens] = first + layout.to_tile_order()
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, layout.num_tokens, 2, 64, generator=generator).bfloat16().transpose(1, 2) for _ in range(3)
    )
    mean = k.float().mean(2)
    results = []
    for tokens, order in ((layout, torch.arange(layout.num_tokens)), (layout.in_tile_order(), index)):
        mask = fps.sliding_tile_mask(tokens, (1, 1, 2))
        tables = on_device(
            tokens.token_of_slot, tokens.tile_of_block, tokens.tile_block_offsets, *mask.lists(False)[3:5]
        )
        token_of_slot, tile_of_block, offsets, counts, indices = tables
        z = SM90.quantize(
            *on_device(*(x[:, :, order] for x in (q, k, v)), token_of_slot, offsets, mean),
            granularity=1, smooth_k=True, pow2_scales=False,
        )  # fmt: skip
        out, lse, *_ = SM90.forward(
            *z[:6], token_of_slot, tile_of_block, counts, indices, z[7],
            num_tokens=layout.num_tokens, softmax_scale=0.125, out_dtype=torch.bfloat16,
        )  # fmt: skip
        results.append(([x.cpu() for x in z[:6]], out.cpu(), lse.cpu()))
    (raster, out, lse), (ordered, out_ordered, lse_ordered) = results
    for a, b in zip(raster, ordered, strict=True):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))
    assert torch.equal(out[:, :, index], out_ordered) and torch.equal(lse[:, :, index], lse_ordered)
