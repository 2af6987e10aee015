"""The adapters of all model families, on tiny random transformers: where tokens are, what sparse means, which way time runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import tiny_models
import torch
from tiny_models import FAMILIES, TILE, Family
from torch import Tensor
from typer.testing import CliRunner

import fpsattention as fps
from fpsattention.analysis.captures import analyze_captures, find_captures
from fpsattention.cli.main import app
from fpsattention.errors import UnsupportedError
from fpsattention.integrations import adapters
from fpsattention.layout import exact, masks, tiles

WINDOW = (1, 1, 1)
SPARSE = {
    "format": "fpsattn-schedule/1",
    "tile": TILE,
    "levels": {"narrow": {"precision": "fp8", "window": list(WINDOW)}, "dense": {"precision": "bf16"}},
    "phases": [{"sigma": [1.0, 0.5], "level": "narrow"}, {"sigma": [0.5, 0.0], "level": "dense"}],
}
Seen = list[tuple[str, Tensor, Tensor, Tensor, Tensor]]


@pytest.fixture(params=list(FAMILIES))
def family(request):
    return FAMILIES[request.param]


def build(family: Family, batch: int, sigma: float) -> tuple[torch.nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    model, arguments = family.make(batch)
    with torch.no_grad():
        for parameter in model.parameters():  # gates that start at 0 would hide the attention
            if parameter.abs().max() == 0:
                parameter.normal_(std=0.1)
    arguments["timestep"] = torch.full_like(arguments["timestep"], family.time(sigma))
    return model.eval(), arguments


def observe(handle: Any) -> Seen:
    seen: Seen = []
    for site in handle.installations[0].sites:
        site.observers.append(lambda *call: seen.append(call))
    return seen


def run(model: torch.nn.Module, arguments: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        out = model(**arguments, return_dict=False)
    return out[0] if isinstance(out, tuple) else out


def latents_moved(family: Family, arguments: dict[str, Any], sample: int, at: tuple[int, int, int]) -> dict[str, Any]:
    assert family.cell is not None
    moved = arguments["hidden_states"].clone()
    family.cell(moved, sample, at)
    return {**arguments, "hidden_states": moved}


def first_queries(seen: Seen, batch: int) -> list[Tensor]:
    """q ``(S, H, D)`` of every sample in the first layer; a model may call its core sample by sample."""
    calls = [q for name, q, *_ in seen if name == seen[0][0]]
    return list(calls[0]) if calls[0].shape[0] == batch else [q[0] for q in calls]


@pytest.mark.slow
def test_a_latent_cell_is_the_predicted_token(family):
    """Changing a cell of one sample's input changes exactly one row of q, at the place that the adapter's geometry says."""
    model, arguments = build(family, 2, 0.9)
    t, h, w = family.grid
    with fps.apply(model, SPARSE) as handle:
        seen = observe(handle)
        run(model, arguments)
        plain = first_queries(seen, 2)
        for sample, at in ((0, (0, 0, 1)), (1, (0, 1, 0)), (0, (t - 1, h - 1, w - 1)), (1, (t - 1, h // 2, w // 3))):
            seen.clear()
            run(model, latents_moved(family, arguments, sample, at))
            changed = [
                (a != b).any(-1).any(-1).nonzero().flatten().tolist()
                for a, b in zip(plain, first_queries(seen, 2), strict=True)
            ]
            row = family.before + (at[0] * h + at[1]) * w + at[2]
            assert changed[sample] == [row]
            assert changed[1 - sample] == []
        tokens = next(iter(handle.installations[0].counts()))[0]
        assert tokens.grid == family.grid
        assert tokens.text_position == ("prefix" if family.before else "suffix") or not tokens.text_len


@pytest.mark.parametrize("name", ["wan", "cogvideox", "hunyuan", "mochi"])
def test_recorded_calls_are_analyzed(name, tmp_path):
    """Texts before and after the video, and Mochi, which attends sample by sample: what is recorded is the first's."""
    family = FAMILIES[name]
    model, arguments = build(family, 2, 0.9)
    with fps.apply(model, SPARSE) as handle, handle.record(dir=tmp_path, layers=[0]):
        seen = observe(handle)
        run(model, arguments)
    captures = find_captures(tmp_path)
    q, k, v = captures[0].load()
    wanted = [x for x in seen if x[0] == seen[0][0]][0][1:4]
    assert len(captures) == 1 and all(torch.equal(x, y) for x, y in zip((q, k, v), wanted, strict=True))
    assert captures[0].text_position == ("prefix" if family.before else "suffix")
    (record,) = analyze_captures(captures, fps.Schedule.from_dict(SPARSE))
    assert 0.0 < record["density"] < 1.0 and 0.0 < record["quantization"]["rel_l1"] < 0.1 < record["sparsity"]["rel_l1"]


