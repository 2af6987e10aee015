"""FP8 linears: the op against its definition, and the schedule that switches it in a model's blocks."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import tiny_models
import tiny_wan
import torch
from torch import Tensor

import fpsattention as fps
from fpsattention.errors import ConfigError, UnsupportedError
from fpsattention.integrations import linears as integration
from fpsattention.integrations.linears import ScheduledLinear
from fpsattention.ops import linear
from fpsattention.ops.linear import fp8_linear, quantize_rows

E4M3_STEP = 2.0**-4  # rounding to 3 bits of mantissa moves a normal number by at most this fraction of it
ALL = {
    "format": "fpsattn-schedule/2",
    "tile": tiny_wan.TILE,
    "own_linears": [],
    "levels": {"both": {"precision": "fp8", "linears": "fp8"}, "attention": {"precision": "fp8"}},
    "phases": [{"sigma": [1.0, 0.0], "level": "both"}],
}
SWITCHED = {**ALL, "phases": [{"sigma": [1.0, 0.5], "level": "both"}, {"sigma": [0.5, 0.0], "level": "attention"}]}
NAMES = (
    "attn1.to_q",
    "attn1.to_k",
    "attn1.to_v",
    "attn1.to_out.0",
    "attn2.to_q",
    "attn2.to_out.0",
    "ffn.net.0.proj",
    "ffn.net.2",
)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def fake(x: Tensor) -> Tensor:
    """Quantized and dequantized by rows, with the identity as its derivative."""
    scale = x.detach().abs().amax(1, keepdim=True).float() / 448
    return x + ((x.detach().float() / scale).to(torch.float8_e4m3fn).float() * scale - x.detach().float()).to(x.dtype)


@pytest.fixture
def model() -> torch.nn.Module:
    return tiny_wan.transformer()


# The op ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rows_are_quantized_as_defined(dtype):
    x = draw(7, 48, dtype=dtype) * torch.logspace(-3, 3, 7)[:, None].to(dtype)
    x8, scale = quantize_rows(x)
    assert torch.equal(scale, x.abs().amax(1, keepdim=True).float() / 448)
    assert torch.equal(x8.view(torch.uint8), (x.float() / scale).to(torch.float8_e4m3fn).view(torch.uint8))
    assert torch.equal(x8.float().abs().amax(1), torch.full((7,), 448.0))  # the largest of a row meets the largest code


def test_rows_of_zeros_nans_and_infinities():
    x = torch.zeros(4, 16)
    x[1, 3], x[2, 5], x[3, 0] = math.nan, -math.inf, 1e-38
    x8, scale = quantize_rows(x)
    assert scale[0] == 1 and (x8[0].float() == 0).all()
    assert x8[1:3].float().isnan().all() and scale[1:3].isnan().all()
    assert scale[3] == 2.0**-100 and x8[3].float().isfinite().all()


@pytest.mark.parametrize("shape", [(1, 16, 16), (5, 48, 32), (67, 112, 208)])
def test_output_is_the_product_of_the_fake_quantized(shape):
    rows, k, n = shape
    x, w, b = draw(rows, k), draw(n, k, seed=1), draw(n, seed=2)
    exact = fake(x).double() @ fake(w).double().t() + b.double()
    size = fake(x).double().abs() @ fake(w).double().abs().t() + b.double().abs()
    # FP32 sums of K terms, in any order, and three more roundings.
    assert ((fp8_linear(x, w, b).double() - exact).abs() <= (k + 3) * 2.0**-24 * size).all()
    error = (exact - (x.double() @ w.double().t() + b.double())).abs()
    assert (
        error <= (2 * E4M3_STEP + E4M3_STEP**2) * size + 1e-3
    ).all() and error.max() > 1e-3  # it is FP8, and no worse


def test_scaled_mm_takes_these_arguments_and_agrees():
    """What a GPU runs, on torch's CPU version of it: scales, transposition and bias are where they belong."""
    x8, sx = quantize_rows(draw(33, 64, dtype=torch.bfloat16))
    w8, sw = quantize_rows(draw(48, 64, seed=1, dtype=torch.bfloat16))
    for bias in (None, draw(48, seed=2, dtype=torch.bfloat16)):
        got = linear.scaled_mm(x8, sx, w8, sw, bias)
        wanted = linear.multiply(x8, sx, w8, sw, bias, torch.float32)
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got.float(), wanted, rtol=2.0**-8, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_those_of_the_fake_quantized_layer(dtype):
    x, w, b = (t.to(dtype).requires_grad_() for t in (draw(2, 13, 32), draw(48, 32, seed=1), draw(48, seed=2)))
    up = draw(2, 13, 48, seed=3).to(dtype)
    fp8_linear(x, w, b).backward(up)
    got = [t.grad.clone() for t in (x, w, b)]
    x32, w32, b32 = (t.detach().float().requires_grad_() for t in (x, w, b))
    torch.nn.functional.linear(fake(x32.flatten(0, 1)), fake(w32), b32).backward(up.float().flatten(0, 1))
    bound = 1e-5 if dtype == torch.float32 else 2.0**-7  # BF16: operands and results are rounded to 2^-9
    for mine, wanted in zip(got, (x32.grad, w32.grad, b32.grad), strict=True):
        assert mine.dtype == dtype
        assert float((mine.float() - wanted).norm() / wanted.norm()) < bound


