"""The whole path of a block on the CPU: FP8 attention, FP8 linears, tile order, norms and RoPE in the quantizer, in tiny models of both kinds."""

from __future__ import annotations

import re
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import tiny_wan
import torch
from test_linears import ALL, fake
from torch import Tensor

import fpsattention as fps

ROOT = Path(__file__).resolve().parents[2]
LEVELS = {
    "attention": {"precision": "fp8", "granularity": "block"},
    "linears": {"precision": "bf16", "linears": "fp8"},
    "both": {"precision": "fp8", "granularity": "block", "linears": "fp8"},
}


def schedule(level: str, tile: list[int]) -> dict[str, Any]:
    return {**ALL, "tile": tile, "levels": {"it": LEVELS[level]}, "phases": [{"sigma": [1.0, 0.0], "level": "it"}]}


def wan() -> tuple[torch.nn.Module, dict[str, Any], list[int]]:
    return tiny_wan.transformer(), tiny_wan.inputs([900.0, 300.0]), tiny_wan.TILE


def hunyuanvideo() -> tuple[torch.nn.Module, dict[str, Any], list[int]]:
    torch.manual_seed(0)
    model, arguments = tiny_models.FAMILIES["hunyuan"].make(2)
    return model.eval(), arguments, tiny_models.TILE


MODELS = {"Wan": wan, "HunyuanVideo": hunyuanvideo}


def emphasize(model: torch.nn.Module) -> None:
    """Random weights make branches that vanish beside the residual: larger gates and projections make errors visible."""
    for name, parameter in model.named_parameters():
        if "scale_shift_table" in name or "to_out.0.weight" in name or "proj_out.weight" in name and "blocks" in name:
            parameter.data.mul_(4.0)


def errors(name: str) -> dict[str, float]:
    """Relative L2 of the output against the FP32 model, by what is FP8."""
    model, arguments, tile = MODELS[name]()
    emphasize(model)
    with torch.no_grad():
        plain = model(**arguments, return_dict=False)[0]
        found = {}
        for level, prepare in (*((level, False) for level in LEVELS), ("both", True)):
            with fps.apply(model, schedule(level, tile), prepare=prepare) as handle:
                out = model(**arguments, return_dict=False)[0]
                report = handle.report()
            # dense attention is the model's own, in its own order
            assert ("tile order" in str(report)) == (level != "linears") and not report.fallbacks
            assert all(report.prepared["transformer"]) == prepare
            found["all" if prepare else level] = float((out - plain).norm() / plain.norm())
        assert torch.equal(model(**arguments, return_dict=False)[0], plain)
    return found


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.slow
def test_the_whole_is_no_worse_than_the_sum_of_its_parts(name):
    """And the parts are what docs/end_to_end.md says they are."""
    found = errors(name)
    assert max(found["both"], found["all"]) <= found["attention"] + found["linears"]
    assert found["all"] == pytest.approx(found["both"], rel=0.02)
    assert min(found.values()) > 1e-5
    document = (ROOT / "docs/end_to_end.md").read_text()
    (row,) = [line for line in document.splitlines() if line.startswith(f"| {name}, tiny |")]
    for cell, level in zip(row.split("|")[2:5], LEVELS, strict=True):
        assert found[level] == pytest.approx(float(cell), rel=0.1), level  # other machines sum in another order


