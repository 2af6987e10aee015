"""Checks of fpsattention.parallel that test_parallel.py runs on every rank of a group; each asserts on every rank.

``run`` writes errors to ``<rank>.json`` by name.
"""

import datetime
import json
import os
import runpy
import sys
import time
import traceback

import torch
import torch.distributed as dist

import fpsattention as fps
from fpsattention import parallel
from fpsattention.layout.masks import BlockMask, dense_mask, sliding_tile_mask
from fpsattention.ops import cpu

ULYSSES = ((False, "ulysses", "bf16"), (True, "ulysses", "bf16"), (True, "ulysses", "fp8"))
FETCHING = ((True, "halo", "fp8"), (True, "ring", "fp8"))
RING = 3e-5  # P is rounded against another running maximum, which moves subnormals


def problem(grid, tile, window=None, text=0, position="suffix", heads=3, dim=64, batch=1, seed=0):
    layout = fps.plan(grid, tile, text, position)
    mask = dense_mask(layout) if window is None else sliding_tile_mask(layout, window)
    generator = torch.Generator().manual_seed(seed)
    q, k, v, g = (torch.randn(batch, layout.num_tokens, heads, dim, generator=generator) for _ in range(4))
    return layout, mask, (q, k + torch.randn(1, 1, heads, dim, generator=generator), v), g


PROBLEMS = {
    "dense, whole blocks": ((4, 8, 16), (2, 8, 8)),
    "window, text, batch": ((5, 5, 9), (4, 4, 7), (2, 1, 1), 17, "suffix", 3, 64, 2),
    "text before, one head": ((6, 6, 7), (2, 3, 6), (1, 2, 1), 131, "prefix", 1),
    "window along T": ((12, 8, 8), (2, 8, 8), (3, 1, 1), 0, "suffix", 2, 128),
    "head dim 80, padded to 96, then to 128 columns": ((4, 5, 6), (1, 5, 6), None, 3, "suffix", 2, 80),
}


def one_process(layout, mask, qkv, g, **options):
    inputs = [x.clone().requires_grad_() for x in qkv]
    out, lse = fps.attention(
        *inputs, layout.grid, block_mask=mask, text_len=layout.text_len, text_position=layout.text_position, return_lse=True, **options
    )  # fmt: skip
    out.backward(g)
    return out.detach(), lse, [x.grad for x in inputs]


def spread(layout, mask, qkv, g, how, **options):
    """The same by all ranks together, gathered."""
    whole_tiles, scheme, exchange = how
    sharding = parallel.shard_tokens(layout, whole_tiles=whole_tiles)
    inputs = [sharding.take(x, 1).requires_grad_() for x in qkv]
    out, lse = parallel.attention(
        *inputs, sharding, scheme=scheme, exchange=exchange, block_mask=mask, return_lse=True, **options
    )
    out.backward(sharding.take(g, 1))
    return sharding.gather(out.detach(), 1), sharding.gather(lse, 2), [sharding.gather(x.grad, 1) for x in inputs]


def distance(a, b):
    return float((a - b).norm() / b.norm())


def compare(one, many, how, grad=1e-6):
    scheme = how[1]
    if scheme == "ring":
        assert 0 < distance(many[0], one[0]) < RING
    else:
        assert torch.equal(many[0], one[0]), how
    # q . k_mean, which only the lse has, is a sum whose order is free.
    assert torch.allclose(many[1], one[1], atol=2e-5 if scheme != "ring" else 5e-3)
    for name, a, b in zip("qkv", many[2], one[2], strict=True):
        if scheme == "ulysses":
            assert torch.equal(a, b), (how, name)
        else:  # parts of dK and dV are added up by ranks
            assert distance(a, b) < (grad if scheme == "halo" else RING), (how, name)


def equal_to_one_process():
    for arguments in PROBLEMS.values():
        work = problem(*arguments)
        one = one_process(*work)
        for how in (*ULYSSES, *FETCHING):
            compare(one, spread(*work, how), how)


def options_of_the_call():
    work = problem((4, 6, 7), (2, 6, 4), (1, 1, 2), 5, "prefix", batch=2)
    batch, _, heads, dim = work[2][0].shape
    generator = torch.Generator().manual_seed(1)
    for options in (
        {"granularity": "token", "scale": 0.3},
        {"granularity": "block", "pow2_scales": True, "smooth_k": False},
        {"k_mean": torch.randn(batch, heads, dim, generator=generator), "v_absmax": torch.full((batch, heads, dim), 2.0)},
    ):  # fmt: skip
        one = one_process(*work, **options)
        for how in (*ULYSSES[1:], FETCHING[0]):
            compare(one, spread(*work, how, **options), how)


