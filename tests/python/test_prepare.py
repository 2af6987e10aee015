"""Norm and RoPE inside of the quantizer: the arithmetic against FP64 and step by step, the op against the reference, gradients."""

import numpy as np
import pytest
import torch
from cases import NARROW, Case

import fpsattention as fps
from fpsattention.errors import ConfigError, UnsupportedError
from fpsattention.ops import cpu, hidden, reference
from fpsattention.ops.attend import attend
from fpsattention.ops.norm_rope import NORMS, norm_rope, norm_rope_backward, ordered_sum

VIDEO = Case("text_suffix", (3, 5, 7), (3, 4, 4), (1, 1, 2), text_len=9, batch=2)
KINDS = list(NORMS.values())
EPS = 1e-6


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tables(tokens, dim, seed=9):
    angles = 3 * randn(1, 1, tokens, dim // 2, seed=seed)
    return angles.cos(), angles.sin()


RUN = (5, 97)  # of tokens that have the first row of weights, where all are rotated


def run_of(run):
    return {} if run is None else {"weights_begin": run[0], "weights_end": run[1]}


def arguments(case, kind, dtype=torch.bfloat16, two_rows=False, text_rotated=False):
    """Raw q, k, v as views of one projection, weights and biases of the kind, tables of the video tokens, or of all."""
    layout = case.layout()
    fused = 2 * randn(case.batch, layout.num_tokens, 3, case.heads, case.dim, seed=1) + 0.5
    q, k, v = (x.transpose(1, 2) for x in fused.to(dtype).unbind(2))
    channels = case.dim * (case.heads if kind == NORMS["rms_across_heads"] else 1)
    rows = 2 if two_rows else 1
    w = [1 + 0.2 * randn(rows, channels, seed=s) for s in (2, 3)] if kind else [None, None]
    b = [0.1 * randn(rows, channels, seed=s) for s in (4, 5)] if kind == NORMS["layer"] else [None, None]
    cos, sin = tables(layout.num_tokens - (0 if text_rotated else case.text_len), case.dim)
    return layout, (q, k, v), (*w, *b, cos, sin)


def exact_norm_rope(x, weight, bias, cos, sin, kind, halves, first, run):
    """FP64, written differently: torch's own norms, complex numbers."""
    x = x.double()
    batch, heads, tokens, dim = x.shape
    rows = x.transpose(1, 2)  # (B, S, H, D)
    rows = rows.flatten(2) if kind == NORMS["rms_across_heads"] else rows
    if kind == NORMS["layer"]:
        rows = torch.nn.functional.layer_norm(rows, rows.shape[-1:], eps=EPS)
    elif kind:
        rows = torch.nn.functional.rms_norm(rows, rows.shape[-1:], eps=EPS)
    video = slice(first, first + cos.shape[2])
    for parameter, apply in ((weight, torch.mul), (bias, torch.add)):
        if parameter is not None:
            of_token = parameter.double()[-1].expand(tokens, -1).clone()
            of_token[video if run is None else slice(*run)] = parameter.double()[0]
            rows = apply(rows, of_token if kind == NORMS["rms_across_heads"] else of_token[:, None])
    x = rows.reshape(batch, tokens, heads, dim).transpose(1, 2).clone()
    order = torch.arange(dim).view(2, -1).T.reshape(-1) if halves else torch.arange(dim)  # pairs side by side
    pairs = torch.view_as_complex(x[:, :, video][..., order].unflatten(-1, (-1, 2)).contiguous())
    turned = torch.view_as_real(pairs * torch.complex(cos.double(), sin.double())).flatten(3)
    x[:, :, video] = turned[..., order.argsort()]
    return x


@pytest.mark.parametrize("kind", KINDS, ids=list(NORMS))
@pytest.mark.parametrize(
    ("halves", "first", "two_rows", "run"), [(False, 0, False, None), (True, 9, True, None), (False, 0, True, RUN)]
)
def test_norm_rope_is_exact_to_rounding(kind, halves, first, two_rows, run):
    _, (q, _, _), (weight, _, bias, _, cos, sin) = arguments(VIDEO, kind, two_rows=two_rows, text_rotated=bool(run))
    options = {"norm": kind, "rope_halves": halves, "first_rotated": first, **run_of(run)}
    got = norm_rope(q, weight, bias, cos, sin, eps=EPS, **options)
    want = exact_norm_rope(q, weight, bias, cos, sin, kind, halves, first, run)
    # 11 additions of a sum of squares, a handful of roundings after it, on values that may cancel in a rotation.
    assert ((got - want).abs() <= 24 * 2.0**-24 * want.abs().amax()).all()
    swapped = norm_rope(q, weight, bias, cos, sin, eps=EPS, **{**options, "rope_halves": not halves})
    assert (swapped - want).abs().amax() > 0.1  # the bound can fail


@pytest.mark.parametrize("dim", [64, 96, 128])
def test_sums_are_in_the_order_that_is_written_down(dim):
    x = (randn(5, dim) * 10.0 ** randn(5, dim, seed=1)).numpy().astype(np.float32)
    for row in x:
        lanes = [np.float32(0)] * (8 if dim == 64 else 16)
        for chunk in range(dim // 8):
            total = row[8 * chunk]
            for channel in range(1, 8):
                total = np.float32(total + row[8 * chunk + channel])
            lanes[chunk] = total
        distance = len(lanes) // 2
        while distance:  # what lanes of a warp do with xor shuffles
            lanes = [np.float32(lanes[i] + lanes[i ^ distance]) for i in range(len(lanes))]
            distance //= 2
        assert all(lane == ordered_sum(torch.from_numpy(row)).item() for lane in lanes)


@pytest.mark.parametrize("kind", KINDS, ids=list(NORMS))
@pytest.mark.parametrize("case", [VIDEO, NARROW], ids=["d64", "d96"])
def test_the_op_has_the_bits_of_the_reference(kind, case):
    run = RUN if kind == NORMS["layer"] else None
    layout, qkv, tensors = arguments(case, kind, two_rows=kind > 1, text_rotated=bool(run))
    options = {"norm": kind, "eps": EPS, "rope_halves": kind % 2 == 1, **run_of(run), "granularity": kind % 3}
    options |= {"smooth_k": True, "pow2_scales": False, "block_sums": True, "k_mean_stride": 2}
    slots = (layout.token_of_slot, layout.tile_block_offsets)
    k_mean = randn(case.batch, case.heads, case.dim, seed=8)
    want = reference.prepare(*qkv, *slots, *tensors, k_mean, **options)
    got = torch.ops.fpsattn.prepare(*qkv, *slots, *tensors, k_mean, **options)
    for name, a, b in zip(want._fields, got, want, strict=True):
        if name == "q_k_mean":
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)
        else:
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8)), name
    # It is the quantizer of what norm_rope gives, in FP32, and computes the mean of just that.
    position = {name: options.pop(name) for name in ("norm", "eps", "rope_halves", *run_of(run))}
    q, k = (
        norm_rope(x, tensors[i], tensors[2 + i], *tensors[4:], first_rotated=0, **position)
        for i, x in enumerate(qkv[:2])
    )
    for a, b in zip(
        torch.ops.fpsattn.prepare(*qkv, *slots, *tensors, **position, **options),
        cpu.quantize(q, k, qkv[2], *slots, **options),
        strict=True,
    ):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("kind", KINDS, ids=list(NORMS))
