"""Block masks against plain Python, against dense matrices and against torch's FlexAttention."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import fpsattention.layout.masks as masks
from fpsattention.errors import ConfigError
from fpsattention.layout.masks import BlockMask, dense_mask, sliding_tile_mask
from fpsattention.layout.tiles import BLOCK, clear_plan_cache, plan


def blocks_of(layout, tile):
    return list(range(int(layout.tile_block_offsets[tile]), int(layout.tile_block_offsets[tile + 1])))


def tiles_of_window(layout, window):
    """Plain Python: the tiles that each tile attends."""
    n = layout.tile_grid
    video = list(itertools.product(*map(range, n)))
    text = list(range(len(video), layout.num_tiles))
    rows = []
    for center in video:
        start = [min(max(c - w // 2, 0), size - w) for c, w, size in zip(center, window, n, strict=True)]
        near = [
            i
            for i, other in enumerate(video)
            if all(s <= c < s + w for s, c, w in zip(start, other, window, strict=True))
        ]
        rows.append(near + text)
    return rows + [list(range(layout.num_tiles))] * len(text)


def rows_of(num_blocks, indices):
    """Lists ``[Bm * Hm * rows]`` of Python lists."""
    return [row[:n] for n, row in zip(num_blocks.flatten().tolist(), indices.flatten(0, 2).tolist(), strict=True)]


def own_first(layout, tile, attended):
    others = [b for t in sorted(attended) if t != tile for b in blocks_of(layout, t)]
    return (blocks_of(layout, tile) if tile in attended else []) + others


def random_tiles(layout, *lead, columns=None, seed=0, density=0.4):
    shape = (*lead, layout.num_tiles, columns or layout.num_tiles)
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < density


LAYOUT = plan((5, 9, 7), (3, 4, 5), text_len=600)  # tiles of 1 block down to 2 x 1 x 2 tokens, text of two tiles


@st.composite
def layouts_and_windows(draw):
    grid = draw(st.tuples(st.integers(1, 7), st.integers(1, 11), st.integers(1, 13)))
    tile = draw(st.tuples(*(st.integers(1, 8),) * 3))
    layout = plan(grid, tile, draw(st.sampled_from([0, 1, 128, 700])), draw(st.sampled_from(["suffix", "prefix"])))
    return layout, tuple(draw(st.integers(1, n)) for n in layout.tile_grid)


@settings(max_examples=50, deadline=None)
@given(layouts_and_windows())
@example((plan((1, 1, 1)), (1, 1, 1)))
@example((plan((7, 11, 13), (2, 3, 3)), (2, 3, 4)))
def test_sliding_window_equals_plain_python(case):
    layout, window = case
    mask = sliding_tile_mask(layout, window)
    expected = tiles_of_window(layout, window)
    assert rows_of(mask.kv_num_blocks, mask.kv_indices) == [
        own_first(layout, tile, attended) for tile, attended in enumerate(expected)
    ]
    # STA's rule: every video tile attends the same number of tiles.
    text_tiles = layout.num_tiles - layout.num_video_tiles
    assert {len(row) for row in expected[: layout.num_video_tiles]} == {int(np.prod(window)) + text_tiles}

    transposed = [[] for _ in range(layout.num_blocks)]
    for block, tile in enumerate(layout.tile_of_block.tolist()):
        for kv in own_first(layout, tile, expected[tile]):
            transposed[kv].append(block)
    assert rows_of(mask.q_num_blocks, mask.q_indices) == transposed

    tokens = layout.tile_tokens.tolist()
    pairs = sum(tokens[i] * tokens[j] for i, row in enumerate(expected) for j in row)
    assert mask.density == pairs / layout.num_tokens**2
    assert mask.sparsity == 1 - mask.density


def test_a_centred_odd_window_is_symmetric():
    layout = plan((6, 10, 14), (2, 2, 2))  # 3 x 5 x 7 equal tiles
    blocks = sliding_tile_mask(layout, (3, 5, 7)).to_blocks()[0, 0]
    assert blocks.all()
    matrix = sliding_tile_mask(layout, (1, 3, 1)).to_blocks()[0, 0]
    mirrored = matrix.view(3, 5, 7, 3, 5, 7).flip((0, 1, 2, 3, 4, 5)).reshape(matrix.shape)
    assert torch.equal(matrix, mirrored)  # mirroring the video mirrors the pattern
    assert not torch.equal(matrix, matrix.T)  # clamping makes the border rows one-sided


def test_dense_mask():
    mask = dense_mask(LAYOUT)
    assert mask.density == 1.0 and mask.sparsity == 0.0
    assert mask.to_token_mask().all()
    assert mask.kv_indices[0, 0, 3].tolist() == own_first(LAYOUT, 3, range(LAYOUT.num_tiles))


def test_density_of_the_design():
    assert sliding_tile_mask(plan((21, 45, 80)), (3, 3, 6)).density == 54 / 300


@pytest.mark.parametrize(
    ("window", "message"),
    [
        ((3, 3, 2), r"window \(3, 3, 2\) is larger than the grid of tiles \(2, 3, 2\)"),
        ((1, 0, 1), r"window \(1, 0, 1\), every size must be at least 1"),
        ((1, -1, 1), r"window \(1, -1, 1\), every size must be at least 1"),
        ((1, 1), r"sliding_tile_mask: window \(1, 1\), expected three integers"),
        ((1, 1.0, 1), r"window \(1, 1\.0, 1\), expected three integers"),
        (None, r"window None, expected three integers"),
    ],
)
def test_window_errors(window, message):
    with pytest.raises(ConfigError, match=message):
        sliding_tile_mask(LAYOUT, window)


@pytest.mark.parametrize("lead", [(), (3,), (2, 3)])
@pytest.mark.parametrize("columns", ["tiles", "blocks"])
def test_from_tiles(lead, columns):
    layout = plan((5, 9, 17), (5, 9, 6), text_len=130)  # tiles of three blocks, so tiles and blocks differ
    matrix = random_tiles(layout, *lead, columns=layout.num_tiles if columns == "tiles" else layout.num_blocks)
    matrix[..., 1, :] = False
    mask = BlockMask.from_tiles(layout, matrix)
    assert mask.shape == ((1, 1, *lead)[-2:])
    blocks = matrix if columns == "blocks" else matrix.repeat_interleave(layout.tile_block_offsets.diff(), dim=-1)
    assert torch.equal(mask.to_blocks(), blocks.view(mask.to_blocks().shape))
    for row, (num, indices) in enumerate(zip(mask.kv_num_blocks.flatten(), mask.kv_indices.flatten(0, 2), strict=True)):
        own = blocks_of(layout, row % layout.num_tiles)
        listed = indices[:num].tolist()
        assert listed == sorted(listed, key=lambda b, own=own: (b not in own, b))
    tile_of_token = layout.tile_of_block[layout.slot_of_token.long() // BLOCK].long()
    if columns == "tiles":
        assert torch.equal(
            mask.to_token_mask(), matrix.view(mask.kv_num_blocks.shape + (-1,))[:, :, tile_of_token][..., tile_of_token]
        )
    assert torch.equal(mask.densities(), mask.to_token_mask().double().mean((-1, -2)))
    assert BlockMask.from_tiles(layout, matrix.numpy()).density == mask.density


def test_from_keep_equals_from_tiles_at_any_width():
    layout = plan((5, 9, 17), (5, 9, 6), text_len=130)
    keep = random_tiles(layout, 2, 3, columns=layout.num_blocks)
    keep[0, 1, 3] = False
    want = BlockMask.from_tiles(layout, keep)
    longest = int(want.kv_num_blocks.max())
    for width in (None, layout.num_blocks, longest):
        mask = BlockMask.from_keep(layout, keep, width)
        assert mask.kv_indices.shape == (2, 3, layout.num_tiles, width or layout.num_blocks)
        assert mask.kv_indices.dtype == mask.kv_num_blocks.dtype == torch.int32
        assert rows_of(mask.kv_num_blocks, mask.kv_indices) == rows_of(want.kv_num_blocks, want.kv_indices)
        mask.validate()


def test_from_keep_has_fixed_shapes():
    """Compiled without graph breaks, and on a device whose values cannot be read."""
    keeps = [random_tiles(LAYOUT, 1, 2, columns=LAYOUT.num_blocks) for _ in range(2)]

    def build(keep):
        mask = BlockMask.from_keep(LAYOUT, keep, max_kv=LAYOUT.num_blocks - 1)
        return (mask.kv_num_blocks, mask.kv_indices, *mask.transpose())

    keeps[0][..., 0] = keeps[1][..., 0] = False  # so that no list needs the full width
    compiled = torch.compile(build, fullgraph=True, backend="eager")
    for keep in keeps:
        mask = BlockMask.from_tiles(LAYOUT, keep)
        num, indices, q_num, q_indices = compiled(keep)
        assert rows_of(num, indices) == rows_of(mask.kv_num_blocks, mask.kv_indices)
        assert rows_of(q_num, q_indices) == rows_of(*mask.transpose())
    on_meta = BlockMask.from_keep(LAYOUT, keeps[0].to("meta"), max_kv=3)
    assert on_meta.kv_indices.shape == (1, 2, LAYOUT.num_tiles, 3)


@pytest.mark.parametrize(
    ("keep", "max_kv", "message"),
    [
        (torch.ones(1, 1, 14, 17), None, r"from_keep: keep is torch\.float32, expected a torch\.bool tensor"),
        ([True], None, r"keep is list"),
        (torch.ones(14, 14, dtype=torch.bool), None, r"keep has shape \(14, 14\), expected \[Bm, Hm, num_tiles"),
        (torch.ones(1, 1, 14, 13, dtype=torch.bool), None, r"keep has shape \(1, 1, 14, 13\)"),
        (torch.ones(1, 1, 14, 17, dtype=torch.bool), 0, r"max_kv 0, expected 1 to num_blocks = 17"),
        (torch.ones(1, 1, 14, 17, dtype=torch.bool), 18, r"max_kv 18"),
        (torch.ones(1, 1, 14, 17, dtype=torch.bool), 16, r"max_kv 16, expected at least the longest list, 17 blocks"),
    ],
)
def test_from_keep_errors(keep, max_kv, message):
    assert (LAYOUT.num_tiles, LAYOUT.num_blocks) == (14, 17)
    with pytest.raises(ConfigError, match=message):
        BlockMask.from_keep(LAYOUT, keep, max_kv)


@pytest.mark.parametrize(
    ("tiles", "message"),
    [
        (torch.ones(3, 3), r"from_tiles: tiles is torch\.float32, expected torch\.bool"),
        (
            torch.ones(3, 3, dtype=torch.bool),
            r"tiles has shape \(3, 3\), expected \[num_tiles, num_tiles\] = \[14, 14\]",
        ),
        (torch.ones(14, dtype=torch.bool), r"tiles has shape \(14,\)"),
        (torch.ones(1, 1, 1, 14, 14, dtype=torch.bool), r"tiles has shape \(1, 1, 1, 14, 14\)"),
        (torch.ones(0, 14, 14, dtype=torch.bool), r"tiles has shape \(0, 14, 14\), expected no empty size"),
    ],
)
def test_from_tiles_errors(tiles, message):
    assert LAYOUT.num_tiles == 14
    with pytest.raises(ConfigError, match=message):
        BlockMask.from_tiles(LAYOUT, tiles)


def lists(mask):
    return mask.kv_num_blocks.clone(), mask.kv_indices.clone()


def put(tensor, value, *place):
    tensor[place] = value
    return tensor


NUM, IDX = lists(dense_mask(LAYOUT))
LAST = LAYOUT.num_blocks - 1


@pytest.mark.parametrize(
    ("num_blocks", "indices", "message"),
    [
        (NUM.tolist(), IDX, r"BlockMask: kv_num_blocks is list, expected a torch\.Tensor"),
        (NUM.long(), IDX, r"kv_num_blocks is torch\.int64, expected torch\.int32"),
        (NUM, IDX.float(), r"kv_indices is torch\.float32, expected torch\.int32"),
        (NUM[0], IDX, r"kv_num_blocks has shape \(1, 14\), expected \[Bm, Hm, num_tiles\] with num_tiles = 14"),
        (NUM[..., 1:], IDX, r"kv_num_blocks has shape \(1, 1, 13\)"),
        (NUM, IDX[:, :, 1:], r"kv_indices has shape .* expected \[Bm, Hm, num_tiles, max_kv\]"),
        (NUM, IDX[..., :0], r"kv_indices has shape \(1, 1, 14, 0\)"),
        (
            NUM.expand(2, 1, -1),
            IDX,
            r"kv_indices has shape .* expected the first three sizes of kv_num_blocks \(2, 1, 14\)",
        ),
        (NUM.to("meta"), IDX, r"kv_num_blocks is on meta and kv_indices on cpu, expected one device"),
        (put(NUM.clone(), -1, 0, 0, 2), IDX, rf"kv_num_blocks\[0, 0, 2\] is -1, expected 0\.\.{LAST + 1}"),
        (put(NUM.clone(), 99, 0, 0, 2), IDX, r"kv_num_blocks\[0, 0, 2\] is 99"),
        (NUM, put(IDX.clone(), LAST + 1, 0, 0, 5, 3), rf"kv_indices\[0, 0, 5, 3\] is {LAST + 1}, expected 0\.\.{LAST}"),
        (NUM, put(IDX.clone(), -7, 0, 0, 5, 3), r"kv_indices\[0, 0, 5, 3\] is -7"),
        (NUM, put(IDX.clone(), 5, 0, 0, 5, 3), r"kv_indices\[0, 0, 5\] lists block 5 twice"),
    ],
)
def test_wrong_lists_are_refused(num_blocks, indices, message):
    with pytest.raises(ConfigError, match=message):
        BlockMask(LAYOUT, num_blocks, indices)


def test_lists_of_the_user():
    mask = BlockMask(LAYOUT, torch.zeros(2, 1, 14, dtype=torch.int32), torch.full((2, 1, 14, 3), -5, dtype=torch.int32))
    assert mask.density == 0.0 and not mask.to_token_mask().any()  # entries beyond the length do not matter
    assert mask.q_num_blocks.sum() == 0
    strided = BlockMask(LAYOUT, NUM.expand(3, 2, -1), IDX.expand(3, 2, -1, -1))
    assert strided.density == 1.0 and strided.q_num_blocks.shape == (3, 2, LAYOUT.num_blocks)


def test_values_on_another_device_are_checked_on_request_only():
    mask = BlockMask(LAYOUT, NUM.to("meta"), IDX.to("meta"))
    assert mask.device.type == "meta" and mask.q_indices.shape == (1, 1, LAYOUT.num_blocks, LAYOUT.num_blocks)


def test_transpose_without_synchronization_equals_the_one_of_the_cpu():
    mask = BlockMask.from_tiles(LAYOUT, random_tiles(LAYOUT, 2, 3))
    num_blocks, indices = masks._transpose_on_device(mask)
    assert rows_of(num_blocks, indices) == rows_of(*mask.transpose())
    assert num_blocks.dtype == indices.dtype == torch.int32
    query_blocks = mask.to_blocks()[:, :, LAYOUT.tile_of_block.long()]
    expected = [column.nonzero().flatten().tolist() for column in query_blocks.mT.flatten(0, 2)]
    assert rows_of(*mask.transpose()) == expected


def test_stack_and_select():
    levels = [
        sliding_tile_mask(LAYOUT, (1, 1, 1)),
        BlockMask.from_tiles(LAYOUT, random_tiles(LAYOUT, 3)),  # a mask per head
        dense_mask(LAYOUT),
    ]
    stacked = BlockMask.stack(levels)
    assert stacked.shape == (3, 3)
    assert stacked.kv_indices.shape[-1] == LAYOUT.num_blocks
    for i, level in enumerate(levels):
        assert torch.equal(stacked.to_blocks()[i], level.to_blocks()[0].expand(3, -1, -1))
    stacked.transpose()
    chosen = stacked.select(torch.tensor([2, 0, 0, 1]))
    assert torch.equal(chosen.to_blocks(), stacked.to_blocks()[[2, 0, 0, 1]])
    fresh = BlockMask(LAYOUT, chosen.kv_num_blocks, chosen.kv_indices)
    assert rows_of(*chosen.transpose()) == rows_of(*fresh.transpose())
    assert chosen.densities()[:, 0].tolist() == [
        1.0,
        levels[0].density,
        levels[0].density,
        float(levels[1].densities()[0, 0]),
    ]


def test_stack_errors():
    other = plan((5, 9, 7), (3, 4, 4), text_len=600)
    with pytest.raises(ConfigError, match=r"masks \[\], expected a list of one BlockMask or more"):
        BlockMask.stack([])
    with pytest.raises(ConfigError, match=r"masks\[1\] has tiles \(3, 4, 4\) .* expected one layout"):
        BlockMask.stack([dense_mask(LAYOUT), dense_mask(other)])
    per_head = [BlockMask.from_tiles(LAYOUT, random_tiles(LAYOUT, h)) for h in (2, 3)]
    with pytest.raises(ConfigError, match=r"masks\[0\] has 2 heads, expected 1 or 3"):
        BlockMask.stack(per_head)
    with pytest.raises(ConfigError, match=r"masks\[1\] is on meta, masks\[0\] on cpu"):
        BlockMask.stack([dense_mask(LAYOUT), dense_mask(LAYOUT).to("meta")])
    for index in (torch.tensor(0), torch.tensor([0.0]), torch.tensor([0], device="meta")):
        with pytest.raises(ConfigError, match=r"select: index is .* expected int32 or int64 \[B\] on cpu"):
            dense_mask(LAYOUT).select(index)


def test_copies_on_devices_are_made_once():
    mask = sliding_tile_mask(LAYOUT, (1, 2, 1))
    assert mask.to("cpu") is mask
    moved = mask.to("meta")
    assert moved.layout is LAYOUT.to("meta") and mask.to("meta") is moved and moved.to("cpu") is mask
    assert moved.to("meta") is moved
    assert sliding_tile_mask(LAYOUT.to("meta"), (1, 2, 1)).device.type == "meta"


def test_masks_are_cached_with_the_plans():
    layout = plan((3, 4, 5), (1, 2, 2))
    mask = sliding_tile_mask(layout, [1, 2, 1])
    assert sliding_tile_mask(layout, (1, 2, 1)) is mask
    clear_plan_cache()
    assert sliding_tile_mask(layout, (1, 2, 1)) is not mask


def test_describe():
    text = sliding_tile_mask(plan((21, 45, 80)), (3, 3, 6)).describe()
    assert "every tile visits 108 of 600 KV blocks" in text and "density 0.1800: 82.0 %" in text
    assert (
        "visits 0 to 2 of"
        in BlockMask.from_tiles(plan((1, 1, 256), (1, 1, 128)), torch.tensor([[1, 1], [0, 0]]).bool()).describe()
    )


# FlexAttention -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mask",
    [
        sliding_tile_mask(LAYOUT, (1, 2, 1)),
        dense_mask(LAYOUT),
        BlockMask.from_tiles(LAYOUT, random_tiles(LAYOUT, 2, 3)),
        BlockMask.from_tiles(LAYOUT, random_tiles(LAYOUT, columns=LAYOUT.num_blocks)),
        sliding_tile_mask(plan((4, 8, 8), (2, 8, 8)), (1, 1, 1)),  # no padding: no partial block
    ],
    ids=["window", "dense", "per head and batch", "blocks", "full"],
)
def test_flex_round_trip(mask):
    flex = mask.to_flex()
    back = BlockMask.from_flex(mask.layout, flex)
    assert torch.equal(back.kv_num_blocks, mask.kv_num_blocks)
    assert rows_of(back.kv_num_blocks, back.kv_indices) == rows_of(mask.kv_num_blocks, mask.kv_indices)
    assert flex.seq_lengths == (mask.layout.num_slots,) * 2
    # Torch's own view of the lists is the same matrix.
    assert torch.equal(flex.to_dense().bool(), mask.to_blocks()[:, :, mask.layout.tile_of_block.long()])
    # Torch's transpose holds the same pairs as ours.
    full = flex.full_q_num_blocks + flex.q_num_blocks
    assert torch.equal(full.int(), mask.q_num_blocks)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("heads", [1, 3])
def test_flex_attention_over_slots_equals_masked_dense_attention(heads):
    mask = BlockMask.from_tiles(LAYOUT, random_tiles(LAYOUT, heads) | torch.eye(LAYOUT.num_tiles, dtype=torch.bool))
    q, k, v = torch.randn(
        3, 2, 3, LAYOUT.num_tokens, 16, generator=torch.Generator().manual_seed(0), dtype=torch.double
    )
    slots = LAYOUT.token_of_slot.long()
    in_slots = (torch.where(slots[:, None] < 0, 1e3, x[:, :, slots.clamp_min(0)]) for x in (q, k, v))
    out = flex_attention(*in_slots, block_mask=mask.to_flex())[:, :, LAYOUT.slot_of_token.long()]
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask.to_token_mask())
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


def test_from_flex_takes_what_torch_builds():
    layout = plan((1, 1, 640), (1, 1, 128))
    flex = create_block_mask(lambda b, h, q, kv: q // BLOCK >= kv // BLOCK, 1, None, 640, 640, device="cpu")
    assert torch.equal(BlockMask.from_flex(layout, flex).to_blocks()[0, 0], torch.ones(5, 5).tril().bool())


def test_from_flex_refuses_what_lists_cannot_say():
    layout = plan((1, 1, 640), (1, 1, 128))

    def built(mask_mod, tokens=640, size=BLOCK):
        return create_block_mask(mask_mod, 1, None, tokens, tokens, device="cpu", BLOCK_SIZE=size)

    def causal(b, h, q, kv):
        return q >= kv

    with pytest.raises(ConfigError, match="drops key slot 1 for query slot 0 inside an attended block"):
        BlockMask.from_flex(layout, built(causal))
    with pytest.raises(ConfigError, match=r"covers \(512, 512\) tokens, expected the layout's slots \(640, 640\)"):
        BlockMask.from_flex(layout, built(causal, tokens=512))
    with pytest.raises(ConfigError, match=r"has BLOCK_SIZE \(64, 64\), expected \(128, 128\)"):
        BlockMask.from_flex(layout, built(causal, size=64))
    two_blocks = plan((1, 1, 640), (1, 1, 256))
    with pytest.raises(ConfigError, match="gives query block 1 another list than the first block of its tile 0"):
        BlockMask.from_flex(two_blocks, built(lambda b, h, q, kv: q // BLOCK >= kv // BLOCK))