def long_sequences_take_a_part_of_k_for_its_mean():
    layout, mask, qkv, g = problem((8, 16, 17), (2, 8, 17), (2, 1, 1), heads=1)  # 2176 tokens: every second one
    work = layout, mask, tuple(x.bfloat16() for x in qkv), g.bfloat16()
    one, many = one_process(*work), spread(*work, ULYSSES[2])
    assert torch.equal(one[0], many[0]) and all(torch.equal(a, b) for a, b in zip(one[2], many[2], strict=True))


def heads_are_dealt_by_cost():
    layout, _, qkv, g = problem((6, 8, 8), (2, 4, 8), heads=4)
    keep = torch.eye(layout.num_tiles, dtype=torch.bool).repeat_interleave(layout.tile_block_offsets.diff().long(), 1)
    keep = keep.repeat(1, 4, 1, 1)
    keep[:, 0] = True  # one dense head, three that see their own tile
    mask = BlockMask.from_keep(layout, keep)
    assert parallel.deal_heads(4, 2, mask.densities()[0].tolist()).of == ((0,), (1, 2, 3))
    one = one_process(layout, mask, qkv, g)
    for how in (*ULYSSES, FETCHING[0]):
        compare(one, spread(layout, mask, qkv, g, how), how)


def patterns_after_the_exchange():
    from fpsattention.patterns import mean

    layout, _, qkv, _ = problem((6, 8, 8), (2, 4, 8), heads=3)
    sharding = parallel.shard_tokens(layout, whole_tiles=False)

    def pattern(q, k, layout):
        return mean.topk_mean(q, k, layout, ratio=0.4)

    mask = pattern(*(x.transpose(1, 2) for x in qkv[:2]), layout)
    one = fps.attention(*qkv, layout.grid, block_mask=mask)
    assert not torch.equal(one, fps.attention(*qkv, layout.grid, tile=layout.tile))
    local = [sharding.take(x, 1) for x in qkv]
    out = parallel.attention(*local, sharding, exchange="bf16", block_mask=pattern)
    assert torch.equal(sharding.gather(out, 1), one)
    with failing(fps.ConfigError, "needs whole q and k"):
        tiles = parallel.shard_tokens(layout)
        parallel.attention(*(tiles.take(x, 1) for x in qkv), tiles, block_mask=pattern)


def bytes_on_the_wire():
    """Against q, k, v and the output in BF16, 8 bytes per channel; a scale is 4 bytes, of a block or of a token, and so is the lse."""
    layout, mask, qkv, g = problem((4, 8, 16), (2, 8, 8), heads=4, dim=64)
    assert layout.utilization == 1
    work = layout, mask, tuple(x.bfloat16() for x in qkv), g.bfloat16()
    size = dist.get_world_size()
    rows, dim = layout.num_tokens // size * 4 * (size - 1) // size, 64  # (token of this rank, head of another)
    block, token = 2 * 4 / 128, 2 * 4  # scales of q and k per row
    for how, options, per_row, whole in (
        (ULYSSES[1], {}, (6 * dim, 2 * dim + 4), 1.01),
        (ULYSSES[2], {}, (3 * dim + block, 2 * dim + 4), 0.63),
        (ULYSSES[2], {"granularity": "token"}, (3 * dim + token, 2 * dim + 4), 0.65),
        (ULYSSES[2], {"output": "fp8"}, (3 * dim + block, dim + 8), 0.52),
        (ULYSSES[2], {"granularity": "token", "output": "fp8"}, (3 * dim + token, dim + 8), 0.53),
    ):
        with parallel.count_bytes() as sent:
            spread(*work, how, **options)
        assert (sent["qkv"], sent["out"]) == tuple(rows * n for n in per_row), (how, options, sent)
        assert round((sent["qkv"] + sent["out"]) / (rows * 8 * dim), 2) == whole
        assert sent["gradients"] == rows * 8 * dim  # of the output, q, k and v: BF16 in every case
        if how[2] == "fp8":
            assert sent["statistics"] == 2 * 8 * 4 * 64 * (size - 1)
            assert round(sent["qkv"] / (rows * 6 * dim), 2) == (0.52 if options.get("granularity") else 0.50)


