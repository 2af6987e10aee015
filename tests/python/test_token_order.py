"""Tile order once per forward: the layout, the ops, and models, which must not notice."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import tiny_models
import tiny_wan
import torch
from test_linears import ALL
from torch import Tensor

import fpsattention as fps
from fpsattention.errors import ConfigError, UnsupportedError
from fpsattention.integrations import site
from fpsattention.layout.tiles import BLOCK, plan
from fpsattention.ops.attend import attend

MIXED = {
    **ALL,
    "levels": {"dense": {"precision": "bf16"}, "it": {"precision": "fp8", "window": [1, 1, 2]}},
    "phases": [{"sigma": [1.0, 0.5], "level": "dense"}, {"sigma": [0.5, 0.0], "level": "it"}],
}


@pytest.fixture
def same_mean(monkeypatch):
    """The mean of K summed in FP64 and rounded once. The op sums tokens in their order in FP32: the last bit may differ, and a code."""

    def with_mean(q: Tensor, k: Tensor, v: Tensor, lists: Any, **options: Any) -> Any:
        return attend(q, k, v, lists, k_mean=k.detach().double().mean(1).float(), **options)

    monkeypatch.setattr(site, "attend", with_mean)


# Layout and ops ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [(0, "none"), (13, "suffix"), (13, "prefix")], ids=["video", "suffix", "prefix"])
@pytest.mark.parametrize("grid, tile", [((5, 7, 11), (2, 3, 5)), ((3, 8, 12), (3, 4, 4)), ((2, 16, 16), None)])
def test_rows_of_a_block_are_consecutive_and_the_tiles_are_the_same(grid, tile, text):
    layout = plan(grid, tile, *text)
    ordered, index = layout.in_tile_order(), layout.to_tile_order()
    first = text[0] if text[1] == "prefix" else 0
    for block in ordered.token_of_slot.view(-1, BLOCK):
        tokens = block[block >= 0]
        assert (tokens.diff() == 1).all() and (block[: len(tokens)] >= 0).all()
    whole = torch.arange(layout.num_tokens)  # a sequence in tile order, by its tokens in raster order
    whole[first : first + layout.num_video_tokens] = first + index
    valid = layout.token_of_slot >= 0
    assert torch.equal(whole[ordered.token_of_slot[valid].long()].int(), layout.token_of_slot[valid])
    assert torch.equal(ordered.token_of_slot >= 0, layout.token_of_slot >= 0)
    assert torch.equal(ordered.slot_of_token[ordered.token_of_slot[valid].long()], valid.nonzero()[:, 0].int())
    assert torch.equal(ordered.tile_of_block, layout.tile_of_block)


@pytest.mark.parametrize("granularity", ["tile", "block", "token"])
@pytest.mark.slow
def test_attention_of_the_ordered_is_the_ordered_attention(granularity):
    grid, tile, window = (3, 8, 12), (3, 4, 4), (1, 2, 2)
    layout = plan(grid, tile, 5, "suffix")
    generator = torch.Generator().manual_seed(0)
    q, k, v, up = (torch.randn(2, layout.num_tokens, 2, 64, generator=generator).bfloat16() for _ in range(4))
    index = torch.cat([layout.to_tile_order(), torch.arange(layout.num_video_tokens, layout.num_tokens)])
    mean = k.double().mean(1).float()
    results = []
    for mask, order in (
        (fps.sliding_tile_mask(layout, window), torch.arange(layout.num_tokens)),
        (fps.sliding_tile_mask(layout.in_tile_order(), window), index),
    ):
        inputs = [x[:, order].clone().requires_grad_() for x in (q, k, v)]
        out, lse = attend(*inputs, mask, granularity=granularity, k_mean=mean)
        out.backward(up[:, order])
        results.append([out, lse.transpose(1, 2), *(x.grad for x in inputs)])
    for raster, ordered in zip(*results, strict=True):
        assert torch.equal(raster[:, index], ordered)


# Models ------------------------------------------------------------------------------------------------------------------


def both_orders(model: torch.nn.Module, arguments: dict[str, Any], schedule: Any) -> list[tuple[Tensor, list[Tensor]]]:
    """Outputs, and what the layers saw, in raster order and in tile order."""
    results = []
    for order in ("raster", "tile"):
        seen: list[Tensor] = []
        with fps.apply(model, schedule, token_order=order) as handle:
            for one in handle.installations[0].sites:
                one.observers.append(lambda name, *tensors, seen=seen: seen.extend(tensors))
            results.append((model(**arguments, return_dict=False)[0], seen))
            assert all(("tile order" in text) == (order == "tile") for text in handle.report().grids.values())
    return results


@pytest.mark.slow
@pytest.mark.parametrize("per_token", [False, True], ids=["timestep per sample", "timestep per token"])
@torch.no_grad()
def test_wan_is_the_same_to_the_bit(same_mean, per_token):
    """FP8 attention and linears, odd sizes, samples at two levels; Wan 2.2's timesteps per token are permuted along."""
    model = tiny_wan.transformer()
    arguments = tiny_wan.inputs([900.0, 300.0], grid=(3, 7, 11))
    if per_token:
        tokens = 3 * 7 * 11
        arguments["timestep"] = torch.linspace(1, 999, 2 * tokens).view(2, tokens)
    schedule = {
        **ALL,
        "tile": [2, 3, 4],
        "phases": [{"sigma": [1.0, 0.5], "level": "both"}, {"sigma": [0.5, 0.0], "level": "attention"}],
    }
    (raster, seen), (ordered, seen_ordered) = both_orders(model, arguments, schedule)
    assert torch.equal(raster, ordered)
    assert len(seen) == 8 and all(torch.equal(a, b) for a, b in zip(seen, seen_ordered, strict=True))
    if per_token:  # the test can fail: the modulation is of the tokens
        model.condition_embedder.register_forward_hook(lambda _, i, out: (out[0], out[1].flip(1), *out[2:]))
        with fps.apply(model, schedule):
            assert not torch.equal(model(**arguments, return_dict=False)[0], raster)


