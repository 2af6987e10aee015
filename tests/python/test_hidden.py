"""Keys that a mask hides per sample, on the device: padded text."""

from __future__ import annotations

import pytest
import torch

from fpsattention.errors import ConfigError
from fpsattention.layout import masks, tiles
from fpsattention.ops import hidden
from fpsattention.ops.attend import attend

GRID, TILE, WINDOW, TEXT, HEADS, DIM = (2, 8, 10), (1, 4, 5), (1, 1, 2), 140, 2, 64  # text of two blocks
VIDEO = 160
LENGTHS = (140, 131, 9, 1)  # whole, into the second block, into the first one, one token


def inputs(position: str, dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(len(LENGTHS), VIDEO + TEXT, HEADS, DIM, generator=generator) for _ in range(3))
    valid = torch.arange(TEXT) < torch.tensor(LENGTHS)[:, None]
    hide = torch.nn.functional.pad(~valid, (VIDEO, 0) if position == "suffix" else (0, VIDEO))
    k[hide], v[hide] = 30.0, 1e4  # would win every row, and ruin the scales of V
    layout = tiles.plan(GRID, tile=TILE, text_len=TEXT, text_position=position)
    return q.to(dtype), k.to(dtype), v.to(dtype), hide, masks.sliding_tile_mask(layout, WINDOW)


def sdpa(q, k, v, allowed):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=allowed).transpose(1, 2)


@pytest.mark.parametrize("position", ["suffix", "prefix"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_hidden_keys_are_not_attended(backend, position):
    q, k, v, hide, mask = inputs(position)
    allowed = mask.to_token_mask() & ~hide[:, None, None]
    want = sdpa(q, k, v, allowed)
    filled = hidden.fill(k, v, hide, position == "prefix")
    out, lse = attend(q, *filled, mask, hidden=hide, backend=backend)
    for sample in range(len(LENGTHS)):
        assert (out[sample] - want[sample]).abs().mean() < 0.06 * want[sample].abs().mean()
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * DIM**-0.5
    exact = scores.masked_fill(~allowed, -torch.inf).logsumexp(-1)
    assert (lse - exact).abs().max() < 0.25  # scores are off by what e4m3 is
    loud, _ = attend(q, k, v, mask, backend=backend)
    assert (loud - want).abs().mean() > 10 * want.abs().mean()  # what hides them is needed


@pytest.mark.slow
def test_cpu_is_the_reference_and_a_sample_is_itself():
    q, k, v, hide, mask = inputs("suffix")
    k, v = hidden.fill(k, v, hide, False)
    out, lse = attend(q, k, v, mask, hidden=hide)
    by_reference = attend(q, k, v, mask, hidden=hide, backend="reference")
    # Sums in another order flip a rounding to e4m3 here and there.
    for a, b in zip((out, lse), by_reference, strict=True):
        assert (a - b).abs().mean() < 1e-5 and (a - b).abs().max() < 0.01
    for i in range(len(LENGTHS)):
        alone, _ = attend(q[i : i + 1], k[i : i + 1], v[i : i + 1], mask, hidden=hide[i : i + 1])
        assert torch.allclose(alone[0], out[i], atol=1e-6)
    nothing, _ = attend(q, k, v, mask, hidden=torch.zeros_like(hide))
    assert torch.equal(nothing, attend(q, k, v, mask)[0])


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.slow
def test_gradients_are_those_of_masked_attention(backend):
    q, k, v, hide, mask = inputs("suffix")
    tensors = [x.requires_grad_() for x in (q, k, v)]
    weight = torch.randn(q.shape, generator=torch.Generator().manual_seed(1)) * ~hide[:, :, None, None]
    out, _ = attend(q, *hidden.fill(k, v, hide, False), mask, hidden=hide, backend=backend)
    grads = torch.autograd.grad((out * weight).sum(), tensors)
    exact = sdpa(q, k, v, mask.to_token_mask() & ~hide[:, None, None])
    wanted = torch.autograd.grad((exact * weight).sum(), tensors)
    for got, want in zip(grads, wanted, strict=True):
        assert (got - want).abs().mean() < 0.15 * want.abs().mean()
    assert not grads[1][hide].any() and not grads[2][hide].any()


def test_k_of_the_sm90_backward_adds_nothing_to_dq():
    """The kernels of the backward read no ones: a hidden key must be 0 there, as keys in padding slots are."""
    q, k, v, hide, mask = inputs("suffix")
    layout = mask.layout
    k8 = torch.randn(len(LENGTHS), HEADS, layout.num_blocks, 128, DIM).to(torch.float8_e4m3fn)
    got = hidden.without_keys(k8, hidden.slots(hide, layout.token_of_slot)).float()
    zero = (got == 0).all(-1).flatten(2)[:, 0][:, layout.slot_of_token.long()]
    assert torch.equal(zero, hide)


@pytest.mark.slow
def test_under_compile_and_bad_arguments():
    q, k, v, hide, mask = inputs("suffix")
    lists = mask.lists(True)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def run(q, k, v, hide):
        return attend(q, *hidden.fill(k, v, hide, False), lists, hidden=hide)[0]

    eager = attend(q, *hidden.fill(k, v, hide, False), lists, hidden=hide)[0]
    assert torch.equal(run(q, k, v, hide), eager)
    with pytest.raises(ConfigError, match="attention_masked: hidden has shape"):
        attend(q, k, v, mask, hidden=hide[:1])
    with pytest.raises(ConfigError, match="attention_masked: hidden has dtype"):
        attend(q, k, v, mask, hidden=hide.int())
