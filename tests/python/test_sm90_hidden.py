"""Keys hidden per sample, in the sm_90a kernels: on a Hopper GPU, or in the emulator."""

from __future__ import annotations

import pytest
import torch
from test_hidden import inputs, sdpa
from test_sm90_ops import DEVICE

from fpsattention.ops import hidden
from fpsattention.ops.attend import attend


@pytest.mark.parametrize("position", ["suffix", "prefix"])
def test_forward_and_gradients(position):
    """Scores of hidden keys would win every row, and as padding of K in the backward they must add nothing to dQ."""
    q, k, v, hide, mask = inputs(position, torch.bfloat16)
    q, k, v, hide = (x[[0, 2]].to(DEVICE) for x in (q, k, v, hide))
    tensors = [x.clone().requires_grad_() for x in (q, k, v)]
    weight = torch.randn(q.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, q.dtype)
    filled = hidden.fill(*tensors[1:], hide, position == "prefix")
    out, _ = attend(tensors[0], *filled, mask, hidden=hide, backend="sm90", deterministic=True)
    grads = torch.autograd.grad((out * weight).sum(), tensors)
    exact_inputs = [x.float().clone().requires_grad_() for x in (q, k, v)]
    exact = sdpa(*exact_inputs, mask.to_token_mask().to(DEVICE) & ~hide[:, None, None])
    wanted = torch.autograd.grad((exact * weight.float()).sum(), exact_inputs)
    assert (out.float() - exact).abs().mean() < 0.06 * exact.abs().mean()
    for got, want in zip(grads, wanted, strict=True):
        assert (got.float() - want).abs().mean() < 0.15 * want.abs().mean()
    assert not grads[1][hide].any() and not grads[2][hide].any()
