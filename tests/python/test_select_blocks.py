"""``fpsattn::select_blocks`` and ``transpose_blocks`` on the CPU: against the rule in plain Python, and in the patterns that use them."""

from __future__ import annotations

import math

import pytest
import torch

import fpsattention as fps
from fpsattention import ConfigError, patterns
from fpsattention.layout.tiles import core
from fpsattention.ops import blocks as law
from fpsattention.patterns.blocks import tables, to_mask

LAYOUTS = [
    ((3, 5, 7), (2, 3, 4), 0),
    ((4, 12, 11), (2, 7, 11), 13),
    ((2, 16, 16), (1, 16, 16), 600),
    ((1, 1, 700), (1, 1, 100), 0),
]


def values_of(layout, seed=0, weights=False):
    """Ties, infinities, NaN and zeros of both signs among random values."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 2, layout.num_tiles, layout.num_blocks, generator=generator)
    if weights:
        x = (3 * x).softmax(-1)
        x[0, 0] = (x[0, 0] * 8).round() / 8  # ties
        return x
    x[0, 0] = (2 * x[0, 0]).round() / 2
    flat = x[0, 1].view(-1)
    for i, value in enumerate((math.inf, -math.inf, math.nan, 0.0, -0.0, 0.0)):
        flat[i::11] = value
    return x


def plain(row, own, video, text_row, sizes, count, mass, at_least, own_first):
    """The rule for one row: (kept blocks in list order, tokens by the rule, tokens visited)."""

    def rank(j):
        value = float(row[j])
        first = own_first and j in own
        number = math.inf if math.isnan(value) else value
        sign = math.copysign(1.0, value) if value == 0 else 0.0  # -0 comes after +0
        return (not first, not math.isnan(value), -number, -sign, j)

    order = sorted(range(video), key=rank)
    if count < 0:
        count, before = 0, 0
        for j in order:
            if before >= math.ceil(mass * 2**40):
                break
            count += 1
            before += math.floor(min(max(float(row[j]), 0.0), 1.0) * 2**40)
    chosen = set(range(len(row))) if text_row else set(order[: max(count, at_least)]) | set(range(video, len(row)))
    others = sorted(chosen - set(own))
    kept = sorted(own) + others
    return kept, sum(sizes[j] for j in chosen), sum(sizes[j] for j in kept)


CASES = [
    {"count": 1},
    {"count": 3, "own_first": True},
    {"count": 0},
    {"count": 999},
    {"mass": 0.6},
    {"mass": 0.3, "min_count": 2},
    {"mass": 0.0},
    {"mass": 1.5},
]


@pytest.mark.parametrize("grid, tile, text", LAYOUTS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_lists_follow_the_rule(grid, tile, text, case):
    layout = fps.plan(grid, tile, text)
    t = tables(layout, torch.device("cpu"))
    options = {"count": -1, "mass": 0.0, "min_count": 0, "own_first": False, **case}
    values = values_of(layout, weights="mass" in case)
    lengths, lists, attended = torch.ops.fpsattn.select_blocks(
        values, layout.tile_block_offsets, t.block_sizes, num_video_tiles=layout.num_video_tiles, max_count=layout.num_blocks,
        width=layout.num_blocks, **options,
    )  # fmt: skip
    offsets, sizes = layout.tile_block_offsets.tolist(), t.block_sizes.tolist()
    video = offsets[layout.num_video_tiles]
    for b in range(2):
        for h in range(2):
            for i in range(layout.num_tiles):
                own = range(offsets[i], offsets[i + 1])
                kept, rule, visited = plain(
                    values[b, h, i], own, video, i >= layout.num_video_tiles, sizes, options["count"], options["mass"],
                    options["min_count"], options["own_first"],
                )  # fmt: skip
                assert lists[b, h, i, : lengths[b, h, i]].tolist() == kept, (b, h, i)
                assert attended[b, h, i].tolist() == [rule, visited]
    narrow = torch.ops.fpsattn.select_blocks(
        values, layout.tile_block_offsets, t.block_sizes, num_video_tiles=layout.num_video_tiles, max_count=layout.num_blocks, width=2, **options
    )  # fmt: skip
    assert torch.equal(narrow[0], lengths.clamp_max(2)) and torch.equal(narrow[2], attended)
    first = torch.arange(2) < narrow[0].unsqueeze(-1)
    assert torch.equal(narrow[1][first], lists[..., :2][first])


@pytest.mark.parametrize("grid, tile, text", LAYOUTS)
def test_transposed_lists_are_the_planners(grid, tile, text):
    layout = fps.plan(grid, tile, text)
    keep = torch.rand(2, 3, layout.num_tiles, layout.num_blocks, generator=torch.Generator().manual_seed(1)) > 0.6
    mask = fps.BlockMask.from_keep(layout, keep)
    counts, indices = torch.ops.fpsattn.transpose_blocks(
        mask.kv_num_blocks,
        mask.kv_indices,
        layout.tile_block_offsets,
        num_blocks=layout.num_blocks,
        width=layout.num_blocks,
    )
    wanted = core().transpose_lists(
        mask.kv_num_blocks.numpy(), mask.kv_indices.numpy(), layout.tile_block_offsets.numpy()
    )
    assert counts.tolist() == wanted[0].tolist()
    for row, length, list_ in zip(
        indices.flatten(0, 2), counts.flatten(), torch.from_numpy(wanted[1]).flatten(0, 2), strict=True
    ):
        assert torch.equal(row[:length], list_[:length])


@pytest.mark.parametrize("grid, tile, text", LAYOUTS)
@pytest.mark.parametrize(
    "bound",
    [patterns.get("topk_mean", ratio=0.3), patterns.get("cdf_mean", mass=0.5, min_ratio=0.2, by_size=True)],
    ids=str,
)
def test_patterns_by_the_op_and_by_torch_agree(grid, tile, text, bound):
    """Lists and both densities, and what ``cdf_mean`` with a window, which the op does not know, goes on doing."""
    layout = fps.plan(grid, tile, text)
    q, k = torch.randn(2, 1, 2, layout.num_tokens, 32, generator=torch.Generator().manual_seed(2)).unbind()
    mask, densities = bound.pattern.measured(q, k, layout, **bound.hyperparameters)
    keep = bound.pattern.select(layout, {"q": q, "k": k}, bound.hyperparameters)
    assert torch.equal(mask.to_blocks(), to_mask(layout, keep).to_blocks())
    assert torch.equal(bound(q, k, layout).kv_indices, mask.kv_indices)
    selected, kernel = bound.pattern.density(q, k, layout, **bound.hyperparameters)
    assert densities.tolist() == pytest.approx([selected, kernel], abs=1e-9)


def test_sums_of_the_quantizer_score_as_well():
    layout = fps.plan((4, 12, 11), (2, 7, 11), 13)
    q, k, v = torch.randn(3, 1, 2, layout.num_tokens, 64, generator=torch.Generator().manual_seed(3)).unbind()
    sums = torch.ops.fpsattn.quantize(
        q,
        k,
        v,
        layout.token_of_slot,
        layout.tile_block_offsets,
        granularity=1,
        smooth_k=True,
        pow2_scales=False,
        block_sums=True,
    )[8:]
    for pattern, options in ((patterns.topk_mean, {"ratio": 0.4}), (patterns.cdf_mean, {"mass": 0.6})):
        mask, densities = pattern.of_sums(*sums, layout, **options)
        wanted, of_tokens = pattern.measured(q, k, layout, **options)
        assert torch.equal(mask.to_blocks(), wanted.to_blocks()) and torch.equal(densities, of_tokens)
    with pytest.raises(ConfigError, match="sparge: sums over blocks.*expected cdf_mean, draft"):
        patterns.sparge.of_sums(*sums, layout)


def test_bad_arguments():
    layout = fps.plan(*LAYOUTS[0])
    t = tables(layout, torch.device("cpu"))
    values = values_of(layout)

    def call(values=values, offsets=layout.tile_block_offsets, sizes=t.block_sizes, **options):
        settings = {"num_video_tiles": layout.num_video_tiles, "max_count": 99, "width": 2, "count": 1, **options}
        return torch.ops.fpsattn.select_blocks(values, offsets, sizes, **settings)

    for arguments, message in (
        ({"values": values.double()}, r"select_blocks: values is torch.float64 .*expected float32"),
        ({"offsets": layout.tile_block_offsets[1:]}, "tile_block_offsets is torch.int32"),
        ({"sizes": t.block_tokens}, "block_tokens is torch.float32"),
        ({"width": 0}, "width 0, expected 1 to"),
        ({"width": layout.num_blocks + 1}, "expected 1 to the number of blocks"),
        ({"num_video_tiles": 99}, "num_video_tiles 99"),
        ({"count": -1, "own_first": True}, "own_first with a mass"),
        ({"count": -1, "mass": 7.0}, "mass 7.0"),
    ):
        with pytest.raises(ConfigError, match=message):
            call(**arguments)
    with pytest.raises(ConfigError, match=f"{law.MAX_BLOCKS + 1} blocks"):
        wide = torch.zeros(1, 1, 1, law.MAX_BLOCKS + 1)
        call(
            wide,
            torch.tensor([0, law.MAX_BLOCKS + 1], dtype=torch.int32),
            torch.ones(law.MAX_BLOCKS + 1, dtype=torch.int32),
            num_video_tiles=1,
        )
    with pytest.raises(ConfigError, match="transpose_blocks: lists are torch.int64"):
        torch.ops.fpsattn.transpose_blocks(
            torch.ones(1, 1, 2).long(),
            torch.ones(1, 1, 2, 2).int(),
            torch.tensor([0, 1, 2]).int(),
            num_blocks=2,
            width=2,
        )