def test_second_derivatives_and_bad_arguments_are_refused():
    x, w = draw(4, 32).requires_grad_(), draw(16, 32, seed=1)
    (grad,) = torch.autograd.grad(fp8_linear(x, w).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
    with pytest.raises(ConfigError, match=r"weight has shape \(20, 32\), expected multiples of 16"):
        fp8_linear(x, draw(20, 32))
    with pytest.raises(ConfigError, match=r"expected \(..., K\) and \(N, K\)"):
        fp8_linear(x, draw(16, 48))
    with pytest.raises(ConfigError, match="expected floats on one device"):
        fp8_linear(x, torch.ones(16, 32, dtype=torch.int32))


def test_autocast_is_that_of_linear():
    x, w, b = draw(4, 32), draw(16, 32, seed=1), draw(16, seed=2)
    with torch.autocast("cpu", torch.bfloat16):
        out = fp8_linear(x, w, b)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, fp8_linear(x.bfloat16(), w, b))  # codes are never multiplied in BF16


# Under a schedule --------------------------------------------------------------------------------------------------------


def scheduled(model: torch.nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, ScheduledLinear)]


@torch.no_grad()
def test_every_layer_computes_fp8_linear_and_nothing_else_changes(model):
    """Bit for bit: the named layers are fp8_linear of what they get; time, modulation, text and patch layers get and give what they
    did; remove() gives every bit back."""
    plain = tiny_wan.run(model, [700.0])
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def watch() -> Any:
        kinds = (torch.nn.Linear, torch.nn.Conv3d)
        layers = {name: m for name, m in model.named_modules() if isinstance(m, kinds)}
        return [
            m.register_forward_hook(lambda _, i, o, name=n: seen.update({name: (i[0], o)})) for n, m in layers.items()
        ]

    hooks = watch()
    tiny_wan.run(model, [700.0])
    before = dict(seen)
    with fps.apply(model, ALL) as handle:
        assert scheduled(model) == [f"blocks.{layer}.{name}" for layer in range(2) for name in NAMES]
        assert list(model.state_dict()) == list(state)
        changed = tiny_wan.run(model, [700.0])
        row = handle.report().rows[0]
        assert (row.linears, row.calls) == (8, 1) and "8 fp8" in str(handle.report())
    for hook in hooks:
        hook.remove()
    assert set(seen) == set(before)
    outside = [name for name in seen if not name.startswith("blocks.")]
    assert len(outside) >= 6
    for name in outside:
        if name != "proj_out":  # it comes after the blocks
            assert all(torch.equal(a, b) for a, b in zip(seen[name], before[name], strict=True)), name
    for layer in range(2):
        for name in ("attn2.to_k", "attn2.to_v"):  # of the text
            assert torch.equal(seen[f"blocks.{layer}.{name}"][1], before[f"blocks.{layer}.{name}"][1])
        for name in NAMES:
            module = model.get_submodule(f"blocks.{layer}.{name}")
            x, out = seen[f"blocks.{layer}.{name}"]
            assert torch.equal(out, fp8_linear(x, module.weight, module.bias)), name
            assert not torch.equal(out, module(x))
    assert not torch.equal(changed, plain)
    assert not scheduled(model)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(tiny_wan.run(model, [700.0]), plain)


