"""The ops as torch sees them: opcheck, autograd, compile, direct calls with bad arguments."""

import pytest
import torch
import torch.utils.checkpoint
from cases import CASES, Case

import fpsattention as fps
from fpsattention.errors import ConfigError, UnsupportedError, of_library
from fpsattention.ops import reference

CASE = CASES[2]


def arguments(case=CASE, dtype=torch.float32, requires_grad=False):
    layout, mask = case.layout(), case.mask()
    q, k, v = (x.transpose(1, 2).requires_grad_(requires_grad) for x in case.inputs(dtype))
    tables = (
        layout.token_of_slot,
        layout.tile_of_block,
        layout.tile_block_offsets,
        mask.kv_num_blocks,
        mask.kv_indices,
    )
    return (q, k, v, *tables, *mask.transpose())


OPTIONS = {"granularity": 0, "softmax_scale": 0.125, "smooth_k": True, "pow2_scales": True}


ALL_CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
# torch's own checkers multiply FP8 inputs and sum FP8 outputs, which torch cannot do: those two checks are left out where they meet
# such tensors. AOT dispatch of attention, gradients included, is tested by test_compile_* below.
NO_FP8_SUM = tuple(c for c in ALL_CHECKS if c != "test_aot_dispatch_dynamic")
NO_FP8_MUL = tuple(c for c in ALL_CHECKS if c != "test_schema")


def test_opcheck_attention():
    args = arguments(requires_grad=True)
    torch.library.opcheck(torch.ops.fpsattn.attention.default, args, OPTIONS, test_utils=NO_FP8_SUM)


@pytest.mark.slow
def test_opcheck_quantize_forward_backward():
    q, k, v, token_of_slot, tile_of_block, offsets, counts, indices, q_counts, q_indices = arguments()
    options = {"granularity": 2, "smooth_k": True, "pow2_scales": False, "k_mean_stride": 2}
    torch.library.opcheck(
        torch.ops.fpsattn.quantize.default, (q, k, v, token_of_slot, offsets), options, test_utils=ALL_CHECKS
    )
    z = reference.Quantized(*torch.ops.fpsattn.quantize(q, k, v, token_of_slot, offsets, **options))
    lists = (token_of_slot, tile_of_block, counts, indices)
    options = {"num_tokens": q.shape[2], "softmax_scale": 0.1, "out_dtype": torch.bfloat16}
    torch.library.opcheck(
        torch.ops.fpsattn.forward.default, (*z.operands, *lists, z.q_k_mean), options, test_utils=NO_FP8_MUL
    )
    out, _, row_max, row_sum = torch.ops.fpsattn.forward(*z.operands, *lists, z.q_k_mean, **options)
    args = (torch.randn_like(out), out, *z.operands, row_max, row_sum, *lists, q_counts, q_indices)
    torch.library.opcheck(torch.ops.fpsattn.backward.default, args, {"softmax_scale": 0.1}, test_utils=NO_FP8_MUL)


def test_outputs_have_nhd_memory():
    out, *_ = torch.ops.fpsattn.attention(*arguments(), **OPTIONS)
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_equal_the_reference(dtype):
    args = arguments(dtype=dtype, requires_grad=True)
    q, k, v = args[:3]
    out = torch.ops.fpsattn.attention(*args, **OPTIONS)[0]
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    gradients = torch.autograd.grad(out, (q, k, v), grad)
    layout = CASE.layout()
    z = reference.quantize(
        *(x.detach() for x in (q, k, v)), layout.token_of_slot, layout.tile_block_offsets,
        granularity=0, smooth_k=True, pow2_scales=True,
    )  # fmt: skip
    lists = (layout.token_of_slot, layout.tile_of_block, *args[6:8])
    f = reference.forward(*z.operands, *lists, num_tokens=q.shape[2], softmax_scale=0.125, out_dtype=dtype)
    want = reference.backward(grad, f.out, *z.operands, f.row_max, f.row_sum, *lists, softmax_scale=0.125)
    limit = 1e-3 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    for name, a, b in zip("qkv", gradients, want, strict=True):
        assert a.dtype == dtype and (a.float() - b).norm() <= limit * b.norm(), name