class Fake(torch.nn.Module):
    """The layer that FP8 linears are the straight-through version of."""

    def __init__(self, linear: torch.nn.Linear):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.nn.functional.linear(fake(x.reshape(-1, x.shape[-1])), fake(self.weight), self.bias)
        return rows.unflatten(0, x.shape[:-1])


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("level", "prepare"), [("linears", False), ("both", False), ("both", True)])
def test_gradients_are_those_of_the_fake_quantized_model(name, level, prepare):
    """By autograd of the same model with fake-quantized layers in the same places, under the same attention, and through the model's own
    norms and RoPE where the quantizer has both."""

    def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
        model.zero_grad()
        model(**arguments, return_dict=False)[0].square().mean().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    model, arguments, tile = MODELS[name]()
    emphasize(model)
    for parameter in (p for n, p in model.named_parameters() if ".norm_q." in n or ".norm_k." in n):
        parameter.data.mul_(torch.linspace(0.5, 1.5, len(parameter)))
    plain = gradients(model)
    with fps.apply(model, schedule(level, tile), prepare=prepare) as handle:
        paths = [path.removeprefix("transformer.") for path in handle.installations[0].linears.installed]
        got = gradients(model)
        assert all(handle.report().prepared["transformer"]) == prepare
    for path in paths:
        parent, _, leaf = path.rpartition(".")
        model.get_submodule(parent)._modules[leaf] = Fake(model.get_submodule(path))
    attention = {"linears": "dense", "both": schedule("attention", tile)}[level]
    with fps.apply(model, attention):
        wanted = gradients(model)
    assert set(got) == set(wanted) and any("attn.norm_k" in name or "attn1.norm_k" in name for name in wanted)
    off = {n: float((got[n] - wanted[n]).norm() / wanted[n].norm()) for n in wanted if wanted[n].norm() > 1e-6}
    from_plain = {n: float((plain[n] - wanted[n]).norm() / wanted[n].norm()) for n in off}
    # FP32 sums in another order move a value over the border of a code here and there; quantization moves everything.
    median = sorted(off.values())[len(off) // 2]
    print(
        name,
        level,
        prepare,
        "median",
        median,
        "max",
        max(off.values()),
        "plain",
        sorted(from_plain.values())[len(off) // 2],
    )
    assert median < 1e-3 and max(off.values()) < 0.02 and sorted(from_plain.values())[len(off) // 2] > 10 * median


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*preset.*:UserWarning")
def test_the_recipe_of_the_readme(monkeypatch):
    """The code block of the fastest pipeline, as it stands, on a tiny pipeline: what it says runs, compiled and counted."""
    (recipe,) = [
        b for b in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S) if "enable_tiling" in b
    ]
    whole = tiny_wan.pipeline()

    class Pipeline(type(whole)):  # type: ignore[misc]
        """Takes a prompt, as the real one does; its text encoder is random numbers."""

        def __call__(self, prompt: str) -> Any:
            texts = torch.randn(2, 1, 16, tiny_wan.TEXT, generator=torch.Generator().manual_seed(len(prompt)))
            return super().__call__(
                prompt_embeds=texts[0], negative_prompt_embeds=texts[1], height=64, width=96, num_frames=9, num_inference_steps=4,
                guidance_scale=3.0, generator=torch.Generator().manual_seed(3), output_type="pt",
            )  # fmt: skip

    pipe = Pipeline(**{**whole.components, "transformer": tiny_wan.transformer(num_layers=4)})
    pipe.set_progress_bar_config(disable=True)
    plain = pipe("a fox runs through snow").frames
    # The graphs are run as they are: what a compiler makes of them is torch's affair.
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend="eager"))
    torch._dynamo.reset()
    names: dict[str, Any] = {"fps": fps, "pipe": pipe}
    exec(recipe, names)
    video, report = names["video"], names["handle"].report()
    assert video.shape == plain.shape and torch.isfinite(video).all() and not torch.equal(video, plain)
    assert pipe.vae.use_tiling and pipe.transformer.blocks[0].attn1.fused_projections
    assert report.executions["transformer"] is None  # compiled
    calls = {(row.level, row.layer): (row.calls, row.linears) for row in report.rows if row.calls}
    fp8 = sum(n for (level, layer), (n, _) in calls.items() if layer == 1 and level != "dense")
    assert fp8 and report.prepared["transformer"] == [fp8] * 4 and not report.fallbacks
    assert {layer: linears for (level, layer), (_, linears) in calls.items() if level != "dense"} == {
        0: 0,
        1: 6,
        2: 6,
        3: 0,
    }
    assert "ran in the quantizer, 4 of 4 layers" in str(report)
