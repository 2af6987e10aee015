"""fps.attention: against the FP64 reference, layouts, dtypes, strides, backends; its errors; a fuzz over grids."""

import importlib
import math

import pytest
import torch
from cases import CASES, IDS, Case
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fpsattention as fps
from fpsattention.errors import ConfigError, UnsupportedError
from fpsattention.ops import reference


def exact(case, q, k, v):
    mask = case.mask().to_token_mask()
    return reference.attention_fp64(*(x.transpose(1, 2) for x in (q, k, v)), mask).transpose(1, 2)


def relative_l1(out, want):
    return ((out.double() - want).abs().sum() / want.abs().sum()).item()


@pytest.mark.parametrize("case", CASES, ids=IDS)
@pytest.mark.parametrize("granularity", ["tile", "block", "token"])
def test_close_to_fp64(case, granularity):
    q, k, v = case.inputs()
    out = fps.attention(q, k, v, granularity=granularity, **case.kwargs())
    assert out.shape == q.shape and out.dtype == q.dtype
    assert relative_l1(out, exact(case, q, k, v)) < 0.062


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_backends_agree(case):
    q, k, v = (x.requires_grad_() for x in case.inputs())
    outs = [
        fps.attention(q, k, v, backend=backend, return_lse=True, **case.kwargs()) for backend in ("cpu", "reference")
    ]
    # A score one ulp off may round a P the other way: see test_cpu.py.
    assert relative_l1(outs[0][0], outs[1][0].double()) < 1e-3
    torch.testing.assert_close(outs[0][1], outs[1][1], rtol=1e-4, atol=5e-4)
    grads = [torch.autograd.grad(out.square().sum(), (q, k, v)) for out, _ in outs]
    for a, b in zip(*grads, strict=True):
        assert (a - b).norm() <= 5e-3 * b.norm() + 1e-5


