"""The baselines' numerics against token-by-token rules in plain Python, and the library's own op beside them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import fpsattention as fps
from fpsattention import ConfigError
from fpsattention.compare.numerics import BF16, EXACT, NAIVE_FP8, PAPER, SAGE, Numerics, blockwise_attention

LAYOUT = fps.plan((3, 7, 14), (3, 7, 5), 11)  # tiles of 105, 105, 84 tokens and text: padding in every block


def tensors(layout=LAYOUT, heads=2, dim=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, heads, layout.num_tokens, dim, generator=generator) for _ in range(3))
    return q, k + torch.randn(1, heads, 1, dim, generator=generator), v


def some_mask(q, k, layout=LAYOUT):
    keep = torch.rand(1, 2, layout.num_tiles, layout.num_blocks, generator=torch.Generator().manual_seed(3)) < 0.6
    keep[..., 0] = True
    return fps.BlockMask.from_keep(layout, keep)


def e4m3(x):
    """Nearest value with four significant bits (ties to even), spaced 2^-9 below 2^-6, at most 448."""
    x = np.asarray(x, dtype=np.float64)
    exponent = np.floor(np.log2(np.maximum(np.abs(x), 2.0**-20)))
    step = 2.0 ** (np.maximum(exponent, -6) - 3)
    return np.clip(np.round(x / step) * step, -448, 448)


def plain(q, k, v, mask, numerics, pv_threshold=None, warp=32):
    """One head in FP64, block after block, as the papers say it. q, k, v ``[S, D]``."""
    layout = mask.layout
    slots = layout.token_of_slot.view(-1, 128).tolist()
    blocks = [[t for t in row if t >= 0] for row in slots]
    dim = q.shape[1]
    if numerics.smooth_k:
        k = k - k.mean(0)

    def rounded(x, group):
        values, scales = np.zeros_like(x), np.zeros(len(x))
        tile = layout.tile_of_block.tolist()
        for j, tokens in enumerate(blocks):
            if group == "head":
                groups = [list(range(len(x)))]
            elif group == "tile":
                groups = [[t for i, other in enumerate(blocks) if tile[i] == tile[j] for t in other]]
            elif group == "half":
                groups = [tokens[:64], tokens[64:]]
            else:
                groups = [tokens]
            for g in groups:
                if not g:
                    continue
                largest = np.abs(x[g]).max()
                s = largest / (127 if numerics.qk == "int8" else 448)
                mine = [t for t in g if t in tokens]
                y = x[mine] / s
                values[mine] = np.sign(y) * np.floor(np.abs(y) + 0.5) if numerics.qk == "int8" else e4m3(y)
                scales[mine] = s
        return values, scales

    if numerics.qk == "bf16":
        q, k, v = (torch.from_numpy(x).bfloat16().double().numpy() for x in (q, k, v))
    if numerics.qk in ("exact", "bf16"):
        (qv, qs), (kv, ks) = (q, np.ones(len(q))), (k, np.ones(len(k)))
    else:
        (qv, qs), (kv, ks) = rounded(q, numerics.q_group), rounded(k, numerics.k_group)
    if numerics.v in ("exact", "bf16"):
        vv, vs = v, np.ones(dim)
    else:
        vs = np.abs(v).max(0) / 448 if numerics.v == "channel" else np.full(dim, np.abs(v).max() / 448)
        vv = e4m3(v / vs)
    out = np.zeros_like(v)
    skipped = 0
    for i, tokens in enumerate(blocks):
        tile = int(layout.tile_of_block[i])
        listed = mask.kv_indices[tile][: mask.kv_num_blocks[tile]].tolist() if mask.kv_indices.ndim == 2 else None
        for start in range(0, len(tokens), warp):
            rows = tokens[start : start + warp]
            m, l, o = np.full(len(rows), -np.inf), np.zeros(len(rows)), np.zeros((len(rows), dim))
            for j in listed:
                keys = blocks[j]
                s = (qv[rows] @ kv[keys].T) * qs[rows][:, None] * ks[keys][None] / math.sqrt(dim)
                local = s.max(1)
                new = np.maximum(m, local)
                p = np.exp(s - new[:, None])
                total = p.sum(1)
                if numerics.p_scale is not None:
                    p = e4m3(p * numerics.p_scale) / numerics.p_scale
                elif numerics.v == "bf16":
                    p = torch.from_numpy(p).bfloat16().double().numpy()
                if numerics.round_sum:
                    total = p.sum(1)
                rescale = np.exp(m - new)
                l, m = l * rescale + total, new
                o = o * rescale[:, None]
                if pv_threshold is None or (local - new >= -pv_threshold).any():
                    o = o + p @ vv[keys]
                else:
                    skipped += 1
            out[rows] = o * vs / l[:, None]
    return out, skipped


class OneHead:
    """The lists of one head."""

    def __init__(self, mask, head):
        self.layout = mask.layout
        self.kv_num_blocks, self.kv_indices = (x[0, head % x.shape[1]] for x in (mask.kv_num_blocks, mask.kv_indices))


@pytest.mark.parametrize(
    "numerics",
    [EXACT, BF16, SAGE, NAIVE_FP8, PAPER, Numerics("fp8", "block", "half", True, "channel", 256.0, True)],
    ids=["exact", "bf16", "sage", "naive", "paper", "mixed"],
)
def test_equals_the_rule_in_plain_python(numerics):
    q, k, v = tensors()
    mask = some_mask(q, k)
    out, _ = blockwise_attention(q, k, v, mask, numerics)
    for head in range(2):
        want, _ = plain(*(x[0, head].double().numpy() for x in (q, k, v)), OneHead(mask, head), numerics)
        got = out[0, head].double().numpy()
        # The same roundings but for values that FP32 moves across a boundary: single steps of a few elements.
        assert np.abs(got - want).mean() / np.abs(want).mean() < (1e-5 if numerics is EXACT else 5e-4)


def test_exact_numerics_are_masked_attention():
    q, k, v = tensors()
    mask = some_mask(q, k)
    out, share = blockwise_attention(q, k, v, mask, EXACT)
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask.to_token_mask())
    torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-5)
    assert share == 1.0


def test_errors_are_in_the_order_that_care_predicts():
    """Outliers in some tokens: naive FP8 is worst, scales per tile and smoothing help, and nobody is exact."""
    q, k, v = tensors(seed=4)
    q[:, :, ::97] *= 20
    k = k + 4 * torch.randn(1, 2, 1, 64, generator=torch.Generator().manual_seed(9))
    mask = fps.dense_mask(LAYOUT)
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v)

    def error(out):
        return ((out - dense).abs().sum() / dense.abs().sum()).item()

    naive, sage, bf16 = (error(blockwise_attention(q, k, v, mask, n)[0]) for n in (NAIVE_FP8, SAGE, BF16))
    ours = error(fps.attention(q, k, v, grid=LAYOUT.grid, block_mask=mask, text_len=11, tensor_layout="HND"))
    assert 0 < bf16 < sage < naive and bf16 < ours < naive


def test_the_second_filter_of_sparge():
    """Against plain Python, warp by warp; a generous threshold filters nothing, a small one does, and the error grows with it."""
    q, k, v = tensors()
    tile = LAYOUT.tile_of_block.long()[LAYOUT.slot_of_token.long() // 128]
    towards = torch.randn(2, LAYOUT.num_tiles, 64, generator=torch.Generator().manual_seed(8))
    q, k = (0.3 * x + towards[:, tile] for x in (q, k))  # tiles that prefer their own, by many units
    mask = fps.BlockMask.from_keep(LAYOUT, torch.ones(1, 1, LAYOUT.num_tiles, LAYOUT.num_blocks, dtype=torch.bool))
    everything, share = blockwise_attention(q, k, v, mask, SAGE, pv_threshold=1e4)
    assert share == 1.0 and torch.equal(everything, blockwise_attention(q, k, v, mask, SAGE)[0])
    out, share = blockwise_attention(q, k, v, mask, SAGE, pv_threshold=3.0)
    assert 0 < share < 1
    skipped = 0
    for head in range(2):
        want, count = plain(*(x[0, head].double().numpy() for x in (q, k, v)), OneHead(mask, head), SAGE, 3.0)
        got = out[0, head].double().numpy()
        assert np.abs(got - want).mean() / np.abs(want).mean() < 5e-3
        skipped += count
    assert skipped > 0
    tighter = blockwise_attention(q, k, v, mask, SAGE, pv_threshold=0.5)
    assert tighter[1] <= share and (tighter[0] - everything).abs().sum() >= (out - everything).abs().sum() > 0


def test_rows_without_blocks_give_zero():
    q, k, v = tensors()
    keep = torch.zeros(1, 1, LAYOUT.num_tiles, LAYOUT.num_blocks, dtype=torch.bool)
    keep[:, :, 0, :2] = True
    mask = fps.BlockMask.from_keep(LAYOUT, keep)
    out, _ = blockwise_attention(q, k, v, mask, SAGE)
    assert torch.isfinite(out).all() and (out[:, :, -11:] == 0).all() and (out != 0).any()


def test_settings_are_checked():
    with pytest.raises(ConfigError, match=r"qk 'int4'"):
        Numerics("int4")
    with pytest.raises(ConfigError, match=r"groups 'warp'"):
        Numerics("int8", "warp")
    with pytest.raises(ConfigError, match=r"blockwise_attention: q has shape"):
        blockwise_attention(*(x[:, :, 1:] for x in tensors()), fps.dense_mask(LAYOUT))
