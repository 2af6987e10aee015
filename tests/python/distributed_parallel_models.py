"""Checks of whole models for distributed_parallel.py."""

import copy
import warnings

import diffusers
import diffusers.models.transformers
import tiny_models
import tiny_wan
import torch
import torch.distributed as dist
from distributed_parallel import RING, distance, failing

import fpsattention as fps
from fpsattention import parallel
from fpsattention.integrations import adapters

warnings.simplefilter("ignore")
SCHEMES = ({"exchange": "bf16"}, {}, {"scheme": "halo"}, {"scheme": "ring"})


def schedule(tile, *phases, **settings):
    levels = {
        "sparse": fps.Level("sparse", "fp8", "tile", (1, 1, 2)),
        "full": fps.Level("full", "fp8", "block", hadamard=True),
        "own": fps.Level("own", "bf16"),
    }
    return fps.Schedule(levels, phases or (fps.Phase(1.0, 0.0, "sparse"),), tile=tuple(tile), **settings)


def models_are_whole_again():
    """Every family that has a plan: the bits of one process (ring: to rounding). One head, so a rank of two has none."""
    for name in (
        "wan",
        "vace",
        "chronoedit",
        "skyreels",
        "hunyuan",
        "cogvideox",
        "easyanimate",
        "allegro",
        "ltx",
        "cosmos1",
        "cosmos2",
        "kandinsky",
    ):
        torch.manual_seed(0)
        model, arguments = tiny_models.FAMILIES[name].make(2)
        model.eval()
        with fps.apply(model, schedule(tiny_models.TILE)), torch.no_grad():
            one = model(**arguments, return_dict=False)[0]
            schemes = SCHEMES if name in ("wan", "cogvideox", "hunyuan") else SCHEMES[1:2]
            for how in schemes:
                (spread,) = parallel.shard(model, **how)
                with parallel.count_bytes() as counter:
                    out = model(**arguments, return_dict=False)[0]
                spread.remove()
                assert counter["gather"] > 0, (name, how)
                equal = distance(out, one) < RING if how.get("scheme") == "ring" else torch.equal(out, one)
                assert equal, (name, how, distance(out, one))
            if len(schemes) > 1:
                assert torch.equal(model(**arguments, return_dict=False)[0], one)


def levels_and_heads_of_a_schedule():
    """A batch at three levels, one of them the model's own attention; windows of single heads, which are dealt by cost; three heads."""
    model = tiny_wan.transformer(num_attention_heads=3)
    phases = fps.Phase(1.0, 0.7, "own"), fps.Phase(0.7, 0.4, "full"), fps.Phase(0.4, 0.0, "sparse")
    with torch.no_grad():
        for settings in ({}, {"heads": {(None, 0): (1, 2, 3), (0, 2): (1, 1, 1)}}):
            with fps.apply(model, schedule(tiny_wan.TILE, *phases, **settings)) as handle:
                one = tiny_wan.run(model, [900.0, 500.0, 100.0])
                alone = handle.report()
                for how in SCHEMES:
                    handle.reset()
                    (spread,) = parallel.shard(model, **how)
                    out = tiny_wan.run(model, [900.0, 500.0, 100.0])
                    spread.remove()
                    equal = distance(out, one) < RING if how.get("scheme") == "ring" else torch.equal(out, one)
                    assert equal, (settings, how, distance(out, one))
                    assert [row.calls for row in handle.report().rows] == [row.calls for row in alone.rows]


def patterns_of_a_schedule():
    """Lists that are made from q and k, INT8, and scale groups of several tiles: on whole sequences, after the exchange, whatever the scheme."""
    from fpsattention import patterns

    model = tiny_wan.transformer(num_attention_heads=3)
    scored = fps.Level("scored", "fp8", "tile", pattern=patterns.get("topk_mean", ratio=0.4))
    with torch.no_grad():
        grouped = fps.Level("grouped", "fp8", (3, 8, 8), (1, 1, 2))
        for level in (scored, fps.Level("int8", "int8", "block", (1, 1, 2)), grouped):
            made = fps.Schedule({level.name: level}, (fps.Phase(1.0, 0.0, level.name),), tile=tuple(tiny_wan.TILE))
            with fps.apply(model, made):
                one = tiny_wan.run(model, [300.0, 600.0])
                for how in SCHEMES[:3]:
                    (spread,) = parallel.shard(model, **how)
                    assert torch.equal(tiny_wan.run(model, [300.0, 600.0]), one), (level.name, how)
                    spread.remove()