@torch.no_grad()
def test_q_k_and_v_share_one_quantization(model, monkeypatch):
    calls: list[tuple[int, ...]] = []

    def counted(x: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(tuple(x.shape))
        return quantize_rows(x)

    monkeypatch.setattr(linear, "quantize_rows", counted)
    monkeypatch.setattr(integration, "quantize_rows", counted)
    with fps.apply(model, ALL):
        tiny_wan.run(model, [700.0])
    tokens = math.prod(tiny_wan.GRID)
    assert sum(shape[0] == tokens for shape in calls) == 2 * (len(NAMES) - 2)  # both blocks; the weights are smaller
    assert len(calls) == 2 * (2 * len(NAMES) - 2)


@torch.no_grad()
def test_levels_switch_linears_by_sigma_layer_and_sample(model):
    with fps.apply(model, "fp8"):
        own = tiny_wan.run(model, [900.0, 100.0])
    with fps.apply(model, ALL):
        both = tiny_wan.run(model, [900.0, 100.0])
    with fps.apply(model, SWITCHED) as handle:
        mixed = tiny_wan.run(model, [900.0, 100.0])
        assert handle.report().host_reads == 1
        assert [(r.level, r.linears, r.calls) for r in handle.report().rows[:2]] == [
            ("both", 8, 1),
            ("attention", 0, 1),
        ]
    schedule = {**ALL, "tile": None}
    with fps.apply(model, {**schedule, "layers": {"0-1": "attention"}}):
        assert not scheduled(model)
    with fps.apply(model, {**schedule, "layers": {"1": "attention"}}):
        assert {name.split(".")[1] for name in scheduled(model)} == {"0"}
    # GEMMs of another batch round differently, which flips a code here and there.
    torch.testing.assert_close(mixed[:1], both[:1], rtol=1e-3, atol=2e-3)
    with fps.apply(model, {**ALL, "phases": [{"sigma": [1.0, 0.0], "level": "attention"}]}):
        torch.testing.assert_close(mixed[1:], tiny_wan.run(model, [900.0, 100.0])[1:], rtol=1e-3, atol=2e-3)
    assert float((both - own).abs().max()) > 4e-3


def test_first_and_last_layers_are_left_out_by_default():
    model = tiny_wan.transformer(num_layers=4)
    with fps.apply(model, "fp8", linears="fp8") as handle:
        assert {name.split(".")[1] for name in scheduled(model)} == {"1", "2"}
        assert [row.linears for row in handle.report().rows] == [0, 8, 8, 0]
        assert handle.schedule == fps.Schedule.from_dict(handle.schedule.to_dict())
        assert handle.schedule.to_dict()["levels"]["fp8"]["linears"] == "fp8"
    with fps.apply(model, ALL, linears="bf16"):
        assert not scheduled(model)
    with pytest.raises(ConfigError, match="linears 'int8'"):
        fps.apply(model, "fp8", linears="int8")
    with pytest.raises(ConfigError, match="expected an 'fp8' level"):
        fps.apply(model, "dense", linears="fp8")
    with pytest.raises(ConfigError, match=r"own_linears is \[1.5\]"):
        fps.Schedule.from_dict({**ALL, "own_linears": [1.5]})
    with pytest.raises(ConfigError, match=r'levels\["a"\].linears is \'int8\''):
        fps.Schedule.from_dict({**ALL, "levels": {"a": {"precision": "fp8", "linears": "int8"}}})
    assert not scheduled(model)


@torch.no_grad()
def test_dense_attention_with_fp8_linears(model):
    levels = {"it": {"precision": "bf16", "linears": "fp8"}}
    schedule = {**ALL, "levels": levels, "phases": [{"sigma": [1, 0], "level": "it"}]}
    assert fps.Schedule.from_dict(schedule).to_dict()["levels"] == levels
    plain = tiny_wan.run(model, [700.0])
    with fps.apply(model, schedule):
        out = tiny_wan.run(model, [700.0])
    assert 1e-4 < float((out - plain).norm() / plain.norm()) < 0.02


@pytest.mark.parametrize("family", ["wan", "vace", "hunyuan", "hunyuan15", "motif"])
@torch.no_grad()
def test_families(family):
    """Each family's rows name layers that are there, of the blocks only, and never those of time or modulation."""
    torch.manual_seed(0)
    module, arguments = tiny_models.FAMILIES[family].make(2)
    plain = module.eval()(**arguments, return_dict=False)[0]
    with fps.apply(module, {**ALL, "tile": tiny_models.TILE}) as handle:
        names = scheduled(module)
        out = module(**arguments, return_dict=False)[0]
        assert len(names) == sum(row.linears for row in handle.report().rows) >= 6
    assert all("blocks." in name for name in names)
    assert not any(
        part in name for name in names for part in ("norm", "embed", "time", "mod", "adaln", "context", "add_")
    )
    assert 0 < float((out - plain).norm() / plain.norm()) < 0.02
    assert torch.equal(module(**arguments, return_dict=False)[0], plain)


def test_families_without_a_row_are_refused():
    module, _ = tiny_models.FAMILIES["mochi"].make(1)
    with pytest.raises(UnsupportedError, match="linears of Mochi are not known"):
        fps.apply(module, ALL)
    assert not module._forward_pre_hooks and not any(
        "FPS" in type(b.attn1.processor).__name__ for b in module.transformer_blocks
    )


# With others -------------------------------------------------------------------------------------------------------------


def lora(model: torch.nn.Module, seed: int) -> None:
    from peft import LoraConfig

    name = f"adapter{seed}"
    torch.manual_seed(seed)
    model.add_adapter(
        LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_k", "net.2"], init_lora_weights=False), name
    )
    model.set_adapter(name)


@pytest.mark.parametrize("when", ["before", "after"])
@torch.no_grad()
@pytest.mark.slow
def test_lora_unfused_swapped_and_fused(model, when):
    """Unfused, the adapter's own layers stay 16-bit beside an FP8 base; fused, FP8 is of the merged weights. Whichever came first."""
    pytest.importorskip("peft")
    handle = fps.apply(model, ALL) if when == "after" else None
    lora(model, 1)
    handle = handle or fps.apply(model, ALL)
    assert len(handle.installations[0].linears.installed) == 16
    q = model.blocks[0].attn1.to_q
    x = draw(1, 9, 128, dtype=torch.float32)
    seen: list[Tensor] = []
    hook = q.register_forward_hook(lambda _, i, o: seen.extend((i[0], o)))
    one = tiny_wan.run(model, [700.0])
    x, out = seen
    branch = q.lora_B["adapter1"](q.lora_A["adapter1"](x)) * q.scaling["adapter1"]
    assert torch.equal(out, fp8_linear(x, q.base_layer.weight, q.base_layer.bias) + branch)
    hook.remove()
    lora(model, 2)
    two = tiny_wan.run(model, [700.0])
    assert float((one - two).abs().max()) > 1e-3
    model.fuse_lora(adapter_names=["adapter2"])
    merged = tiny_wan.run(model, [700.0])
    weight = q.base_layer.weight.clone()
    seen.clear()
    hook = q.register_forward_hook(lambda _, i, o: seen.extend((i[0], o)))
    tiny_wan.run(model, [700.0])
    hook.remove()
    assert torch.equal(seen[1], fp8_linear(seen[0], weight, q.base_layer.bias))
    assert 0 < float((merged - two).norm() / two.norm()) < 0.05
    model.unfuse_lora()
    handle.remove()
    assert not scheduled(model)


@torch.no_grad()
def test_fused_projections_are_followed_and_change_no_bit(model):
    with fps.apply(model, ALL) as handle:
        plain = tiny_wan.run(model, [700.0])
        for block in model.blocks:
            block.attn1.fuse_projections()
        fused = tiny_wan.run(model, [700.0])
        assert "blocks.1.attn1.to_qkv" in scheduled(model) and "blocks.1.attn1.to_q" not in scheduled(model)
        assert handle.report().rows[0].linears == 6
        for block in model.blocks:
            block.attn1.unfuse_projections()
        assert torch.equal(tiny_wan.run(model, [700.0]), plain)
    torch.testing.assert_close(
        fused, plain, rtol=1e-3, atol=2e-3
    )  # scales are the same; the sums of a wider GEMM may not be
    assert not scheduled(model)


@pytest.mark.parametrize("when", ["before", "after"])
@torch.no_grad()
def test_layerwise_casting(when):
    model = tiny_wan.transformer().bfloat16()

    def cast() -> None:
        model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)

    def run() -> Tensor:
        arguments = {name: x.bfloat16() for name, x in tiny_wan.inputs([700.0]).items()}
        return model(**arguments, return_dict=False)[0]

    if when == "before":
        cast()
        plain = run()
    with fps.apply(model, ALL):
        if when == "after":
            cast()
        q = model.blocks[0].attn1.to_q
        seen: list[Tensor] = []
        hook = q.register_forward_hook(lambda _, i, o: seen.extend((i[0], o)))
        run()
        hook.remove()
        assert q.weight.dtype == torch.float8_e4m3fn
        assert torch.equal(seen[1], fp8_linear(seen[0], q.weight.bfloat16(), q.bias.bfloat16()))
    if when == "before":
        assert torch.equal(run(), plain)
    assert torch.equal(q(seen[0]), torch.nn.functional.linear(seen[0], q.weight.bfloat16(), q.bias.bfloat16()))


