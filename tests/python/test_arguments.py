"""Arguments of the public functions: whatever comes, an answer or one of our errors; and the words that have several names."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

import fpsattention as fps
from fpsattention.errors import ConfigError, UnsupportedError

GRID, SHAPE = (2, 3, 4), (1, 24, 2, 64)
OURS = (ConfigError, UnsupportedError)


def unprintable():
    class Unprintable:
        def __repr__(self):
            raise RuntimeError("no repr")

    return Unprintable()


JUNK = [
    None, True, False, 0, 1, -1, 3, 2**31, 2**70, 1.5, float("nan"), float("inf"), -0.0, 1e308, 10**400, 1j, "", "tile", "NHD", "cpu",
    b"x", (), [], {}, set(), (1, 2), (2, 3, 4), [2, 3, 4], (2, 3, 4, 5), {2, 3, 4}, {2: 1, 3: 1, 4: 1}, frozenset({2, 3, 4}),
    (2.0, 3.0, 4.0), (True, 3, 4), ("2", "3", "4"), ((2,), 3, 4), [[2, 3, 4]], (None,) * 3, (0, 3, 4), (-2, 3, 4), (2**40, 1, 1),
    (2**30,) * 3, range(2, 5), iter((2, 3, 4)), int, object(), len, lambda: 1, unprintable(), Exception("x"), slice(3), Ellipsis,
    np.array([2, 3, 4]), np.array([2.0, 3, 4]), np.int32(2), np.float32(0.5), np.bool_(True), np.array(2), np.nan,
    torch.tensor(2), torch.tensor([2, 3, 4]), torch.tensor(True), torch.zeros(SHAPE), torch.zeros(SHAPE, dtype=torch.int64),
    torch.zeros(0), torch.zeros(1, 2, 64), torch.zeros(1, 2, 64, dtype=torch.int64), torch.zeros(1, 2, 64, dtype=torch.float64),
    torch.zeros(SHAPE, dtype=torch.complex64), torch.zeros(SHAPE, device="meta"), torch.zeros(SHAPE).to_sparse(),
    torch.nested.nested_tensor([torch.zeros(24, 2, 64)]), torch.nested.nested_tensor([torch.zeros(24, 2, 64)], layout=torch.jagged),
    torch.float32, torch.device("cpu"), torch.Size((2, 3, 4)), fps.plan(GRID), fps.dense_mask(fps.plan(GRID)), fps.plan, fps,
]  # fmt: skip
NAMES = [
    "q", "k", "v", "grid", "tile", "window", "block_mask", "granularity", "scale", "softmax_scale", "smooth_k", "pow2_scales", "text_len",
    "text_position", "tensor_layout", "return_lse", "backend", "k_mean", "v_absmax", "deterministic",
]  # fmt: skip


def attention(**changes):
    arguments = {name: torch.ones(SHAPE) for name in "qkv"} | {"grid": GRID} | changes
    return fps.attention(**arguments)


def ours_or_fine(function, *arguments, **options):
    """Runs; any exception that is not ours fails the test. Errors are one line and name the package."""
    try:
        return function(*arguments, **options)
    except OURS as error:
        text = str(error)
        assert text.startswith("fpsattention") and "\n" not in text and len(text) < 500, text
        return error


@pytest.mark.parametrize("name", NAMES)
def test_one_odd_argument(name):
    for junk in JUNK:
        ours_or_fine(attention, **{name: junk})


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(st.dictionaries(st.sampled_from(NAMES), st.sampled_from(range(len(JUNK))), min_size=2, max_size=5))
@pytest.mark.slow
def test_several_odd_arguments(changes):
    ours_or_fine(attention, **{name: JUNK[index] for name, index in changes.items()})


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.binary(max_size=3)
NESTED = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.tuples(inner, inner, inner)
        | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
)


@pytest.mark.slow
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(st.sampled_from(NAMES[3:]), NESTED)
def test_random_values(name, value):
    ours_or_fine(attention, **{name: value})


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(st.sampled_from(["grid", "tile", "text_len", "text_position"]), NESTED | st.sampled_from(JUNK))
@pytest.mark.slow
def test_plan(name, value):
    small = {"grid": GRID, name: value}
    if name in ("grid", "text_len") and not isinstance(ours_or_fine(lambda: planned_size(**small)), int):
        return
    ours_or_fine(fps.plan, **small)


def planned_size(grid=GRID, text_len=0, **_):
    """Tokens, where the sizes are sane and small enough to plan in a test."""
    try:
        total = int(np.prod([int(x) for x in grid], dtype=object)) + int(text_len)
    except Exception:
        return 0  # plan() must say what is wrong
    return total if total < 10**5 else None


def test_masks_and_layouts():
    layout, mask = fps.plan(GRID), fps.dense_mask(fps.plan(GRID))
    for junk in JUNK:
        for function in (
            lambda x: fps.sliding_tile_mask(layout, x), lambda x: fps.sliding_tile_mask(x, (1, 1, 1)), fps.dense_mask,
            lambda x: fps.BlockMask(x, mask.kv_num_blocks, mask.kv_indices), lambda x: fps.BlockMask(layout, x, mask.kv_indices),
            lambda x: fps.BlockMask(layout, mask.kv_num_blocks, x), lambda x: fps.BlockMask.from_tiles(layout, x),
            lambda x: fps.BlockMask.from_tiles(x, torch.ones(1, 1, dtype=torch.bool)), fps.BlockMask.stack,
            lambda x: fps.BlockMask.stack([mask, x]), mask.select, mask.to, layout.to, layout.permuted, layout.same_as,
            lambda x: fps.BlockMask.from_flex(layout, x), lambda x: fps.BlockMask.from_flex(x, mask.to_flex()),
        ):  # fmt: skip
            ours_or_fine(function, junk)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"grid": 24}, r"grid 24, expected three integers \(T, H, W\)"),
        ({"grid": {2, 3, 4}}, r"grid \{2, 3, 4\}, expected three integers"),
        ({"grid": (2.0, 3.0, 4.0), "block_mask": fps.dense_mask(fps.plan(GRID))}, "grid .2.0, 3.0, 4.0., expected three integers"),
        ({"tile": {2, 3, 4}}, "tile {2, 3, 4}, expected three integers"),
        ({"window": torch.tensor([1, 1, 1])}, "window Tensor .* expected three integers"),
        ({"granularity": {}}, "granularity {}, expected one of 'tile', 'block', 'token'"),
        ({"scale": True}, "scale True, expected a finite number > 0"),
        ({"scale": 0.1, "softmax_scale": 0.1}, "scale and softmax_scale are both given"),
        ({"softmax_scale": -1}, "softmax_scale -1, expected a finite number > 0"),
        ({"v_absmax": torch.ones(1, 2, 64, dtype=torch.int64)}, "v_absmax has dtype torch.int64, expected a tensor of floats"),
        ({"smooth_k": "no"}, "smooth_k 'no', expected True or False"),
        ({"pow2_scales": None}, "pow2_scales None, expected True or False"),
        ({"text_len": 1.0}, "text_len 1.0, expected an integer"),
        ({"q": torch.nested.nested_tensor([torch.zeros(24, 2, 64)])}, "q is a nested or sparse tensor, expected a dense one"),
    ],
)  # fmt: skip
def test_messages(changes, text):
    with pytest.raises(ConfigError, match=f"^fpsattention.attention: {text}"):
        attention(**changes)


def test_the_other_layout_is_named():
    x = torch.zeros(1, 2, 24, 64)
    with pytest.raises(
        ConfigError, match=r'has 24 tokens but q has 2: if q is \(B, H, S, D\), pass tensor_layout="HND"'
    ):
        fps.attention(x, x, x, GRID)
    x = x.transpose(1, 2)
    with pytest.raises(
        ConfigError, match=r'has 24 tokens but q has 2: if q is \(B, S, H, D\), pass tensor_layout="NHD"'
    ):
        fps.attention(x, x, x, GRID, tensor_layout="HND")


def test_two_names_of_the_scale():
    q, k, v = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0)).unbind(0)
    want = fps.attention(q, k, v, GRID, scale=0.3)
    assert torch.equal(fps.attention(q, k, v, GRID, softmax_scale=0.3), want)
    assert torch.equal(fps.attention(q, k, v, GRID, scale=np.float64(0.3)), want)
    assert not torch.equal(fps.attention(q, k, v, GRID), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.slow
def test_autocast_is_that_of_sdpa(dtype):
    q, k, v = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0)).unbind(0)
    v = v.to(dtype)
    with torch.autocast("cpu", dtype):
        out = fps.attention(q, k, v, GRID)
        dense = scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
        compiled = torch.compile(lambda *x: fps.attention(*x, GRID), fullgraph=True, backend="eager")(q, k, v)
    assert out.dtype == dense.dtype == dtype
    assert torch.equal(out, fps.attention(q.to(dtype), k.to(dtype), v, GRID)) and torch.equal(out, compiled)
    assert (out.float() - dense.float()).norm() < 0.1 * dense.float().norm()
    with pytest.raises(ConfigError, match="v has dtype .* expected torch.float32 like q"):
        fps.attention(q, k, v, GRID)