def _reference(family: Family, sample: int, q: Tensor, k: Tensor, v: Tensor, window: Any) -> tuple[Tensor, Tensor]:
    """SDPA of the tokens of one sample that count, by the block mask of the window (None: by no mask), and which tokens these are."""
    t, h, w = family.grid
    before, after = _text(family, sample)
    video = t * h * w
    rows = torch.cat([before, family.before + torch.arange(video), family.before + video + after])
    allowed = None
    if window is not None:
        position = "prefix" if len(before) else "suffix"
        layout = tiles.plan(family.grid, tile=TILE, text_len=len(before) + len(after), text_position=position)
        mask = masks.sliding_tile_mask(layout, window).with_exact(exact.frames(family.exact, layout))
        allowed = mask.to_token_mask()[0, 0]
    q, k, v = (x[rows].transpose(0, 1)[None] for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=allowed)[0].transpose(0, 1), rows


def len_before(family: Family) -> int:
    return family.before


def _text(family: Family, sample: int) -> tuple[Tensor, Tensor]:
    before = torch.arange(family.before)
    if family is FAMILIES["qwen"]:  # its text is padded, and first
        before = torch.arange(tiny_models.VALID[sample])
    return before, torch.arange(family.after[sample])


def test_sparse_is_masked_sdpa_and_not_dense(family):
    """FP8 error of one call: e4m3 has 3 bits of mantissa, so a rounding of 2^-4 per factor at most, much less in the mean."""
    model, arguments = build(family, 2, 0.9)
    with fps.apply(model, SPARSE) as handle:
        seen = observe(handle)
        run(model, arguments)
        report = handle.report()
    assert not report.fallbacks
    assert len({name for name, *_ in seen}) == len(handle.installations[0].sites)
    order: dict[str, int] = {}
    for name, *tensors in seen:
        for i, (q, k, v, out) in enumerate(zip(*tensors, strict=True)):
            sample = i
            if tensors[0].shape[0] == 1:
                sample = order[name] = order.get(name, -1) + 1
            masked, rows = _reference(family, sample, q, k, v, WINDOW)
            dense, _ = _reference(family, sample, q, k, v, None)
            error = float((out[rows] - masked).abs().sum() / masked.abs().sum())
            assert error < 0.06, name
            assert float((out[rows] - dense).abs().sum() / dense.abs().sum()) > 2.5 * error, name
            assert bool(out.isfinite().all())  # rows of padding are not defined


def test_the_noisiest_step_has_the_first_phase(family):
    for sigma, level in ((0.9, "narrow"), (0.1, "dense")):
        model, arguments = build(family, 1, sigma)
        plain = run(model, arguments)
        with fps.apply(model, SPARSE) as handle:
            out = run(model, arguments)
            assert {row.level for row in handle.report().rows if row.calls} == {level}
            assert {row.calls for row in handle.report().rows if row.level == level} == {1}
        assert torch.equal(out, plain) == (level == "dense")  # bf16 levels are the model's own attention
        assert torch.equal(run(model, arguments), plain)  # removed


def test_every_class_of_the_table_is_tested():
    tested = {"Cosmos 3"}  # of sequences without a batch: test_cosmos3.py
    for family in FAMILIES.values():
        model, _ = family.make(1)
        tested.add(adapters.find(model).name)  # type: ignore[union-attr]
    assert tested == {adapter.name for adapter in adapters.ADAPTERS}


# Masks ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["hunyuan", "hunyuan15", "motif", "qwen"])
def test_padding_changes_nothing(name):
    """Samples of a padded batch give what each gives alone without padding: whatever is in the padding."""
    family = FAMILIES[name]
    model, arguments = build(family, 2, 0.9)
    with fps.apply(model, SPARSE):
        together = run(model, arguments)
        noise = {**arguments, "encoder_hidden_states": arguments["encoder_hidden_states"].clone()}
        valid = arguments.get("encoder_attention_mask", arguments.get("encoder_hidden_states_mask"))
        noise["encoder_hidden_states"][~valid.bool()] += 3.0
        # Queries of the padding share scales with those of the text, so roundings to e4m3 may flip.
        torch.testing.assert_close(run(model, noise), together, rtol=1e-3, atol=5e-3)
        for sample in range(2):
            alone = {}
            for key, value in arguments.items():
                alone[key] = value[sample : sample + 1] if isinstance(value, (Tensor, list)) else value
                if key.startswith("encoder") and not key.endswith("_2"):
                    alone[key] = alone[key][:, : tiny_models.VALID[sample]]
            # GEMMs of another size round differently, which flips an e4m3 rounding here and there.
            torch.testing.assert_close(run(model, alone), together[sample : sample + 1], rtol=1e-3, atol=5e-3)


