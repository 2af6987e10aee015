"""The kernels alone, through the torch ops, beside this board's own ceilings: a copy, a BF16 and an FP8 matrix product."""

from __future__ import annotations

import pytest
import torch

from fpsattention.layout.tiles import BLOCK

from . import timing
from . import workloads as w

# Of a forward: five products against two (S again, dP, dV, dQ, dK), whatever a mode really executes
BACKWARD_FLOPS = 2.5
SHAPES = {
    "quick": (w.WAN_14B_720P, w.D64_480P), "full": (w.WAN_14B_720P, w.WAN_1B_480P, w.D64_480P), "dry": (w.TINY, w.TINY_ODD)
}  # fmt: skip


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "shape" in metafunc.fixturenames:
        metafunc.parametrize("shape", SHAPES[metafunc.config.bench["mode"]], ids=lambda shape: shape.name)


def test_ceilings(bench, record) -> None:
    """They are the roof of the roofline: a kernel is held against them, not against a datasheet. Copy: bytes read plus written."""
    device, dry = bench["device"], bench["mode"] == "dry"
    n, elements = (256, 1 << 16) if dry else (8192, 1 << 30)
    source = [torch.randn(elements, device=device, dtype=torch.bfloat16) for _ in range(2)]
    target = torch.empty_like(source[0])
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    a8, b8, one = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn), torch.ones((), device=device)
    calls = {
        "copy": lambda turn: target.copy_(source[turn % 2]),
        "bf16-gemm": lambda turn: a @ b,
        "fp8-gemm": lambda turn: torch._scaled_mm(
            a8, b8.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True
        ),
    }
    for name, ms in timing.interleaved(calls, device, timing.BUDGET_S[bench["mode"]], max_repeats=20).items():
        amount, unit = (2 * source[0].nbytes / 1e9, "GB/s") if name == "copy" else (2 * n**3 / 1e12, "TFLOP/s")
        record("ceiling", name=name, ms=ms, rate=amount / ms["median"] * 1e3, unit=unit)


def ideal_bytes(workload: w.Workload) -> float:
    """Q, K, V read once, their e4m3 outputs written once, one more read of V (absmax) and of the K subsample (mean)."""
    return workload.shape.set_bytes / 6 * (3 * 3 + 2 + 2.0 / workload.k_mean_stride)


@pytest.mark.parametrize("granularity", ["tile", "token"])
def test_quantize(shape: w.Shape, granularity: str, bench, record) -> None:
    workload = w.build(shape, 1.0, bench["device"])
    inputs = w.random_inputs(shape, bench["device"])
    calls = {"quantize": lambda turn: workload.quantize(inputs[turn % len(inputs)], granularity)}
    ms = timing.interleaved(calls, bench["device"], timing.BUDGET_S[bench["mode"]])["quantize"]
    moved = ideal_bytes(workload)
    record("kernel", name="quantize", granularity=granularity, workload=workload.describe(), ms=ms, ideal_bytes=moved,
           gb_per_s=moved / ms["median"] / 1e6)  # fmt: skip


def first_blocks(workload: w.Workload, length: int, clusters: bool = True) -> tuple[torch.Tensor, ...]:
    """tile_of_block, and lists of exactly ``length`` blocks for every tile: its own first, then the following ones, cyclically.

    Without ``clusters``: the same lists, one for every block, which is a tile of its own then. The forward launches clusters, of CTAs that
    share a list, where tiles have two blocks or so (``clusters_pay`` in csrc/forward/sm90/forward_launch.cu).
    """
    layout, device = workload.layout, workload.device
    order = layout.tile_block_offsets[:-1, None] + torch.arange(layout.num_blocks, device=device)
    tile_of_block = layout.tile_of_block
    if not clusters:
        order = order[tile_of_block.long()]
        tile_of_block = torch.arange(len(tile_of_block), dtype=torch.int32, device=device)
    counts = torch.full((1, 1, len(order)), length, dtype=torch.int32, device=device)
    return tile_of_block, counts, (order % layout.num_blocks).to(torch.int32)[None, None].contiguous()


@pytest.mark.parametrize("granularity", ["tile", "tile, no clusters", "token"])
def test_forward(shape: w.Shape, granularity: str, bench, record) -> None:
    """Operands already quantized, at several densities of blocks. ``of_ideal``: time over dense time times density; 1 is ideal."""
    clusters = granularity != "tile, no clusters"
    if not clusters and shape.head_dim != 128:
        pytest.skip("only D = 128 runs in clusters")
    workload = w.build(shape, 1.0, bench["device"])
    layout, (x, *_) = workload.layout, w.random_inputs(shape, bench["device"])
    quantized = workload.quantize(x, granularity.split(",")[0])
    lengths = {density: max(1, round(density * layout.num_blocks)) for density in w.DENSITIES}

    def forward(length: int) -> timing.Call:
        lists = first_blocks(workload, length, clusters)
        return lambda turn: workload.forward(quantized, lists)

    calls = {str(density): forward(length) for density, length in lengths.items()}
    times = timing.interleaved(calls, bench["device"], 3 * timing.BUDGET_S[bench["mode"]], max_repeats=20)
    for density, length in lengths.items():
        ms = times[str(density)]
        flops = 4 * BLOCK * BLOCK * shape.head_dim * shape.heads * layout.num_blocks * length
        record(
            "kernel", name="forward", granularity=granularity, workload=workload.describe(), density=density, blocks=length, ms=ms,
            tflops=flops / ms["median"] / 1e9, of_ideal=ms["median"] / times["1.0"]["median"] * layout.num_blocks / length,
        )  # fmt: skip


@pytest.mark.parametrize("density", [1.0, w.PAPER_DENSITY])
def test_backward(shape: w.Shape, density: float, bench, record) -> None:
    """Both modes, on what a forward left behind."""
    workload = w.build(shape, density, bench["device"])
    layout, mask, (x, *_) = workload.layout, workload.mask, w.random_inputs(shape, bench["device"])
    quantized = workload.quantize(x, pow2_scales=True)
    out, _, row_max, row_sum = workload.forward(quantized)
    grad_out = torch.randn_like(out)

    def backward(deterministic: bool) -> timing.Call:
        return lambda turn: torch.ops.fpsattn.backward(
            grad_out, out, *quantized[:6], row_max, row_sum, layout.token_of_slot, layout.tile_of_block,
            mask.kv_num_blocks, mask.kv_indices, mask.q_num_blocks, mask.q_indices, softmax_scale=workload.softmax_scale,
            deterministic=deterministic,
        )  # fmt: skip

    calls = {"fast": backward(False), "deterministic": backward(True)}
    budget = 2 * timing.BUDGET_S[bench["mode"]]
    for mode, ms in timing.interleaved(calls, bench["device"], budget, max_repeats=20).items():
        record("kernel", name="backward", mode=mode, granularity="tile", workload=workload.describe(), density=density, ms=ms,
               tflops=BACKWARD_FLOPS * workload.computed_flops / ms["median"] / 1e9)  # fmt: skip
