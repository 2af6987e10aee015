"""Keys hidden per sample, in the sm_90a kernels: on a Hopper GPU, or in the emulator."""

from __future__ import annotations

import pytest
import torch
from test_hidden import VIDEO, inputs, sdpa
from test_sm90_ops import DEVICE

import fpsattention as fps
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


def test_raw_queries_and_keys():
    """Norm and RoPE in the quantizer with hidden keys, forward and gradients, against the definition by autograd."""
    q, k, v, hide, mask = inputs("suffix", torch.bfloat16)
    q, k, v, hide = (x[[0, 2]] for x in (q, k, v, hide))
    generator = torch.Generator().manual_seed(2)
    weights = [1 + 0.2 * torch.randn(2, q.shape[3], generator=generator) for _ in "qk"]
    angles = torch.randn(VIDEO, q.shape[3] // 2, generator=generator)
    up, results = torch.randn(q.shape, generator=generator), []
    for backend, device in (("sm90", DEVICE), ("reference", "cpu")):
        tensors = [x.to(device).clone().requires_grad_() for x in (q, k, v, *weights)]
        norm, rope = fps.Norm("rms", *tensors[3:]), fps.Rope(angles.cos().to(device), angles.sin().to(device))
        filled = hidden.fill(tensors[1], tensors[2], hide.to(device), False)
        options = {"deterministic": True} if backend == "sm90" else {}
        out, _ = attend(
            tensors[0], *filled, mask, hidden=hide.to(device), norm=norm, rope=rope, backend=backend, **options
        )
        results.append([x.float().cpu() for x in (out, *torch.autograd.grad((out * up.to(out)).sum(), tensors))])
    for got, want in zip(*results, strict=True):
        assert (got - want).norm() < 0.02 * want.norm()
    assert not results[0][2][hide].any() and results[0][2].any()
