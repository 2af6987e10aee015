"""Models outside of diffusers, by the name of their core: the original Wan code, musubi-tuner, DiffSynth-Studio."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from outside import DIM, GRID, HEADS, Projections, diffsynth, musubi, sdpa, wan
from torch import Tensor
from torch.nn import functional

import fpsattention as fps
from fpsattention.errors import ConfigError, UnsupportedError
from fpsattention.integrations import adapters
from fpsattention.integrations.adapters import WAN_DIFFSYNTH, WAN_ORIGINAL, Adapter, Geometry, submodules
from fpsattention.layout import masks, tiles
from fpsattention.schedule.schedule import FORMAT

TILE, WINDOW = [1, 4, 4], (1, 1, 1)
SPARSE = {
    "format": "fpsattn-schedule/1",
    "tile": TILE,
    "levels": {"narrow": {"precision": "fp8", "window": list(WINDOW)}, "dense": {"precision": "bf16"}},
    "phases": [{"sigma": [1.0, 0.5], "level": "narrow"}, {"sigma": [0.5, 0.0], "level": "dense"}],
}


def rand(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def run_wan(
    model: torch.nn.Module, t: tuple[float, ...], seq_len: int = 192, grid: tuple[int, int, int] = GRID
) -> Tensor:
    videos = [rand(4, grid[0], 2 * grid[1], 2 * grid[2]) + i for i in range(len(t))]
    context = [rand(5, HEADS * DIM)] * len(t)
    return torch.stack(model(videos, torch.tensor(t), context, seq_len))


def masked(q: Tensor, k: Tensor, v: Tensor, others: int = 0, position: str = "suffix") -> Tensor:
    layout = tiles.plan(GRID, tile=TILE, text_len=others, text_position=position if others else "suffix")
    return sdpa(q, k, v, masks.sliding_tile_mask(layout, WINDOW).to_token_mask())


def close_to_masked_and_far_from_dense(seen: list, **others: object) -> None:
    """e4m3 rounds by 2^-4 at most; much of the video is behind the mask."""
    assert seen
    for _, q, k, v, out in seen:
        want = masked(q, k, v, **others)
        error = (out - want).abs().mean()
        assert error < 0.06 * want.abs().mean()
        assert error < 0.5 * (out - sdpa(q, k, v)).abs().mean()


def observed(handle) -> list:
    seen: list = []
    for site in handle.installations[0].sites:
        site.observers.append(lambda *call: seen.append(call))
    return seen


@pytest.mark.parametrize("code", [wan, musubi])
def test_wan_by_core_name(code):
    model = code.WanModel()
    with torch.no_grad():
        plain = run_wan(model, (900.0, 800.0))
        with fps.apply(model, SPARSE, adapter=WAN_ORIGINAL) as handle:
            seen = observed(handle)
            run_wan(model, (900.0, 800.0))
            assert len(seen) == 2  # layers; cross-attention is the model's own
            close_to_masked_and_far_from_dense(seen)
            assert torch.equal(run_wan(model, (400.0, 300.0)), run_wan(model, (100.0, 0.0)))  # dense: no time in there
            assert torch.equal(run_wan(model, (400.0, 300.0)), plain)
            assert {row.level: row.calls for row in handle.report().rows} == {"narrow": 2, "dense": 6}
        assert torch.equal(run_wan(model, (900.0, 800.0)), plain)
        assert not any("forward" in vars(module) for module in model.modules())


def test_padding_to_seq_len_is_not_attended():
    """The original code pads tokens to ``seq_len`` and masks them by lengths."""
    model = wan.WanModel()
    with torch.no_grad(), fps.apply(model, SPARSE, adapter=WAN_ORIGINAL) as handle:
        want = run_wan(model, (900.0,), 192)
        # Padding repeats a key in the mean that is subtracted, so roundings to e4m3 flip here and there.
        assert (run_wan(model, (900.0,), 200) - want).abs().mean() < 0.01 * want.abs().mean()
        assert torch.allclose(run_wan(model, (100.0,), 200), run_wan(model, (100.0,), 192), atol=1e-5)
        assert not handle.report().fallbacks


def test_wan_trains():
    model = musubi.WanModel()
    with fps.apply(model, SPARSE, adapter=WAN_ORIGINAL):
        run_wan(model, (900.0,)).square().mean().backward()
    assert all(block.self_attn.q.weight.grad.abs().sum() > 0 for block in model.blocks)


def test_copies_and_pickles_run_and_can_be_freed():
    model = wan.WanModel()
    with torch.no_grad(), fps.apply(model, SPARSE, adapter=WAN_ORIGINAL):
        want = run_wan(model, (900.0,))
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(run_wan(other, (900.0,)), want)
            assert other.blocks[0].self_attn.forward.module is other.blocks[0].self_attn
            assert fps.status(other)["transformer"].copied
            assert fps.remove(other)
            assert not torch.equal(run_wan(other, (900.0,)), want)
        assert torch.equal(run_wan(model, (900.0,)), want)


def test_refusals_name_the_reason():
    model = wan.WanModel()
    with pytest.raises(UnsupportedError, match="WAN_ORIGINAL"):
        fps.apply(model, SPARSE)
    model.blocks[0].self_attn.window_size = (4, 4)
    with fps.apply(model, SPARSE, adapter=WAN_ORIGINAL), pytest.raises(UnsupportedError, match=r"window_size \(4, 4\)"):
        run_wan(model, (900.0,))
    with torch.no_grad(), fps.apply(model, SPARSE, adapter=WAN_ORIGINAL, on_unsupported="dense") as handle:
        run_wan(model, (900.0,))
        assert any("window_size" in reason for reason in handle.report().fallbacks)
    model.blocks[1].self_attn.forward = model.blocks[1].self_attn.forward  # as sequence parallelism does
    with pytest.raises(UnsupportedError, match="a forward of its own on the instance"):
        fps.apply(model, SPARSE, adapter=WAN_ORIGINAL)
    with pytest.raises(UnsupportedError, match=r"flash_attention with parameters \(x\)"):
        fps.apply(_Other(), SPARSE, adapter=replace(WAN_ORIGINAL, classes=("_Other",)))


def _other_names() -> dict[str, object]:
    def flash_attention(x):
        return x

    return {"flash_attention": flash_attention}


class _Other(torch.nn.Module):
    def __init__(self):
        super().__init__()
        code = "class Attention(__import__('torch').nn.Module):\n def forward(self, x):\n  return flash_attention(x)"
        names = _other_names()
        exec(code, names)
        self.blocks = torch.nn.ModuleList([torch.nn.Module()])
        self.blocks[0].self_attn = names["Attention"]()


def run_diffsynth(call, model, timestep: float, **arguments) -> Tensor:
    latents = rand(1, 4, GRID[0], 2 * GRID[1], 2 * GRID[2])
    return call(model, latents=latents, timestep=torch.tensor([timestep]), context=None, **arguments)


def test_diffsynth_runs_parts_of_the_model():
    model = diffsynth.WanModel()
    plain = diffsynth.model_fn_wan_video
    with torch.no_grad():
        want = run_diffsynth(plain, model, 100.0)
        handle = fps.apply(model, SPARSE, adapter=WAN_DIFFSYNTH)
        with pytest.raises(ConfigError, match="outside of a forward"):
            run_diffsynth(plain, model, 900.0)
        call, seen = handle.around(plain), observed(handle)
        run_diffsynth(call, model, 900.0)
        close_to_masked_and_far_from_dense(seen)
        seen.clear()
        run_diffsynth(call, model, 900.0, reference_latents=rand(1, 7, HEADS * DIM))
        close_to_masked_and_far_from_dense(seen, others=7, position="prefix")
        assert torch.equal(run_diffsynth(call, model, 100.0), want)
        assert torch.equal(run_diffsynth(call, diffsynth.WanModel(), 900.0), want)  # a model without a schedule
        handle.remove()
        assert torch.equal(run_diffsynth(call, model, 900.0), want)


def test_attention_forward_with_layouts():
    model = diffsynth.WanModel(diffsynth.PatternBlock)
    adapter = replace(WAN_DIFFSYNTH, attentions=submodules(blocks="self_attn"), core="attention_forward")
    latents, timestep = rand(1, 4, GRID[0], 2 * GRID[1], 2 * GRID[2]), torch.tensor([900.0])
    with torch.no_grad():
        want = model(latents, timestep, None)
        with fps.apply(model, SPARSE, adapter=adapter) as handle:
            seen = observed(handle)
            model(latents, timestep, None)
            close_to_masked_and_far_from_dense(seen)
            assert torch.equal(model(latents, timestep * 0.1, None), want)


def joint(model: torch.nn.Module, arguments: dict) -> Geometry:
    text = arguments["text"].shape[1]
    grid = adapters.latents_grid(arguments["x"], model.patch_size)
    return Geometry(grid, arguments["x"], arguments["timestep"], text)


def test_joint_attention_with_padded_text():
    """musubi-tuner's ``attention``, with an adapter of a user's own."""
    model = musubi.JointModel()
    adapter = Adapter("joint", ("JointModel",), submodules(blocks="self_attn"), joint, core="attention", text_mask=True)
    video, text = rand(2, 4, GRID[0], 2 * GRID[1], 2 * GRID[2]), rand(2, 9, HEADS * DIM)
    valid = torch.arange(9) < torch.tensor([[9], [4]])
    with torch.no_grad(), fps.apply(model, SPARSE, adapter=adapter) as handle:
        out = model(video, torch.tensor([900.0, 900.0]), text, valid)
        assert not handle.report().fallbacks
        cut = model(video[1:], torch.tensor([900.0]), text[1:, :4], valid[1:, :4])
    assert (out[1] - cut[0]).abs().mean() < 0.01 * cut.abs().mean()


class GroupedAttention(Projections):
    """Two query heads, one of K and V."""

    def __init__(self):
        super().__init__()
        self.k, self.v = (torch.nn.Linear(HEADS * DIM, DIM) for _ in range(2))

    def forward(self, x, params):
        q, k, v = (layer(x).unflatten(2, (-1, DIM)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        mask = (torch.arange(x.shape[1]) < params.seqlens[:, None])[:, None, None]
        out = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        return self.o(out.transpose(1, 2).flatten(2))


def grouped(level: dict) -> tuple:
    """A model whose heads share keys, its schedule and adapter, and what it takes beside the times: samples of padded text."""
    model = musubi.JointModel()
    for block in model.blocks:
        block.self_attn = GroupedAttention()
    adapter = Adapter("grouped", ("JointModel",), submodules(blocks="self_attn"), joint, core="scaled_dot_product_attention", text_mask=True)  # fmt: skip
    schedule = {**SPARSE, "format": FORMAT, "levels": {**SPARSE["levels"], "narrow": level}}
    video, text = rand(2, 4, GRID[0], 2 * GRID[1], 2 * GRID[2]), rand(2, 9, HEADS * DIM)
    return model, schedule, adapter, video, text, torch.arange(9) < torch.tensor([[9], [4]])


@pytest.mark.slow
@pytest.mark.parametrize(
    "level",
    [
        SPARSE["levels"]["narrow"],
        {"precision": "fp8", "pattern": {"name": "topk_mean", "ratio": 0.2}},
        {"precision": "fp8", "pattern": {"name": "sparge", "mass": 0.1}, "refresh": 2},
    ],
)
def test_heads_that_share_keys(level):
    """A window, lists of sums over blocks, a rule that reads tokens; samples of two levels and of padded text; gradients."""
    model, schedule, adapter, video, text, valid = grouped(level)
    times = torch.tensor([900.0, 800.0])
    plain = model(video, times, text, valid)
    with fps.apply(model, schedule, adapter=adapter) as handle:
        seen = observed(handle)
        out = model(video, times, text, valid)
        assert not handle.report().fallbacks and seen[0][2].shape[2] == 1
        if level is SPARSE["levels"]["narrow"]:
            with torch.no_grad():
                whole = [
                    (name, q[:1], *(x[:1].repeat_interleave(HEADS, 2) for x in (k, v)), o[:1])
                    for name, q, k, v, o in seen
                ]
                close_to_masked_and_far_from_dense(whole, others=9)
        mixed = model(video, torch.tensor([100.0, 800.0]), text, valid)
        assert torch.equal(mixed[1], out[1]) and torch.allclose(mixed[0], plain[0], atol=1e-5)
        mixed.square().sum().backward()
    assert all(block.self_attn.k.weight.grad.any() for block in model.blocks)


@pytest.mark.slow
def test_heads_that_share_keys_in_a_graph():
    """With branches for samples of two levels, one of which makes its lists of sums."""
    level = {"precision": "fp8", "pattern": {"name": "topk_mean", "ratio": 0.2}}
    model, schedule, adapter, video, text, valid = grouped(level)
    with torch.no_grad(), fps.apply(model, schedule, adapter=adapter) as handle:
        times = torch.tensor([100.0, 800.0])
        want = model(video, times, text, valid)
        out = torch.compile(model, backend="aot_eager")(video, times, text, valid)
        assert (out - want).abs().mean() < 1e-3 * want.abs().mean()
        assert not handle.report().fallbacks


def test_other_parallelism_is_refused():
    """xDiT's wrappers subclass the model; ParaAttention and cache-dit mark it, before or after."""
    import tiny_wan

    model = tiny_wan.transformer()
    model._is_parallelized = True
    with pytest.raises(UnsupportedError, match="ParaAttention"):
        fps.apply(model, "fp8")
    model._is_parallelized = False
    with fps.apply(model, "fp8"), torch.no_grad():
        model._is_parallelized = True
        with pytest.raises(UnsupportedError, match="ParaAttention"):
            tiny_wan.run(model, [900.0])
    model = tiny_wan.transformer()
    model.__class__ = type("xFuserWanTransformer3DWrapper", (type(model),), {"__module__": "xfuser.model_executor"})
    with pytest.raises(UnsupportedError, match="xFuserWanTransformer3DWrapper is parallelized by xDiT"):
        fps.apply(model, "fp8")
