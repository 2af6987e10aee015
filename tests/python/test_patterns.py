"""``fpsattention.patterns``: the lists of every pattern equal those of its published rule in plain Python (``pattern_rules.py``)."""

from __future__ import annotations

import pattern_rules as rules
import pytest
import torch

import fpsattention as fps
from fpsattention import ConfigError, patterns
from fpsattention.patterns.sampled import sample

LAYOUTS = {
    "boxes_and_text": fps.plan((4, 10, 13), (2, 5, 7), 20),  # a block per tile, unequal tiles
    "tiles_of_blocks": fps.plan((5, 9, 17), (3, 9, 6)),  # tiles of one and two blocks
    "prefix_and_primes": fps.plan((3, 7, 11), (2, 4, 3), 17, "prefix"),
}
BATCH, HEADS, DIM = 3, 2, 16  # three layers, as a batch
FP8 = 0.07  # relative L1 of FP8 attention of normal inputs at D = 64 (0.056 at D = 128 and 4096 keys)


@pytest.fixture(scope="module", params=LAYOUTS)
def problem(request):
    layout = LAYOUTS[request.param]
    generator = torch.Generator().manual_seed(len(request.param))
    shape = (BATCH, HEADS, layout.num_tokens, DIM)
    base = torch.randn(BATCH, HEADS, 1, DIM, generator=generator)  # so that blocks resemble themselves, more or less
    q, k, v = (base + 1.5 * torch.randn(shape, generator=generator) for _ in range(3))
    slots = rules.Slots(layout)
    slots.tile_grid, slots.tile_volume = layout.tile_grid, layout.tile
    return layout, slots, q, k, v


def rows_of(mask):
    """Lists of every (batch, head)."""
    return [
        [[indices[:n].tolist() for n, indices in zip(*head, strict=True)] for head in zip(nums, lists, strict=True)]
        for nums, lists in zip(mask.kv_num_blocks, mask.kv_indices, strict=True)
    ]


def check(mask, slots, rule, *tensors):
    """``rule(slots, *tensors of one head in FP64)`` gives the chosen video blocks of every tile."""
    mask.validate()
    assert mask.shape == (BATCH, HEADS)
    for b, heads in enumerate(rows_of(mask)):
        for h, lists in enumerate(heads):
            assert lists == slots.rows(rule(slots, *(x[b, h].double().numpy() for x in tensors))), (b, h)


def check_static(mask, slots, chosen):
    assert mask.shape == (1, 1)
    assert rows_of(mask) == [[slots.rows(chosen)]]


# Content -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.2, 0.5, 1.0])
def test_topk_mean(problem, ratio):
    layout, slots, q, k, _ = problem
    mask = patterns.topk_mean(q, k, layout, ratio=ratio)
    check(mask, slots, lambda s, q, k: rules.topk_mean(s, q, k, ratio), q, k)
    if not layout.text_len:  # lists are as wide as the budget
        assert mask.kv_indices.shape[-1] == mask.kv_num_blocks.max()
    shifted = patterns.topk_mean(q, k + 3.0, layout, ratio=ratio)  # K smoothing cannot matter
    assert torch.equal(shifted.kv_indices, mask.kv_indices)


@pytest.mark.parametrize(("mass", "min_ratio", "by_size"), [(0.9, 0.0, False), (0.3, 0.4, False), (0.6, 0.1, True)])
def test_cdf_mean(problem, mass, min_ratio, by_size):
    layout, slots, q, k, _ = problem
    mask = patterns.cdf_mean(q, k, layout, mass=mass, min_ratio=min_ratio, by_size=by_size)
    check(mask, slots, lambda s, q, k: rules.cdf_mean(s, q, k, mass, min_ratio, by_size), q, k)


def test_cdf_mean_with_a_window_is_the_union(problem):
    layout, _, q, k, _ = problem
    mask = patterns.cdf_mean(q, k, layout, mass=0.2, window=(1, 1, 2))
    union = patterns.cdf_mean(q, k, layout, mass=0.2).to_blocks() | fps.sliding_tile_mask(layout, (1, 1, 2)).to_blocks()
    assert torch.equal(mask.to_blocks(), union)
    assert mask.density > patterns.cdf_mean(q, k, layout, mass=0.2).density


