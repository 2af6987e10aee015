"""What the order of the forward's work items costs: bytes that L2 delivers and DRAM is asked for, and SMs that wait. Computed from the
lists, on the CPU; nothing here is timed.

    python -m benchmarks.work_order                        # the table of docs/kernels/forward.md
    python -m benchmarks.work_order --l2-mib 25            # another cache; --sms 78: another GPU
"""

from __future__ import annotations

import argparse
import heapq
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch

from fpsattention.analysis.markdown import table
from fpsattention.layout.masks import BlockMask
from fpsattention.layout.tiles import BLOCK

from . import workloads

SMS, L2_MIB = 132, 50  # of an H100 SXM


@dataclass(frozen=True)
class Item:
    """Query blocks that run side by side and share their loads: a pair on a cluster of two CTAs, or one block on a CTA."""

    query_blocks: tuple[int, ...]
    kv_blocks: tuple[int, ...]


def clusters_pay(num_blocks: int, num_tiles: int, head_dim: int = 128, k_scale_per_token: bool = False) -> bool:
    """The rule of csrc/forward/sm90/forward_launch.cu."""
    return head_dim == 128 and not k_scale_per_token and 3 * num_blocks >= 5 * num_tiles


def work_order(mask: BlockMask, clusters: bool | None = None, bits: int = 4) -> list[Item]:
    """The items of one (batch, head) as csrc/forward/sm90/schedule.cu orders them: pairs in front, longest lists first as far as the
    ``bits`` leading bits of their lengths say, ties in index order. clusters: None for the rule, at D = 128. bits: 0 for the index order."""
    tiles = mask.layout.tile_of_block.tolist()
    counts, indices = mask.kv_num_blocks[0, 0].tolist(), mask.kv_indices[0, 0].tolist()
    if clusters is None:
        clusters = clusters_pay(mask.layout.num_blocks, mask.layout.num_tiles)
    pairs, singles, block = [], [], 0
    while block < len(tiles):
        together = 2 if clusters and tiles[block : block + 2] == [tiles[block]] * 2 else 1
        kv = tuple(indices[tiles[block]][: counts[tiles[block]]])
        (pairs if together == 2 else singles).append(Item(tuple(range(block, block + together)), kv))
        block += together

    def shorter(item: Item) -> int:
        dropped = max(0, len(item.kv_blocks).bit_length() - bits)
        return -(len(item.kv_blocks) >> dropped << dropped)

    return sorted(pairs, key=shorter) + sorted(singles, key=shorter)


@dataclass(frozen=True)
class Traffic:
    """Bytes of K and V for one (batch, head)."""

    from_l2: int  # L2 to SMs
    from_dram: int  # what a least-recently-used cache of the size of L2 does not hold
    unique_per_wave: float  # mean over the waves of `sms` query blocks: different blocks that a wave reads


def traffic(order: Sequence[Item], head_dim: int, sms: int = SMS, l2_bytes: int = L2_MIB << 20) -> Traffic:
    """The items of a wave walk their lists in step."""
    block_bytes = BLOCK * (2 * head_dim + 8)  # K, V^T with its 8 rows
    cache: OrderedDict[int, None] = OrderedDict()
    loads = misses = 0
    unique: list[int] = []
    for wave in _waves(order, sms):
        unique.append(len(set(chain.from_iterable(item.kv_blocks for item in wave))))
        for step in range(max(len(item.kv_blocks) for item in wave)):
            for item in wave:
                if step >= len(item.kv_blocks):
                    continue
                loads += 1
                block = item.kv_blocks[step]
                misses += block not in cache
                cache[block] = None
                cache.move_to_end(block)
                if len(cache) * block_bytes > l2_bytes:
                    cache.popitem(last=False)
    return Traffic(loads * block_bytes, misses * block_bytes, sum(unique) / len(unique) * block_bytes)


def _waves(order: Sequence[Item], sms: int) -> list[list[Item]]:
    waves: list[list[Item]] = [[]]
    room = sms
    for item in order:
        if len(item.query_blocks) > room:
            waves.append([])
            room = sms
        waves[-1].append(item)
        room -= len(item.query_blocks)
    return waves


def makespan(order: Sequence[Item], heads: int, item_clocks: float, block_clocks: float, sms: int = SMS) -> float:
    """Clocks until the last item of `heads` equal heads is done, items going to whoever is free: pairs to clusters, then single
    query blocks to CTAs. An item of n KV blocks takes item_clocks + n block_clocks."""
    pairs = [item for item in order if len(item.query_blocks) == 2]
    singles = [item for item in order if len(item.query_blocks) == 1]
    clusters = [0.0] * (sms // 2 if pairs else 0)
    for item in pairs * heads:
        heapq.heapreplace(clusters, clusters[0] + item_clocks + len(item.kv_blocks) * block_clocks)
    ctas = sorted(clusters * 2) if pairs else [0.0] * sms
    for item in singles * heads:
        heapq.heapreplace(ctas, ctas[0] + item_clocks + len(item.kv_blocks) * block_clocks)
    return max(ctas)


def efficiency(order: Sequence[Item], heads: int, item_clocks: float, block_clocks: float, sms: int = SMS) -> float:
    """The share of the main loop's rate that a launch reaches."""
    blocks = sum(len(item.query_blocks) * len(item.kv_blocks) for item in order) * heads
    return blocks * block_clocks / sms / makespan(order, heads, item_clocks, block_clocks, sms)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sms", type=int, default=SMS)
    parser.add_argument("--l2-mib", type=int, default=L2_MIB)
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    orders: dict[str, dict[str, Any]] = {
        "index order, no clusters": {"clusters": False, "bits": 0}, "exact lengths, no clusters": {"clusters": False, "bits": 31},
        "exact lengths": {"bits": 31}, "as launched": {},
    }  # fmt: skip
    rows = []
    for shape in (workloads.WAN_14B_720P, workloads.STA_GRID):
        for density in (1.0, workloads.PAPER_DENSITY, 0.1):
            mask = workloads.build(shape, density, "cpu").mask
            for name, options in orders.items():
                found = traffic(work_order(mask, **options), shape.head_dim, args.sms, args.l2_mib << 20)
                gigabytes = [f"{found.from_l2 * shape.heads / 1e9:.1f}", f"{found.from_dram * shape.heads / 1e9:.2f}"]
                rows.append([shape.name, f"{mask.density:.3f}", name, *gigabytes, f"{found.unique_per_wave / 1e6:.1f}"])
    print(table(["shape", "density", "order", "L2 to SMs, GB", "from DRAM, GB", "unique in a wave, MB"], rows))


if __name__ == "__main__":
    main()
