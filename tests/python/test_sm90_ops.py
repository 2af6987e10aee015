"""The sm_90a kernels through the torch ops, against the reference.

Run on a Hopper GPU, or on CPU tensors with FPSATTN_SM90_ON_HOST=1 in a process whose CUDA runtime is an emulator. Skipped elsewhere.
"""

import os

import pytest
import torch
from cases import CASES, IDS, NARROW, Case, assert_quantized, same_bytes
from fp8_accumulator import forward_bounds

import fpsattention as fps
from fpsattention.errors import ConfigError, UnsupportedError
from fpsattention.ops import core as ops
from fpsattention.ops import reference
from fpsattention.ops.norm_rope import NORMS

ON_GPU = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
if ops.sm90_missing():
    pytest.skip(f"no sm_90a kernels: {ops.sm90_missing()}", allow_module_level=True)
if not (ON_GPU or ops.sm90_on_host()):
    pytest.skip("neither a Hopper GPU nor FPSATTN_SM90_ON_HOST=1 (emulator)", allow_module_level=True)
DEVICE = "cuda" if ON_GPU else "cpu"
SM90 = torch.ops.fpsattn  # on CPU tensors too, where device code runs on the host
HALVES = [torch.bfloat16, torch.float16]
DTYPES = [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)]
# An emulator adds e4m3 products exactly unless told otherwise.
CUTS = ON_GPU or "fp8-acc=truncated" in os.environ.get("HOPPER_EMU_OPTS", "")


def inputs(case, dtype, seed=0):
    return tuple(x.transpose(1, 2) for x in case.inputs(dtype, seed))


def on_device(*tensors):
    return tuple(t.to(DEVICE) if isinstance(t, torch.Tensor) else t for t in tensors)


@pytest.mark.parametrize("case", [*CASES, NARROW], ids=[*IDS, NARROW.name])
@pytest.mark.parametrize("granularity", [0, 1, 2])
@pytest.mark.parametrize(
    ("dtype", "pow2"), [(torch.bfloat16, False), pytest.param(torch.float16, True, marks=pytest.mark.slow)]
)
def test_quantize_is_bit_exact(case, granularity, dtype, pow2):
    layout = case.layout()
    qkv = inputs(case, dtype)
    options = {
        "granularity": granularity,
        "smooth_k": True,
        "pow2_scales": pow2,
        "k_mean_stride": 2,
        "block_sums": pow2,
    }
    got = SM90.quantize(*on_device(*qkv, layout.token_of_slot, layout.tile_block_offsets), **options)
    got = [x.cpu() for x in got]
    mean = qkv[1].float()[:, :, ::2].mean(2)
    torch.testing.assert_close(got[6], mean, rtol=1e-5, atol=1e-5)
    want = reference.quantize(*qkv, layout.token_of_slot, layout.tile_block_offsets, k_mean=got[6], **options)
    assert_quantized(got, want)