def halo_sends_what_is_visited():
    """A window of 3 tiles along T: a rank needs a tile of each neighbour, not the shards of all."""
    layout, mask, qkv, g = problem((16, 8, 8), (2, 8, 8), (3, 1, 1), heads=2)  # 8 tiles of one block
    sharding = parallel.shard_tokens(layout)
    counters = {}
    for name, how, of in (("window", FETCHING[0], mask), ("dense", FETCHING[0], dense_mask(layout))):
        with parallel.count_bytes() as counter:
            spread(layout, of, qkv, g, how)
        counters[name] = counter
    block = 2 * (2 * 128 * 64 + 4)  # two heads: k, v, a scale
    size, rank = dist.get_world_size(), dist.get_rank()
    tiles = 8 // size
    visitors = sum(
        len({t for t in range(8) if t // tiles == rank} & visited(sharding, mask, other)) for other in range(size) if other != rank
    )  # fmt: skip
    assert counters["window"]["kv"] == visitors * block
    assert visitors == (2 if size == 2 else [1, 2, 2, 1][rank]) - (size == 2), visitors
    assert counters["dense"]["kv"] == tiles * (size - 1) * block


def visited(sharding, mask, rank):
    from fpsattention.parallel.ring import visited_blocks

    return set(visited_blocks(mask.lists(False), sharding)[rank].nonzero().flatten().tolist())


def ring_is_exact_but_for_rounding_p():
    """A code that depends on the running maximum is found out; a rank with nothing to attend in a shard, and rows that attend nothing, are fine."""
    layout, mask, qkv, g = problem(*PROBLEMS["window, text, batch"])
    one, many = one_process(layout, mask, qkv, g), spread(layout, mask, qkv, g, FETCHING[1])
    compare(one, many, FETCHING[1])
    rounded = cpu._probabilities

    def on_another_grid(y, dim, *rest):  # coarse near the maximum, finer around y = 0
        coded = y[..., : cpu.CODE_SLOTS[dim]]
        coded.copy_((coded - cpu.CODE_ORIGIN).half() + cpu.CODE_ORIGIN)
        return rounded(y, dim, *rest)

    try:
        cpu._probabilities = on_another_grid
        one, many = one_process(layout, mask, qkv, g), spread(layout, mask, qkv, g, FETCHING[1])
        assert distance(many[0], one[0]) > 2 * RING, distance(many[0], one[0])
    finally:
        cpu._probabilities = rounded
    keep = torch.zeros(1, 1, layout.num_tiles, layout.num_blocks, dtype=torch.bool)
    keep[..., -3:-1, -1] = True  # two tiles attend the last block; all others nothing
    empty = BlockMask.from_keep(layout, keep)
    one = one_process(layout, empty, qkv, g)
    for how in FETCHING:
        out, lse, grads = spread(layout, empty, qkv, g, how)
        assert torch.equal(out, one[0]) and torch.equal(lse.isinf(), one[1].isinf()) and bool(lse.isinf().any())
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(grads, one[2], strict=True))


def fp8_output():
    layout, mask, qkv, g = problem(*PROBLEMS["window along T"])
    one = one_process(layout, mask, qkv, g)
    with parallel.count_bytes() as counter:
        many = spread(layout, mask, qkv, g, ULYSSES[2], output="fp8")
    rows = one[0].abs().amax(-1, keepdim=True)
    assert bool(((many[0] - one[0]).abs() <= torch.maximum(one[0].abs() * 2**-4, rows * 2**-10) * (1 + 1e-6)).all())
    assert not torch.equal(many[0], one[0])
    tokens, size = layout.num_tokens, dist.get_world_size()
    assert counter["out"] <= (tokens * 2 // size) * (128 + 8) * (size - 1)  # f32 tensors would be 4 * 128


def differing_ranks_are_refused():
    rank = dist.get_rank()
    grid = (4, 8, 16) if rank == 0 else (8, 8, 8)  # of as many tokens and blocks
    layout, mask, qkv, _ = problem(grid, (2, 8, 8))
    sharding = parallel.shard_tokens(layout)
    local = [sharding.take(x, 1) for x in qkv]
    with failing(fps.ConfigError, r"rank 0 has .*\(4, 8, 16\).*rank 1 has .*\(8, 8, 8\).*the same"):
        parallel.attention(*local, sharding, block_mask=mask)
    layout, mask, qkv, _ = problem((4, 8, 16), (2, 8, 8))
    sharding = parallel.shard_tokens(layout)
    local = [sharding.take(x, 1) for x in qkv]
    with failing(fps.ConfigError, "ranks differ"):
        parallel.attention(*local, sharding, window=(1, 1, 1 + (rank == 0)))
    parallel.attention(*local, sharding, block_mask=mask)  # the group lives


def wrong_arguments():
    layout, mask, qkv, _ = problem((4, 8, 16), (2, 8, 8))
    sharding, ranges = parallel.shard_tokens(layout), parallel.shard_tokens(layout, whole_tiles=False)
    local = [sharding.take(x, 1) for x in qkv]
    for text, arguments, options in (
        ("scheme 'tree', expected one of", (*local, sharding), {"scheme": "tree"}),
        ("exchange 'fp4', expected", (*local, sharding), {"exchange": "fp4"}),
        ("granularity 'row', expected", (*local, sharding), {"granularity": "row"}),
        ("expected the .* of rank", (*qkv, sharding), {}),
        ("sharding is a TileLayout", (*local, layout), {}),
        ("needs whole tiles", (*local, ranges), {}),
        ("output 'fp8', expected 'bf16'", (*local, sharding), {"output": "fp8", "scheme": "halo"}),
        ("window and block_mask are both", (*local, sharding), {"block_mask": mask, "window": (1, 1, 1)}),
        ("block_mask was made for", (*local, sharding), {"block_mask": dense_mask(fps.plan((8, 8, 8)))}),
        ("k is torch.float32", (local[0], local[1][:, 1:], local[2], sharding), {}),
        ("backend 'reference'", (*local, sharding), {"backend": "reference"}),
        ("costs", (*local, sharding), {"head_costs": [1.0]}),
    ):  # fmt: skip
        with failing(fps.ConfigError, rf"fpsattention\.parallel\.\w+: .*{text}"):
            parallel.attention(*arguments, **options)
    with failing(fps.ConfigError, "at least one for each of the"):
        parallel.shard_tokens(fps.plan((1, 4, 4)))
    with failing(fps.ConfigError, "mesh is a int"):
        parallel.shard_tokens(layout, 3)
    with failing(fps.ConfigError, "x has 3 tokens"):
        sharding.take(qkv[0][:, :3], 1)


class failing:
    def __init__(self, kind, pattern):
        self.kind, self.pattern = kind, pattern

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        import re

        assert kind is not None and issubclass(kind, self.kind), f"{kind} {error}, expected {self.kind} {self.pattern}"
        assert re.search(self.pattern, str(error)), f"{error} does not match {self.pattern}"
        return True


def more_ranks_than_heads_and_two_meshes():
    """3 heads on 4 ranks; then 2 x 2: every pair of ranks has a sequence of its own."""
    work = problem((8, 6, 7), (2, 6, 7), (2, 1, 1), 9, heads=3)
    one = one_process(*work)
    for how in (*ULYSSES, *FETCHING):
        compare(one, spread(*work, how), how)
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "sp"))
    seed = mesh["dp"].get_local_rank()
    layout, mask, qkv, _ = problem((8, 6, 7), (2, 6, 7), (2, 1, 1), heads=3, seed=seed)
    sharding = parallel.shard_tokens(layout, mesh["sp"])
    out = parallel.attention(*(sharding.take(x, 1) for x in qkv), sharding, block_mask=mask)
    assert torch.equal(sharding.gather(out, 1), fps.attention(*qkv, layout.grid, block_mask=mask))
    with failing(fps.ConfigError, "2 dimensions"):
        parallel.shard_tokens(layout, mesh)


