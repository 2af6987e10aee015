"""``fpsattn estimate``: its FLOPs are those of the models, its sums add up, every number says where it is from."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from fpsattention.cli.main import app
from fpsattention.errors import ConfigError
from fpsattention.estimate import CONFIGURATIONS, GPUS, MODELS, Time, block_kernels, estimate, render
from fpsattention.estimate.document import block_tables
from fpsattention.estimate.forward import PAPER_BASELINE, PAPER_GPU, kernels_of, shape_of
from fpsattention.estimate.rates import predictions

GRID = (21, 45, 80)
SMALL = (3, 8, 12)
ROOT = Path(__file__).resolve().parents[2]


def counted(model: torch.nn.Module, arguments: dict[str, torch.Tensor]) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**arguments)
    return counter.get_total_flops()


def empty(*shape: int) -> torch.Tensor:
    return torch.empty(shape, device="meta")


@pytest.mark.parametrize("name", ["wan-14b", "wan-1.3b"])
def test_flops_of_a_block_are_those_of_diffusers(name):
    """Counted by torch on the real block, which has no memory (meta): matrix products and attention, to the last one."""
    from diffusers.models.transformers.transformer_wan import WanTransformerBlock

    model, tokens = MODELS[name], math.prod(SMALL)
    with torch.device("meta"):
        block = WanTransformerBlock(model.width, model.ffn, model.heads, cross_attn_norm=True)
        rope = (empty(1, tokens, 1, 128), empty(1, tokens, 1, 128))
    arguments = {
        "hidden_states": empty(1, tokens, model.width),
        "encoder_hidden_states": empty(1, model.text, model.width),
    }
    wanted = counted(block, {**arguments, "temb": empty(1, 6, model.width), "rotary_emb": rope})
    shape, _ = shape_of(model, SMALL, 1.0)
    for linears in ("bf16", "fp8"):
        assert sum(k.flops for k in block_kernels(model, shape, attention="bf16", linears=linears)) == wanted


def test_flops_of_the_joint_blocks_are_those_of_diffusers():
    from diffusers.models.transformers import transformer_hunyuan_video as hv

    model, tokens = MODELS["hunyuanvideo"], math.prod(SMALL)
    with torch.device("meta"):
        double = hv.HunyuanVideoTransformerBlock(model.heads, model.head_dim, 4.0)
        single = hv.HunyuanVideoSingleTransformerBlock(model.heads, model.head_dim, 4.0)
        rope = (empty(tokens, 128), empty(tokens, 128))
    arguments = {
        "hidden_states": empty(1, tokens, model.width),
        "encoder_hidden_states": empty(1, model.text, model.width),
    }
    arguments |= {"temb": empty(1, model.width), "image_rotary_emb": rope}
    shape, _ = shape_of(model, SMALL, 1.0)
    for block, kind, modulation in ((double, False, 2 * 6), (single, True, 3)):
        wanted = counted(block, arguments) - 2 * modulation * model.width**2  # of the modulation: one row
        assert (
            sum(k.flops for k in block_kernels(model, shape, attention="bf16", linears="bf16", single=kind)) == wanted
        )


def test_the_known_totals_of_wan():
    """4.68 PFLOP of attention and 1.81 PFLOP of linear layers in a forward at 720p: S^2 and S times the sizes in the configuration."""
    model = MODELS["wan-14b"]
    shape, density = shape_of(model, GRID, 0.194)
    kernels = kernels_of(model, shape, CONFIGURATIONS[0], True)
    total = {
        part: sum(n * k.flops for n, ks in kernels for k in ks if k.part == part) for part in ("attention", "linears")
    }
    assert total["attention"] == pytest.approx(4.68e15, rel=0.01) and total["linears"] == pytest.approx(
        1.81e15, rel=0.01
    )
    sparse = sum(k.flops for k in block_kernels(model, shape, attention="fp8", linears="fp8") if k.part == "attention")
    assert density <= 0.194 and sparse == pytest.approx(
        density * 4.68e15 / 40, rel=0.06
    )  # padding slots are multiplied, too


def test_sums_floors_and_order():
    for gpu in GPUS:
        e = estimate("wan-14b", GRID, gpu, "fa2")
        for column in e.columns.values():
            assert all(time.ms >= time.floor for time in column.values())
        baseline, attention, both = (c.name for c in CONFIGURATIONS)
        assert e.speedup(baseline) == 1.0 < e.speedup(attention) < e.speedup(both) < e.limit(both)
        assert e.speedup(attention) < e.limit(attention)
        assert e.video[both]["VAE"] == e.video[baseline]["VAE"] > 0
        assert {rate.kind for rate in e.sources.values()} == {"measured", "predicted"}
        assert all(rate.source for rate in e.sources.values())
    assert estimate("wan-14b", GRID, own_linears=False).speedup(both) > estimate("wan-14b", GRID).speedup(both)
    fewer = replace(MODELS["wan-14b"], layers=(20, 0))
    assert estimate(fewer, GRID).total(baseline) == pytest.approx(estimate("wan-14b", GRID).total(baseline) / 2)


def test_norms_in_the_quantizer_save_what_they_no_longer_move():
    """RMSNorm and RoPE wrote q and k and the quantizer read them: 8 bytes an element, of which a norm across heads keeps 4."""
    for name, grid, kept in (("wan-14b", GRID, 4), ("hunyuanvideo", SMALL, 0)):
        model = MODELS[name]
        shape, _ = shape_of(model, grid, 0.143)
        apart, fused = (block_kernels(model, shape, attention="fp8", linears="fp8", prepare=p) for p in (False, True))
        assert len(fused) == len(apart) - 1
        assert sum(k.bytes for k in apart) - sum(k.bytes for k in fused) == pytest.approx(
            (8 - kept) * shape.tokens * model.width
        )
        dense = block_kernels(model, shape, attention="bf16", linears="fp8")
        assert dense == block_kernels(model, shape, attention="bf16", linears="fp8", prepare=True)
    (name,) = [k.name for k in fused if k.part == "quantize"]
    assert name == "RMSNorm, RoPE, quantize to tile order"
    with_it, without = (estimate("wan-14b", GRID, prepare=p) for p in (True, False))
    both = CONFIGURATIONS[2].name
    assert with_it.speedup(both) > without.speedup(both) and with_it.limit(both) == without.limit(both)
    # docs/kernels/quantize.md: 5,902 MB, without padding slots
    moved = next(k.bytes for k in block_kernels(MODELS["wan-14b"], shape_of(MODELS["wan-14b"], GRID, 0.143)[0],
                                                attention="fp8", linears="fp8", prepare=True) if k.part == "quantize")  # fmt: skip
    assert moved == pytest.approx(5.902e9, rel=0.01)


def test_the_attention_rate_is_that_of_the_recorded_predictions():
    tflops = predictions()["kernels"]["fpsattn_forward_d128"]["tflops"]
    rate = GPUS["h200"].attention[128]
    assert rate.value == pytest.approx(tflops * 1e12 / 1.10) and str(tflops) in rate.source and rate.kind == "predicted"
    assert f"| {tflops} |" in (ROOT / "docs/speed_model.md").read_text()


def test_command_prints_three_lines_in_80_columns_and_says_what_is_predicted():
    result = CliRunner().invoke(app, ["estimate", "--model", "wan-14b", "--grid", "21x45x80", "--gpu", "h200"])
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    for start in ("attention only ", "with FP8 linears ", "both, on an H20 over FlashAttention-2 "):
        (line,) = [line for line in lines if line.startswith(start)]
        speedups = [float(cell[:-1]) for cell in line.split()[-4:]]
        assert (
            speedups[:3] == sorted(speedups[:3], reverse=True) and speedups[3] > speedups[0]
        )  # 0.10, 0.143, 0.194; the limit
    assert "No time here was measured." in result.stdout and "4.96x" in result.stdout


def test_json_and_errors():
    run = CliRunner().invoke
    data = json.loads(
        run(app, ["estimate", "--model", "hunyuanvideo", "--gpu", "h20", "--baseline", "fa3", "--json"]).stdout
    )
    assert (data["kind"], data["paper"]["gpu"], data["paper"]["baseline"]) == ("predicted", PAPER_GPU, PAPER_BASELINE)
    assert [e["density_asked"] for e in data["estimates"]] == [0.1, 0.143, 0.194] and len(data["lines"]) == 3
    assert all({"per_second", "kind", "source"} == set(rate) for rate in data["rates"].values())
    for arguments in (
        ["--model", "x"],
        ["--gpu", "b200"],
        ["--baseline", "sage"],
        ["--grid", "0x1x1"],
        ["--grid", "21"],
    ):
        assert run(app, ["estimate", *arguments]).exit_code == 2, arguments
    with pytest.raises(ConfigError, match="gpu 'b200', expected one of h200, h100, h20"):
        estimate("wan-14b", GRID, "b200")
    with pytest.raises(ConfigError, match="density 1.5"):
        estimate("wan-14b", GRID, density=1.5)


def test_measured_times_have_the_same_table():
    columns = {"dense": {"attention": Time(8.0, None, "measured"), "norms": Time(2.0, 1.0, "measured")},
               "ours": {"attention": Time(1.0, 0.5, "measured"), "norms": Time(2.0, 1.0, "measured")}}  # fmt: skip
    lines = render(columns)
    assert lines[1].split() == ["floor", "measured", "floor", "measured"]
    assert lines[2].split() == ["attention", "-", "8.0", "0.5", "1.0"]
    assert lines[-2].split() == ["forward", "-", "10.0", "1.5", "3.0"] and lines[-1].split() == [
        "speed-up",
        "1.00x",
        "3.33x",
    ]


def test_the_document_shows_what_the_command_prints():
    document = (ROOT / "docs/end_to_end.md").read_text()
    assert block_tables(estimate("wan-14b", GRID)) in document, "fpsattn estimate --kernels prints the tables"
