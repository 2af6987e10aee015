"""Heads that share K and V, keys of their own, tables per head, in the sm_90a kernels: on a Hopper GPU, or in the emulator."""

from __future__ import annotations

import pytest
import test_variants
import torch
from cases import assert_quantized
from test_sm90_ops import CUTS, DEVICE, HALVES, ON_GPU, SM90  # skips where there are no kernels
from variants import Sides, distance, repeated

import fpsattention as fps
from fpsattention.errors import ConfigError
from fpsattention.ops import reference
from fpsattention.ops.variants import attend_permuted, attend_queries


@pytest.mark.parametrize("granularity", [0, 1, 2])
@pytest.mark.parametrize(
    ("group", "dim"),
    [(1, 64), (2, 128), pytest.param(3, 64, marks=pytest.mark.slow), pytest.param(3, 96, marks=pytest.mark.slow)],
)
def test_the_ops_with_two_sides_equal_the_reference(group, dim, granularity):
    """Codes, scales, means and sums to the bit; the rest as near as two orders of one sum are. Both backwards."""
    sides = Sides(group, dim, granularity, HALVES[group % 2])
    z = [x.cpu() for x in sides.quantize(SM90, DEVICE)]
    want = sides.quantize(reference, k_mean=z[6])
    torch.testing.assert_close(z[6], sides.qkv[1].float()[:, :, ::3].mean(2), rtol=1e-5, atol=1e-5)
    assert_quantized(z, want)
    f = [x.cpu() for x in sides.forward(SM90, z, DEVICE)]
    exact = sides.forward(reference, want)
    for name, a, b in zip(exact._fields, f, exact, strict=True):
        # The output is rounded to 16 bits; where an accumulator loses bits some P are the neighbouring e4m3 value.
        assert a.shape == b.shape and distance(a, b) <= 2.0**-8 + (0.03**0.5 * 2.0**-4 if CUTS else 0.0), name
    wanted = sides.backward(reference, want, exact)
    saved = [x.cpu() for x in exact]
    for deterministic in (True, False):
        grads = sides.backward(SM90, want, saved, DEVICE, deterministic=deterministic)
        for name, a, b in zip(("dq", "dk", "dv"), grads, wanted, strict=True):
            bound = 2.0**-7 + (0.03**0.5 * 2.0**-4 if CUTS else 0.0)  # as in test_sm90_ops.py
            assert a.shape == b.shape and distance(a.cpu(), b) <= bound, (name, deterministic)


@pytest.mark.slow
def test_public_calls_and_their_gradients():
    """Grouped queries of ``fps.attention``; keys without queries; an order per head. Against repeated heads, the whole call, the reference."""
    layout = test_variants.mask_of(text=9).layout
    mask, tokens = test_variants.mask_of(text=9), layout.num_tokens
    generator = torch.Generator().manual_seed(4)
    q, k, v = (
        torch.randn(1, tokens, heads, 64, generator=generator).bfloat16().to(DEVICE).requires_grad_()
        for heads in (6, 2, 2)
    )
    options = {
        "text_len": 9,
        "block_mask": mask.to(DEVICE),
        "backend": "sm90",
        "return_lse": True,
        "deterministic": True,
    }
    out, lse = fps.attention(q, k, v, test_variants.GRID, **options)
    many = [repeated(x, 2, 3) for x in (k, v)]
    want, want_lse = fps.attention(q, *many, test_variants.GRID, **options)
    assert torch.equal(out, want) and torch.equal(lse, want_lse)
    weight = torch.randn(out.shape, generator=generator).to(DEVICE, out.dtype)
    got, wanted = (torch.autograd.grad((x * weight).sum(), (q, k, v), retain_graph=True) for x in (out, want))
    assert torch.equal(got[0], wanted[0])
    assert all(
        distance(a, b) < 2.0**-7 for a, b in zip(got[1:], wanted[1:], strict=True)
    )  # three roundings to BF16 less

    first = 70  # two frames and the text
    asked, asked_lse = attend_queries(q[:, first:], k, v, mask.to(DEVICE), first, backend="sm90", deterministic=True)
    assert torch.equal(asked, out[:, first:]) and torch.equal(asked_lse, lse[:, :, first:])
    weight[:, :first] = 0
    got = torch.autograd.grad((asked * weight[:, first:]).sum(), (q, k, v))
    wanted = torch.autograd.grad((out * weight).sum(), (q, k, v))
    assert all(distance(a, b) < 2.0**-8 for a, b in zip(got, wanted, strict=True))

    order = torch.stack([torch.randperm(tokens, generator=generator) for _ in range(2)])[None].to(DEVICE)
    two = [x[:, :, :2].detach().requires_grad_() for x in (q, k, v)]
    angles = torch.randn(tokens, 32, generator=generator).to(DEVICE)
    raw = {"norm": fps.Norm("rms_across_heads"), "rope": fps.Rope(angles.cos(), angles.sin())}
    for orders, options in (((order, order.flip(1)), {}), ((order,), raw)):
        results = [
            attend_permuted(*two, mask.to(DEVICE), *orders, backend=backend, **options)
            for backend in ("sm90", "reference")
        ]
        assert distance(results[0][0].cpu(), results[1][0].cpu()) < 0.02
        grads = [torch.autograd.grad(out.float().square().sum(), two) for out, _ in results]
        assert all(distance(a.cpu(), b.cpu()) < 0.02 for a, b in zip(*grads, strict=True))


@pytest.mark.skipif(ON_GPU, reason="values on a GPU are not read by the host")
def test_what_the_kernels_refuse():
    sides = Sides(2, 64, 0, torch.bfloat16)
    options = {"granularity": 0, "smooth_k": True, "pow2_scales": False}
    args = (*sides.qkv, *sides.tables[:2], None, None)
    with pytest.raises(ConfigError, match="kv_tile_block_offsets is missing: both or none"):
        SM90.quantize(*args, sides.tables[2], **options)
    with pytest.raises(ConfigError, match="k has 3 heads, expected a divisor of the 4 of q"):
        SM90.quantize(
            args[0],
            *(torch.cat([x, x[:, :1]], 1) for x in args[1:3]),
            *args[3:],
            sides.tables[2],
            sides.tables[3],
            **options,
        )
    with pytest.raises(ConfigError, match="kv_token_of_slot is missing"):
        SM90.quantize(*(x[:, :, :200] for x in sides.qkv), *sides.tables[:2], **options)
    broken = sides.tables[2].clone()
    broken[1, 1, 0] = sides.kv_tokens
    with pytest.raises(ConfigError, match=r"kv_token_of_slot\[1920\] is 211, expected -1 to 210"):
        SM90.quantize(*args, broken, sides.tables[3], **options)
    z = sides.quantize(reference)
    f = sides.forward(reference, z)
    with pytest.raises(ConfigError, match="num_kv_tokens is 0 and kv_token_of_slot is given: both or none"):
        SM90.backward(
            sides.grad,
            f[0],
            *z[:6],
            f[2],
            f[3],
            *sides._row_tables(),
            *sides.q_lists,
            sides.tables[2],
            softmax_scale=0.1,
        )