@pytest.mark.parametrize("when", ["before", "after"])
@torch.no_grad()
def test_offload_hooks(model, when):
    """accelerate's sequential offload: weights are on no device between two calls."""
    accelerate = pytest.importorskip("accelerate")
    with fps.apply(model, ALL):
        wanted = tiny_wan.run(model, [700.0])
    plain = tiny_wan.run(model, [700.0])
    if when == "before":
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    with fps.apply(model, ALL):
        if when == "after":
            accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        assert torch.equal(tiny_wan.run(model, [700.0]), wanted)
        assert model.blocks[0].attn1.to_q.weight.device.type == "meta"
    assert torch.equal(tiny_wan.run(model, [700.0]), plain)


@torch.no_grad()
def test_forwards_of_others_and_quantized_weights_are_refused(model):
    """Weights that are quantized already keep their own product: a clear error, or a line in the report."""

    class Quantized(Tensor):
        pass

    q = model.blocks[1].attn1.to_q
    q.weight = torch.nn.Parameter(q.weight.data.as_subclass(Quantized), requires_grad=False)
    plain = tiny_wan.run(model, [700.0])
    with pytest.raises(
        UnsupportedError, match=r"blocks.1.attn1.to_q has weights that are quantized already \(Quantized\)"
    ):
        fps.apply(model, ALL)
    assert torch.equal(tiny_wan.run(model, [700.0]), plain) and not scheduled(model)
    with fps.apply(model, ALL, on_unsupported="dense") as handle:
        tiny_wan.run(model, [700.0])
        assert len(scheduled(model)) == 15
        assert any("quantized already" in note for note in handle.report().notes())
    v = model.blocks[0].attn1.to_v
    v.forward = lambda x: torch.nn.functional.linear(x, v.weight, v.bias)
    with pytest.raises(UnsupportedError, match="to_v has a forward of its own"):
        fps.apply(model, ALL)


