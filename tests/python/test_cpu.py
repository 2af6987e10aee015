"""The CPU kernels against the reference: bytes exactly, attention to rounding."""

import pytest
import torch
from cases import CASES, IDS, NARROW, Case, assert_quantized, same_bytes

from fpsattention.ops import cpu, reference

GRANULARITIES = [0, 1, 2]


def quantized(case, granularity, dtype=torch.float32, seed=0, **options):
    layout = case.layout()
    q, k, v = (x.transpose(1, 2) for x in case.inputs(dtype, seed))
    options = {"granularity": granularity, "smooth_k": True, "pow2_scales": False, **options}
    return (
        layout,
        (q, k, v),
        reference.quantize(q, k, v, layout.token_of_slot, layout.tile_block_offsets, **options),
        options,
    )


@pytest.mark.parametrize("case", [*CASES, NARROW], ids=[*IDS, NARROW.name])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize(
    "options", [{}, {"pow2_scales": True, "block_sums": True}, {"smooth_k": False}], ids=["plain", "pow2", "raw_k"]
)
def test_quantize_is_bit_exact(case, granularity, options):
    layout, qkv, want, options = quantized(case, granularity, torch.bfloat16, **options)
    if options["smooth_k"]:
        options["k_mean"] = want.k_mean  # its summation order is free, everything after it is not
    got = cpu.quantize(*qkv, layout.token_of_slot, layout.tile_block_offsets, **options)
    assert_quantized(got, want)


def test_quantize_computes_the_strided_mean_and_repeats_its_bits():
    layout, (q, k, v), *_ = quantized(CASES[2], 0)
    runs = [
        cpu.quantize(
            q,
            k,
            v,
            layout.token_of_slot,
            layout.tile_block_offsets,
            granularity=0,
            smooth_k=True,
            pow2_scales=False,
            k_mean_stride=3,
        )
        for _ in range(2)
    ]
    torch.testing.assert_close(runs[0][6], k[:, :, ::3].mean(2), rtol=1e-5, atol=1e-6)
    assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_quantize_of_bad_values(bad, which):
    case = CASES[4]
    layout, qkv, *_ = quantized(case, 0)
    qkv[which][0, 1, 5, 7] = bad
    options = {"granularity": 1, "smooth_k": False, "pow2_scales": False}
    tables = (layout.token_of_slot, layout.tile_block_offsets)
    for a, b in zip(cpu.quantize(*qkv, *tables, **options), reference.quantize(*qkv, *tables, **options), strict=True):
        if a.dtype == torch.float8_e4m3fn:
            assert same_bytes(a, b)
        else:
            torch.testing.assert_close(a, b, equal_nan=True)


@pytest.mark.parametrize("case", CASES, ids=IDS)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_forward_and_backward_equal_the_reference(case, granularity):
    layout, (q, _, _), z, _ = quantized(case, granularity)
    mask = case.mask()
    lists = (layout.token_of_slot, layout.tile_of_block, mask.kv_num_blocks, mask.kv_indices)
    options = {
        "num_tokens": layout.num_tokens,
        "softmax_scale": case.dim**-0.5,
        "out_dtype": torch.float32,
        "q_k_mean": z.q_k_mean,
    }
    want = reference.forward(*z.operands, *lists, **options)
    got = cpu.forward(*z.operands, *lists, **options)
    # Equal but for FP32 rounding. A score off by one ulp can move a P across a rounding boundary by one e4m3 step, 2^-3 of
    # itself at most; that is rare, so nearly all elements agree to FP32 rounding and none is off by more than such steps explain.
    difference, size = (got[0] - want.out).abs(), want.out.abs().max()
    assert (difference > 2e-5 * size).float().mean() < 0.02
    assert difference.max() < 2**-4 * size
    torch.testing.assert_close(got[1], want.lse, rtol=1e-4, atol=2e-4)
    assert (
        got[2] != want.row_max
    ).float().mean() < 1e-3  # a maximum within an ulp of an integer may round up in one of them
    same = got[2] == want.row_max
    torch.testing.assert_close(got[3][same], want.row_sum[same], rtol=2e-3, atol=0)

    grad = torch.randn(want.out.shape, generator=torch.Generator().manual_seed(5))
    saved = (*z.operands, want.row_max, want.row_sum, *lists)
    ours = cpu.backward(grad, want.out, *saved, softmax_scale=case.dim**-0.5)
    theirs = reference.backward(grad, want.out, *saved, softmax_scale=case.dim**-0.5)
    for name, a, b in zip(("dq", "dk", "dv"), ours, theirs, strict=True):
        assert (a - b).abs().sum() <= 1e-4 * b.abs().sum() + 1e-5, name


