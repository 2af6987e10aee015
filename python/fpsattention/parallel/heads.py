"""Which rank attends which heads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from ..errors import ConfigError
from ..layout.masks import Lists
from ..layout.plain import plain_tensors


@dataclass(frozen=True)
class Heads:
    """Heads of each rank. ``of[r]`` may be empty: that rank attends nothing."""

    of: tuple[tuple[int, ...], ...]

    @property
    def total(self) -> int:
        """Of all ranks."""
        return sum(map(len, self.of))

    @cached_property
    def order(self) -> tuple[int, ...]:
        """Heads, rank after rank."""
        return tuple(head for heads in self.of for head in heads)

    @cached_property
    def inverse(self) -> tuple[int, ...] | None:
        """Where each head stands in ``order``; None: in its own place."""
        if self.order == tuple(range(self.total)):
            return None
        return tuple(sorted(range(self.total), key=self.order.__getitem__))

    def cut(self, x: Tensor, dim: int, rank: int) -> Tensor:
        """The heads of a rank; a view where they are neighbours."""
        heads = self.of[rank]
        if not heads or heads == tuple(range(heads[0], heads[0] + len(heads))):
            return x.narrow(dim, heads[0] if heads else 0, len(heads))
        return x.index_select(dim, _index(heads, x.device))

    def restore(self, parts: Sequence[Tensor], dim: int) -> Tensor:
        """Parts of all ranks, put together in the order of the heads."""
        whole = torch.cat(list(parts), dim)
        return whole if self.inverse is None else whole.index_select(dim, _index(self.inverse, whole.device))


@lru_cache(maxsize=1024)  # a fresh tensor would be a copy to the device, and wait for it, in every call
def _index(values: tuple[int, ...], device: torch.device) -> Tensor:
    with plain_tensors():
        return torch.tensor(values).to(device)


def deal_heads(num_heads: int, ranks: int, costs: Sequence[float] | None = None) -> Heads:
    """Deal heads to ranks so that the dearest rank has as little to do as the greedy rule finds.

    Args:
        costs: of each head, e.g. its density; None or all equal: neighbours, in numbers that differ by at most one.

    The rule is LPT: dearest head first, each to the rank with the least so far (Graham 1969: at most 4/3 of the best).

    Raises:
        ConfigError: numbers below 1, or costs that are not ``num_heads`` finite numbers >= 0.
    """
    if num_heads < 1 or ranks < 1:
        raise ConfigError(
            f"fpsattention.parallel.deal_heads: {num_heads} heads on {ranks} ranks, expected at least 1 of each"
        )
    if costs is not None:
        costs = [float(cost) for cost in costs]
        if len(costs) != num_heads or not all(0 <= cost < float("inf") for cost in costs):
            raise ConfigError(
                f"fpsattention.parallel.deal_heads: costs {costs}, expected {num_heads} finite numbers >= 0, one per head"
            )
    if costs is None or len(set(costs)) == 1:
        size, more = divmod(num_heads, ranks)
        starts = [rank * size + min(rank, more) for rank in range(ranks + 1)]
        return Heads(tuple(tuple(range(a, b)) for a, b in zip(starts, starts[1:], strict=False)))
    load, dealt = [0.0] * ranks, [[] for _ in range(ranks)]  # type: list[float], list[list[int]]
    for head in sorted(range(num_heads), key=lambda head: (-costs[head], head)):
        rank = min(range(ranks), key=lambda rank: (load[rank], len(dealt[rank]), rank))
        load[rank] += costs[head]
        dealt[rank].append(head)
    return Heads(tuple(tuple(sorted(heads)) for heads in dealt))


def head_costs(lists: Lists) -> tuple[float, ...] | None:
    """Block pairs that each head visits, over all samples; None: all heads share one list. Reads the lengths on the host."""
    counts = lists.kv_num_blocks
    if counts.shape[1] == 1:
        return None
    sizes = lists.tile_block_offsets.diff().to(torch.float64)
    return tuple((counts.to(torch.float64) * sizes).sum((0, 2)).tolist())


def cut_lists(lists: Lists, heads: Heads, rank: int) -> Lists:
    """Lists of the heads of one rank; those that all heads share stay."""
    if lists.kv_num_blocks.shape[1] == 1:
        return lists
    cut = (None if x is None else heads.cut(x, 1, rank) for x in lists[3:])
    return Lists(*lists[:3], *cut)  # type: ignore[arg-type]