@torch.no_grad()
@pytest.mark.slow
def test_hunyuanvideo_is_the_same_to_the_bit(same_mean):
    """Text after the video, padded by sample; single blocks have both in one sequence."""
    torch.manual_seed(0)
    model, arguments = tiny_models.FAMILIES["hunyuan"].make(2)
    schedule = {**ALL, "tile": [1, 3, 4]}
    (raster, seen), (ordered, seen_ordered) = both_orders(model.eval(), arguments, schedule)
    assert torch.equal(raster, ordered) and len(seen) == 8
    assert all(torch.equal(a, b) for a, b in zip(seen, seen_ordered, strict=True))


def test_gradients_are_the_same(same_mean):
    model = tiny_wan.transformer().train()
    found = []
    for order in ("raster", "tile"):
        model.zero_grad()
        model.enable_gradient_checkpointing()
        with fps.apply(model, ALL, token_order=order):
            tiny_wan.run(model, [700.0]).square().mean().backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    for name, gradient in found[0].items():  # sums over tokens run in another order
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@torch.no_grad()
def test_forwards_with_dense_attention_stay_in_raster_order():
    """So the model's own attention is its own to the bit; FP8 forwards of the same schedule are in tile order."""
    model = tiny_wan.transformer()
    plain = tiny_wan.run(model, [900.0])
    with fps.apply(model, MIXED) as handle:
        assert torch.equal(tiny_wan.run(model, [900.0]), plain)
        assert "tile order" not in str(handle.report())
        tiny_wan.run(model, [100.0])
        assert "tile order" in str(handle.report())
        handle.reset()
        tiny_wan.run(model, [900.0, 100.0])
        assert "tile order" not in str(handle.report())
    assert torch.equal(tiny_wan.run(model, [900.0]), plain)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@torch.no_grad()
def test_what_is_refused_sees_raster_order(monkeypatch, same_mean):
    """A refused call is the model's own: its mask and its order of keys are of raster order."""
    model = tiny_wan.transformer()
    plain = tiny_wan.run(model, [700.0])
    monkeypatch.setattr(site.Site, "refusal", lambda self, core: "is refused by this test")
    with fps.apply(model, "fp8", on_unsupported="dense", token_order="tile") as handle:
        assert torch.equal(tiny_wan.run(model, [700.0]), plain)
        assert any("refused by this test" in reason for reason in handle.report().fallbacks)


@torch.no_grad()
def test_recordings_are_in_raster_order(tmp_path, same_mean):
    from safetensors.torch import load_file

    model, files = tiny_wan.transformer(), {}
    for order in ("raster", "tile"):
        with fps.apply(model, ALL, token_order=order) as handle, handle.record(dir=tmp_path / order, layers=[1]):
            tiny_wan.run(model, [700.0])
        (path,) = (tmp_path / order).glob("*.safetensors")
        files[order] = load_file(path)
    assert all(torch.equal(files["raster"][name], files["tile"][name]) for name in ("q", "k", "v"))


def test_families_and_values_that_are_refused():
    mochi, _ = tiny_models.FAMILIES["mochi"].make(1)
    with pytest.raises(UnsupportedError, match='token_order "tile" of this Mochi is not known'):
        fps.apply(mochi, "fp8", token_order="tile")
    with pytest.raises(ConfigError, match="token_order 'spiral', expected one of"):
        fps.apply(mochi, "fp8", token_order="spiral")
    with fps.apply(mochi, "fp8") as handle:
        assert not handle.installations[0].places
    hunyuan, _ = tiny_models.FAMILIES["hunyuan"].make(1)
    hunyuan.register_to_config(image_condition_type="token_replace")  # blocks look for the first frame in front
    with fps.apply(hunyuan, "fp8") as handle:
        assert not handle.installations[0].places


@torch.no_grad()
def test_a_place_that_is_gone_is_an_error():
    """Tokens that never come back would be garbage without a sign."""
    model = tiny_wan.transformer()
    with fps.apply(model, ALL):
        model.norm_out = torch.nn.LayerNorm(128, elementwise_affine=False)
        with pytest.raises(UnsupportedError, match="moved its tokens at 3 of 4 places"):
            tiny_wan.run(model, [700.0])


@torch.no_grad()
def test_copies_keep_their_order(same_mean):
    model = tiny_wan.transformer()
    with fps.apply(model, ALL):
        wanted = tiny_wan.run(model, [700.0])
        twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for twin in twins:
        assert torch.equal(tiny_wan.run(twin, [700.0]), wanted)
        assert fps.remove(twin)
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in twin.modules())


@pytest.mark.slow
@torch.no_grad()
def test_compiled(same_mean):
    """The blocks are compiled as ever; in a graph of the whole model the permutations are part of it."""
    model = tiny_wan.transformer()
    with fps.apply(model, {**ALL, "phases": [{"sigma": [1.0, 0.0], "level": "attention"}]}):
        eager = tiny_wan.run(model, [700.0])
        torch._dynamo.reset()
        whole = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(tiny_wan.run(whole, [700.0]), eager, rtol=1e-3, atol=2e-3)
        torch._dynamo.reset()
        outer = torch.compile(lambda **kwargs: model(**kwargs, return_dict=False)[0], fullgraph=True, backend="eager")
        torch.testing.assert_close(outer(**tiny_wan.inputs([700.0])), eager, rtol=1e-3, atol=2e-3)
