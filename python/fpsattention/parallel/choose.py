"""Which scheme pays where: bytes, time and memory of one attention layer, computed. Nothing here was measured. See ``docs/scale.md``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..errors import ConfigError
from ..layout.masks import BlockMask, cached_mask
from ..layout.tiles import TileLayout, check_layout, int3, integer
from .sharding import cut_evenly


@dataclass(frozen=True)
class Network:
    """What connects the ranks.

    Attributes:
        bandwidth: bytes per second that a GPU sends while it receives as many.
        latency: seconds that a message to one other rank costs beside its bytes.
    """

    name: str
    bandwidth: float
    latency: float


#: Data sheets: fourth-generation NVLink, 450 GB/s each way; one 400 Gb/s port per GPU. Latencies are assumptions.
NETWORKS = {
    "nvlink": Network("NVLink", 450e9, 2e-6),
    "400g": Network("400 Gb/s", 50e9, 5e-6),
}
FORWARD_FLOPS = 1.15e15  # of the attention kernels per second, the products that are computed: an assumption
BACKWARD_FLOPS = 0.6e15  # likewise; 2.5 times the forward's products


@dataclass(frozen=True)
class Estimate:
    """One scheme on one layer, per rank; the slowest rank where they differ.

    Attributes:
        scheme, exchange: as :func:`fpsattention.parallel.attention` takes them.
        sent: bytes that a rank sends, forward, or forward and backward.
        exchange_seconds: of these bytes, alone on the network.
        compute_seconds: of the attention kernels.
        seconds: of both: one after the other, or (ring) the exchange behind the computation as far as it fits.
        memory: bytes that a rank keeps for the backward (or holds at once), beside q, k and v themselves.
        exact: one process's bits.
        problem: why it cannot be used; "".
    """

    scheme: str
    exchange: str
    sent: float
    exchange_seconds: float
    compute_seconds: float
    seconds: float
    memory: float
    exact: bool
    problem: str = ""

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.scheme}, {self.exchange}" if self.scheme == "ulysses" else self.scheme


@dataclass(frozen=True)
class Choice:
    """What :func:`choose` picked: ``parallel.attention(..., **choice.arguments)``; all estimates, and the reasons in words."""

    best: Estimate
    estimates: tuple[Estimate, ...]
    reasons: tuple[str, ...]

    @property
    def arguments(self) -> dict[str, str]:
        """``scheme`` and ``exchange``, for :func:`fpsattention.parallel.attention` and :func:`fpsattention.parallel.shard`."""
        return {"scheme": self.best.scheme, "exchange": self.best.exchange}

    def __str__(self) -> str:
        return "\n".join(self.reasons)


def choose(
    layout: TileLayout,
    ranks: int,
    *,
    heads: int,
    head_dim: int,
    window: Sequence[int] | None = None,
    block_mask: BlockMask | None = None,
    dynamic: bool = False,
    density: float | None = None,
    batch: int = 1,
    network: str | Network = "nvlink",
    backward: bool = False,
    exact: bool = True,
) -> Choice:
    """The scheme that takes least time on one layer, by the cost model of ``docs/scale.md`` (computed, not measured).

    Args:
        layout: tiles of the whole sequence.
        ranks: that share it.
        window, block_mask: the pattern; neither: dense.
        dynamic: the lists are made from q and k in every call, so that only a rank that has all tokens of a head can make them; ``density`` says
            how dense they are (default 1).
        network: "nvlink", "400g", or a :class:`Network`.
        backward: of a training step: forward and backward.
        exact: only schemes with the bits of one process ("ring" differs by rounding).

    Raises:
        ConfigError: an argument is wrong.
    """
    layout = check_layout(layout, "parallel.choose").cpu()
    for name, value in (("ranks", ranks), ("heads", heads), ("head_dim", head_dim), ("batch", batch)):
        if integer(value, f"parallel.choose: {name}") < 1:
            raise ConfigError(f"fpsattention.parallel.choose: {name} {value}, expected at least 1")
    net = NETWORKS.get(network) if isinstance(network, str) else network
    if not isinstance(net, Network) or net.bandwidth <= 0 or net.latency < 0:
        raise ConfigError(
            f"fpsattention.parallel.choose: network {network!r}, expected one of {', '.join(map(repr, NETWORKS))} or a Network"
        )
    if density is not None and not (isinstance(density, (int, float)) and 0 < density <= 1):
        raise ConfigError(f"fpsattention.parallel.choose: density {density!r}, expected a number in (0, 1]")
    if window is not None and block_mask is not None:
        raise ConfigError("fpsattention.parallel.choose: window and block_mask are both given, expected one of them")
    if dynamic and (window is not None or block_mask is not None):
        raise ConfigError(
            "fpsattention.parallel.choose: dynamic with a window or block_mask, expected neither: their lists are static"
        )
    mask = block_mask
    if mask is None:
        mask = cached_mask(layout, layout.tile_grid if window is None else int3(window, "parallel.choose: window"))
    if dynamic:
        density = 1.0 if density is None else density
    elif density is None:
        density = mask.density
    work = _Work(layout, ranks, heads, head_dim, batch, density, net, backward)
    few = layout.num_video_tiles < ranks
    tiles = f"{layout.num_video_tiles} video tiles for {ranks} ranks: use a smaller tile" if few else ""
    fetched = (0, (0,) * ranks) if few else _fetched_tokens(layout, mask, ranks)
    static = tiles or ("the lists need all tokens of a head" if dynamic else "")
    found = (
        work.ulysses("bf16", ""),
        work.ulysses("fp8", tiles or ("the lists are made from unquantized q and k" if dynamic else "")),
        work.halo(fetched[0], static),
        work.ring(fetched[1], static),
    )
    usable = [e for e in found if not e.problem and (e.exact or not exact)]
    best = min(usable, key=lambda e: (e.seconds, e.sent))
    return Choice(best, found, _reasons(best, found, exact))


def _reasons(best: Estimate, found: Sequence[Estimate], exact: bool) -> tuple[str, ...]:
    reasons = [
        f"{best.name}: {best.seconds * 1e3:.3f} ms per layer ({best.exchange_seconds * 1e3:.3f} exchange, {best.compute_seconds * 1e3:.3f} "
        f"attention), {best.sent / 1e6:.1f} MB sent per rank"
    ]
    for other in found:
        if other is best:
            continue
        if other.problem:
            reasons.append(f"{other.name}: cannot: {other.problem}")
        elif exact and not other.exact:
            reasons.append(
                f"{other.name}: {other.seconds * 1e3:.3f} ms, but not the bits of one process (exact=False allows it)"
            )
        else:
            reasons.append(f"{other.name}: {other.seconds * 1e3:.3f} ms, {other.sent / 1e6:.1f} MB")
    return tuple(reasons)


@dataclass(frozen=True)
class _Work:
    layout: TileLayout
    ranks: int
    heads: int
    dim: int
    batch: int
    density: float
    net: Network
    backward: bool

    @property
    def rows(self) -> float:
        """(token, head) pairs of a rank."""
        return self.batch * self.layout.num_tokens * self.heads / self.ranks

    @property
    def fill(self) -> float:
        """Slots per token: blocks are computed, and sent as FP8, with their padding."""
        return self.layout.num_slots / self.layout.num_tokens

    def compute(self, share: float = 1.0) -> float:
        """Seconds of attention on the slowest rank, ``share`` of all pairs."""
        flops = 4.0 * self.batch * self.layout.num_slots**2 * self.density * self.heads * self.dim / self.ranks
        return share * flops * (1 / FORWARD_FLOPS + (2.5 / BACKWARD_FLOPS if self.backward else 0.0))

    def seconds(self, sent: float, messages: int) -> float:
        return sent / self.net.bandwidth + messages * self.net.latency

    def ulysses(self, exchange: str, problem: str) -> Estimate:
        uneven = math.ceil(self.heads / self.ranks) * self.ranks / self.heads  # the rank with most heads
        others = (self.ranks - 1) / self.ranks
        per_row = 8.0 * self.dim  # q, k, v, output
        if exchange == "fp8":  # bytes and scales of slots; output and lse of tokens
            per_row = (3.0 * self.dim + 8 / 128) * self.fill + 2.0 * self.dim + 4
        rounds = 2 if exchange == "bf16" else 3  # statistics
        if self.backward:
            per_row += 8.0 * self.dim
            rounds += 2
        sent = self.rows * per_row * others
        kept = 5.0 * self.dim + 8  # q, k and v as FP8, the output, two statistics of its row
        spent, compute = self.seconds(sent * uneven, rounds * (self.ranks - 1)), self.compute(uneven)
        return Estimate(
            "ulysses", exchange, sent, spent, compute, spent + compute, self.rows * uneven * kept, True, problem
        )

    def _fetching(self, tokens: int) -> float:
        """Bytes of K and V of so many fetched tokens."""
        return self.batch * tokens * self.heads * (2.0 * self.dim + 4 / 128) * self.fill

    def halo(self, fetched: int, problem: str) -> Estimate:
        sent = self._fetching(fetched)
        rounds = 2
        if self.backward:
            sent += self.batch * fetched * self.heads * 4.0 * self.dim
            rounds = 3
        spent, compute = self.seconds(sent, rounds * (self.ranks - 1)), self.compute()
        kept = self.rows * (5 * self.dim + 8) + self._fetching(fetched)
        return Estimate("halo", "fp8", sent, spent, compute, spent + compute, kept, True, problem)

    def ring(self, fetched: Sequence[int], problem: str) -> Estimate:
        """``fetched`` in each step; step 0 is the rank's own shard."""
        # K and V are fetched anew for the backward.
        each = [self._fetching(n) * (2 if self.backward else 1) for n in fetched]
        if self.backward:
            each = [e + self.batch * n * self.heads * 4.0 * self.dim for e, n in zip(each, fetched, strict=True)]
        visits = [1.0] + [n / max(1, self.layout.num_tokens / self.ranks) for n in fetched[1:]]
        shares = [v / sum(visits) for v in visits]
        steps = [self.seconds(e, 1) if n else 0.0 for e, n in zip(each, fetched, strict=True)]
        computed = [self.compute(share) for share in shares]
        total = self.seconds(0, self.ranks - 1)  # statistics
        total += sum(max(c, s) for c, s in zip(computed, [*steps[1:], 0.0], strict=True))
        kept = self.rows * (5 * self.dim + 8) + 2 * max([*map(self._fetching, fetched), 0.0])
        return Estimate("ring", "fp8", sum(each), sum(steps), sum(computed), total, kept, False, problem)