@pytest.mark.parametrize(
    ("mass", "ratio", "similarity", "smooth_k"),
    [(0.5, None, None, True), (0.5, None, 0.2, False), (None, 0.3, -0.1, True), (0.98, None, 0.6, True)],
)
def test_sparge(problem, mass, ratio, similarity, smooth_k):
    layout, slots, q, k, _ = problem
    if similarity is None:  # half of the blocks of a head pass, and half do not
        keys = (k[0, 0] - k[0, 0].mean(0)).double().numpy()
        cosines = sorted(rules.mean_cosine(keys[slots.blocks[b]]) for b in slots.video_blocks)
        similarity = (cosines[len(cosines) // 2 - 1] + cosines[len(cosines) // 2]) / 2
        assert cosines[0] < similarity < cosines[-1]
    mask = patterns.sparge(q, k, layout, mass=mass, ratio=ratio, similarity=float(similarity), smooth_k=smooth_k)
    check(mask, slots, lambda s, q, k: rules.sparge(s, q, k, mass, ratio, similarity, smooth_k), q, k)


@pytest.mark.parametrize("sparsity", [0.9, 0.5, 0.0])
def test_draft(problem, sparsity):
    layout, slots, q, k, _ = problem
    mask = patterns.draft(q, k, layout, sparsity=sparsity)
    check(mask, slots, lambda s, q, k: rules.draft(s, q, k, sparsity), q, k)


@pytest.mark.parametrize("layer", [0, 1, 2, 3])
@pytest.mark.parametrize(
    ("threshold", "scope", "top"), [(0.25, "head", None), (0.6, "head", None), (0.5, "query", None), (0.25, "head", 2)]
)
def test_vmoba(problem, layer, threshold, scope, top):
    layout, slots, q, k, _ = problem
    mask = patterns.vmoba(q, k, layout, layer=layer, threshold=threshold, scope=scope, top=top)
    check(mask, slots, lambda s, q, k: rules.vmoba(s, q, k, layer, threshold, scope, top), q, k)


def test_svg(problem):
    layout, slots, q, k, v = problem
    spatial, temporal = (
        rules.share_kept(slots, rule, 0.5, inclusive=True) for rule in rules.svg_rules(layout.grid, 0.3, True)
    )
    sampled = sample(layout.num_tokens, 12, 3, torch.device("cpu")).tolist()
    # One head prefers each: give head 0 of sample 0 keys that agree with neighbours in time.
    mask = patterns.svg(q, k, layout, v=v, share=0.3, rows=12, seed=3)
    check(mask, slots, lambda s, q, k, v: rules.svg(s, q, k, v, (spatial, temporal), sampled), q, k, v)


def test_svg_tells_spatial_from_temporal_heads():
    layout = fps.plan((8, 8, 16), (1, 8, 16))
    frame, pixel = torch.arange(8).repeat_interleave(128), torch.arange(128).repeat(8)
    marks = (
        torch.nn.functional.one_hot(torch.stack([frame, 8 + pixel // 16]), 16).float() * 12
    )  # alike in a frame, or in place
    q = marks[None]
    v = torch.randn(1, 2, 1024, 16, generator=torch.Generator().manual_seed(0))
    choose = {"v": v, "share": 0.3, "sink": False, "min_share": 0.05}
    mask = patterns.svg(q, q, layout, **choose)
    frames = mask.to_blocks()[0]
    assert not frames[0].all() and frames[0].diagonal().all()  # a band of frames
    assert frames[1].all()  # a band of pixels meets every frame
    assert torch.equal(patterns.svg(q.flip(1), q.flip(1), layout, **choose).to_blocks()[0], frames.flip(0))


@pytest.mark.parametrize(("mass", "min_ratio", "max_ratio"), [(0.95, 0.05, 0.17), (0.4, 0.2, 0.9)])
def test_blade(problem, mass, min_ratio, max_ratio):
    layout, slots, q, k, _ = problem
    mask = patterns.blade(q, k, layout, samples=4, mass=mass, min_ratio=min_ratio, max_ratio=max_ratio, seed=1)
    places = sample(128, 4, 1, torch.device("cpu")).tolist()
    check(mask, slots, lambda s, q, k: rules.blade(s, q, k, places, mass, min_ratio, max_ratio), q, k)


@pytest.mark.parametrize(("stride", "mass"), [(8, 0.9), (32, 0.4)])
def test_antidiagonal(problem, stride, mass):
    layout, slots, q, k, _ = problem
    q, k = q[:1], k[:1]
    mask = patterns.antidiagonal(q, k, layout, stride=stride, mass=mass)
    for h, lists in enumerate(rows_of(mask)[0]):
        chosen = rules.antidiagonal(slots, layout, q[0, h].double().numpy(), k[0, h].double().numpy(), stride, mass)
        assert lists == slots.rows(chosen)


@pytest.mark.parametrize("mass", [0.9, 0.4])
@pytest.mark.slow
def test_exact(problem, mass):
    layout, slots, q, k, _ = problem
    lse = (q @ k.transpose(-1, -2) / DIM**0.5).logsumexp(-1)
    mask = patterns.exact(q, k, layout, lse=lse, mass=mass)
    check(mask, slots, lambda s, q, k, lse: rules.exact(s, q, k, lse, mass), q, k, lse)


# Static ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [(1, 1, 1), (3, 2, 1), (6, 6, 1), (2, 9, 3)])
def test_sliding_tile_truncated(problem, window):
    layout, slots, *_ = problem
    index = [(t, h, w) for t in range(layout.tile_grid[0]) for h in range(layout.tile_grid[1]) for w in range(layout.tile_grid[2])]  # fmt: skip
    chosen = [
        [
            b
            for j, other in enumerate(index)
            if all(abs(x - y) <= size / 2 for x, y, size in zip(own, other, window, strict=True))
            for b in slots.blocks_of_tile[j]
        ]
        for own in index
    ]
    check_static(patterns.sliding_tile(layout, window=window, border="truncate"), slots, chosen)


def test_sliding_tile_shifted_is_the_mask_of_the_library(problem):
    layout, *_ = problem
    mask, want = patterns.sliding_tile(layout, window=(1, 1, 2)), fps.sliding_tile_mask(layout, (1, 1, 2))
    assert rows_of(mask) == rows_of(want)
    whole = tuple(n - (n % 2 == 0) for n in layout.tile_grid)  # the largest odd window that fits
    truncated = patterns.sliding_tile(layout, window=whole, border="truncate")
    shifted = patterns.sliding_tile(layout, window=whole)
    assert (truncated.kv_num_blocks <= shifted.kv_num_blocks.max()).all()  # borders see less
    if max(whole) > 1:
        assert truncated.density < shifted.density


@pytest.mark.parametrize(
    ("decay", "neighbour", "sink", "block", "min_share"),
    [(0.2, 0.5, True, 128, 1 / 3), (0.95, 1.0, False, 16, 0.5), (0.1, 0.25, False, 8, 0.1)],
)
def test_radial(problem, decay, neighbour, sink, block, min_share):
    layout, slots, *_ = problem
    rule = rules.radial_rule(layout.grid, decay, neighbour, sink, block)
    mask = patterns.radial(layout, decay=decay, neighbour=neighbour, sink=sink, block=block, min_share=min_share)
    check_static(mask, slots, rules.share_kept(slots, rule, min_share, inclusive=False))


def test_radial_density_counts_tokens_and_blocks():
    layout = fps.plan((16, 8, 16), (1, 8, 16))  # a block is a frame
    rule = rules.radial_rule(layout.grid, 0.2, 0.5, True, 32)
    places = [(f, h, w) for f in range(16) for h in range(8) for w in range(16)]
    pairs = sum(rule(a, b) for a in places[::37] for b in places) / (len(places[::37]) * len(places))
    density = patterns.radial.density(layout, block=32)
    assert density.selected == pytest.approx(pairs, rel=0.05)  # pairs: every 37th query only
    assert 0.3 < density.selected < 0.9 and density.kernel == patterns.radial(layout, block=32).density
    assert density.ratio == density.kernel / density.selected


@pytest.mark.parametrize("window", [None, (1, 1, 2)])
def test_foreground(problem, window):
    layout, slots, *_ = problem
    box = ((0, 2), (1, 6), (3, 7))

    def inside(tile):
        return any(
            all(lo <= x < hi for x, (lo, hi) in zip(slots.place(t), box, strict=True)) for t in slots.tiles[tile]
        )

    front = [i for i in range(slots.video_tiles) if inside(i)]
    assert 0 < len(front) < slots.video_tiles
    background = None if window is None else rows_of(fps.sliding_tile_mask(layout, window))[0][0]
    chosen = []
    for i in range(slots.video_tiles):
        kept = [b for j in front for b in slots.blocks_of_tile[j]] if i in front else []
        kept += background[i] if background else (slots.video_blocks if i not in front else [])
        chosen.append(kept)
    check_static(patterns.foreground(layout, box=box, window=window), slots, chosen)


def test_vorta_routes(problem):
    layout, *_ = problem
    full, window = fps.dense_mask(layout).to_blocks()[0, 0], fps.sliding_tile_mask(layout, (1, 1, 2)).to_blocks()[0, 0]
    by_name = patterns.vorta(layout, routes=("full", "window", "full"), window=(1, 1, 2))
    assert torch.equal(by_name.to_blocks()[0], torch.stack([full, window, full]))
    routes = torch.tensor([[0, 1, 0], [1, 1, 0]])
    by_tensor = patterns.vorta(layout, routes=routes, window=(1, 1, 2))
    assert torch.equal(by_tensor.to_blocks(), torch.stack([full, window])[routes])


@pytest.mark.parametrize("position", ["suffix", "prefix"])
def test_part_attention_is_attention_by_label(position):
    """Random parts of odd sizes, one of them shared: every output attends exactly its part, the shared one and text."""
    generator = torch.Generator().manual_seed(5)
    labels = torch.randint(0, 5, (701,), generator=generator) * 10
    layout = patterns.part_layout(labels, text_len=9, text_position=position, max_tile=128)
    mask = patterns.part(layout, labels=labels, shared=(20,))
    mask.validate()
    every = torch.full((9,), 20)  # text is shared, too
    kind = torch.cat([every, labels] if position == "prefix" else [labels, every])
    allowed = (kind[:, None] == kind) | (kind == 20) | (kind[:, None] == 20)
    assert torch.equal(mask.to_token_mask()[0, 0], allowed)
    assert sorted(layout.token_of_slot[layout.token_of_slot >= 0].tolist()) == list(range(710))
    q, k, v = (torch.randn(1, 2, 710, 64, generator=generator) for _ in range(3))
    out = fps.attention(
        q, k, v, grid=layout.grid, block_mask=mask, text_len=9, text_position=position, tensor_layout="HND"
    )
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, allowed)
    assert (out - want).abs().sum() / want.abs().sum() < FP8


# In the op, compiled, refused ----------------------------------------------------------------------------------------------


CONTENT = {
    "topk_mean": {"ratio": 0.3}, "cdf_mean": {"mass": 0.5, "window": [1, 1, 2]}, "sparge": {"mass": 0.6, "similarity": 0.0}, "draft": {"sparsity": 0.6},
    "vmoba": {"threshold": 0.5}, "svg": {"rows": 8}, "blade": {"max_ratio": 0.5}, "antidiagonal": {"mass": 0.5}, "exact": {"mass": 0.5},
}  # fmt: skip
STATIC = {
    "sliding_tile": {"window": [1, 1, 2]}, "radial": {}, "foreground": {"box": [[0, 1], [0, 4], [0, 4]], "window": [1, 1, 1]},
    "vorta": {"routes": ["full", "window"], "window": [1, 1, 1]},
}  # fmt: skip


def test_the_registry_is_complete():
    assert patterns.names() == sorted([*CONTENT, *STATIC, "part"])


@pytest.mark.parametrize("name", [*CONTENT, *STATIC])
def test_by_name_in_the_op(problem, name):
    """A pattern named as a schedule names it; the op takes its lists and is as exact under them as FP8 is."""
    layout, *_ = problem
    bound = patterns.from_dict({"name": name, **(CONTENT | STATIC)[name]})
    assert bound.static == (name in STATIC)
    again = patterns.from_dict(bound.to_dict())
    assert again == bound and hash(again) == hash(bound) and bound.to_dict()["name"] == name
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, layout.num_tokens, 64, generator=generator) for _ in range(3))
    lse = (q @ k.transpose(-1, -2) / 8).logsumexp(-1)
    mask = bound(q, k, layout, v=v, lse=lse)
    out = fps.attention(
        q, k, v, grid=layout.grid, block_mask=mask, text_len=layout.text_len,
        text_position=layout.text_position if layout.text_len else "suffix", tensor_layout="HND",
    )  # fmt: skip
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask.to_token_mask())
    assert (out - want).abs().sum() / want.abs().sum() < FP8


@pytest.mark.parametrize("name", CONTENT)
@pytest.mark.slow
def test_one_graph_and_no_values_read(name):
    """Compiled without a graph break, gradients or not; on the meta device nothing can be read."""
    layout = LAYOUTS["tiles_of_blocks"]
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, 2, layout.num_tokens, 16, generator=generator).requires_grad_() for _ in range(3))
    lse = (q @ k.transpose(-1, -2) / 4).logsumexp(-1)
    bound = patterns.get(name, **CONTENT[name])
    want = bound(q, k, layout, v=v, lse=lse)

    def build(q, k, v, lse):
        mask = bound(q, k, layout, v=v, lse=lse)
        return mask.kv_num_blocks, mask.kv_indices

    torch._dynamo.reset()
    num, indices = torch.compile(build, fullgraph=True, backend="eager")(q, k, v, lse)
    assert torch.equal(num, want.kv_num_blocks) and torch.equal(indices, want.kv_indices)
    on_meta = bound(*(x.to("meta") for x in (q, k)), layout.to("meta"), v=v.to("meta"), lse=lse.to("meta"))
    assert on_meta.kv_indices.shape == want.kv_indices.shape