@pytest.mark.parametrize("dim", [96, 80, 32, 7])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_head_dims_are_padded(backend, dim):
    """The same tokens, cut to ``dim`` channels, as zeros in the others give; their gradients are exact, too."""
    case = Case("padded", (3, 5, 7), (3, 4, 4), (1, 1, 2), text_len=3, dim=dim)
    q, k, v = (x.requires_grad_() for x in case.inputs())
    k_mean = k.detach().mean(1)
    options = {"backend": backend, "return_lse": True, "pow2_scales": True, **case.kwargs()}
    out, lse = fps.attention(q, k, v, k_mean=k_mean, **options)
    assert out.shape == q.shape and relative_l1(out, exact(case, q, k, v)) < 0.075
    wide = [
        torch.nn.functional.pad(x.detach(), (0, (64 if dim < 64 else 128) - dim)).requires_grad_() for x in (q, k, v)
    ]
    wide_mean = torch.nn.functional.pad(k_mean, (0, wide[0].shape[-1] - dim))
    wide_out, wide_lse = fps.attention(*wide, k_mean=wide_mean, scale=dim**-0.5, **options)
    assert torch.equal(out, wide_out[..., :dim]) and torch.equal(lse, wide_lse) and not wide_out[..., dim:].any()
    grads = torch.autograd.grad(out.square().sum(), (q, k, v))
    wide_grads = torch.autograd.grad(wide_out.square().sum(), wide)
    assert all(torch.equal(a, b[..., :dim]) for a, b in zip(grads, wide_grads, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_layouts_dtypes_and_strides_are_the_same_computation(dtype):
    case = CASES[5]
    q, k, v = case.inputs(dtype)
    out, lse = fps.attention(q, k, v, return_lse=True, **case.kwargs())
    assert out.dtype == dtype and lse.dtype == torch.float32 and lse.shape == (2, 1, q.shape[1])
    heads_first = fps.attention(
        *(x.transpose(1, 2).contiguous() for x in (q, k, v)), tensor_layout="HND", **case.kwargs()
    )
    assert torch.equal(heads_first.transpose(1, 2), out)
    wide = torch.zeros(*q.shape[:3], 2 * case.dim, dtype=dtype)
    strided = []
    for x in (q, k, v):
        y = wide.clone()
        y[..., ::2] = x
        strided.append(y[..., ::2])
    assert strided[0].stride(3) == 2 and torch.equal(fps.attention(*strided, **case.kwargs()), out)


def test_lse_is_that_of_the_scores():
    case = CASES[2]
    q, k, v = case.inputs()
    _, lse = fps.attention(q, k, v, return_lse=True, granularity="token", **case.kwargs())
    scores = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()) * case.dim**-0.5
    want = scores.masked_fill(~case.mask().to_token_mask(), -math.inf).logsumexp(-1)
    assert (lse - want).abs().mean() < 0.02 and (lse - want).abs().max() < 0.3


def test_scale_and_given_statistics():
    case = CASES[2]
    q, k, v = case.inputs()
    mean = k.mean(1)
    out = fps.attention(q, k, v, **case.kwargs())
    torch.testing.assert_close(fps.attention(q, k, v, k_mean=mean, **case.kwargs()), out, rtol=1e-3, atol=5e-2)
    same = fps.attention(q, k, v, v_absmax=v.abs().amax(1), **case.kwargs())
    assert torch.equal(same, out)
    assert torch.equal(fps.attention(q, k, v, scale=case.dim**-0.5, **case.kwargs()), out)
    assert not torch.equal(fps.attention(q, k, v, scale=0.5, **case.kwargs()), out)


def test_any_block_mask_per_head_and_sample():
    layout = fps.plan((2, 8, 24), (2, 8, 8))
    tiles = torch.tensor([[[1, 0, 1], [0, 1, 0], [1, 1, 1]], [[1, 1, 0], [1, 1, 0], [0, 0, 0]]], dtype=torch.bool)
    mask = fps.BlockMask.from_tiles(layout, torch.stack([tiles, tiles.flip(0)]))  # [B=2, H=2, 3, 3]
    q, k, v = (torch.randn(2, layout.num_tokens, 2, 64, generator=torch.Generator().manual_seed(i)) for i in range(3))
    out = fps.attention(q, k, v, grid=(2, 8, 24), block_mask=mask)
    want = reference.attention_fp64(*(x.transpose(1, 2) for x in (q, k, v)), mask.to_token_mask()).transpose(1, 2)
    assert relative_l1(out, want) < 0.06 and torch.equal(out == 0, want == 0)


def test_nan_is_never_silently_finite():
    case = CASES[2]
    q, k, v = case.inputs()
    q[0, 3, 1, 2] = float("nan")
    out = fps.attention(q, k, v, granularity="token", **case.kwargs())
    bad = out.isnan().any(-1)
    assert bad[0, 3, 1] and bad.sum() == 1


# Accuracy: docs/numerics.md, the table ------------------------------------------------------------------------------------


def video_like(kind, tokens=4096, dim=128):
    generator = torch.Generator().manual_seed(11)
    shape = (1, tokens, 1, dim)
    if kind == "smooth":  # runs of 16 nearly equal tokens, alike in q, k and v as the tokens of one video are
        base = torch.randn(1, tokens // 16, 1, dim, generator=generator).repeat_interleave(16, 1)
        return tuple(base + 0.1 * torch.randn(shape, generator=generator) for _ in range(3))
    x = [torch.randn(shape, generator=generator) for _ in range(3)]
    if kind == "outliers":
        x = [
            t + 10 * torch.randn(shape, generator=generator) * (torch.rand(shape, generator=generator) < 1e-3)
            for t in x
        ]
    return tuple(x)


@pytest.mark.parametrize(
    ("kind", "limit", "cosine"), [("normal", 0.056, 0.9984), ("outliers", 0.081, 0.0), ("smooth", 0.0125, 0.9998)]
)
@pytest.mark.slow
def test_accuracy_table(kind, limit, cosine):
    q, k, v = video_like(kind)
    out = fps.attention(q, k, v, grid=(4, 32, 32))
    want = reference.attention_fp64(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    assert relative_l1(out, want) <= limit
    assert torch.cosine_similarity(out.double().flatten(), want.flatten(), 0) >= cosine


# Fuzz ---------------------------------------------------------------------------------------------------------------------


@st.composite
def problems(draw):
    grid = tuple(draw(st.tuples(st.integers(1, 5), st.integers(1, 9), st.integers(1, 9))))
    tile = draw(st.none() | st.tuples(st.integers(1, 5), st.integers(1, 9), st.integers(1, 9)))
    text_len = draw(st.sampled_from([0, 0, 1, 7, 130]))
    position = draw(st.sampled_from(["suffix", "prefix"]))
    layout = fps.plan(grid, tile, text_len, position)
    window = draw(st.none() | st.tuples(*(st.integers(1, n) for n in layout.tile_grid)))
    return (
        grid,
        tile,
        window,
        text_len,
        position,
        draw(st.sampled_from(["tile", "block", "token"])),
        draw(st.integers(0, 2**16)),
    )


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(problems())
@pytest.mark.slow
def test_fuzz_against_fp64(problem):
    grid, tile, window, text_len, position, granularity, seed = problem
    layout = fps.plan(grid, tile, text_len, position)
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, layout.num_tokens, 1, 64, generator=generator) for _ in range(3))
    out = fps.attention(
        q, k, v, grid, tile=tile, window=window, text_len=text_len, text_position=position, granularity=granularity
    )
    mask = (fps.dense_mask(layout) if window is None else fps.sliding_tile_mask(layout, window)).to_token_mask()
    want = reference.attention_fp64(*(x.transpose(1, 2) for x in (q, k, v)), mask).transpose(1, 2)
    assert relative_l1(out, want) < 0.09  # few tokens average few errors: 2^-4 of V, of P, and of the scores


# Errors -------------------------------------------------------------------------------------------------------------------

GRID = (2, 3, 4)


def call(**changes):
    shape = changes.pop("shape", (1, 24, 2, 64))
    q, k, v = (changes.pop(name, torch.zeros(shape)) for name in "qkv")
    return fps.attention(q, k, v, **{"grid": GRID, **changes})


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {"grid": (21, 30, 52), "shape": (1, 32768, 1, 64)},
            r"grid \(21, 30, 52\) has 32760 tokens but q has 32768: pass text_len=8 or fix grid",
        ),
        ({"grid": (5, 5, 5)}, r"grid \(5, 5, 5\) has 125 tokens but q has 24: fix grid"),
        ({"shape": (1, 24, 2, 136)}, "head dimension 136, supported are 1 to 128"),
        (
            {"v": torch.zeros(1, 24, 2, 64, dtype=torch.float16)},
            "v has dtype torch.float16, expected torch.float32 like q",
        ),
        ({"k": torch.zeros(1, 23, 2, 64)}, r"k has shape \(1, 23, 2, 64\), expected \(1, 24, 2, 64\) like q"),
        ({"k": torch.zeros(1, 24, 2, 64, device="meta")}, "k is on meta, expected cpu like q"),
        ({"q": torch.zeros(24, 2, 64)}, r"q has shape \(24, 2, 64\), expected \(B, S, H, D\)"),
        ({"q": torch.zeros(1, 24, 2, 64, dtype=torch.int64)}, "q has dtype torch.int64"),
        ({"shape": (0, 24, 2, 64)}, "no size may be 0"),
        ({"tile": (2, 3, 2), "window": (1, 1, 3)}, "window"),
        ({"tile": (2, 3, 2), "window": (1, 1, 0)}, "window"),
        ({"window": (1, -1, 1)}, "window"),
        ({"tile": (0, 3, 2)}, "tile"),
        ({"grid": (2, 3)}, "grid"),
        ({"granularity": "head"}, "granularity 'head', expected one of 'tile', 'block', 'token'"),
        ({"tensor_layout": "BSHD"}, "tensor_layout 'BSHD', expected one of 'NHD', 'HND'"),
        ({"backend": "cuda"}, "backend 'cuda', expected one of"),
        ({"scale": float("nan")}, "scale nan, expected a finite number > 0"),
        ({"k_mean": torch.zeros(3)}, r"k_mean has shape \(3,\)"),
        ({"k_mean": torch.zeros(1, 2, 64), "smooth_k": False}, "k_mean is given but smooth_k is False"),
        ({"text_position": "middle", "text_len": 0}, "text_position"),
        ({"block_mask": torch.ones(3, 3)}, "block_mask is a Tensor, expected fpsattention.BlockMask"),
    ],
)
def test_bad_arguments(changes, text):
    with pytest.raises(ConfigError, match=text):
        call(**changes)


