"""Ring attention on the sm_90a kernels: the parts are FP32, so what is merged is one process's output before its rounding.

Ranks run one after the other, in one process: once to see what each sends, once with what the others sent. Skipped where test_sm90_ops.py is.
"""

import itertools
import os
from types import SimpleNamespace

import pytest
import torch
from cases import Case

import fpsattention  # noqa: F401  registers the ops
from fpsattention.ops import core as ops
from fpsattention.parallel import ring
from fpsattention.parallel.options import Options
from fpsattention.parallel.sharding import Sharding, _by_tiles

ON_GPU = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
if ops.sm90_missing():
    pytest.skip(f"no sm_90a kernels: {ops.sm90_missing()}", allow_module_level=True)
if not (ON_GPU or ops.sm90_on_host()):
    pytest.skip("neither a Hopper GPU nor FPSATTN_SM90_ON_HOST=1 (emulator)", allow_module_level=True)
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
EXACT = not ON_GPU and "fp8-acc=truncated" not in os.environ.get("HOPPER_EMU_OPTS", "")

# docs/scale.md: P's subnormals move with the running maximum. Sums that drop bits drop others when blocks are added up in another order: their
# own errors (docs/kernels/forward.md, "Accumulation": 0.25 % at most) bound that.
RING = 3e-5 if EXACT else 2.5e-3

PROBLEMS = [  # (case, ranks, granularity)
    (Case("window, text, batch", (5, 5, 9), (4, 4, 7), (2, 1, 1), 17, "suffix", batch=2, heads=1), 2, 0),
    (Case("three ranks, scales of tokens", (3, 5, 7), (1, 5, 7), None, 3, "prefix", heads=1, dim=96), 3, 2),
    (Case("tiles of two blocks", (4, 8, 17), (2, 8, 17), None, heads=1, dim=128), 2, 1),
]


class Simulated(Sharding):
    """The group of a rank is its number."""

    @property
    def rank(self):
        return self.group


def shardings(layout, size):
    """As shard_tokens deals whole tiles, without a process group."""
    video, text = _by_tiles(layout, size)
    prefix = layout.text_position == "prefix"
    tokens = [torch.cat([t, v] if prefix else [v, t]) for v, t in zip(video, text, strict=True)]
    counts = tuple(x.numel() for x in tokens)
    return [Simulated(layout, rank, torch.cat(tokens), counts, True) for rank in range(size)]


def ring_attention(monkeypatch, tensors, lists, ranks, options, statistics, forward):
    """The whole output (B, H, S, D), of ``ring._forward`` as it is or as ``forward`` replaces it."""
    mail = {}

    def run(sending):
        parts = []
        for sharding in ranks:
            steps = itertools.count()

            def exchange(chunks, sizes, rank, what, wait, steps=steps):
                step = next(steps)
                mail.setdefault((rank, step), chunks)
                senders = range(len(ranks))
                received = (
                    [chunks[0].new_zeros(n) for n in sizes] if sending else [mail[s, step][rank] for s in senders]
                )
                assert [x.numel() for x in received] == list(sizes)
                return SimpleNamespace(wait=lambda: received)

            monkeypatch.setattr(ring, "exchange", exchange)
            local = [x.index_select(2, sharding.tokens(sharding.rank).to(x.device)) for x in tensors]
            problems = ring.problems_of(lists, sharding, True)
            assert len(problems) == len(ranks)
            parts.append(ring.RingAttention.apply(*local, problems, sharding, options, *statistics)[0])
        return torch.cat(parts, 2).index_select(2, ranks[0].position().to(DEVICE))

    def nothing(z, problem, sharding, *_):
        blocks = z.q8.shape[:2]
        slots = 128 * sharding.blocks(sharding.rank).numel()
        empty = torch.zeros(*blocks, slots, device=DEVICE)
        return torch.zeros(*blocks, sharding.num_local, z.v_scale.shape[2], device=DEVICE), empty, empty

    monkeypatch.setattr(ring, "_forward", nothing)
    run(sending=True)
    monkeypatch.setattr(ring, "_forward", forward)
    return run(sending=False)


@pytest.mark.parametrize("case, size, granularity", PROBLEMS, ids=[case.name for case, *_ in PROBLEMS])
def test_ring_is_within_rounding_of_p_of_one_process(case, size, granularity, monkeypatch):
    layout, mask = case.layout(), case.mask()
    lists = mask.lists(False).to(DEVICE)
    q, k, v = (x.transpose(1, 2).to(DEVICE) for x in case.inputs(torch.bfloat16))
    statistics = k.float().mean(2), v.float().abs().amax(2)
    options = Options(granularity, case.dim**-0.5, True, False, 1, True, torch.float32)
    z = torch.ops.fpsattn.quantize(
        q, k, v, lists.token_of_slot, lists.tile_block_offsets, *statistics, granularity=granularity, smooth_k=True, pow2_scales=False
    )  # fmt: skip
    one = torch.ops.fpsattn.forward(
        *z[:6], lists.token_of_slot, lists.tile_of_block, lists.kv_num_blocks, lists.kv_indices, num_tokens=layout.num_tokens,
        softmax_scale=case.dim**-0.5, out_dtype=torch.float32,
    )[0]  # fmt: skip
    assert not torch.equal(one, one.bfloat16().float())

    forward, parts = ring._forward, []

    def kept(*arguments):
        parts.append(forward(*arguments))
        assert parts[-1][0].dtype == torch.float32
        return parts[-1]

    def attend(function):
        merged = ring_attention(monkeypatch, (q, k, v), lists, shardings(layout, size), options, statistics, function)
        return float((merged - one).norm() / one.norm())

    distance = attend(kept)
    print(f"{distance:.1e}")
    assert distance < RING
    rounded = iter(parts)  # the same parts as BF16 would leave them

    def as_bf16(*_):
        out, *rest = next(rounded)
        return out.bfloat16().float(), *rest

    assert attend(as_bf16) > 5e-4