@pytest.mark.parametrize(("two_rows", "first", "run"), [(False, 0, None), (True, 9, None), (True, 0, RUN)])
def test_backward_of_norm_rope_is_that_of_autograd(kind, two_rows, first, run):
    _, (q, _, _), (weight, _, bias, _, cos, sin) = arguments(VIDEO, kind, torch.float32, two_rows, bool(run))
    options = {"norm": kind, "eps": EPS, "rope_halves": two_rows, "first_rotated": first, **run_of(run)}
    given = [None if x is None else x.clone().requires_grad_() for x in (q, weight, bias)]
    grad = randn(*q.shape, seed=6)
    there = [x for x in given if x is not None]
    want = torch.autograd.grad(norm_rope(*given, cos, sin, **options), there, grad)
    got = [g for g in norm_rope_backward(grad, q, weight, bias, cos, sin, **options) if g is not None]
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape and (a - b).norm() <= 1e-5 * b.norm()


def test_gradients_of_a_row_have_nothing_of_the_other_tokens():
    """A row whose tokens have no gradient gets zeros, not what rounding leaves of the gradients of all."""
    _, (q, _, _), (weight, _, bias, _, cos, sin) = arguments(VIDEO, NORMS["layer"], torch.float32, True, True)
    grad = randn(*q.shape, seed=6)
    grad[:, :, : RUN[0]], grad[:, :, RUN[1] :] = 0, 0
    options = {"norm": NORMS["layer"], "eps": EPS, "rope_halves": False, "first_rotated": 0, **run_of(RUN)}
    for gradient in norm_rope_backward(grad, q, weight, bias, cos, sin, **options)[1:]:
        assert gradient[0].any() and not gradient[1].any()