def long_sequences_of_a_model():
    """2112 tokens: the mean of K is over every second one, in tile order where one process has them so."""
    model, one = tiny_wan.transformer(num_layers=1), {}
    with torch.no_grad():
        for order, schemes in (("tile", SCHEMES[1:3]), ("raster", SCHEMES[:2])):
            with fps.apply(model, schedule((4, 6, 4)), token_order=order):
                one[order] = tiny_wan.run(model, [300.0], grid=(16, 12, 11))
                for how in schemes:
                    (spread,) = parallel.shard(model, **how)
                    assert torch.equal(tiny_wan.run(model, [300.0], grid=(16, 12, 11)), one[order]), (order, how)
                    spread.remove()
    assert not torch.equal(one["tile"], one["raster"])


def diffusers_parallelism(model, anything):
    """``model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))``, which wants an accelerator, on the CPU."""
    from diffusers import ContextParallelConfig
    from diffusers.hooks.context_parallel import apply_context_parallel
    from diffusers.models._modeling_parallel import ParallelConfig

    size = dist.get_world_size()
    context = ContextParallelConfig(ulysses_degree=size, ulysses_anything=anything)
    config = ParallelConfig(context_parallel_config=context)
    mesh = torch.distributed.device_mesh.init_device_mesh(
        "cpu", context.mesh_shape, mesh_dim_names=context.mesh_dim_names
    )
    config.setup(dist.get_rank(), size, torch.device("cpu"), mesh=mesh)
    model._parallel_config = config
    for module in model.modules():
        if hasattr(getattr(module, "processor", None), "_parallel_config"):
            module.processor._parallel_config = config
    blocks = {f"blocks.{i}" for i in range(40)} - {
        f"blocks.{i}" for i in range(len(getattr(model, "blocks", range(40))))
    }
    plan = {
        name: cut for name, cut in model._cp_plan.items() if not any(name.startswith(f"{gone}.") for gone in blocks)
    }
    apply_context_parallel(model, context, plan)


# Plans of diffusers, by family; its own attention to text and sound wants as many heads as ranks.
HALVES = {"num_attention_heads": 2, "attention_head_dim": 32}
PLANNED = {
    "wan": {}, "chronoedit": {}, "helios": {}, "flux": {}, "flux2": {}, "qwen": {}, "ltx": HALVES,
    "ltx2": {**HALVES, "audio_num_attention_heads": 2, "audio_attention_head_dim": 16},
}  # fmt: skip


def of_a_plan(name):
    torch.manual_seed(0)
    model, arguments = tiny_models.FAMILIES[name].make(2)
    model = type(model).from_config({**model.config, **PLANNED[name]}).eval()
    if name == "flux2":  # its plan cuts ids with a batch dimension, as its pipeline passes them
        arguments |= {ids: arguments[ids].expand(2, -1, -1) for ids in ("img_ids", "txt_ids")}
    if name.startswith("ltx"):  # its own attention to a padded text fails under Ulysses in diffusers 0.42
        arguments["encoder_attention_mask"] = None
    if name == "ltx2":
        # Its plan leaves this out in diffusers 0.42, so that the model fails without a schedule as well.
        arguments["audio_encoder_attention_mask"] = None
        model._cp_plan = {**model._cp_plan, "cross_attn_rope": model._cp_plan["rope"]}
    return model, arguments


def context_parallelism_of_diffusers():
    """Every model with a plan; before and after ``apply``; streams that are cut apart (Flux) and a joint one (Helios, whose plan names 40 blocks)."""
    served = set()
    for name in PLANNED:
        model, arguments = of_a_plan(name)
        served.add(type(model).__name__)
        tile = tiny_models.TILE
        with torch.no_grad():
            handle = fps.apply(model, schedule(tile))
            one = model(**arguments, return_dict=False)
            if name == "wan":
                handle.remove()
            diffusers_parallelism(model, anything=name in ("chronoedit", "helios"))
            if name == "wan":
                handle = fps.apply(model, schedule(tile))
            handle.reset()
            with parallel.count_bytes() as counter:
                out = model(**arguments, return_dict=False)
            for a, b in zip(out, one, strict=True):
                # diffusers attends the sound of LTX-2 once per rank, and rounds another way.
                assert distance(a, b) < 1e-6 if name == "ltx2" else torch.equal(a, b), (name, distance(a, b))
            assert counter["qkv"] + counter["out"] > 0 and not handle.report().fallbacks, name
    planned = {n for n in dir(diffusers.models.transformers) if getattr(getattr(diffusers, n, None), "_cp_plan", None)}
    assert served == planned - adapters.REFUSED.keys(), "a model with a plan is not tested"


