"""Patterns on the sm_90a kernels: lists made on the device, scale groups of several tiles, pseudo-keys, clusters.

Run on a Hopper GPU, or on CPU tensors with FPSATTN_SM90_ON_HOST=1 in a process whose CUDA runtime is an emulator. Skipped elsewhere.
"""

import json

import pytest
import torch
from test_compensation import exact

import fpsattention as fps
from fpsattention import patterns
from fpsattention.ops import blocks as law
from fpsattention.ops import core as ops
from fpsattention.ops.attend import attend, attend_selected
from fpsattention.ops.selection import Selection, sizes_of
from fpsattention.patterns.blocks import tables

ON_GPU = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
if ops.sm90_missing():
    pytest.skip(f"no sm_90a kernels: {ops.sm90_missing()}", allow_module_level=True)
if not (ON_GPU or ops.sm90_on_host()):
    pytest.skip("neither a Hopper GPU nor FPSATTN_SM90_ON_HOST=1 (emulator)", allow_module_level=True)
DEVICE = "cuda" if ON_GPU else "cpu"
LAYOUT = fps.plan((4, 6, 10), (2, 3, 5), 7)


def tensors(layout=LAYOUT, seed=0, dim=64):
    generator = torch.Generator().manual_seed(seed)
    shape = (1, 2, layout.num_tokens, dim)
    return [torch.randn(shape, generator=generator).to(DEVICE, torch.bfloat16).requires_grad_() for _ in range(3)]


def relative_l1(out, want):
    out, want = out.detach().double().cpu(), want.detach().double().cpu()
    return ((out - want).abs().sum() / want.abs().sum()).item()


def gradients(out, inputs):
    return torch.autograd.grad(out.float().square().sum(), inputs)


def test_lists_of_a_content_pattern():
    q, k, v = tensors()
    mask = patterns.cdf_mean(q, k, LAYOUT, mass=0.6)
    assert mask.device.type == DEVICE
    results = [attend(q, k, v, mask, tensor_layout="HND", backend=backend)[0] for backend in ("sm90", "reference")]
    assert relative_l1(*results) < 2.0**-9  # one rounding to BF16
    for a, b in zip(*(gradients(out, (q, k, v)) for out in results), strict=True):
        assert relative_l1(a, b) < 0.01


@pytest.mark.parametrize("rule", [{"name": "topk_mean", "ratio": 0.4}, {"name": "draft", "sparsity": 0.6}])
def test_lists_of_the_sums_of_the_quantizer(rule):
    """quantize, select, forward as a level of a schedule runs them: the lists of two calls on the CPU, and their gradients."""
    q, k, v = tensors()
    bound, layout = patterns.from_dict(rule), LAYOUT.to(DEVICE)
    sizes = sizes_of(LAYOUT, bound.list_width(LAYOUT))
    given = Selection(
        layout.token_of_slot, layout.tile_of_block, layout.tile_block_offsets, sizes, json.dumps(rule), True
    )
    out, lists, densities = attend_selected(q, k, v, given, tensor_layout="HND")
    on_cpu = [x.detach().cpu() for x in (q, k)]
    mask = fps.BlockMask(layout, lists.kv_num_blocks, lists.kv_indices).to("cpu")
    assert torch.equal(mask.to_blocks(), bound(*on_cpu, LAYOUT).to_blocks())
    assert densities[0, 1].item() == pytest.approx(mask.density, abs=1e-9)
    want = attend(q, k, v, mask, tensor_layout="HND", backend="reference")[0]
    assert relative_l1(out, want) < 2.0**-9  # one rounding to BF16
    for a, b in zip(gradients(out, (q, k, v)), gradients(want, (q, k, v)), strict=True):
        assert relative_l1(a, b) < 0.01


def test_scale_groups():
    q, k, v = tensors()
    tables = patterns.scale_groups(patterns.topk_mean(q, k, LAYOUT, ratio=0.4), (4, 6, 10), backward=True)
    results = [attend(q, k, v, tables, tensor_layout="HND", backend=backend)[0] for backend in ("sm90", "reference")]
    assert relative_l1(*results) < 2.0**-9  # one rounding to BF16
    for a, b in zip(*(gradients(out, (q, k, v)) for out in results), strict=True):
        assert relative_l1(a, b) < 0.01


def test_pseudo_keys():
    q, k, v = tensors()
    mask = patterns.topk_mean(q, k, LAYOUT, ratio=0.4)
    out, _ = patterns.compensated_attention(q, k, v, mask, backend="sm90")
    on_cpu = [x.detach().cpu().requires_grad_() for x in (q, k, v)]
    want = exact(*on_cpu, mask.to("cpu"), "tile")
    assert relative_l1(out, want) < 0.07
    right = torch.autograd.grad(want.square().sum(), on_cpu)
    for a, b in zip(gradients(out, (q, k, v)), right, strict=True):
        assert relative_l1(a, b) < 0.15  # of a square: twice the error of the output, and FP8's own


