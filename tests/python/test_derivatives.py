"""Derivatives: forward mode against the reference and as the adjoint of the backward, torch.func, second derivatives, one forward."""

from functools import partial

import pytest
import torch
import torch.autograd.forward_ad as fwad
import torch.utils.checkpoint
from cases import CASES, IDS

import fpsattention as fps
from fpsattention.errors import UnsupportedError
from fpsattention.ops import core, cpu, reference

CASE = CASES[4]
pytestmark = pytest.mark.skipif(core.sm90_on_host(), reason="CPU tensors go to the sm_90a kernels here")


def relative(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


def saved(case, granularity=0):
    """What a forward leaves for its derivatives, in FP32."""
    lists = case.mask().lists(True)
    q, k, v = (x.transpose(1, 2) for x in case.inputs())
    z = reference.quantize(
        q,
        k,
        v,
        lists.token_of_slot,
        lists.tile_block_offsets,
        granularity=granularity,
        smooth_k=True,
        pow2_scales=False,
    )
    tables = (lists.token_of_slot, lists.tile_of_block, lists.kv_num_blocks, lists.kv_indices)
    options = {"softmax_scale": case.dim**-0.5}
    f = reference.forward(*z.operands, *tables, num_tokens=q.shape[2], out_dtype=torch.float32, **options)
    return q, (f.out, *z.operands, f.row_max, f.row_sum, *tables), options


def noise(like, count, seed=7):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(like.shape, generator=generator, dtype=torch.float32) for _ in range(count)]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=IDS)
@pytest.mark.parametrize("granularity", [0, 2])
def test_tangents_equal_the_reference(case, granularity):
    q, arguments, options = saved(case, granularity)
    tangents = noise(q, 3)
    for given in ((0, 1, 2), (0,), (1,), (2,), (0, 2)):
        chosen = [tangents[i] if i in given else None for i in range(3)]
        want = reference.jvp(*chosen, *arguments, **options)
        if case.name == "one_token" and 2 not in given:
            assert want.abs().max() < 1e-4 and cpu.jvp(*chosen, *arguments, **options).abs().max() < 1e-4
            continue
        # As in the backward, a score one ulp off may round a P the other way.
        assert relative(cpu.jvp(*chosen, *arguments, **options), want) < 2e-3


@pytest.mark.parametrize("case", CASES[1:], ids=IDS[1:])
@pytest.mark.slow
def test_forward_mode_is_the_adjoint_of_the_backward(case):
    """<dO, jvp(t)> = <vjp(dO), t>, in the reference and in the CPU kernels: both take the very same P."""
    q, arguments, options = saved(case)
    *tangents, grad = noise(q, 4)
    for implementation in (reference, cpu):
        forward = (grad.double() * implementation.jvp(*tangents, *arguments, **options).double()).sum()
        gradients = implementation.backward(grad, *arguments, **options)
        backward = sum((g.double() * t.double()).sum() for g, t in zip(gradients, tangents, strict=True))
        assert abs(forward - backward) < 1e-4 * grad.norm() * max(t.norm() for t in tangents), implementation.__name__


@pytest.mark.parametrize("case", [CASES[2], CASES[5]], ids=[IDS[2], IDS[5]])
@pytest.mark.slow
def test_tangents_are_those_of_exact_attention(case):
    """Against FP64 forward mode of dense attention on the unquantized inputs: off by the quantization error only."""
    q, k, v = case.inputs()
    tangents = noise(q, 3)
    mask = case.mask().to_token_mask()

    def exact(*inputs):
        return reference.attention_fp64(*(x.transpose(1, 2) for x in inputs), mask).transpose(1, 2)

    want = torch.func.jvp(exact, (q.double(), k.double(), v.double()), tuple(t.double() for t in tangents))[1]
    for backend in ("cpu", "reference"):
        attend = partial(fps.attention, backend=backend, **case.kwargs())
        out, got = torch.func.jvp(attend, (q, k, v), tuple(tangents))
        assert torch.equal(out, attend(q, k, v))
        assert relative(got, want) < 0.08, backend


@pytest.mark.parametrize("grad_mode", [True, False])
def test_no_way_to_forward_mode_is_silently_zero(grad_mode):
    q, k, v = CASE.inputs()
    (tangent,) = noise(v, 1)
    want = fps.attention(q, k, tangent, **CASE.kwargs())  # linear in v

    def attend(x):
        return fps.attention(q, k, x, **CASE.kwargs())

    def op(x):
        lists = CASE.mask().lists(True)
        options = {"granularity": 0, "softmax_scale": CASE.dim**-0.5, "smooth_k": True, "pow2_scales": False}
        q_, k_, x_ = (y.transpose(1, 2) for y in (q, k, x))
        return torch.ops.fpsattn.attention(q_, k_, x_, *lists, **options)[0].transpose(1, 2)

    with torch.set_grad_enabled(grad_mode):
        assert relative(torch.func.jvp(attend, (v,), (tangent,))[1], want) < 0.05
        for function in (attend, op):
            with fwad.dual_level():
                assert relative(fwad.unpack_dual(function(fwad.make_dual(v, tangent))).tangent, want) < 0.05
        with pytest.raises(UnsupportedError, match="which fpsattention.attention supports: call that"):
            torch.func.jvp(op, (v,), (tangent,))
        with fwad.dual_level(), pytest.raises(UnsupportedError, match="torch.ops.fpsattn.quantize, which has none"):
            layout = CASE.layout()
            x = fwad.make_dual(v, tangent).transpose(1, 2)
            tables = (layout.token_of_slot, layout.tile_block_offsets)
            torch.ops.fpsattn.quantize(x, x, x, *tables, granularity=0, smooth_k=True, pow2_scales=False)