def _fetched_tokens(layout: TileLayout, mask: BlockMask, ranks: int) -> tuple[int, tuple[int, ...]]:
    """Tokens that a rank fetches (the rank with most), in all and in each step of the ring, where whole tiles are dealt as
    :func:`shard_tokens` does."""
    bounds = cut_evenly(layout.tile_tokens[: layout.num_video_tiles].tolist(), ranks)
    sizes = torch.tensor(bounds).diff()
    owner = torch.repeat_interleave(torch.arange(ranks), sizes)
    texts = layout.num_tiles - layout.num_video_tiles
    owner = torch.cat(
        [owner, *(torch.full((n.numel(),), r) for r, n in enumerate(torch.arange(texts).tensor_split(ranks)))]
    )
    visits = mask.to("cpu").to_blocks().any(0).any(0)  # [num_tiles, num_blocks]
    tokens, of_block = layout.block_tokens.long(), owner[layout.tile_of_block.long()]
    per_pair = torch.zeros(ranks, ranks, dtype=torch.int64)
    for rank in range(ranks):
        seen = visits[owner == rank].any(0)
        per_pair[rank].index_add_(0, of_block[seen], tokens[seen])
    per_pair.fill_diagonal_(0)
    total = int(per_pair.sum(1).max())
    steps = tuple(int(max(per_pair[r, (r - step) % ranks] for r in range(ranks))) for step in range(ranks))
    return total, steps