@pytest.mark.parametrize("kind", NORMS.values(), ids=NORMS)
@pytest.mark.parametrize("case", [CASES[3], CASES[4], NARROW], ids=["d128", "d64_text", "d96_text"])
@pytest.mark.parametrize("halves", [False, True], ids=["pairs", "halves"])
def test_prepare_is_bit_exact(case, kind, halves):
    """Of views of one projection, with all that a norm can have, against the reference."""
    layout = case.layout()
    generator = torch.Generator().manual_seed(7)
    dtype, granularity = ((torch.float16, 2), (torch.bfloat16, 0), (torch.bfloat16, 1))[kind % 3]

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    fused = (3 * randn(case.batch, layout.num_tokens, 3, case.heads, case.dim) + 0.5).to(dtype)
    channels = case.dim * (case.heads if kind == NORMS["rms_across_heads"] else 1)
    all_rotated = (kind + halves) % 2 == 1  # text, too, and another run of tokens has the first row of weights
    rows = 1 + (halves or all_rotated)
    parameters = [1 + 0.3 * randn(rows, channels) if kind else None for _ in range(2)]
    parameters += [0.3 * randn(rows, channels) if kind == NORMS["layer"] else None for _ in range(2)]
    rotated = layout.num_tokens - (0 if all_rotated else case.text_len)
    angles = 4 * randn(case.batch, case.heads if halves else 1, rotated, case.dim // 2)
    args = (layout.token_of_slot, layout.tile_block_offsets, *parameters, angles.cos(), angles.sin())
    first = 0 if all_rotated else case.text_len // 2
    options = {"norm": kind, "eps": 1e-5, "rope_halves": halves, "first_rotated": first}
    options |= {"weights_begin": 5, "weights_end": layout.num_tokens - 3} if all_rotated else {}
    options |= {"granularity": granularity, "smooth_k": True, "pow2_scales": False, "k_mean_stride": 2}
    options["block_sums"] = True
    qkv = [x.transpose(1, 2) for x in fused.to(DEVICE).unbind(2)]
    got = [x.cpu() for x in SM90.prepare(*qkv, *on_device(*args), **options)]
    qkv = [x.cpu() for x in qkv]
    computed = reference.prepare(*qkv, *args, **options)
    torch.testing.assert_close(got[6], computed.k_mean, rtol=1e-5, atol=1e-5)
    want = reference.prepare(*qkv, *args, k_mean=got[6], **options)
    assert_quantized(got, want)


def test_prepare_across_many_heads_is_bit_exact():
    """Full steps of the kernel that sums the squares of a token over its heads, and the rest of 3 heads."""
    test_prepare_is_bit_exact(Case("many_heads", (1, 3, 7), heads=11, dim=96), NORMS["rms_across_heads"], False)


def test_attention_of_raw_projections_and_its_gradients():
    case = Case("raw", (3, 5, 7), (3, 4, 4), (1, 1, 2), text_len=3, dim=128)
    host = [x.requires_grad_() for x in case.inputs(torch.bfloat16)]
    device = [x.detach().to(DEVICE).requires_grad_() for x in host]
    angles = torch.randn(105, 64, generator=torch.Generator().manual_seed(2))
    results = []
    for tensors, backend in ((host, "reference"), (device, "sm90")):
        weight = torch.linspace(0.5, 1.5, 256, device=tensors[0].device, requires_grad=True)
        norm = fps.Norm("rms_across_heads", weight, weight)
        rope = fps.Rope(angles.cos().to(weight.device), angles.sin().to(weight.device))
        out = fps.attention(*tensors, norm=norm, rope=rope, backend=backend, **case.kwargs())
        grads = torch.autograd.grad(out.float().square().sum(), [*tensors, weight])
        results.append([x.float().cpu() for x in (out, *grads)])
    for name, a, b in zip(("out", "dq", "dk", "dv", "dw"), *results, strict=True):
        assert (a - b).norm() <= 0.02 * b.norm(), name


def test_quantize_takes_views_of_a_fused_projection_and_odd_strides():
    case = CASES[4]
    layout = case.layout()
    fused = torch.randn(
        1, layout.num_tokens, 3, case.heads, case.dim, generator=torch.Generator().manual_seed(1)
    ).bfloat16()
    tables = (layout.token_of_slot, layout.tile_block_offsets)
    options = {"granularity": 0, "smooth_k": False, "pow2_scales": False}
    views = [x.transpose(1, 2) for x in fused.to(DEVICE).unbind(2)]
    odd = torch.zeros(
        *fused.shape[:-1], case.dim + 3, dtype=torch.bfloat16, device=DEVICE
    )  # rows 16-byte loads cannot read
    odd[..., : case.dim] = fused.to(DEVICE)
    odd = [x.transpose(1, 2) for x in odd[..., : case.dim].unbind(2)]
    want = reference.quantize(*(x.transpose(1, 2) for x in fused.unbind(2)), *tables, **options)
    for tensors in (views, odd):
        got = SM90.quantize(*tensors, *on_device(*tables), **options)
        assert all(same_bytes(a.cpu(), b) for a, b in zip(got[:3], want[:3], strict=True))


@pytest.mark.parametrize("case", CASES, ids=IDS)
@pytest.mark.parametrize("granularity", [0, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_is_as_accurate_as_the_reference(case, granularity, dtype):
    layout, mask = case.layout(), case.mask()
    q, k, v = inputs(case, dtype)
    z = reference.quantize(
        q,
        k,
        v,
        layout.token_of_slot,
        layout.tile_block_offsets,
        granularity=granularity,
        smooth_k=True,
        pow2_scales=False,
    )
    lists = (layout.token_of_slot, layout.tile_of_block, mask.kv_num_blocks, mask.kv_indices)
    options = {"num_tokens": layout.num_tokens, "softmax_scale": case.dim**-0.5, "out_dtype": dtype}
    want = reference.forward(*z.operands, *lists, z.q_k_mean, **options)
    out, lse, row_max, row_sum = (x.cpu() for x in SM90.forward(*on_device(*z.operands, *lists, z.q_k_mean), **options))
    exact = reference.attention_fp64(q, k, v, mask.to_token_mask())
    ours, theirs = (out.double() - exact).abs(), (want.out.double() - exact).abs()
    assert ours.sum() <= 1.05 * theirs.sum() + 1e-6
    bounds = forward_bounds(z, *lists[1:], softmax_scale=case.dim**-0.5, cuts=CUTS)
    assert beyond(bounds, (out, lse, row_max, row_sum), want, layout) == []


@pytest.mark.parametrize("case", [*(CASES[i] for i in (0, 1, 3, 5)), NARROW], ids=lambda case: case.name)
def test_fp32_output_is_the_one_that_is_rounded(case):
    """Of BF16 inputs: rounded once it is the 16-bit outputs, bit for bit; and it keeps what they lose."""
    layout, mask = case.layout(), case.mask()
    options = {"granularity": 0, "smooth_k": True, "pow2_scales": False}
    z = reference.quantize(*inputs(case, torch.bfloat16), layout.token_of_slot, layout.tile_block_offsets, **options)
    lists = (layout.token_of_slot, layout.tile_of_block, mask.kv_num_blocks, mask.kv_indices)
    options = {"num_tokens": layout.num_tokens, "softmax_scale": case.dim**-0.5}
    operands = on_device(*z.operands, *lists, z.q_k_mean)
    wide, *statistics = (x.cpu() for x in SM90.forward(*operands, **options, out_dtype=torch.float32))
    assert wide.dtype == torch.float32 and wide.transpose(1, 2).is_contiguous()
    for dtype in HALVES:
        narrow, *others = (x.cpu() for x in SM90.forward(*operands, **options, out_dtype=dtype))
        assert torch.equal(wide.to(dtype), narrow) and not torch.equal(wide, narrow.float())
        assert all(torch.equal(a, b) for a, b in zip(statistics, others, strict=True))
    if case != NARROW:  # whose 16-bit outputs test_head_dim_96_has_the_bits_of_the_padded_one looks at
        want = reference.forward(*z.operands, *lists, z.q_k_mean, **options, out_dtype=torch.float32)
        bounds = forward_bounds(z, *lists[1:], softmax_scale=case.dim**-0.5, cuts=CUTS)
        assert beyond(bounds, (wide, *statistics), want, layout) == []


def beyond(bounds, got, want, layout):
    """Names of the outputs of forward that differ from ``want`` by more than ``bounds`` allow."""
    out, lse, row_max, row_sum = got
    slots = layout.slot_of_token.long()
    eps, tiny = torch.finfo(out.dtype).eps, torch.finfo(out.dtype).smallest_normal * torch.finfo(out.dtype).eps
    rounding = eps * want.out.double().abs() + tiny  # half a step each, of two roundings
    at_our_max = row_sum.double() * torch.exp2((row_max - want.row_max).double())
    off = {
        "out": (out.double() - want.out.double()).abs() - (bounds.out[:, :, slots] + rounding),
        "lse": (lse - want.lse).double().abs() - (bounds.relative_sum[:, :, slots] + 2.0**-21 * (1 + want.lse.abs())),
        "row_sum": (at_our_max - want.row_sum.double()).abs() - (bounds.row_sum + 2.0**-21 * want.row_sum),
        "row_max": (row_max - want.row_max).abs() - (~bounds.sure_max).float(),
    }
    return [name for name, x in off.items() if not bool((x <= 0).all())]


@pytest.mark.parametrize("case", CASES[2:6], ids=IDS[2:6])
def test_the_bounds_of_forward_find_planted_errors(case):
    layout, mask = case.layout(), case.mask()
    q, k, v = inputs(case, torch.bfloat16)
    z = reference.quantize(
        q, k, v, layout.token_of_slot, layout.tile_block_offsets, granularity=0, smooth_k=True, pow2_scales=False
    )
    lists = (layout.token_of_slot, layout.tile_of_block, mask.kv_num_blocks, mask.kv_indices)
    options = {"num_tokens": layout.num_tokens, "out_dtype": torch.bfloat16}
    want = reference.forward(*z.operands, *lists, softmax_scale=case.dim**-0.5, **options)
    bounds = forward_bounds(z, *lists[1:], softmax_scale=case.dim**-0.5, cuts=True)
    assert beyond(bounds, want, want, layout) == []
    # Scores 2 % too large; the last block of every list forgotten; two neighbours of V in each other's slot.
    scaled = reference.forward(*z.operands, *lists, softmax_scale=1.02 * case.dim**-0.5, **options)
    assert "out" in beyond(bounds, scaled, want, layout)
    shorter = (*lists[:2], (lists[2] - 1).clamp_min(1), lists[3])
    if bool((lists[2] > 1).any()):
        forgetful = reference.forward(*z.operands, *shorter, softmax_scale=case.dim**-0.5, **options)
        assert {"out", "lse", "row_sum"} <= set(beyond(bounds, forgetful, want, layout))
    v8t = z.v8t.clone().view(torch.uint8)
    v8t[..., :-8, 4:6] = v8t[..., :-8, [5, 4]]
    swapped = reference.forward(
        z.q8, z.k8, v8t.view(z.v8t.dtype), *z[3:6], *lists, softmax_scale=case.dim**-0.5, **options
    )
    assert beyond(bounds, swapped, want, layout) == ["out"]


@pytest.mark.parametrize("magnitude", [1e3, 1e4, 1e6])
def test_huge_scores_are_attention_and_not_nan(magnitude):
    """Scores of 1e6 to 1e13: FP32 rounds them by more than P spans. The winner takes all, as in dense attention."""
    case = CASES[3]
    layout, mask = case.layout(), case.mask()
    q, k, v = inputs(case, torch.bfloat16)
    q, k = (x.float().mul(magnitude).bfloat16() for x in (q, k))
    z = reference.quantize(
        q, k, v, layout.token_of_slot, layout.tile_block_offsets, granularity=0, smooth_k=False, pow2_scales=True
    )
    lists = (layout.token_of_slot, layout.tile_of_block, mask.kv_num_blocks, mask.kv_indices)
    options = {"num_tokens": layout.num_tokens, "softmax_scale": case.dim**-0.5, "out_dtype": torch.bfloat16}
    want = reference.forward(*z.operands, *lists, **options)
    operands = on_device(*z.operands, *lists)
    out, lse, row_max, row_sum = SM90.forward(*operands, **options)
    # Where an accumulator drops bits, the winner may be a runner-up whose score is 2^-9 of the largest away.
    wrong = ((out.cpu().float() - want.out.float()).abs() > 2.0**-6 * want.out.abs().float().amax()).any(-1)
    assert not out.isnan().any() and wrong.float().mean() <= (0.02 if CUTS else 0.0)
    assert (lse.cpu() - want.lse).abs().max() <= (2.0**-9 if CUTS else 2.0**-20) * want.lse.abs().max()
    grads = SM90.backward(
        out, out, *operands[:6], row_max, row_sum, *operands[6:], *on_device(*mask.transpose()),
        softmax_scale=case.dim**-0.5, deterministic=True,
    )  # fmt: skip
    assert all(bool(g.isfinite().all()) for g in grads)


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("case", CASES[1:6], ids=IDS[1:6])
@pytest.mark.parametrize("dtype", DTYPES)
def test_backward_equals_the_reference(case, dtype, deterministic):
    layout, mask = case.layout(), case.mask()
    q, k, v = inputs(case, dtype)
    z = reference.quantize(
        q, k, v, layout.token_of_slot, layout.tile_block_offsets, granularity=0, smooth_k=True, pow2_scales=True
    )
    lists = (layout.token_of_slot, layout.tile_of_block, mask.kv_num_blocks, mask.kv_indices)
    scale = case.dim**-0.5
    f = reference.forward(*z.operands, *lists, num_tokens=layout.num_tokens, softmax_scale=scale, out_dtype=dtype)
    grad = torch.randn(f.out.shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    args = (grad, f.out, *z.operands, f.row_max, f.row_sum, *lists)
    want = reference.backward(*args, softmax_scale=scale)
    runs = [
        [
            x.cpu()
            for x in SM90.backward(
                *on_device(*args, *mask.transpose()), softmax_scale=scale, deterministic=deterministic
            )
        ]
        for _ in range(2 if deterministic else 1)
    ]
    for name, a, b in zip(("dq", "dk", "dv"), runs[0], want, strict=True):
        # V~, dO, P and dS enter the tensor cores in BF16 and the result is rounded once more, each 2^-9 of itself. Where an
        # accumulator loses bits, some P are the neighbouring e4m3 value: 3 % of them, by 2^-4.
        bound = 2.0**-7 + (0.03**0.5 * 2.0**-4 if CUTS else 0.0)
        assert a.dtype == dtype and (a.float() - b).norm() <= bound * b.norm(), name
    if deterministic:
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_head_dim_96_has_the_bits_of_the_padded_one():
    """Forward and backward through the public function, on views of one projection of 96 columns a head."""
    case = NARROW
    fused = torch.randn(1, case.layout().num_tokens, 3, case.heads, 96, generator=torch.Generator().manual_seed(5))
    narrow = [x.requires_grad_() for x in fused.bfloat16().to(DEVICE).unbind(2)]
    wide = [torch.nn.functional.pad(x.detach(), (0, 32)).requires_grad_() for x in narrow]
    results = []
    for tensors in (narrow, wide):
        out, lse = fps.attention(*tensors, scale=0.1, return_lse=True, deterministic=True, **case.kwargs())
        assert out.shape == tensors[0].shape
        grads = torch.autograd.grad(out.float().square().sum(), tensors)
        results.append([out[..., :96], lse, *(g[..., :96] for g in grads)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dim", [128, 96, 80])
def test_public_function_and_its_gradients(dim):
    case = Case("public", (4, 9, 10), (4, 5, 5), (1, 2, 1), text_len=9, batch=2, dim=dim)
    host = [x.requires_grad_() for x in case.inputs(torch.bfloat16)]
    device = [x.detach().to(DEVICE).requires_grad_() for x in host]
    results = []
    for tensors, backend in ((host, "reference"), (device, "sm90")):
        out, lse = fps.attention(*tensors, backend=backend, return_lse=True, **case.kwargs())
        grads = torch.autograd.grad(out.float().square().sum(), tensors)
        results.append([x.float().cpu() for x in (out, lse, *grads)])
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), *results, strict=True):
        assert (a - b).norm() <= 0.02 * b.norm(), name


def test_ops_refuse_bad_tensors():
    case = CASES[2]
    layout = case.layout()
    q, k, v = on_device(*inputs(case, torch.bfloat16))
    tables = on_device(layout.token_of_slot, layout.tile_block_offsets)
    options = {"granularity": 0, "smooth_k": True, "pow2_scales": False}
    with pytest.raises(ConfigError, match="fpsattention.quantize: k has dtype Half, expected BFloat16"):
        SM90.quantize(q, k.half(), v, *tables, **options)
    with pytest.raises(ConfigError, match="v has shape"):
        SM90.quantize(q, k, v[:, :, :-1], *tables, **options)
    with pytest.raises(ConfigError, match="granularity is 7"):
        SM90.quantize(q, k, v, *tables, **{**options, "granularity": 7})
    with pytest.raises(ConfigError, match="q has dtype Float, the sm_90a kernels take BFloat16 or Half"):
        SM90.quantize(q.float(), k.float(), v.float(), *tables, **options)
    with pytest.raises(ConfigError, match="tile_block_offsets has 1 entries, expected num_tiles"):
        SM90.quantize(q, k, v, tables[0], tables[1][:1], **options)


@pytest.mark.skipif(ON_GPU, reason="values on a GPU are not read by the host: kernels trap, and the context is lost")
def test_ops_refuse_tables_that_point_out_of_range():
    case = CASES[2]
    layout, mask = case.layout(), case.mask()
    q, k, v = inputs(case, torch.bfloat16)
    tokens, offsets = layout.token_of_slot, layout.tile_block_offsets
    options = {"granularity": 0, "smooth_k": True, "pow2_scales": False}
    broken = tokens.clone()
    broken[3] = layout.num_tokens
    with pytest.raises(ConfigError, match=rf"token_of_slot\[3\] is {layout.num_tokens}, expected -1 to"):
        SM90.quantize(q, k, v, broken, offsets, **options)
    padding_first = tokens.clone()
    padding_first[128] = -1
    with pytest.raises(ConfigError, match=r"token_of_slot\[128\] is padding: valid slots come first"):
        SM90.quantize(q, k, v, padding_first, offsets, **options)
    with pytest.raises(ConfigError, match=r"tile_block_offsets\[1\] is 1000, expected 0 to"):
        SM90.quantize(q, k, v, tokens, torch.where(torch.arange(len(offsets)) == 1, 1000, offsets).int(), **options)
    z = reference.Quantized(*SM90.quantize(q, k, v, tokens, offsets, **options))
    tiles = layout.tile_of_block.clone()
    tiles[2] = -1
    scalars = {"num_tokens": layout.num_tokens, "softmax_scale": 0.125, "out_dtype": torch.bfloat16}
    with pytest.raises(ConfigError, match=r"tile_of_block\[2\] is -1, expected 0 to"):
        SM90.forward(*z.operands, tokens, tiles, mask.kv_num_blocks, mask.kv_indices, **scalars)
    scalars["out_dtype"] = torch.float64
    with pytest.raises(ConfigError, match=r"out_dtype is Double, expected BFloat16, Half or Float"):
        SM90.forward(*z.operands, tokens, layout.tile_of_block, mask.kv_num_blocks, mask.kv_indices, **scalars)


@pytest.mark.slow
def test_forward_and_backward_take_lists_that_are_wider_than_there_are_blocks():
    case = CASES[2]
    layout, mask = case.layout(), case.mask()
    q, k, v = inputs(case, torch.bfloat16)
    q, k, v, tokens, offsets, tiles, *lists = on_device(
        q, k, v, layout.token_of_slot, layout.tile_block_offsets, layout.tile_of_block,
        mask.kv_num_blocks, mask.kv_indices, *mask.transpose(),
    )  # fmt: skip
    z = reference.Quantized(*SM90.quantize(q, k, v, tokens, offsets, granularity=0, smooth_k=True, pow2_scales=True))
    results = []
    for extra in (0, layout.num_blocks + 3):
        counts, indices, q_counts, q_indices = lists
        wide = [torch.nn.functional.pad(x, (0, extra), value=1 << 30) for x in (indices, q_indices)]  # never read
        scalars = {"num_tokens": layout.num_tokens, "softmax_scale": 0.125, "out_dtype": torch.bfloat16}
        f = SM90.forward(*z.operands, tokens, tiles, counts, wide[0], **scalars)
        grads = SM90.backward(
            f[0], f[0], *z.operands, f[2], f[3], tokens, tiles, counts, wide[0], q_counts, wide[1],
            softmax_scale=0.125, deterministic=True,
        )  # fmt: skip
        results.append([f[0], *grads])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_forward_mode_and_other_backends_are_refused():
    case = CASES[2]
    q, k, v = on_device(*case.inputs(torch.bfloat16))
    with pytest.raises(UnsupportedError, match="a forward-mode derivative .* was asked on the sm_90a kernels"):
        torch.func.jvp(lambda x: fps.attention(q, k, x, **case.kwargs()), (v,), (v,))
    with pytest.raises(
        (ConfigError, UnsupportedError), match="backend 'cpu' but|backend 'cpu', but FPSATTN_SM90_ON_HOST=1"
    ):
        fps.attention(q, k, v, backend="cpu", **case.kwargs())


@pytest.mark.skipif(not ON_GPU, reason="CUDA graphs need a GPU")
def test_cuda_graph_replays():
    case = CASES[3]
    q, k, v = on_device(*case.inputs(torch.bfloat16))
    out = fps.attention(q, k, v, **case.kwargs())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = fps.attention(q, k, v, **case.kwargs())
    graph.replay()
    assert torch.equal(captured, out)