@pytest.mark.parametrize("kind", ["rms", "rms_across_heads", "layer"])
def test_attention_of_raw_projections_and_its_gradients(kind):
    """backend "cpu" (the op, written-out derivatives) against "reference" (autograd through the definition)."""
    run = None if kind == "rms" else RUN
    _, qkv, tensors = arguments(VIDEO, NORMS[kind], torch.float32, two_rows=True, text_rotated=bool(run))
    results = []
    for backend in ("cpu", "reference"):
        raw = [x.transpose(1, 2).clone().requires_grad_() for x in qkv]
        given = [x if x is None else x.clone().requires_grad_() for x in tensors[:4]]
        norm, rope = fps.Norm(kind, *given, eps=EPS, tokens=run), fps.Rope(*(x[0, 0] for x in tensors[4:]))
        out = fps.attention(*raw, norm=norm, rope=rope, backend=backend, pow2_scales=True, **VIDEO.kwargs())
        leaves = [*raw, *(x for x in given if x is not None)]
        results.append((out, torch.autograd.grad(out.square().sum(), leaves)))
    (out, grads), (want, want_grads) = results
    assert (out - want).norm() <= 1e-3 * want.norm()  # a score one ulp off may round a P the other way
    for a, b in zip(grads, want_grads, strict=True):
        assert a.abs().amax() > 0 and (a - b).norm() <= 5e-3 * b.norm()


def test_attention_of_raw_projections_is_attention_of_what_norm_rope_gives():
    _, qkv, tensors = arguments(VIDEO, NORMS["rms"], torch.float32)
    w_q, w_k, _, _, cos, sin = tensors
    options = {"norm": NORMS["rms"], "eps": EPS, "rope_halves": True, "first_rotated": 4}
    q, k = (norm_rope(x, w, None, cos, sin, **options) for x, w in zip(qkv, (w_q, w_k), strict=False))
    want = fps.attention(q, k, qkv[2], tensor_layout="HND", **VIDEO.kwargs())
    rope = fps.Rope(cos, sin, style="halves", first=4)
    got = fps.attention(
        *qkv, norm=fps.Norm("rms", w_q[0], w_k[0], eps=EPS), rope=rope, tensor_layout="HND", **VIDEO.kwargs()
    )
    assert torch.equal(got, want)
    half = fps.attention(*(x.bfloat16() for x in qkv), rope=rope, tensor_layout="HND", **VIDEO.kwargs())
    assert half.dtype == torch.bfloat16 and half.shape == want.shape


def test_a_run_of_tokens_stands_for_the_rotated_ones():
    """Weights of two rows: the run of the tokens that a rope rotates says the same, another one or a rope of all tokens something else;
    without a rope, the run alone says whose the rows are."""
    _, qkv, tensors = arguments(VIDEO, NORMS["rms"], torch.float32, two_rows=True, text_rotated=True)
    cos, sin = (x[:, :, 9:] for x in tensors[4:])

    def attention(run, rope):
        norm = fps.Norm("rms", *tensors[:2], eps=EPS, tokens=run)
        return fps.attention(*qkv, norm=norm, rope=rope, tensor_layout="HND", **VIDEO.kwargs())

    rope = fps.Rope(cos, sin, first=9)
    want = attention(None, rope)
    assert torch.equal(attention((9, 114), rope), want)
    assert not torch.equal(attention((0, 105), rope), want)
    assert not torch.equal(attention((9, 114), fps.Rope(*tensors[4:])), want)
    still = fps.Rope(torch.ones_like(cos), torch.zeros_like(sin), first=9)
    assert torch.equal(attention((9, 114), None), attention(None, still))