@pytest.mark.slow
def test_pattern_and_attention_in_one_graph():
    """From q and k to the output and its gradients without a graph break: the bits of eager mode."""
    layout = LAYOUTS["tiles_of_blocks"]
    bound = patterns.get("topk_mean", ratio=0.4)

    def run(q, k, v):
        mask = bound(q, k, layout)
        return fps.attention(q, k, v, grid=layout.grid, block_mask=mask, tensor_layout="HND")

    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(1, 2, layout.num_tokens, 64, generator=generator).requires_grad_() for _ in range(3)]
    torch._dynamo.reset()
    out, want = torch.compile(run, fullgraph=True, backend="aot_eager")(*inputs), run(*inputs)
    assert torch.equal(out, want)
    for a, b in zip(*(torch.autograd.grad(x.sum(), inputs) for x in (out, want)), strict=True):
        assert torch.equal(a, b)


def test_lists_are_as_wide_as_the_budget():
    layout = fps.plan((21, 45, 80))
    q = torch.empty(1, 40, layout.num_tokens, 128, device="meta", dtype=torch.bfloat16)
    mask = patterns.topk_mean(q, q, layout.to("meta"), ratio=0.1)
    assert mask.kv_indices.shape == (1, 40, layout.num_tiles, int(0.1 * layout.num_blocks))
    mask = patterns.blade(q, q, layout.to("meta"), samples=2)
    assert mask.kv_indices.shape[-1] == int(0.17 * layout.num_blocks)