def test_clusters():
    q, k, v = tensors()
    clustered = patterns.svg2(q, k, LAYOUT, q_clusters=4, k_clusters=5, mass=0.5, iterations=3)
    results = [patterns.clustered_attention(q, k, v, clustered, backend=b) for b in ("sm90", "reference")]
    assert relative_l1(*results) < 2.0**-9  # one rounding to BF16


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU: an emulator has no streams to capture")
def test_a_content_pattern_can_be_captured():
    q, k, v = (x.detach() for x in tensors(fps.plan((9, 24, 32), (2, 8, 8))))
    layout = fps.plan((9, 24, 32), (2, 8, 8))

    def run():
        mask = patterns.topk_mean(q, k, layout, ratio=0.2)
        return attend(q, k, v, mask, tensor_layout="HND")[0]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # tables are made once, outside
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    k.copy_(torch.randn_like(k))
    graph.replay()
    assert torch.equal(out, run())


# Lists made by kernels ----------------------------------------------------------------------------------------------------

SELECT_LAYOUTS = [((4, 6, 10), (2, 3, 5), 7), ((3, 10, 20), (1, 10, 14), 600), ((1, 1, 43000), (1, 1, 128), 0)]


@pytest.mark.parametrize("grid, tile, text", SELECT_LAYOUTS)
def test_selection_has_the_bits_of_the_cpu(grid, tile, text):
    """Ties, zeros of both signs, infinities and NaN included; 336 blocks take a row in 20 registers a lane, 9 and fewer in 8."""
    layout = fps.plan(grid, tile, text)
    t = tables(layout, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(1, 2, layout.num_tiles, layout.num_blocks, generator=generator)
    values[:, 0] = (2 * values[:, 0]).round() / 2
    for i, value in enumerate((float("inf"), float("-inf"), float("nan"), 0.0, -0.0)):
        values[0, 1].view(-1)[i::13] = value
    weights = (3 * torch.randn(values.shape, generator=generator)).softmax(-1)
    weights[:, 1] = (weights[:, 1] * 8).round() / 8
    some = layout.num_blocks // 3 + 1
    for x, case in (
        (values, {"count": 1}),
        (values, {"count": some, "own_first": True}),
        (values, {"count": 0}),
        (values, {"count": layout.num_blocks}),
        (weights, {"mass": 0.7}),
        (weights, {"mass": 0.2, "min_count": some}),
        (weights, {"mass": 2.0}),
    ):
        options = {
            "num_video_tiles": layout.num_video_tiles,
            "max_count": layout.num_blocks,
            "width": layout.num_blocks,
            **case,
        }
        wanted = law.select_blocks(x, layout.tile_block_offsets, t.block_sizes, **options)
        got = torch.ops.fpsattn.select_blocks(
            *(y.to(DEVICE) for y in (x, layout.tile_block_offsets, t.block_sizes)), **options
        )
        assert torch.equal(got[0].cpu(), wanted[0]) and torch.equal(got[2].cpu(), wanted[2]), case
        listed = torch.arange(layout.num_blocks) < wanted[0].unsqueeze(-1)
        assert torch.equal(got[1].cpu()[listed], wanted[1][listed]), case


@pytest.mark.parametrize("grid, tile, text", SELECT_LAYOUTS[:2])
def test_transposition_has_the_bits_of_the_cpu(grid, tile, text):
    layout = fps.plan(grid, tile, text)
    keep = torch.rand(2, 2, layout.num_tiles, layout.num_blocks, generator=torch.Generator().manual_seed(1)) > 0.5
    mask = fps.BlockMask.from_keep(layout, keep)
    for width in (layout.num_blocks, 2):
        lists = mask.kv_num_blocks, mask.kv_indices, layout.tile_block_offsets
        wanted = law.transpose_blocks(*lists, num_blocks=layout.num_blocks, width=width)
        got = torch.ops.fpsattn.transpose_blocks(
            *(x.to(DEVICE) for x in lists), num_blocks=layout.num_blocks, width=width
        )
        assert torch.equal(got[0].cpu(), wanted[0])
        listed = torch.arange(width) < wanted[0].unsqueeze(-1)
        assert torch.equal(got[1].cpu()[listed], wanted[1][listed])


@pytest.mark.skipif(not ON_GPU, reason="graphs are captured on a GPU")
def test_a_pattern_is_captured_and_follows_its_inputs():
    q, k, _ = (x.detach() for x in tensors())
    patterns.topk_mean(q, k, LAYOUT, ratio=0.4).transpose()  # tables are made before
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        mask = patterns.topk_mean(q, k, LAYOUT, ratio=0.4)
        transposed = mask.transpose()
    for seed in (1, 2):
        again = tensors(seed=seed)
        q.copy_(again[0].detach()), k.copy_(again[1].detach())
        graph.replay()
        wanted = patterns.topk_mean(q, k, LAYOUT, ratio=0.4)
        assert torch.equal(mask.to_blocks(), wanted.to_blocks())
        assert torch.equal(transposed[0], wanted.transpose()[0])