def gradients_are_those_of_one_process():
    """The mean over the ranks, with and without checkpointing; inputs that want a gradient, too. Weights follow sums in another order."""
    twin = tiny_wan.transformer(num_attention_heads=3, num_layers=1).train()
    fps.apply(twin, schedule(tiny_wan.TILE, fps.Phase(1.0, 0.5, "full"), fps.Phase(0.5, 0.0, "sparse")))
    models = [
        (how, checkpointing, copy.deepcopy(twin))
        for how in SCHEMES
        for checkpointing in (False, True)[: 1 + (how == {})]
    ]
    tiny_wan.run(twin, [700.0, 300.0]).square().mean().backward()
    for how, checkpointing, model in models:
        if checkpointing:
            model.enable_gradient_checkpointing()
        parallel.shard(model, **how)
        tiny_wan.run(model, [700.0, 300.0]).square().mean().backward()
        limit = RING if how.get("scheme") == "ring" else 1e-5
        for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None), name
            if p.grad is None:
                continue
            dist.all_reduce(p.grad)
            grad = p.grad / dist.get_world_size()
            # A bias of K moves no output: its gradient is rounding.
            assert distance(grad, q.grad) < limit or float(q.grad.abs().max()) < 1e-6, (
                how,
                name,
                distance(grad, q.grad),
            )


def compiled_blocks_break_at_the_exchange():
    """Graphs before and after, with the eager bits and counts. One rank is compiled: nothing of the exchange is in a graph."""
    model, graphs = tiny_wan.transformer(num_attention_heads=3, num_layers=1).train(), []
    handle = fps.apply(model, schedule(tiny_wan.TILE))
    parallel.shard(model)

    def run():
        handle.reset()
        model.zero_grad()
        out = tiny_wan.run(model, [700.0, 300.0])
        out.square().mean().backward()
        return [out.detach(), *(p.grad for p in model.parameters() if p.grad is not None)], handle.report().executions

    eager, executions = run()
    if dist.get_rank() == 0:
        model.compile_repeated_blocks(backend=lambda graph, _: graphs.append(graph) or graph)
    compiled, counted = run()
    assert all(torch.equal(a, b) for a, b in zip(compiled, eager, strict=True)) and counted == executions
    if dist.get_rank() == 0:
        assert 2 <= len(graphs) <= 4, len(graphs)
        with failing(RuntimeError, "exchanges tokens outside of graphs"):
            torch._dynamo.reset()
            model.compile_repeated_blocks(fullgraph=True, backend="eager")
            tiny_wan.run(model, [700.0, 300.0])


def what_cannot_be_spread():
    model = tiny_wan.transformer()
    (spread,) = parallel.shard(model)
    with failing(fps.ConfigError, "no schedule is applied"):
        tiny_wan.run(model, [500.0])
    with failing(fps.ConfigError, "spread already"):
        parallel.shard(model)
    spread.remove()
    spread.remove()
    for text, options in (
        ("scheme 'star'", {"scheme": "star"}),
        ("exchange 'bf16' with scheme 'halo'", {"exchange": "bf16", "scheme": "halo"}),
        ("output 'fp8' with scheme 'ring'", {"output": "fp8", "scheme": "ring"}),
    ):
        with failing(fps.ConfigError, rf"fpsattention\.parallel\.shard: .*{text}"):
            parallel.shard(model, **options)
    mochi, _ = tiny_models.FAMILIES["mochi"].make(1)
    with failing(fps.UnsupportedError, "has no plan: it calls attention sample by sample"):
        parallel.shard(mochi)
    with failing(fps.UnsupportedError, "is not supported|has no plan"):
        parallel.shard(torch.nn.Linear(1, 1))
    # Ranks at different noise levels would run different kernels: refused before they exchange anything.
    with fps.apply(model, schedule(tiny_wan.TILE, fps.Phase(1.0, 0.5, "own"), fps.Phase(0.5, 0.0, "sparse"))):
        (spread,) = parallel.shard(model)
        with failing(fps.ConfigError, r"ranks differ: .*segments \(\d,\).*; rank 1 .*segments \(\d,\)"):
            tiny_wan.run(model, [900.0 - 800.0 * dist.get_rank()])
        spread.remove()


def fsdp_on_a_mesh_of_samples_and_tokens():
    """2 x 2 ranks: weights sharded (FSDP2) over all four, a sample per pair; gradients are those of one process with both samples."""
    from torch.distributed.fsdp import fully_shard

    mesh = torch.distributed.init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "sp"))
    model, twin = (tiny_wan.transformer(num_attention_heads=3).train() for _ in range(2))
    for one in (model, twin):
        fps.apply(one, schedule(tiny_wan.TILE))
    parallel.shard(model, mesh["sp"], scheme="halo")
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    for seed in (0, 1):
        (tiny_wan.run(twin, [400.0], seed=seed).square().mean() / 2).backward()
    for _ in range(2):  # accumulated over two micro-batches of half a loss each
        (tiny_wan.run(model, [400.0], seed=mesh["dp"].get_local_rank()).square().mean() / 2).backward()
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        grad = p.grad.full_tensor()
        assert distance(grad, q.grad) < 1e-5 or float(q.grad.abs().max()) < 1e-6, (name, distance(grad, q.grad))
