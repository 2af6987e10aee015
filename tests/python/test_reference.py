"""The reference itself: against FP64, against autograd, and against hand-computed cases. No other module is involved."""

import math

import pytest
import torch

from fpsattention.ops import reference as ref

ONE_E4M3_STEP = 2.0**-4  # relative rounding error of a normal e4m3 number


def tables(sizes, seed=0):
    """Layout tables of tiles with the given token counts; tokens are dealt out in a random order."""
    generator = torch.Generator().manual_seed(seed)
    blocks = [-(-n // ref.BLOCK) for n in sizes]
    tokens = torch.randperm(sum(sizes), generator=generator).int()
    token_of_slot = torch.full((sum(blocks) * ref.BLOCK,), -1, dtype=torch.int32)
    tile_of_token = torch.empty(sum(sizes), dtype=torch.long)
    block = start = 0
    for tile, (n, b) in enumerate(zip(sizes, blocks, strict=True)):
        token_of_slot[block * ref.BLOCK : block * ref.BLOCK + n] = tokens[start : start + n]
        tile_of_token[tokens[start : start + n].long()] = tile
        block, start = block + b, start + n
    offsets = torch.tensor([0, *torch.tensor(blocks).cumsum(0).tolist()], dtype=torch.int32)
    tile_of_block = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(blocks)).int()
    return token_of_slot, offsets, tile_of_block, tile_of_token


def lists(tile_mask, offsets):
    """Block lists ``[1, 1, tiles]`` of a boolean tile x tile matrix."""
    rows = [
        [j for t in range(len(tile_mask)) if row[t] for j in range(offsets[t], offsets[t + 1])] for row in tile_mask
    ]
    width = max(map(len, rows), default=0)
    counts = torch.tensor([[[len(r) for r in rows]]], dtype=torch.int32)
    return counts, torch.tensor([[[r + [0] * (width - len(r)) for r in rows]]], dtype=torch.int32)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


SIZES = (130, 1, 97, 128)  # a tile of two blocks, a tile of one token, a prime, a full block
MASK = torch.tensor([[1, 1, 0, 1], [0, 1, 1, 0], [0, 0, 0, 0], [1, 0, 1, 1]], dtype=torch.bool)  # row 2 is empty


def problem(granularity, *, pow2=False, smooth=True, dim=64, mask=MASK, sizes=SIZES):
    token_of_slot, offsets, tile_of_block, tile_of_token = tables(sizes)
    total = sum(sizes)
    q, k, v = (randn(2, 3, total, dim, seed=s) for s in (1, 2, 3))
    k = k + 2 * randn(2, 3, 1, dim, seed=4)
    counts, indices = lists(mask, offsets)
    quantized = ref.quantize(
        q, k, v, token_of_slot, offsets, granularity=granularity, smooth_k=smooth, pow2_scales=pow2
    )
    result = ref.forward(
        *quantized.operands, token_of_slot, tile_of_block, counts, indices, num_tokens=total, softmax_scale=dim**-0.5,
        out_dtype=torch.float32, q_k_mean=quantized.q_k_mean,
    )  # fmt: skip
    token_mask = mask[tile_of_token][:, tile_of_token]
    return q, k, v, token_mask, quantized, result, (token_of_slot, tile_of_block, counts, indices)


@pytest.mark.parametrize("dim", [64, 96])
def test_block_sums_are_those_of_the_tokens_of_a_block(dim):
    token_of_slot, offsets, *_ = tables(SIZES)
    q, k, v = (randn(2, 3, sum(SIZES), dim, seed=s) for s in (1, 2, 3))
    z = ref.quantize(
        q, k + 5, v, token_of_slot, offsets, granularity=0, smooth_k=True, pow2_scales=False, block_sums=True
    )
    for x, sums in ((q, z.q_block_sum), (k + 5, z.k_block_sum)):
        for block, slots in enumerate(token_of_slot.view(-1, 128).tolist()):
            tokens = x[:, :, [t for t in slots if t >= 0]].double()
            bound = 22 * 2.0**-24 * tokens.abs().sum(2)  # of 15 + 7 additions
            assert ((sums[:, :, block] - tokens.sum(2)).abs() <= bound).all()
    without = ref.quantize(q, k, v, token_of_slot, offsets, granularity=0, smooth_k=True, pow2_scales=False)
    assert without.q_block_sum.shape == without.k_block_sum.shape == (2, 3, 0, dim)


@pytest.mark.parametrize("granularity", [ref.TILE, ref.BLOCKWISE, ref.TOKEN])
@pytest.mark.parametrize("pow2", [False, True])
def test_forward_is_close_to_fp64(granularity, pow2):
    q, k, v, mask, _, result, _ = problem(granularity, pow2=pow2)
    exact = ref.attention_fp64(q, k, v, mask)
    assert (result.out - exact).abs().sum() / exact.abs().sum() < 0.056
    scores = (q.double() @ k.double().mT * q.shape[-1] ** -0.5).masked_fill(~mask, -math.inf)
    lse = scores.logsumexp(-1)
    empty = ~mask.any(-1)
    assert (result.lse[:, :, empty] == -math.inf).all() and (result.out[:, :, empty] == 0).all()
    # A score is a sum of D products whose factors are each off by at most half an e4m3 step.
    products = (q.abs() @ k.sub(k.mean(2, keepdim=True)).abs().mT).amax() * q.shape[-1] ** -0.5
    assert (result.lse - lse)[:, :, ~empty].abs().max() < (products + 1) * ONE_E4M3_STEP


def test_smoothing_does_not_change_the_lse_it_reports():
    _, _, _, mask, _, smooth, _ = problem(ref.TILE, smooth=True)
    _, _, _, _, _, plain, _ = problem(ref.TILE, smooth=False)
    rows = mask.any(-1)
    correction = problem(ref.TILE)[4].q_k_mean.abs().max() * 64**-0.5
    # Both differ from the truth by the rounding of the scores; the correction itself is many times larger.
    assert correction > 3 and (smooth.lse - plain.lse)[:, :, rows].abs().max() < 0.15 * correction


def test_row_statistics():
    *_, result, (token_of_slot, tile_of_block, counts, _) = problem(ref.TILE)
    padding = token_of_slot < 0
    assert (result.row_max[:, :, padding] == 0).all() and (result.row_sum[:, :, padding] == 0).all()
    assert (result.row_max == result.row_max.round()).all()
    empty = (counts[0, 0][tile_of_block.long()] == 0).repeat_interleave(ref.BLOCK)
    # The largest P of a row is above 2^7 by the definition of m, and quantized upwards to at most 256.
    assert (result.row_sum[:, :, ~padding & ~empty] >= 128).all() and (result.row_sum[:, :, empty] == 0).all()


def test_one_key_returns_its_value_row():
    token_of_slot, offsets, tile_of_block, _ = tables((5, 1))
    v = randn(1, 1, 6, 64)
    counts, indices = lists([[0, 1], [0, 1]], offsets)
    z = ref.quantize(randn(1, 1, 6, 64, seed=1), randn(1, 1, 6, 64, seed=2), v, token_of_slot, offsets, granularity=0,
                     smooth_k=True, pow2_scales=False)  # fmt: skip
    out = ref.forward(*z.operands, token_of_slot, tile_of_block, counts, indices, num_tokens=6, softmax_scale=1.0,
                      out_dtype=torch.float32).out  # fmt: skip
    key = token_of_slot[ref.BLOCK].long()
    expected = ref.to_e4m3(v[0, 0, key] / z.v_scale[0, 0]).float() * z.v_scale[0, 0]
    torch.testing.assert_close(out[0, 0], expected.expand(6, 64), rtol=2e-7, atol=0)


@pytest.mark.parametrize("granularity", [ref.TILE, ref.BLOCKWISE, ref.TOKEN])
def test_backward_is_the_gradient_of_the_fake_quantized_attention(granularity):
    """Autograd through ``fake_quantize`` with the probabilities' rounding as identity too, at FP64, is what backward computes."""
    q, k, v, mask, z, result, (tos, tob, counts, indices) = problem(granularity)
    grad = randn(*q.shape, seed=9)
    dq, dk, dv = ref.backward(grad, result.out, *z.operands, result.row_max, result.row_sum, tos, tob, counts, indices,
                              softmax_scale=q.shape[-1] ** -0.5)  # fmt: skip

    def values(x8, scale):  # dequantized, in token order
        scale = scale if scale.dim() == 4 else scale.unsqueeze(-1).expand(*scale.shape, ref.BLOCK)
        flat = (x8.double() * scale.double().unsqueeze(-1)).flatten(2, 3)
        order = torch.argsort(torch.where(tos < 0, 2**30, tos))[: q.shape[2]]
        return flat[:, :, order].requires_grad_()

    qd, kd = values(z.q8, z.q_scale), values(z.k8, z.k_scale)
    v_raw, _ = ref._dequantized_v(z.v8t)
    vd = values(v_raw, torch.ones_like(z.q_scale))
    vd = (vd.detach() * z.v_scale.double().unsqueeze(2)).requires_grad_()
    ref.attention_fp64(qd, kd, vd, mask).backward(grad.double())
    for name, ours, exact in (("dq", dq, qd.grad), ("dk", dk, kd.grad), ("dv", dv, vd.grad)):
        error = (ours - exact).norm() / exact.norm()
        # What is left is the rounding of P alone: relative 2^-4 at most, uniformly spread: about 2^-4 / sqrt(3) rms.
        assert error < 0.04, (name, error.item())


def test_backward_keys_sum_to_zero():
    """sum_j dS_ij = 0, hence dK of a constant shift of K, through which the smoothing's gradient would flow, is zero."""
    q, k, v, mask, z, result, (tos, tob, counts, indices) = problem(ref.TOKEN)
    grad = randn(*q.shape, seed=9)
    _, dk, _ = ref.backward(grad, result.out, *z.operands, result.row_max, result.row_sum, tos, tob, counts, indices,
                            softmax_scale=q.shape[-1] ** -0.5)  # fmt: skip
    # The only slack is that m may have moved after a subnormal P was rounded (docs/numerics.md, backward).
    assert dk.sum(2).abs().max() < 2e-3 * dk.abs().sum(2).max()


class TestScales:
    def test_values(self):
        absmax = torch.tensor([0.0, 448.0, 1.0, 1e-40, math.inf, math.nan])
        scale = ref.scale_of(absmax, pow2=False)
        assert scale[:3].tolist() == [1.0, 1.0, torch.tensor(1.0).div(448).item()]
        assert scale[3] == 2.0**-100 and scale[4].isnan() and scale[5].isnan()

    def test_pow2_rounds_up_and_keeps_powers(self):
        scale = ref.scale_of(torch.tensor([448.0, 448.0 * 1.0001, 448.0 * 0.75, 448.0 * 2**-7]), pow2=True)
        assert scale.tolist() == [1.0, 2.0, 1.0, 2.0**-7]

    def test_saturation_ties_and_nan(self):
        x = torch.tensor([1e9, -1e9, 464.0, 17.0, 19.0, 2.0**-10, 3 * 2.0**-10, math.nan])
        out = ref.to_e4m3(x).float()
        # 17 lies halfway between 16 and 18, 19 between 18 and 20; 2^-10 is half the smallest subnormal
        assert out[:7].tolist() == [448.0, -448.0, 448.0, 16.0, 20.0, 0.0, 2.0**-8] and out[7].isnan()


@pytest.mark.parametrize("which", ["q", "k", "v"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bad_value_is_never_silently_finite(which, bad):
    token_of_slot, offsets, tile_of_block, tile_of_token = tables(SIZES)
    total, dim = sum(SIZES), 64
    x = {name: randn(1, 1, total, dim, seed=i) for i, name in enumerate("qkv")}
    victim = int(token_of_slot[3])  # a token of tile 0
    x[which][0, 0, victim, 5] = bad
    counts, indices = lists(MASK, offsets)
    z = ref.quantize(
        x["q"], x["k"], x["v"], token_of_slot, offsets, granularity=ref.TOKEN, smooth_k=False, pow2_scales=False
    )
    result = ref.forward(*z.operands, token_of_slot, tile_of_block, counts, indices, num_tokens=total, softmax_scale=0.125,
                         out_dtype=torch.float32)  # fmt: skip
    out = result.out[0, 0]
    if which == "q":
        assert out[victim].isnan().all() and torch.isfinite(out[torch.arange(total) != victim]).all()
    elif which == "k":  # every row that attends the key; no other
        attends = MASK[tile_of_token, 0]
        assert out[attends].isnan().all() and torch.isfinite(out[~attends]).all()
    else:  # the scale of a channel of V belongs to all keys: the channel, and no other, is lost
        rows = MASK[tile_of_token].any(-1)
        assert out[rows][:, 5].isnan().all() and torch.isfinite(out[:, torch.arange(dim) != 5]).all()


def test_v_slot_order_round_trip():
    values = torch.arange(128.0).view(1, 1, 1, 128, 1)
    order = torch.arange(128).view(-1, 16)[:, list(ref.V_SLOT_ORDER)].reshape(-1)
    v8t = torch.zeros(1, 1, 1, 9, 128)
    v8t[..., 0, :] = values[..., order, 0].remainder(16)  # e4m3 holds small integers exactly
    assert sorted(ref.V_SLOT_ORDER) == list(range(16))
    raw, _ = ref._dequantized_v(v8t.to(torch.float8_e4m3fn))
    assert raw[0, 0, 0, :, 0].tolist() == [i % 16 for i in range(128)]


def test_the_exact_attention_passes_finite_differences():
    """The gradients that the tests above compare with are themselves right: autograd against central differences, FP64."""
    mask = torch.tensor([[1, 1, 0, 1], [0, 1, 1, 0], [0, 0, 0, 0], [1, 0, 1, 1]], dtype=torch.bool)
    tensors = [randn(1, 1, 4, 5, seed=s).double().requires_grad_() for s in (1, 2, 3)]
    assert torch.autograd.gradcheck(lambda q, k, v: ref.attention_fp64(q, k, v, mask), tensors)


def test_values_beyond_a_given_v_absmax_saturate_and_infinities_do_not():
    token_of_slot, offsets, *_ = tables((5,))
    v = torch.ones(1, 1, 5, 64)
    v[0, 0, 1, 0], v[0, 0, 2, 1] = 100.0, math.inf
    z = ref.quantize(
        v, v, v, token_of_slot, offsets, None, torch.ones(1, 1, 64), granularity=0, smooth_k=False, pow2_scales=False
    )
    raw, _ = ref._dequantized_v(z.v8t)
    slot = {int(t): s for s, t in enumerate(token_of_slot.tolist()) if t >= 0}
    assert raw[0, 0, 0, slot[1], 0] == 448 and not torch.isfinite(raw[0, 0, 0, slot[2], 1])


TAIL = 11  # the last code that may belong to the tail
SUBNORMAL_STEP = 2.0**-9


def code_grid():
    """Every FP16 value of h (docs/numerics.md, "Codes by arithmetic") as an exponent y, and what lies between two of them: ties, and next to ties."""
    steps = torch.arange(-8, 545, dtype=torch.double)  # to y = 8.75
    between = torch.tensor([0.0, 0.25, 0.5 - 2.0**-13, 0.5, 0.5 + 2.0**-13, 0.75], dtype=torch.double)
    return ((steps[:, None] + between - 264.125) / 32).flatten()


def test_exponent_codes_are_near_the_exponential():
    y = code_grid()
    steps = torch.round(y * 32 + 264.125).clamp(0, 547).long()  # half to even
    inner = (steps + 15) // 16 % 2 == 0
    quarters = steps - 86 - inner.long()  # of a code, from the border of the tail on
    tail = torch.round(quarters.double() / 2).long()  # half to even
    codes = ref.exponent_codes(y)
    assert torch.equal(codes.long(), (torch.where(quarters < 0, tail, quarters) + 46) // 4)
    assert int(codes.max()) == 126 and int(codes.min()) == 0
    assert set(codes.int().diff().tolist()) == {0, 1}
    p, want = codes.view(torch.float8_e4m3fn).double(), torch.exp2(y)
    main = (codes > TAIL) & (y <= 8)
    assert float((p / want - 1)[main].abs().max()) < 0.075
    assert float((p - want)[~main & (y < 0)].abs().max()) < 2.25 * SUBNORMAL_STEP
    special = torch.tensor([8.0, 8.0 + 2.0**-20, 9.0, 1e30, math.inf, -8.25, -9.0, -1e30, -math.inf, math.nan])
    assert ref.exponent_codes(special).tolist() == [120, 120, 126, 126, 126, 0, 0, 0, 0, 0]


def test_a_code_is_eight_less_where_the_maximum_is_one_more():
    """The code of 2^(y - n) is that of 2^y less 8 n, down to the tail: the running maximum does not matter. On all of the grid."""
    y = code_grid()
    codes = ref.exponent_codes(y)
    p = codes.view(torch.float8_e4m3fn).double()
    for n in range(1, 17):
        lower = ref.exponent_codes(y - n)
        main = codes.int() - 8 * n > TAIL
        assert torch.equal(lower.int()[main], codes.int()[main] - 8 * n) and not bool((lower > TAIL)[~main].any()), n
        difference = (lower.view(torch.float8_e4m3fn).double() - p * 2.0**-n).abs()
        assert float(difference[~main].max()) <= 2 * SUBNORMAL_STEP, n
    # A grid that grows coarser with y, as FP16 has it around y itself, does not do that.
    coarse = ref.exponent_codes(y.half().double()).int()
    lower = ref.exponent_codes((y - 4).half().double()).int()
    main = coarse - 32 > TAIL
    assert not torch.equal(lower[main], (coarse - 32)[main])


@pytest.mark.parametrize("dim", [64, 128])
def test_probabilities_keep_nan_in_every_slot(dim):
    y = torch.full((ref.BLOCK, ref.BLOCK), 3.0).fill_diagonal_(math.nan)
    assert torch.equal(ref.probabilities(y, dim).isnan(), y.isnan())