@torch.no_grad()
def test_a_device_without_fp8_products(model, monkeypatch):
    monkeypatch.setattr(integration, "why_not", lambda device: f"FP8 linears do not run on {device.type}")
    with fps.apply(model, ALL), pytest.raises(UnsupportedError, match="to_q: FP8 linears do not run on cpu"):
        tiny_wan.run(model, [700.0])
    with fps.apply(model, "fp8"):
        wanted = tiny_wan.run(model, [700.0])
    with fps.apply(model, {**ALL, "tile": None}, on_unsupported="dense") as handle:
        assert torch.equal(tiny_wan.run(model, [700.0]), wanted)
        assert sum("do not run on cpu" in reason for reason in handle.report().fallbacks) == 16


@torch.no_grad()
def test_copies_and_pickles_keep_their_linears(model):
    with fps.apply(model, ALL):
        wanted = tiny_wan.run(model, [700.0])
        twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    plain = tiny_wan.run(model, [700.0])
    for twin in twins:
        assert len(scheduled(twin)) == 16
        assert torch.equal(tiny_wan.run(twin, [700.0]), wanted)
        assert fps.remove(twin) and not scheduled(twin)
        assert torch.equal(tiny_wan.run(twin, [700.0]), plain)


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    tiny_wan.run(model, [900.0, 100.0]).square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.slow
def test_training_with_checkpointing(model):
    """Samples of both kinds in one batch; recomputation gives the same gradients, and they are near those of the plain model."""
    model.train()
    plain = gradients(model)
    with fps.apply(model, SWITCHED):
        wanted = gradients(model)
        model.enable_gradient_checkpointing()
        got = gradients(model)
    assert set(got) == set(wanted) == set(plain)
    for name, gradient in wanted.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
    # Layers below 8 others, each of which rounds its gradient's operand by 2.6 % (root mean square of e4m3).
    ffn = "blocks.1.ffn.net.2.weight"
    assert 1e-4 < float((wanted[ffn] - plain[ffn]).norm() / plain[ffn].norm()) < 0.1