def test_empty_rows_and_per_head_lists():
    case = Case("rows", (2, 8, 24), (2, 8, 8), heads=3)
    layout, _, z, _ = quantized(case, 0)
    counts = torch.tensor([[[3, 0, 1], [0, 0, 0], [1, 1, 1]]], dtype=torch.int32)
    indices = torch.tensor(
        [[[[2, 0, 1], [0, 0, 0], [1, 0, 0]], [[0, 0, 0]] * 3, [[2, 0, 0], [0, 0, 0], [1, 0, 0]]]], dtype=torch.int32
    )
    lists = (layout.token_of_slot, layout.tile_of_block, counts, indices)
    options = {"num_tokens": layout.num_tokens, "softmax_scale": 0.125, "out_dtype": torch.float32}
    want, got = reference.forward(*z.operands, *lists, **options), cpu.forward(*z.operands, *lists, **options)
    torch.testing.assert_close(got[0], want.out, rtol=1e-3, atol=2e-3)
    assert (got[0][:, 1] == 0).all() and (got[1][:, 1] == -torch.inf).all()
    assert torch.equal(got[0] == 0, want.out == 0) and torch.equal(got[1].isinf(), want.lse.isinf())


@pytest.mark.parametrize("granularity", [0, 2])
@pytest.mark.parametrize("magnitude", [1e3, 1e4, 1e6])
def test_huge_scores_are_attention_and_not_nan(magnitude, granularity):
    """Scores of 1e6 to 1e13: FP32 rounds them by more than P spans. The winner takes all, as in dense attention."""
    case = CASES[3]
    layout, mask = case.layout(), case.mask()
    q, k, v = (x.transpose(1, 2) for x in case.inputs())
    z = reference.quantize(
        q * magnitude, k * magnitude, v, layout.token_of_slot, layout.tile_block_offsets,
        granularity=granularity, smooth_k=False, pow2_scales=True,
    )  # fmt: skip
    lists = (layout.token_of_slot, layout.tile_of_block, mask.kv_num_blocks, mask.kv_indices)
    options = {"num_tokens": layout.num_tokens, "softmax_scale": case.dim**-0.5, "out_dtype": torch.float32}
    want = reference.forward(*z.operands, *lists, **options)
    slots = layout.slot_of_token.long()
    q8, k8 = (
        (x.float() * reference._per_slot(s).unsqueeze(-1)).flatten(2, 3)[:, :, slots]
        for x, s in ((z.q8, z.q_scale), (z.k8, z.k_scale))
    )
    v8 = (reference._dequantized_v(z.v8t)[0] * z.v_scale[:, :, None, None]).flatten(2, 3)[:, :, slots]
    exact = reference.attention_fp64(q8, k8, v8, mask.to_token_mask())
    for out, lse, row_max, row_sum in (want, cpu.forward(*z.operands, *lists, **options)):
        assert (out - exact).abs().max() <= 2.0**-4 * v.abs().max()
        assert not lse.isnan().any() and row_sum.max() <= 512
        grads = cpu.backward(out, out, *z.operands, row_max, row_sum, *lists, softmax_scale=case.dim**-0.5)
        assert all(bool(g.isfinite().all()) for g in grads)
