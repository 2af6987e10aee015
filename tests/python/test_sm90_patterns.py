"""Patterns on the sm_90a kernels: lists made on the device, scale groups of several tiles, pseudo-keys, clusters.

Run on a Hopper GPU, or on CPU tensors with FPSATTN_SM90_ON_HOST=1 in a process whose CUDA runtime is an emulator. Skipped elsewhere.
"""

import pytest
import torch
from test_compensation import exact

import fpsattention as fps
from fpsattention import patterns
from fpsattention.ops import core as ops
from fpsattention.ops.attend import attend

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