def test_reverse_mode_through_the_primal_of_a_jvp():
    """What MeanFlow-like losses do: a tangent without gradient beside an output with one."""
    q, k, v = CASE.inputs()
    (tangent,) = noise(q, 1)
    weight = torch.eye(CASE.dim) + 0.1 * torch.randn(CASE.dim, CASE.dim, generator=torch.Generator().manual_seed(2))
    weight.requires_grad_()

    def model(x):
        return fps.attention(x @ weight, k, v, **CASE.kwargs())

    out, along = torch.func.jvp(model, (q,), (tangent,))
    (got,) = torch.autograd.grad((out - along.detach()).square().sum(), weight)
    (want,) = torch.autograd.grad((model(q) - along.detach()).square().sum(), weight)
    assert torch.equal(got, want)


@pytest.mark.slow
def test_torch_func_grad_and_vmap():
    q, k, v = CASE.inputs()
    stacked = torch.stack([v, *noise(v, 2)])

    def loss(x):
        return fps.attention(q, k, x, **CASE.kwargs()).square().sum()

    def gradient(x):
        x = x.clone().requires_grad_()
        return torch.autograd.grad(loss(x), x)[0]

    want = torch.stack([gradient(x) for x in stacked])
    assert torch.equal(torch.func.grad(loss)(v), want[0])
    assert torch.equal(torch.vmap(torch.func.grad(loss))(stacked), want)
    assert torch.equal(torch.func.grad(lambda s: torch.vmap(loss)(s).sum())(stacked), want)
    outs = torch.stack([fps.attention(q, k, x, **CASE.kwargs()) for x in stacked])
    assert torch.equal(torch.vmap(lambda x: fps.attention(q, k, x, **CASE.kwargs()))(stacked), outs)
    tangents = torch.vmap(lambda x: torch.func.jvp(lambda y: fps.attention(q, k, y, **CASE.kwargs()), (v,), (x,))[1])(
        stacked
    )
    assert relative(tangents, outs) < 0.05
    moved = torch.vmap(lambda x: fps.attention(q, k, x, **CASE.kwargs()), in_dims=3, out_dims=2)(stacked.movedim(0, 3))
    assert torch.equal(moved.movedim(2, 0), outs)


def test_vmap_with_lists_per_sample_and_over_tables():
    layout = fps.plan((2, 8, 24), (2, 8, 8))
    tiles = torch.tensor([[1, 0, 1], [0, 1, 0], [1, 1, 1]], dtype=torch.bool)
    mask = fps.BlockMask.from_tiles(layout, torch.stack([tiles, ~tiles])[:, None])  # Bm = 2
    q, k, v = (
        torch.randn(3, 2, layout.num_tokens, 1, 64, generator=torch.Generator().manual_seed(i)) for i in range(3)
    )

    def attend(q, k, v):
        return fps.attention(q, k, v, layout.grid, block_mask=mask)

    want = torch.stack([attend(*x) for x in zip(q, k, v, strict=True)])
    assert torch.equal(torch.vmap(attend)(q, k, v), want)
    tables = torch.stack([layout.token_of_slot, layout.token_of_slot])
    with pytest.raises(UnsupportedError, match="vmap over token_of_slot"):
        torch.vmap(
            lambda t: torch.ops.fpsattn.quantize(
                *(x[0].transpose(1, 2) for x in (q, k, v)), t, layout.tile_block_offsets,
                granularity=0, smooth_k=True, pow2_scales=False,
            )[0].float()
        )(tables)  # fmt: skip


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_second_derivatives_are_refused(backend):
    q, k, v = CASES[1].inputs()

    def attend(x):
        return fps.attention(q, k, x, backend=backend, **CASES[1].kwargs())

    def loss(x):
        return attend(x).square().sum()

    def tangent(x):
        return torch.func.jvp(attend, (x,), (v,))[1]

    x = v.clone().requires_grad_()
    with pytest.raises(UnsupportedError, match="double backward was asked for"):
        (gradient,) = torch.autograd.grad(loss(x), x, create_graph=True)
        gradient.sum().backward()
    with pytest.raises(UnsupportedError, match="double backward was asked for"):
        torch.func.grad(lambda x: torch.func.grad(loss)(x).sum())(v)
    with pytest.raises(UnsupportedError, match="double backward was asked for"):
        torch.func.jvp(torch.func.grad(loss), (v,), (v,))
    for second in (lambda: torch.func.grad(lambda x: tangent(x).sum())(v), lambda: torch.func.jvp(tangent, (v,), (v,))):
        with pytest.raises(UnsupportedError, match="a derivative of a forward-mode derivative"):
            second()


def test_one_forward_whatever_is_differentiated():
    """no_grad, training, reentrant checkpointing, forward mode: the same bits."""
    q, k, v = CASE.inputs()
    with torch.no_grad():
        want = fps.attention(q, k, v, **CASE.kwargs())
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]

    def run(*x):
        return fps.attention(*x, **CASE.kwargs())

    for reentrant in (True, False):
        out = torch.utils.checkpoint.checkpoint(run, *leaves, use_reentrant=reentrant)
        assert torch.equal(out, want)
        if reentrant:
            out.square().sum().backward()
    assert torch.equal(run(*leaves), want)
    with torch.inference_mode():
        assert torch.equal(run(q, k, v), want)
    direct = torch.autograd.grad(run(*leaves).square().sum(), leaves)
    assert all(torch.equal(x.grad, g) for x, g in zip(leaves, direct, strict=True))