def with_mask(model: torch.nn.Module, change: Any) -> Any:
    def positional(module: Any, args: Any) -> Any:
        args = list(args)
        args[3] = change(args[3])
        return tuple(args)

    return model.transformer_blocks[0].register_forward_pre_hook(positional)


def test_the_mask_of_the_core_is_what_counts():
    """Not what the adapter thinks of the text: other keys are hidden, too. A mask that cannot be one over keys is refused."""
    model, arguments = build(FAMILIES["hunyuan"], 2, 0.9)
    plain = run(model, arguments)

    def without_a_frame(mask: Tensor) -> Tensor:
        return torch.cat([torch.zeros_like(mask[..., :96]), mask[..., 96:]], -1)

    hook = with_mask(model, without_a_frame)
    with fps.apply(model, "fp8") as handle:
        seen = observe(handle)
        run(model, arguments)
    _, q, k, v, out = seen[0]
    q, k, v = (x[1, : 192 + tiny_models.VALID[1]].transpose(0, 1) for x in (q, k, v))
    want, dense = (
        torch.nn.functional.scaled_dot_product_attention(q, k[:, first:], v[:, first:]).transpose(0, 1)
        for first in (96, 0)
    )
    error = (out[1, : len(want)] - want).abs().mean()
    assert error < 0.06 * want.abs().mean() and error < 0.3 * (want - dense).abs().mean()
    hook.remove()
    hook = with_mask(model, lambda mask: mask.float())
    with fps.apply(model, SPARSE), pytest.raises(UnsupportedError, match="mask of type torch.float32, expected bool"):
        run(model, arguments)
    with fps.apply(model, SPARSE, on_unsupported="dense") as handle:
        seen = observe(handle)
        run(model, arguments)
        assert [name for name, *_ in seen] == ["transformer.single_transformer_blocks.0.attn"]
        (reason,) = handle.report().fallbacks
        assert "transformer_blocks.0.attn: got an attention mask of type" in reason
    hook.remove()
    assert torch.equal(run(model, arguments), plain)


def test_masked_batches_of_several_levels_equal_one_by_one():
    """Samples at different levels, with padding of different lengths: dense, and sparse without padding."""
    model, arguments = build(FAMILIES["hunyuan"], 2, 0.9)
    arguments["timestep"] = torch.tensor([900.0, 100.0])
    with fps.apply(model, SPARSE) as handle:
        together = run(model, arguments)
        assert sorted((row.level, row.calls) for row in handle.report().rows) == 2 * [("dense", 1)] + 2 * [
            ("narrow", 1)
        ]
        for sample in range(2):
            alone = {key: value[sample : sample + 1] for key, value in arguments.items()}
            torch.testing.assert_close(run(model, alone), together[sample : sample + 1], rtol=1e-3, atol=5e-3)


def test_gradients_pass_through_padded_batches():
    model, arguments = build(FAMILIES["hunyuan"], 2, 0.9)
    with fps.apply(model, SPARSE):
        model(**arguments, return_dict=False)[0].square().mean().backward()
    for name in ("to_q", "add_k_proj"):
        grad = getattr(model.transformer_blocks[0].attn, name).weight.grad
        assert grad is not None and bool(grad.isfinite().all()) and float(grad.abs().max()) > 0


# What is known, and what is refused ----------------------------------------------------------------------------------------


def test_refused_models_say_why():
    model = diffusers.SanaVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=1, attention_head_dim=12, num_layers=1, num_cross_attention_heads=1,
        cross_attention_head_dim=12, cross_attention_dim=12, caption_channels=8, sample_size=8,
    )  # fmt: skip
    with pytest.raises(UnsupportedError, match="SanaVideoTransformer3DModel is refused: its self-attention is linear"):
        fps.apply(model)
    with pytest.warns(UserWarning, match="stays dense: SanaVideo"):
        handle = fps.apply(model, on_unsupported="dense")
    assert "linear" in str(handle.report())