@pytest.mark.slow
@pytest.mark.parametrize("grid, tile", [((5, 23, 29), None), ((7, 17, 23), (3, 5, 7)), ((9, 13, 27), (2, 7, 9))])
def test_the_kernel_attends_what_the_selector_selects(grid, tile):
    """Published settings, odd grids: nothing is attended that was not selected but the own tile, 2 % at most where queries resemble the keys at
    their place, as those of a trained model do. ``svg2``, whose clusters end inside of blocks, says how much more it is.
    """
    layout = fps.plan(grid, tile)
    generator = torch.Generator().manual_seed(2)

    def field():
        coarse = torch.randn(1, 16, 3, 5, 5, generator=generator)
        fine = torch.nn.functional.interpolate(coarse, size=grid, mode="trilinear", align_corners=True)
        return (fine / fine.std()).view(1, 1, 16, -1).transpose(-1, -2)

    base, v = field(), field()
    q, k = (base + 0.4 * torch.randn(base.shape, generator=generator) for _ in range(2))
    given = {"q": q, "k": k, "v": v, "lse": (q @ k.transpose(-1, -2) / 4).logsumexp(-1)}
    settings = [(name, {}) for name in CONTENT]
    settings += [
        ("sparge", {"mass": None, "ratio": 0.5, "similarity": -0.1}),
        ("vmoba", {"layer": 1}),
        ("vmoba", {"layer": 2}),
    ]
    for name, options in settings:
        pattern = patterns.get(name).pattern
        density = pattern.density(layout=layout, **{x: given[x] for x in pattern.inputs}, **options)
        assert 0.0 < density.selected <= 1.0 and 1.0 - 1e-12 <= density.ratio <= 1.02, (name, options, density)
    clustered = patterns.svg2(q, k, layout, q_clusters=12, k_clusters=40, iterations=3).density()
    assert 1.02 < clustered.ratio < 1.5


