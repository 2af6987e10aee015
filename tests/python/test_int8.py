"""``precision="int8"``: Q and K in INT8 with a scale per block, P and V as ever; the reference, the CPU kernels, a schedule's level."""

from __future__ import annotations

import pytest
import torch

import fpsattention as fps
from fpsattention import ConfigError, UnsupportedError
from fpsattention.compare.numerics import Numerics, blockwise_attention
from fpsattention.ops import attend as attending
from fpsattention.ops import cpu, reference
from fpsattention.ops.reference import INT8, to_int8

LAYOUTS = [((3, 5, 7), None, 0), ((2, 9, 11), (2, 3, 4), 13), ((1, 1, 131), None, 0)]


def tensors(grid, text, dim=64, seed=0, heads=2):
    generator = torch.Generator().manual_seed(seed)
    tokens = grid[0] * grid[1] * grid[2] + text
    q, k, v = (torch.randn(1, heads, tokens, dim, generator=generator) for _ in range(3))
    return q, k + 3.0 * torch.randn(1, heads, 1, dim, generator=generator), v  # K has a mean to smooth away


def test_rounding_is_half_away_from_zero_and_saturates():
    x = torch.tensor([0.0, 0.4999, 0.5, -0.5, 1.5, 2.5, -2.5, 126.6, 127.5, 1e9, -1e9])
    assert to_int8(x).tolist() == [0, 0, 1, -1, 2, 3, -3, 127, 127, 127, -127]


@pytest.mark.parametrize("grid, tile, text", LAYOUTS)
@pytest.mark.parametrize("smooth", [True, False])
def test_quantized_bytes(grid, tile, text, smooth):
    """By the rule, block by block, in FP64; the CPU kernel has the same bits as the reference."""
    layout = fps.plan(grid, tile, text)
    q, k, v = tensors(grid, text)
    tables = layout.token_of_slot, layout.tile_block_offsets
    options = {"granularity": INT8, "smooth_k": smooth, "pow2_scales": False}
    made = reference.quantize(q, k, v, *tables, **options)
    again = cpu.quantize(q, k, v, *tables, made.k_mean, **options)
    for one, other in zip(made, again, strict=True):
        if one.dtype in (torch.int8, torch.float32):
            torch.testing.assert_close(
                one, other, rtol=1e-5 if one is made.q_k_mean else 0, atol=1e-4 if one is made.q_k_mean else 0
            )
        else:
            assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))
    assert made.q8.dtype == made.k8.dtype == torch.int8 and made.v8t.dtype == torch.float8_e4m3fn
    slots = layout.token_of_slot.view(-1, 128)
    for x, x8, scale in ((q, made.q8, made.q_scale), (k - made.k_mean.unsqueeze(2), made.k8, made.k_scale)):
        for block, tokens in enumerate(slots):
            rows = x[:, :, tokens[tokens >= 0].long()]
            wanted = rows.abs().amax((-1, -2)) / 127
            assert torch.equal(scale[:, :, block], wanted)
            error = rows.double() - x8[:, :, block, tokens >= 0].double() * wanted.double()[..., None, None]
            assert float((error.abs() / wanted[..., None, None]).max()) < 0.5 + 1e-4


@pytest.mark.parametrize("grid, tile, text", LAYOUTS)
def test_cpu_kernels_match_the_reference_with_gradients(grid, tile, text):
    window = None if tile is None else (1, 2, 2)
    results = []
    for backend in ("reference", "cpu"):
        q, k, v = (x.requires_grad_() for x in tensors(grid, text))
        out, lse = fps.attention(
            q, k, v, grid, tile=tile, window=window, text_len=text, tensor_layout="HND", precision="int8", backend=backend,
            return_lse=True,
        )  # fmt: skip
        out.backward(torch.ones_like(out).cumsum(2) / out.shape[2])
        results.append((out.detach(), lse, q.grad, k.grad, v.grad))
    # The two sum K's mean in different orders: here and there a value lies on the other side of a rounding, a step of 1/127 of one
    # key or 1/16 of one P, and all else is equal to a few bits.
    for one, other in zip(*results, strict=True):
        assert float((one - other).abs().sum() / one.abs().sum()) < 1e-3