# A rank that dies ------------------------------------------------------------------------------------------------------------


def lost_ranks():
    """Rank 1 ends, rank 2 is stuck: rank 0 gets an error from both, in time."""
    rank = dist.get_rank()
    groups = [dist.new_group([0, other], timeout=datetime.timedelta(seconds=15)) for other in (1, 2)]
    layout, mask, qkv, _ = problem((4, 8, 16), (2, 8, 8))
    for other, why in ((1, "another rank ended"), (2, "Timed out")):
        if rank not in (0, other):
            continue
        sharding = parallel.shard_tokens(layout, groups[other - 1])
        local = [sharding.take(x, 1) for x in qkv]
        parallel.attention(*local, sharding, block_mask=mask)
        if rank == 1:
            os._exit(17)
        if rank == 2:
            time.sleep(20)
            os._exit(17)
        started = time.monotonic()
        with failing(RuntimeError, rf"fpsattention\.parallel: exchange of \w+ failed on rank 0 of 2 .*{why}"):
            parallel.attention(*local, sharding, block_mask=mask)
        assert time.monotonic() - started < 25


def run(folder, names):
    """The checks of these names, one after the other: an error that is on one rank only does not stop the others."""
    import distributed_parallel_models

    known, results = globals() | vars(distributed_parallel_models), {}
    for name in names:
        started = time.process_time()
        try:
            known[name]()
            results[name] = ""
        except BaseException:
            results[name] = traceback.format_exc()[-3000:]
        print(f"{name}: {time.process_time() - started:.2f} s of CPU", flush=True)
        (folder / f"{dist.get_rank()}.json").write_text(json.dumps(results))


def example(script, *arguments):
    """A script as torchrun runs it."""
    sys.argv = [str(script), *arguments]
    runpy.run_path(str(script), run_name="__main__")