def test_bad_block_masks():
    layout = fps.plan(GRID)
    mask = fps.dense_mask(layout)
    with pytest.raises(ConfigError, match="window .* and block_mask are both given"):
        call(block_mask=mask, window=(1, 1, 1))
    with pytest.raises(ConfigError, match=r"block_mask was made for grid \(2, 3, 5\)"):
        call(block_mask=fps.dense_mask(fps.plan((2, 3, 5))))
    with pytest.raises(ConfigError, match="lists for 3 samples and 1 heads"):
        call(
            block_mask=fps.BlockMask.from_tiles(
                layout, torch.ones(3, 1, layout.num_tiles, layout.num_tiles, dtype=torch.bool)
            )
        )


def test_sm90_backend_on_a_cpu_tensor_says_why(monkeypatch):
    monkeypatch.delenv("FPSATTN_SM90_ON_HOST", raising=False)
    with pytest.raises(UnsupportedError, match="fpsattn doctor"):
        call(backend="sm90", shape=(1, 24, 2, 64))


def test_a_gpu_that_is_not_hopper_is_refused_with_the_reason(monkeypatch):
    function = importlib.import_module("fpsattention.ops.backends")
    monkeypatch.setattr(function.core, "sm90_missing", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert "NVIDIA A100 has compute capability 8.0, they are built for 9.0" in function.sm90_problem(
        torch.device("cuda")
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert function.sm90_problem(torch.device("cuda")) == ""
    monkeypatch.setattr(function.core, "sm90_missing", lambda: "built without CUDA kernels")
    assert function.sm90_problem(torch.device("cuda")) == "built without CUDA kernels"


@pytest.mark.parametrize("kind", ["huge", "constant", "one_key"])
def test_extreme_scores(kind):
    """Logits around +-1e4, all keys equal, one key that dominates: finite, and as good as the format allows."""
    q, k, v = CASES[2].inputs()
    if kind == "huge":
        q, k = 40 * q, 40 * k
    elif kind == "constant":
        k = k[:, :1].expand_as(k)
    else:
        k = torch.cat([20 * q.sign().mean(1, keepdim=True).sign(), 0.01 * k[:, 1:]], 1)
        q = q.abs() * k[:, :1].sign()
    out = [fps.attention(q, k, v, backend=backend, **CASES[2].kwargs()) for backend in ("cpu", "reference")]
    assert out[0].isfinite().all()
    assert relative_l1(out[0], out[1].double()) < 1e-3
    if kind == "constant":  # the mean of the attended V
        mask = CASES[2].mask().to_token_mask()
        want = reference.attention_fp64(*(x.transpose(1, 2) for x in (q, k, v)), mask).transpose(1, 2)
        assert relative_l1(out[0], want) < 0.06