def test_hidden_keys_are_those_of_attention_of_what_norm_rope_gives():
    """Hidden text keys repeat a raw key of the text, which no rotation touches, so it is the prepared one that counts; the norm's weights
    get nothing from them."""
    _, (q, k, v), tensors = arguments(VIDEO, NORMS["rms"], torch.float32, two_rows=True)
    hide = torch.zeros(VIDEO.batch, q.shape[2], dtype=torch.bool)
    hide[0, -4:], hide[1, -8:] = True, True
    options = {"norm": NORMS["rms"], "eps": EPS, "rope_halves": False, "first_rotated": 0}
    mask, results = VIDEO.mask(), []
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k = k.masked_fill(hide[:, :, None, None], 50.0)
    for fused in (True, False):
        raw = [x.clone().requires_grad_() for x in (q, k, v)]
        weights = [x.clone().requires_grad_() for x in tensors[:2]]
        filled = hidden.fill(*raw[1:], hide, False)
        if fused:
            extra = {"norm": fps.Norm("rms", *weights, eps=EPS), "rope": fps.Rope(*tensors[4:])}
            given = (raw[0], filled[0])
        else:
            pairs = zip((raw[0], filled[0]), weights, strict=True)
            given = [norm_rope(x.transpose(1, 2), w, None, *tensors[4:], **options).transpose(1, 2) for x, w in pairs]
            extra = {}
        out, _ = attend(*given, filled[1], mask, hidden=hide, **extra)
        results.append((out, torch.autograd.grad(out[:, :-9].square().sum(), (*raw, *weights))))
    (out, grads), (want, wanted) = results
    assert torch.equal(out, want)
    for a, b in zip(grads, wanted, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()
    assert not grads[1][hide].any() and grads[1].any()


@pytest.mark.slow
def test_op_is_well_formed_and_compiles():
    layout, qkv, tensors = arguments(VIDEO, NORMS["rms_across_heads"], torch.float32)
    options = {"norm": 2, "eps": EPS, "granularity": 0, "smooth_k": True, "pow2_scales": False}
    args = (*qkv, layout.token_of_slot, layout.tile_block_offsets, *tensors)
    torch.library.opcheck(
        torch.ops.fpsattn.prepare.default, args, options, test_utils=("test_schema", "test_faketensor")
    )
    with pytest.raises(UnsupportedError, match="a gradient was asked through torch.ops.fpsattn.prepare"):
        out = torch.ops.fpsattn.prepare(qkv[0].clone().requires_grad_(), *args[1:], **options)
        out[7].sum().backward()
    weight = tensors[0][0].clone().requires_grad_()
    norm, rope = fps.Norm("rms_across_heads", weight, tensors[1][0]), fps.Rope(tensors[4], tensors[5])

    def run(q, k, v):
        return fps.attention(q, k, v, norm=norm, rope=rope, tensor_layout="HND", **VIDEO.kwargs())

    eager = run(*qkv)
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)(*qkv)
    assert torch.equal(eager, compiled)
    grads = [torch.autograd.grad(x.square().sum(), weight)[0] for x in (eager, compiled)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm": "rms"}, "norm is a str, expected fpsattention.Norm"),
        ({"norm": fps.Norm("rms", torch.ones(63))}, r"q_weight has shape \(1, 63\), expected \(1, 64\), or 2 rows"),
        ({"norm": fps.Norm("rms_across_heads", torch.ones(64))}, r"expected \(1, 128\), or 2 rows"),
        ({"norm": fps.Norm("rms", torch.ones(2, 64)), "rope": None}, "has 2 rows but there is no rope"),
        (
            {"norm": fps.Norm("rms", tokens=(9, 115))},
            "weights_end is 115 and weights_begin 9, expected a run of the 114 tok",
        ),
        ({"norm": fps.Norm("rms", tokens=(5, 4))}, "weights_end is 4 and weights_begin 5, expected a run"),
        ({"norm": fps.Norm("rms", tokens=(-1, 4))}, "weights_end is 4 and weights_begin -1, expected a run"),
        ({"norm": fps.Norm("rms", eps=-1.0)}, "eps is -1.0, expected a finite number >= 0"),
        ({"rope": fps.Rope(torch.ones(115, 32), torch.ones(115, 32))}, "cos has 115 tokens from first_rotated=0 on"),
        ({"rope": fps.Rope(torch.ones(9, 31), torch.ones(9, 31))}, "cos has shape .*expected"),
        ({"rope": fps.Rope(torch.ones(9, 32), torch.ones(8, 32))}, "sin has shape .*cos like sin"),
        ({"rope": fps.Rope(torch.ones(9, 32), torch.ones(9, 32), first=-1)}, "from first_rotated=-1 on"),
    ],
)
def test_bad_arguments(change, message):
    _, qkv, tensors = arguments(VIDEO, NORMS["rms"], torch.float32)
    given = {"norm": fps.Norm("rms"), "rope": fps.Rope(tensors[4], tensors[5]), **change}
    with pytest.raises(ConfigError, match=message):
        fps.attention(*qkv, tensor_layout="HND", **given, **VIDEO.kwargs())


def test_what_is_refused():
    with pytest.raises(ConfigError, match="norm.kind 'batch', expected one of 'rms', 'rms_across_heads', 'layer'"):
        fps.Norm("batch")
    with pytest.raises(ConfigError, match=r"norm.tokens \(0, -1\), expected begin and end"):
        fps.Norm("rms", tokens=(0, -1))
    with pytest.raises(ConfigError, match="rope.style 'quarters'"):
        fps.Rope(torch.ones(3, 32), torch.ones(3, 32), style="quarters")
    with pytest.raises(ConfigError, match=r"rope.cos has shape \(32,\)"):
        fps.Rope(torch.ones(32), torch.ones(32))
    x = torch.zeros(1, 105, 2, 80)
    with pytest.raises(UnsupportedError, match="head dimension 80, supported are"):
        fps.attention(x, x, x, norm=fps.Norm("rms"), grid=(3, 5, 7))
    x = torch.zeros(1, 105, 2, 64)
    with pytest.raises(UnsupportedError, match="inside a transform of torch.func"):
        torch.func.vmap(lambda y: fps.attention(y, y, y, norm=fps.Norm("rms"), grid=(3, 5, 7)))(x[None])
