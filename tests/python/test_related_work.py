"""Related systems: what "works with us" means for each, one case per system (``docs/related_work.md``). Small random models, CPU."""

from __future__ import annotations

import copy
import threading
import tracemalloc
from dataclasses import replace

import pytest
import torch

pytest.importorskip("diffusers")

import tiny_wan

import fpsattention as fps
from fpsattention import patterns
from fpsattention.layout import tiles

FP8 = 0.07  # relative L1 of FP8 attention of normal inputs at D = 64
SCHEDULE = {
    "format": "fpsattn-schedule/1",
    "tile": tiny_wan.TILE,
    "levels": {
        "coarse": {"precision": "fp8", "window": [1, 1, 1]},
        "fine": {"precision": "fp8", "granularity": "block", "window": [1, 2, 2]},
        "medium": {"precision": "fp8", "window": [1, 2, 1]},
    },
    "phases": [
        {"sigma": [1.0, 0.9], "level": "coarse"},
        {"sigma": [0.9, 0.4], "level": "fine"},
        {"sigma": [0.4, 0.0], "level": "medium"},
    ],
}


@pytest.fixture(scope="module")
def model():
    return tiny_wan.transformer()


def qkv(tokens, heads=2, dim=64, seed=0, count=3):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, heads, tokens, dim, generator=generator) for _ in range(count)]


def exact(q, k, v, mask=None):
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask)


def relative_l1(out, want):
    return ((out - want).abs().sum() / want.abs().sum()).item()


@torch.no_grad()
def test_lesa_skipped_steps(model):
    """LESA, caches: any steps may be skipped outside; each one that runs has the level of its sigma, whatever ran before."""
    schedule = fps.Schedule.from_dict(SCHEDULE)
    timesteps = [1000.0, 950.0, 880.0, 600.0, 350.0, 100.0]
    with fps.apply(model, schedule):
        whole = [tiny_wan.run(model, [t]) for t in timesteps]
    for subset in ([0, 3], [5, 1], [4], [2, 4, 5]):
        with fps.apply(model, schedule) as handle:
            for i in subset:
                assert torch.equal(tiny_wan.run(model, [timesteps[i]]), whole[i])
            ran = {row.level: row.calls for row in handle.report().rows if row.layer == 0 and row.calls}
        want: dict[str, int] = {}
        for i in subset:
            level = schedule.at(timesteps[i] / 1000).name
            want[level] = want.get(level, 0) + 1
        assert ran == want