def test_the_cost_is_counted_on_shapes():
    layout = fps.plan((21, 45, 80))
    counted = patterns.cost(patterns.get("topk_mean", ratio=0.1), layout, heads=40, dim=128)
    tiles, blocks, width = layout.num_tiles, layout.num_blocks, int(0.1 * layout.num_blocks)
    assert counted.flops == 2 * 40 * tiles * blocks * 128
    assert counted.list_bytes == 4 * 40 * tiles * (width + 1)
    read_once = 2 * 40 * layout.num_tokens * 128 * 2
    assert 2 * read_once < counted.pooling_bytes < counted.bytes  # gathered, masked, summed: several trips
    static = patterns.cost(patterns.get("sliding_tile", window=(3, 3, 6)), layout, heads=40, dim=128)
    assert static[:3] == (0, 0, 0) and static.list_bytes > 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda q, L: patterns.get("topk"), r"patterns\.get: name 'topk', expected one of antidiagonal, "),
        (lambda q, L: patterns.get("topk_mean", k=3), r"topk_mean: hyperparameter 'k', expected one of ratio"),
        (lambda q, L: patterns.get("sliding_tile"), r"sliding_tile: hyperparameter 'window' is missing"),
        (lambda q, L: patterns.from_dict({"ratio": 0.1}), r"from_dict: \{'ratio': 0\.1\}, expected"),
        (lambda q, L: patterns.topk_mean(q, q, L, ratio=1.5), r"topk_mean: ratio 1\.5, expected a number in \[0\.0, 1\.0\]"),
        (lambda q, L: patterns.topk_mean(q, q, L, ratio="a"), r"ratio 'a', expected a number"),
        (lambda q, L: patterns.topk_mean(q, q, (3, 7, 11)), r"layout is tuple, expected a TileLayout"),
        (lambda q, L: patterns.topk_mean(q, L), r"topk_mean: layout is NoneType, expected a TileLayout"),
        (lambda q, L: patterns.topk_mean(q, layout=L), r"topk_mean: k is missing, expected the tensors q, k"),
        (lambda q, L: patterns.topk_mean(q.transpose(1, 2), q, L), r"q has shape \(1, 765, 2, 8\), expected \(B, H, S, D\)"),
        (lambda q, L: patterns.topk_mean(q, q.repeat(1, 2, 1, 1), L), r"k has shape \(1, 4, 765, 8\) on cpu, expected \(1, 2, 765, 8\)"),
        (lambda q, L: patterns.topk_mean(q.int(), q, L), r"q is torch\.int32, expected a floating point tensor"),
        (lambda q, L: patterns.svg(q, q, L), r"svg: v is missing, expected the tensors q, k, v"),
        (lambda q, L: patterns.exact(q, q, L, lse=q), r"exact: lse has shape .* expected \(1, 2, 765\)"),
        (lambda q, L: patterns.sparge(q, q, L, ratio=0.5), r"sparge: mass 0\.98 and ratio 0\.5, expected exactly one"),
        (lambda q, L: patterns.vmoba(q, q, L, scope="all"), r"scope 'all', expected 'head' or 'query'"),
        (lambda q, L: patterns.vmoba(q, q, L, layer=-1), r"layer -1, expected a whole number, at least 0"),
        (lambda q, L: patterns.antidiagonal(q, q, L, stride=5), r"stride 5, expected a divisor of 128"),
        (lambda q, L: patterns.sliding_tile(L, window=(1, 1, 1), border="wrap"), r"border 'wrap', expected one of"),
        (lambda q, L: patterns.sliding_tile(L, window=(1, 0, 1), border="truncate"), r"window \(1, 0, 1\), expected sizes"),
        (lambda q, L: patterns.foreground(L, box=((0, 9), (0, 1), (0, 1))), r"foreground: box .* within grid \(5, 9, 17\)"),
        (lambda q, L: patterns.vorta(L, routes=("full", "coreset"), window=(1, 1, 1)), r"routes .* patterns\.coreset_attention"),
        (lambda q, L: patterns.part(L, labels=[0, 1]), r"labels has shape \(2,\), expected \[765\]"),
        (lambda q, L: patterns.part_layout([0.5]), r"part_layout: labels is torch\.float32 \(1,\), expected whole numbers"),
        (lambda q, L: patterns.part_layout([1], max_tile=100), r"max_tile 100, expected a whole number, at least 128"),
        (lambda q, L: patterns.Refresh(patterns.topk_mean, 0), r"Refresh: every 0, expected a whole number, at least 1"),
    ],
)  # fmt: skip
def test_errors(call, message):
    layout = LAYOUTS["tiles_of_blocks"]
    with pytest.raises(ConfigError, match=message):
        call(torch.randn(1, 2, layout.num_tokens, 8), layout)