def test_fsdp(model, tmp_path):
    """Weights are DTensors between forwards and plain in them: the same output and gradient as without, to the bit."""
    from torch import distributed
    from torch.distributed.fsdp import fully_shard

    names = ("blocks.1.ffn.net.2.weight", "blocks.0.attn1.norm_k.weight")
    sharded = copy.deepcopy(model)
    with fps.apply(model, ALL, prepare=True):
        wanted = tiny_wan.run(model, [700.0])
        wanted.square().mean().backward()
    distributed.init_process_group(
        "gloo", store=distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    try:
        mesh = distributed.device_mesh.init_device_mesh("cpu", (1,))
        for module in (*sharded.blocks, sharded):
            fully_shard(module, mesh=mesh)
        with fps.apply(sharded, ALL, prepare=True) as handle:
            assert len(scheduled(sharded)) == 16
            assert type(sharded.blocks[0].attn1.to_q.weight.data).__name__ == "DTensor"
            out = tiny_wan.run(sharded, [700.0])
            out.square().mean().backward()
            assert handle.report().prepared["transformer"] == [1, 1]
        assert torch.equal(out, wanted)
        for name in names:
            assert torch.equal(sharded.get_parameter(name).grad.full_tensor(), model.get_parameter(name).grad)
    finally:
        distributed.destroy_process_group()


@pytest.mark.slow
@torch.no_grad()
def test_compiled_blocks():
    """A graph for the layers in FP8 and one for the others, whatever the sigma; a batch of both is a third. q, k and v share one
    quantization in all of them, and the next forward finds nothing left over."""
    model = tiny_wan.transformer()
    quantized: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        quantized.append(sum(node.target is torch.aminmax for node in graph.graph.nodes))
        return graph.forward

    with fps.apply(model, SWITCHED):
        arguments = [[900.0], [100.0], [800.0], [200.0], [900.0, 100.0]]
        eager = [tiny_wan.run(model, timestep) for timestep in arguments]
        torch._dynamo.reset()
        model.compile_repeated_blocks(fullgraph=True, backend=backend)
        for timestep, wanted in zip(arguments, eager, strict=True):
            torch.testing.assert_close(tiny_wan.run(model, timestep), wanted, rtol=1e-3, atol=2e-3)
    both = 2 * len(NAMES) - 2
    assert quantized == [both, 0, both]


@pytest.mark.slow
@torch.no_grad()
def test_an_outer_graph_decides_on_the_device():
    model = tiny_wan.transformer()
    with fps.apply(model, SWITCHED):
        eager = [tiny_wan.run(model, [timestep]) for timestep in (900.0, 100.0)]
        torch._dynamo.reset()
        run = torch.compile(lambda **kwargs: model(**kwargs, return_dict=False)[0], fullgraph=True, backend="eager")
        for timestep, wanted in zip((900.0, 100.0), eager, strict=True):
            torch.testing.assert_close(run(**tiny_wan.inputs([timestep])), wanted, rtol=1e-3, atol=2e-3)