def test_only_asked_gradients_come_and_double_backward_raises():
    args = list(arguments())
    args[1] = args[1].clone().requires_grad_()
    out = torch.ops.fpsattn.attention(*args, **OPTIONS)[0]
    (grad_k,) = torch.autograd.grad(out.square().sum(), args[1], create_graph=True)
    with pytest.raises(UnsupportedError, match="double backward was asked for"):
        grad_k.sum().backward()


def test_gradients_reach_a_fused_qkv():
    case = CASES[4]
    layout = case.layout()
    qkv = torch.randn(1, layout.num_tokens, 3, case.heads, case.dim, requires_grad=True)
    fps.attention(*qkv.unbind(2), **case.kwargs()).square().sum().backward()
    parts = [x.detach().clone().requires_grad_() for x in qkv.unbind(2)]
    fps.attention(*parts, **case.kwargs()).square().sum().backward()
    torch.testing.assert_close(qkv.grad, torch.stack([p.grad for p in parts], 2))


def test_missing_transpose_and_ops_without_gradient():
    args = arguments(requires_grad=True)
    with pytest.raises(ConfigError, match="q_num_blocks and q_indices are missing"):
        torch.ops.fpsattn.attention(*args[:8], **OPTIONS)
    options = {k: v for k, v in OPTIONS.items() if k != "softmax_scale"}
    z = reference.Quantized(*torch.ops.fpsattn.quantize(*args[:4], args[5], **options))
    with pytest.raises(UnsupportedError, match="torch.ops.fpsattn.quantize, which has none"):
        z[3].sum().backward()


@pytest.mark.slow
def test_compile_fullgraph_without_recompiles_when_lists_change():
    case = Case("compile", (2, 8, 24), (2, 4, 8), (1, 1, 2))
    layout = case.layout()
    near, far = fps.sliding_tile_mask(layout, (1, 1, 2)), fps.sliding_tile_mask(layout, (1, 2, 1))
    for mask in (near, far):
        mask.transpose()
    q, k, v = (x.requires_grad_() for x in case.inputs())

    def run(q, k, v, counts, indices, q_counts, q_indices):
        out = torch.ops.fpsattn.attention(
            *(x.transpose(1, 2) for x in (q, k, v)), layout.token_of_slot, layout.tile_of_block, layout.tile_block_offsets,
            counts, indices, q_counts, q_indices, **OPTIONS,
        )[0]  # fmt: skip
        return out.transpose(1, 2) * 2

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    width = max(near.q_indices.shape[-1], far.q_indices.shape[-1])
    for number, mask in enumerate((near, far, near)):
        counts, indices = mask.transpose()
        indices = torch.nn.functional.pad(indices, (0, width - indices.shape[-1]))
        lists = (mask.kv_num_blocks, mask.kv_indices, counts, indices)
        with torch._dynamo.config.patch(error_on_recompile=number > 0):
            out = compiled(q, k, v, *lists)
        torch.testing.assert_close(out, run(q, k, v, *lists))
        for a, b in zip(
            torch.autograd.grad(out.sum(), (q, k, v)),
            torch.autograd.grad(run(q, k, v, *lists).sum(), (q, k, v)),
            strict=True,
        ):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("tensor_layout", ["NHD", "HND"])
@pytest.mark.slow
def test_compile_of_a_window_with_gradients_and_odd_strides(tensor_layout):
    case = CASES[2]
    wide = [torch.cat([x, x], -1).requires_grad_() for x in case.inputs()]

    def run(*wide):
        q, k, v = (x[..., : case.dim] for x in wide)
        if tensor_layout == "HND":
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return fps.attention(q, k, v, tensor_layout=tensor_layout, **case.kwargs())

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    out, want = compiled(*wide), run(*wide)
    torch.testing.assert_close(out, want)
    gradients = (torch.autograd.grad(x.square().sum(), wide) for x in (out, want))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_checkpointing_recomputes_the_same_gradients():
    case = CASES[2]
    q, k, v = (x.requires_grad_() for x in case.inputs())

    def run(q, k, v):
        return fps.attention(q, k, v, **case.kwargs())

    out = torch.utils.checkpoint.checkpoint(run, q, k, v, use_reentrant=False)
    gradients = (torch.autograd.grad(x.square().sum(), (q, k, v)) for x in (out, run(q, k, v)))
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