def test_int8_is_the_finer_rounding_of_q_and_k():
    """Against exact attention: 7 bits under one maximum beat e4m3's 4 where a block has no outliers; the error of P and V stays.

    And it is SageAttention's, whose numerics are modelled apart, with P in e4m3 relative to a running maximum.
    """
    grid = (2, 8, 16)
    q, k, v = tensors(grid, 0, dim=128)
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v)

    def error(out):
        return float((out - exact).abs().sum() / exact.abs().sum())

    fp8 = fps.attention(q, k, v, grid, tensor_layout="HND", granularity="block")
    int8 = fps.attention(q, k, v, grid, tensor_layout="HND", precision="int8")
    mask = fps.layout.masks.dense_mask(fps.plan(grid))
    sage = blockwise_attention(q, k, v, mask, Numerics("int8", "block", "block", True, "channel", 448.0))[0]
    assert 0.5 * error(sage) < error(int8) < 1.5 * error(sage)
    assert error(int8) < 0.9 * error(fp8)


def test_where_it_cannot_run(monkeypatch):
    q, k, v = tensors((1, 4, 4), 0)
    monkeypatch.setattr(attending, "resolve_backend", lambda backend, q: "sm90")
    with pytest.raises(UnsupportedError, match="precision 'int8' on the sm_90a kernels.*precision='fp8'"):
        fps.attention(q, k, v, (1, 4, 4), tensor_layout="HND", precision="int8")
    with pytest.raises(ConfigError, match="precision 'int4', expected one of 'fp8', 'int8'"):
        fps.attention(q, k, v, (1, 4, 4), tensor_layout="HND", precision="int4")


def test_levels():
    tiny_wan = pytest.importorskip("tiny_wan")

    def schedule(*levels, version=3):
        return {
            "format": f"fpsattn-schedule/{version}", "tile": tiny_wan.TILE, "levels": {f"l{i}": x for i, x in enumerate(levels)},
            "phases": [{"sigma": [1 - i / len(levels), 1 - (i + 1) / len(levels)], "level": f"l{i}"} for i in range(len(levels))],
        }  # fmt: skip

    level = {"precision": "int8", "window": [1, 2, 2]}
    assert fps.Schedule.from_dict(schedule(level)).to_dict()["levels"]["l0"] == {**level, "granularity": "block"}
    with pytest.raises(ConfigError, match=r'levels\["l0"\].granularity is \'tile\''):
        fps.Schedule.from_dict(schedule({**level, "granularity": "tile"}))
    with pytest.raises(ConfigError, match=r'levels\["l0"\].precision'):
        fps.Schedule.from_dict(schedule(level, version=2))
    model, seen = tiny_wan.transformer(num_layers=1), {}
    mixed = schedule(
        level,
        {"precision": "fp8", "window": [1, 2, 2]},
        {"precision": "int8", "pattern": {"name": "topk_mean", "ratio": 0.4}},
    )
    with torch.no_grad(), fps.apply(model, mixed) as handle:
        handle.installations[0].sites[0].observers.append(lambda name, *tensors: seen.update(tensors=tensors))
        tiny_wan.run(model, [900.0, 600.0, 100.0])
        assert [(row.precision, row.calls) for row in handle.report().rows] == [("int8", 1), ("fp8", 1), ("int8", 1)]
    q, k, v, out = seen["tensors"]
    options = {"tile": tiny_wan.TILE, "window": (1, 2, 2)}
    assert torch.equal(out[:1], fps.attention(q[:1], k[:1], v[:1], tiny_wan.GRID, **options, precision="int8"))
    assert torch.equal(out[1:2], fps.attention(q[1:2], k[1:2], v[1:2], tiny_wan.GRID, **options))
    mask = fps.patterns.topk_mean(
        q[2:].transpose(1, 2), k[2:].transpose(1, 2), fps.plan(tiny_wan.GRID, tiny_wan.TILE), ratio=0.4
    )
    assert torch.equal(out[2:], fps.attention(q[2:], k[2:], v[2:], tiny_wan.GRID, block_mask=mask, precision="int8"))