def test_a_grid_that_is_not_told_is_dense_with_a_line():
    """LTXConditionPipeline hands its transformer coordinates in place of sizes."""
    model, arguments = build(FAMILIES["ltx"], 1, 0.9)
    sizes = [arguments.pop(name) for name in ("num_frames", "height", "width")]
    arguments["video_coords"] = torch.cartesian_prod(*(torch.arange(n) for n in sizes)).T[None]
    plain = run(model, arguments)
    with fps.apply(model, SPARSE), pytest.raises(UnsupportedError, match="expected num_frames, height and width"):
        run(model, arguments)
    with fps.apply(model, SPARSE, on_unsupported="dense") as handle:
        assert torch.equal(run(model, arguments), plain)
        ((reason, count),) = handle.report().fallbacks.items()
        assert "expected num_frames" in reason and count == 1


def test_the_classes_of_both_tables_exist():
    classes = {name for adapter in adapters.ADAPTERS for name in adapter.classes}
    assert not classes & set(adapters.REFUSED)
    assert not [name for name in (*classes, *adapters.REFUSED) if not hasattr(diffusers, name)]


def test_the_page_of_models_is_that_of_the_command():
    result = CliRunner().invoke(app, ["models", "--markdown"])
    page = Path(__file__).parents[2] / "docs/models.md"
    assert result.stdout == page.read_text(encoding="utf-8"), "fpsattn models --markdown > docs/models.md"


def test_the_command_lists_every_family():
    listed = json.loads(CliRunner().invoke(app, ["models", "--json"]).stdout)
    assert [row["family"] for row in listed["supported"]] == [adapter.name for adapter in adapters.ADAPTERS]
    assert {row["status"] for row in listed["supported"]} == {"supported"}
    assert [row["class"] for row in listed["refused"]] == list(adapters.REFUSED)
    text = CliRunner().invoke(app, ["models"]).stdout
    assert all(adapter.name in text for adapter in adapters.ADAPTERS) and "softmax" in text


# torch.compile -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["cogvideox", "ltx", "kandinsky"]
)  # both cores, text or none; the other families: the same code
def test_compiled_blocks_are_eager_ones(name):
    """One graph per block, whatever the level is."""
    model, arguments = build(FAMILIES[name], 1, 0.9)
    later = {**arguments, "timestep": torch.full_like(arguments["timestep"], FAMILIES[name].time(0.1))}
    with fps.apply(model, SPARSE):
        eager = [run(model, a) for a in (arguments, later)]
        paths = [path.rsplit(".", 1)[0] for path in adapters.find(model).attentions(model)]  # type: ignore[union-attr]
        for path in paths:
            model.get_submodule(path).compile(fullgraph=True, backend="eager")
        with torch._dynamo.config.patch(error_on_recompile=True):
            for a, wanted in zip((arguments, later), eager, strict=True):
                torch.testing.assert_close(run(model, a), wanted, rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hunyuan", "qwen"])
def test_compiled_blocks_with_padded_text(name):
    """One graph for all lengths of text: nothing of a mask is read on the host."""
    model, arguments = build(FAMILIES[name], 2, 0.9)
    key = next(key for key in arguments if key in ("encoder_attention_mask", "encoder_hidden_states_mask"))
    shorter = {**arguments, key: arguments[key] & (torch.arange(tiny_models.TEXT) < 4)}
    with fps.apply(model, SPARSE) as handle:
        eager = [run(model, a) for a in (arguments, shorter)]
        for path in adapters.find(model).attentions(model):  # type: ignore[union-attr]
            model.get_submodule(path.rsplit(".", 1)[0]).compile(fullgraph=True, backend="eager")
        torch.testing.assert_close(run(model, arguments), eager[0], rtol=1e-5, atol=1e-5)
        with torch._dynamo.config.patch(error_on_recompile=True):
            torch.testing.assert_close(run(model, shorter), eager[1], rtol=1e-5, atol=1e-5)
        assert not handle.report().fallbacks
    torch._dynamo.reset()


@pytest.mark.slow
def test_compiled_blocks_of_mochi_are_refused():
    """It calls its attention once per sample, with the text of that sample."""
    model, arguments = build(FAMILIES["mochi"], 1, 0.9)
    plain = run(model, arguments)
    with fps.apply(model, SPARSE):
        for path in adapters.find(model).attentions(model):  # type: ignore[union-attr]
            model.get_submodule(path.rsplit(".", 1)[0]).compile(backend="eager")
        with pytest.raises(UnsupportedError, match="compiled, and"):
            run(model, arguments)
    with fps.apply(model, SPARSE, on_unsupported="dense") as handle:
        torch.testing.assert_close(run(model, arguments), plain, rtol=1e-5, atol=1e-5)
        fallbacks = handle.report().fallbacks
        assert len(fallbacks) == len(handle.installations[0].sites) and "is compiled, and" in next(iter(fallbacks))
    torch._dynamo.reset()