def test_a_scale_that_is_not_positive_is_refused():
    for scale in (0.0, -0.1, float("inf")):
        with pytest.raises(ConfigError, match="softmax_scale is .* expected a finite number > 0"):
            torch.ops.fpsattn.attention(*arguments(), **{**OPTIONS, "softmax_scale": scale})


def test_compile_of_the_public_function():
    case = CASES[1]
    q, k, v = case.inputs()
    compiled = torch.compile(
        lambda q, k, v: fps.attention(q, k, v, grid=case.grid), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(q, k, v), fps.attention(q, k, v, grid=case.grid))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({0: lambda q: q.to(torch.float64)}, "q has dtype torch.float64"),
        ({1: lambda k: k[:, :, :-1]}, r"k has shape .* expected"),
        ({2: lambda v: v.to(torch.bfloat16)}, "v has dtype torch.bfloat16, expected torch.float32 like q"),
        ({3: lambda t: t.long()}, "token_of_slot has dtype torch.int64, expected torch.int32"),
        ({3: lambda t: t.clone().fill_(3)}, "holds token .* times, expected every token"),
        ({5: lambda t: t + 1}, "tile_block_offsets must rise from 0"),
        ({6: lambda t: t[:, :, :-1]}, "kv_indices has shape"),
        ({6: lambda t: t + 100}, "kv_num_blocks holds lengths"),
        ({7: lambda t: t + 1000}, "kv_indices holds block"),
        ({7: lambda t: torch.zeros_like(t)}, "lists a block twice"),
    ],
)
def test_direct_calls_with_bad_arguments(change, text):
    args = list(arguments())
    for index, function in change.items():
        args[index] = function(args[index])
    with pytest.raises(ConfigError, match=text):
        torch.ops.fpsattn.attention(*args, **OPTIONS)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({0: lambda g: g[:, :, :-1]}, "grad_out has shape"),
        ({0: lambda g: g.double()}, "grad_out has dtype torch.float64, expected torch.float32"),
        ({8: lambda m: m[..., :-128]}, "row_max has shape"),
        ({15: lambda i: i + 10_000}, "q_indices holds block"),
        ({14: lambda n: n[..., :-1]}, "q_num_blocks has shape"),
    ],
)
def test_backward_with_bad_arguments(change, text):
    q, k, v, token_of_slot, tile_of_block, offsets, counts, indices, q_counts, q_indices = arguments()
    options = {name: value for name, value in OPTIONS.items() if name != "softmax_scale"}
    z = reference.Quantized(*torch.ops.fpsattn.quantize(q, k, v, token_of_slot, offsets, **options))
    lists = (token_of_slot, tile_of_block, counts, indices)
    out, _, row_max, row_sum = torch.ops.fpsattn.forward(
        *z.operands, *lists, num_tokens=q.shape[2], softmax_scale=0.125, out_dtype=torch.float32
    )
    args = [torch.ones_like(out), out, *z.operands, row_max, row_sum, *lists, q_counts, q_indices]
    for index, function in change.items():
        args[index] = function(args[index])
    with pytest.raises(ConfigError, match=text):
        torch.ops.fpsattn.backward(*args, softmax_scale=0.125)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("fpsattn.quantize: k has dtype Half, expected BFloat16", ConfigError),
        ("fpsattn.forward: device 0 has compute capability 8.0, the kernels are built for 9.0", UnsupportedError),
        (
            "fpsattn.quantize: kernel: cudaLaunchKernelEx(&config) failed: an illegal memory access was encountered",
            None,
        ),
        ("CUDA out of memory", None),
    ],
)
def test_errors_of_the_library_become_ours(text, kind):
    error = of_library(text)
    if kind is None:
        assert error is None
    else:
        assert type(error) is kind and str(error) == text.replace("fpsattn.", "fpsattention.")
