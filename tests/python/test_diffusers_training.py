"""Training through ``fpsattention.apply``: gradients, gradient checkpointing, debug."""

from __future__ import annotations

import pytest
import tiny_wan
import torch
from test_diffusers import MIXED, SWITCHED

import fpsattention as fps
from fpsattention.integrations.checkpointing import SnapshotCheckpoint

DEVICE = {**SWITCHED, "levels": {**SWITCHED["levels"], "wide": {"precision": "fp8", "window": {"density": 0.7}}}}
FORWARDS = [([900.0, 100.0], tiny_wan.GRID), ([300.0], (2, 6, 8))]  # other levels, another batch, another grid


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Gradients after two forwards and then one backward."""
    model.zero_grad()
    losses = [tiny_wan.run(model, timesteps, grid=grid).square().mean() for timesteps, grid in FORWARDS]
    sum(losses).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def reentrant(module, *args):
    return torch.utils.checkpoint.checkpoint(module, *args, use_reentrant=True)


@pytest.mark.parametrize("schedule", [DEVICE, MIXED], ids=["device", "host"])
@pytest.mark.parametrize("function", [None, reentrant], ids=["default", "reentrant"])
@pytest.mark.slow
def test_checkpointing_with_two_forwards_before_a_backward(schedule, function):
    model = tiny_wan.transformer().train()
    with fps.apply(model, {**schedule, "tile": [2, 4, 4]}):
        wanted = gradients(model)
        model.enable_gradient_checkpointing(function)
        got = gradients(model)
        assert isinstance(model._gradient_checkpointing_func, SnapshotCheckpoint)
    assert not isinstance(model._gradient_checkpointing_func, SnapshotCheckpoint)
    assert set(got) == set(wanted)
    for name, gradient in wanted.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_blocks_recomputed_behind_our_back_are_refused():
    """A checkpoint that nothing here wraps recomputes outside of any forward: an error, never another forward's level."""
    model = tiny_wan.transformer().train()
    with fps.apply(model, DEVICE | {"tile": [2, 4, 4]}):
        for block in model.blocks:
            plain = block.forward
            block.forward = lambda *args, plain=plain: torch.utils.checkpoint.checkpoint(
                plain, *args, use_reentrant=False
            )
        with pytest.raises(fps.ConfigError, match="ran outside of a forward of its transformer"):
            gradients(model)


@pytest.mark.slow
def test_gradients_follow_the_dense_ones_and_a_step_helps():
    model = tiny_wan.transformer().train()
    dense = gradients(model)
    with fps.apply(model, "fp8"):
        ours = gradients(model)
        for name in ("blocks.0.attn1.to_q.weight", "blocks.1.attn1.to_v.weight", "blocks.0.attn1.to_out.0.weight"):
            assert torch.nn.functional.cosine_similarity(ours[name].flatten(), dense[name].flatten(), dim=0) > 0.97, (
                name
            )
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        losses = []
        for _ in range(5):
            loss = tiny_wan.run(model, [300.0, 800.0], grid=(2, 4, 6)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0]


def test_debug_names_the_layer():
    model = tiny_wan.transformer().train()
    with fps.apply(model, SWITCHED, debug=True) as handle:
        tiny_wan.run(model, [300.0]).square().mean().backward()
        assert not handle.report().nonfinite
        with torch.no_grad():
            model.blocks[1].attn1.to_v.bias[3] = float("nan")
        with pytest.warns(UserWarning, match=r"transformer\.blocks\.1\.attn1: v has NaN or Inf"):
            tiny_wan.run(model, [300.0]).square().mean().backward()
        found = handle.report().nonfinite
        assert "transformer.blocks.1.attn1: v" in found and "transformer.blocks.0.attn1: v" not in found
        assert any("gradient of" in where for where in found)
        assert handle.log_dict()["fpsattn/nonfinite"] > 0
        handle.reset()
        assert not handle.report().nonfinite