def test_flash_vaed_another_decoder():
    """Flash-VAED, H3AE: the decoder is not ours: latents are the same bits whatever decodes them."""
    from diffusers import AutoencoderKLWan

    pipe = tiny_wan.pipeline()
    any_grid = {**SCHEDULE, "levels": {n: {"precision": "fp8", "window": {"density": 0.5}} for n in SCHEDULE["levels"]}}
    with fps.apply(pipe, any_grid):
        before = tiny_wan.sample(pipe)
        torch.manual_seed(1)
        config = {"base_dim": 4, "z_dim": 16, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
        pipe.vae = AutoencoderKLWan(**config, temperal_downsample=[False, True, True]).eval()
        after = tiny_wan.sample(pipe)
    assert torch.equal(before, after)


def test_gpd_few_steps_and_a_dense_teacher(model):
    """GPD, BLADE, few-step models: six steps visit every phase; a dense teacher without a handle, gradients in the student only."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    schedule = fps.Schedule.from_dict(SCHEDULE)
    assert set(schedule.to_steps(FlowMatchEulerDiscreteScheduler(shift=3.0), 6)) == {"coarse", "fine", "medium"}
    student, teacher = copy.deepcopy(model), model.requires_grad_(False)
    with torch.no_grad():
        target = tiny_wan.run(teacher, [700.0])
    with fps.apply(student, schedule):
        loss = (tiny_wan.run(student, [700.0]) - target).square().mean()
        assert torch.equal(tiny_wan.run(teacher, [700.0]), target)  # the student's handle is not the teacher's
        loss.backward()
    assert loss > 0 and all(p.grad is None for p in teacher.parameters())
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in student.blocks[0].attn1.parameters())


@pytest.mark.slow
def test_blade_step_of_distillation():
    """BLADE: its adaptive mask, trained through: a student's projection closes in on a dense teacher in 50 steps."""
    layout = fps.plan((4, 8, 16), (2, 8, 8))
    x = qkv(layout.num_tokens, count=1)[0]
    teacher = exact(x, x, x)
    weight = torch.nn.Parameter(0.5 * torch.eye(64))
    optimizer = torch.optim.Adam([weight], 2e-2)
    losses = []
    for _ in range(50):
        v = x @ weight
        mask = patterns.blade(x, x, layout, samples=8, max_ratio=0.6)
        out = fps.attention(x, x, v, grid=layout.grid, block_mask=mask, tensor_layout="HND")
        loss = (out - teacher).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_soulx_streaming_chunks():
    """SoulX-FlashTalk: chunks that attend the keys of the chunk before equal one attention under that mask; memory stays flat."""
    chunk = (2, 8, 8)  # 128 tokens, a block
    pair = fps.plan((4, 8, 8), chunk)
    keep = torch.zeros(1, 1, 2, 2, dtype=torch.bool)
    keep[0, 0, 1] = True  # the queries of the second chunk; the first one's are not computed again
    mask = fps.BlockMask.from_keep(pair, keep)
    q, k, v = qkv(128 * 4)
    whole = fps.plan((8, 8, 8), chunk)
    steps = torch.tensor([[j in (i - 1, i) for j in range(4)] for i in range(4)])
    want = exact(q, k, v, fps.BlockMask.from_tiles(whole, steps).to_token_mask())
    for i in range(1, 4):
        at = slice(128 * (i - 1), 128 * (i + 1))
        out = fps.attention(*(x[:, :, at] for x in (q, k, v)), grid=pair.grid, block_mask=mask, tensor_layout="HND")
        assert (out[:, :, :128] == 0).all()  # an empty list
        assert relative_l1(out[:, :, 128:], want[:, :, 128 * i : 128 * (i + 1)]) < FP8

    def stream(count):
        for i in range(count):
            at = slice(128 * (i % 3), 128 * (i % 3 + 2))
            fps.attention(*(x[:, :, at] for x in (q, k, v)), grid=pair.grid, block_mask=mask, tensor_layout="HND")

    stream(3)
    plans = tiles._plan.cache_info().misses
    tracemalloc.start()
    stream(5)
    _, after_five = tracemalloc.get_traced_memory()
    stream(20)
    _, after_more = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert tiles._plan.cache_info().misses == plans and after_more < 1.2 * after_five + 50_000


@pytest.mark.parametrize("count", [2, 4])
@torch.no_grad()
@pytest.mark.slow
def test_lightningcp_and_chords_parallel_denoising(model, count):
    """LightningCP, CHORDS: several sigmas in flight, one model, one thread each: the bits of one after the other."""
    timesteps = [980.0, 700.0, 400.0, 150.0][:count]
    with fps.apply(model, SCHEDULE):
        want = [tiny_wan.run(model, [t]) for t in timesteps]
        wrong, barrier = [], threading.Barrier(count)

        def run(i):
            with torch.no_grad():
                for _ in range(4):
                    barrier.wait()
                    if not torch.equal(tiny_wan.run(model, [timesteps[i]]), want[i]):
                        wrong.append(i)

        threads = [threading.Thread(target=run, args=(i,)) for i in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def test_lightningcp_foreground():
    """LightningCP: rows of a foreground box that ends at tile borders equal dense attention over the foreground."""
    layout = fps.plan((2, 8, 16), (2, 4, 4))
    q, k, v = qkv(layout.num_tokens)
    mask = patterns.foreground(layout, box=((0, 2), (0, 4), (4, 12)), window=(1, 1, 1))
    out = fps.attention(q, k, v, grid=layout.grid, block_mask=mask, tensor_layout="HND")
    inside = torch.zeros(layout.grid, dtype=torch.bool)
    inside[:, 0:4, 4:12] = True
    front = inside.flatten()
    assert relative_l1(out[:, :, front], exact(q[:, :, front], k[:, :, front], v[:, :, front])) < FP8


@pytest.mark.parametrize("size", [(7, 5), (13, 11), (16, 30)])
def test_gfvc_and_osdd_pictures(size):
    """GFVC's codec, one-step deblurring: spatial attention of a picture, T = 1, odd sizes, 2-D windows; a schedule of one phase."""
    layout = fps.plan((1, *size), (1, 4, 5))
    q, k, v = qkv(layout.num_tokens)
    out = fps.attention(q, k, v, grid=layout.grid, tensor_layout="HND")
    assert relative_l1(out, exact(q, k, v)) < FP8
    window = (1, min(2, layout.tile_grid[1]), min(2, layout.tile_grid[2]))
    out = fps.attention(q, k, v, grid=layout.grid, tile=(1, 4, 5), window=window, tensor_layout="HND")
    assert relative_l1(out, exact(q, k, v, fps.sliding_tile_mask(layout, window).to_token_mask())) < FP8
    one = {**SCHEDULE, "phases": [{"sigma": [1.0, 0.0], "level": "fine"}]}
    assert fps.Schedule.from_dict(one).at(0.5).name == "fine"


def test_ultra3d_parts():
    """Ultra3D: attention within parts, tokens permuted by part and back."""
    labels = torch.randint(0, 4, (300,), generator=torch.Generator().manual_seed(1))
    layout = patterns.part_layout(labels)
    q, k, v = qkv(300)
    out = fps.attention(q, k, v, grid=layout.grid, block_mask=patterns.part(layout, labels=labels), tensor_layout="HND")
    assert relative_l1(out, exact(q, k, v, labels[:, None] == labels)) < FP8


def test_vmoba_chunks_change_with_the_layer():
    """VMoBA: time, space and volume in turn; denser with a higher threshold; the lists themselves: test_patterns.py."""
    layout = fps.plan((4, 8, 16), (2, 4, 4))
    q, k = qkv(layout.num_tokens, count=2)
    masks = [patterns.vmoba(q, k, layout, layer=layer).to_blocks() for layer in range(4)]
    assert (
        torch.equal(masks[0], masks[3]) and not torch.equal(masks[0], masks[1]) and not torch.equal(masks[1], masks[2])
    )
    grid = masks[0].view(*masks[0].shape[:3], *layout.tile_grid)
    assert (grid == grid[..., :1, :1]).all()  # whole frames
    low, high = (patterns.vmoba(q, k, layout, layer=2, threshold=t).density for t in (0.25, 0.6))
    assert low < high


def test_vorta_routes_by_head():
    """VORTA: heads on different routes in one call equal separate calls, bit for bit; the coreset route: test_patterns_state.py."""
    layout = fps.plan((4, 8, 16), (2, 4, 8))
    q, k, v = qkv(layout.num_tokens, heads=3)
    routes = torch.tensor([0, 1, 1])
    options = {"grid": layout.grid, "tensor_layout": "HND"}
    out = fps.attention(q, k, v, block_mask=patterns.vorta(layout, routes=routes, window=(1, 1, 1)), **options)
    full = fps.attention(q, k, v, block_mask=fps.dense_mask(layout), **options)
    window = fps.attention(q, k, v, block_mask=fps.sliding_tile_mask(layout, (1, 1, 1)), **options)
    assert torch.equal(out[:, 0], full[:, 0]) and torch.equal(out[:, 1:], window[:, 1:])


@pytest.mark.parametrize("length", [1, 127, 300])
def test_diffusion_language_models(length):
    """Diffusion LMs: 1-D sequences of any length; K and V quantized once serve several steps, the same bits as quantizing anew."""
    layout = fps.plan((1, 1, length))
    q, k, v = qkv(length)
    assert relative_l1(fps.attention(q, k, v, grid=layout.grid, tensor_layout="HND"), exact(q, k, v)) < FP8
    lists = fps.dense_mask(layout).lists(False)
    ops = torch.ops.fpsattn
    quantize = {"granularity": 0, "smooth_k": True, "pow2_scales": False}
    first = ops.quantize(q, k, v, lists.token_of_slot, lists.tile_block_offsets, **quantize)
    later = ops.quantize(q * 0.5, k, v, lists.token_of_slot, lists.tile_block_offsets, **quantize)
    tables = (lists.token_of_slot, lists.tile_of_block, lists.kv_num_blocks, lists.kv_indices)
    how = {"num_tokens": length, "softmax_scale": 0.125, "out_dtype": q.dtype}
    anew = ops.forward(*later[:6], *tables, **how)[0]
    kept = ops.forward(later[0], first[1], first[2], later[3], first[4], first[5], *tables, **how)[0]
    assert torch.equal(anew, kept)


def _rank(rank, path):
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    q, k, v = qkv(150)
    for _ in range(1 + 3 * rank):  # the ranks are at different steps: a collective inside would wait forever
        out = fps.attention(q, k, v, grid=(2, 5, 15), tensor_layout="HND")
    both = [torch.empty_like(out) for _ in range(2)]
    dist.all_gather(both, out.contiguous())
    assert torch.equal(*both)
    dist.destroy_process_group()


def test_parastep_ranks_at_different_steps(tmp_path):
    """ParaStep: no collective inside our op, no state between ranks."""
    torch.multiprocessing.start_processes(_rank, (str(tmp_path / "store"),), nprocs=2, start_method="fork")


@pytest.mark.parametrize("grid", [(1, 1, 1), (1, 1, 2), (2, 3, 3)])
def test_h3ae_tiny_grids(grid):
    """High-compression autoencoders leave few tokens: grids down to a single one."""
    tokens = grid[0] * grid[1] * grid[2]
    q, k, v = (x.requires_grad_() for x in qkv(tokens))
    out = fps.attention(q, k, v, grid=grid, tensor_layout="HND")
    assert relative_l1(out, exact(q, k, v)) < 0.12  # so few values do not average
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(out.sum(), (q, k, v)))


@torch.no_grad()
def test_acc3d_views_as_a_batch(model):
    """Acc3D, multi-view: a batch of views at different sigmas gives each view what it gets alone."""
    timesteps = [950.0, 700.0, 300.0]
    batch = tiny_wan.inputs(timesteps)
    with fps.apply(model, SCHEDULE):
        together = model(**batch, return_dict=False)[0]
        for i in range(3):
            alone = model(**{name: x[i : i + 1] for name, x in batch.items()}, return_dict=False)[0]
            assert relative_l1(together[i : i + 1], alone) < 1e-5  # matmuls of other sizes add up in another order


def test_training_and_inference_round_alike(model):
    """Efficiency-meets-fidelity: scales are those of the call, so a training forward has the bits of inference."""
    with fps.apply(model, SCHEDULE):
        trained = tiny_wan.run(model.requires_grad_(True), [700.0])
        with torch.no_grad():
            inferred = tiny_wan.run(model, [700.0])
    assert trained.requires_grad and torch.equal(trained, inferred)


@torch.no_grad()
def test_tfmq_temporal_features_stay_as_they_are(model):
    """Temporal feature maintenance: time embedding and modulation are untouched, outputs and parameters, to the bit; with FP8 linears, too."""
    model = copy.deepcopy(model)
    before = {name: p.clone() for name, p in model.named_parameters()}
    seen = []
    hook = model.condition_embedder.register_forward_hook(lambda _m, _a, out: seen.append(out))
    tiny_wan.run(model, [700.0])
    schedule = replace(fps.Schedule.from_dict(SCHEDULE), own_linears=())
    for linears in (None, "fp8"):
        with fps.apply(model, schedule, linears=linears) as handle:
            tiny_wan.run(model, [700.0])
            assert any(row.linears for row in handle.report().rows) == (linears == "fp8")
            assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    hook.remove()
    assert len(seen) == 3
    for own, *ours in zip(*seen, strict=True):
        assert all((own is None and x is None) or torch.equal(own, x) for x in ours)
