"""Which tokens of a sequence each rank holds: :class:`Sharding`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import ConfigError
from ..layout.plain import Cache, plain_tensors
from ..layout.tiles import BLOCK, TileLayout, check_layout
from ..ops.reference import V_EXTRA_ROWS, v_slot_order
from .collectives import exchange, from_bytes, group_of, num_bytes, to_bytes

STREAMS = ("all", "video", "text")


@dataclass(frozen=True, eq=False)
class Sharding:
    """Tokens of a sequence, dealt to the ranks of a group. Made by :func:`shard_tokens`.

    Attributes:
        layout: of the whole sequence, on the CPU.
        group: the ranks.
        order: int64 ``[S]``: tokens rank after rank, each rank's in the order in which it holds them.
        counts: tokens of each rank.
        whole_tiles: no tile is cut, so that each rank can quantize what it holds.
    """

    layout: TileLayout
    group: dist.ProcessGroup
    order: Tensor
    counts: tuple[int, ...]
    whole_tiles: bool
    _copies: Cache = field(default_factory=Cache, repr=False)

    @property
    def size(self) -> int:
        """Ranks."""
        return len(self.counts)

    @property
    def rank(self) -> int:
        """This process's."""
        return dist.get_rank(self.group)

    @property
    def num_local(self) -> int:
        """Tokens that this rank holds."""
        return self.counts[self.rank]

    @property
    def starts(self) -> tuple[int, ...]:
        """First position of each rank in ``order``."""
        return tuple(np.cumsum([0, *self.counts[:-1]]).tolist())

    def describe(self) -> str:
        """One line; part of what ranks agree on."""
        layout = self.layout
        text = f" + {layout.text_len} text ({layout.text_position})" if layout.text_len else ""
        kind = "whole tiles" if self.whole_tiles else "ranges"
        return f"grid {layout.grid}{text}, tile {layout.tile}, {kind} {self.counts}"

    # Tensors ---------------------------------------------------------------------------------------------------------------

    def _on(self, name: str, device: torch.device, make: Any) -> Any:
        return self._copies.get((name, device), lambda: make().to(device))

    @property
    def in_order(self) -> bool:
        """Whether ranks hold the tokens in the order of the sequence."""
        return self._copies.get("in order", lambda: torch.equal(self.order, torch.arange(self.order.numel())))

    def order_on(self, device: torch.device) -> Tensor:
        """``order`` on a device."""
        return self._on("order", device, lambda: self.order)

    def position_on(self, device: torch.device) -> Tensor:
        """:meth:`position` on a device."""
        return self._on("position", device, self.position)

    def local_tokens(self, stream: str, device: torch.device) -> Tensor:
        """:meth:`tokens` of this rank on a device."""
        return self._on(f"tokens {stream}", device, lambda: self.tokens(self.rank, stream))

    def tokens(self, rank: int, stream: str = "all") -> Tensor:
        """int64: the tokens of a rank in its order, of the whole sequence or numbered within the video or the text alone."""
        start = self.starts[rank]
        tokens = self.order[start : start + self.counts[rank]]
        if stream == "all":
            return tokens
        first = self.layout.text_len if self.layout.text_position == "prefix" else 0
        video = (tokens >= first) & (tokens < first + self.layout.num_video_tokens)
        if stream == "video":
            return tokens[video] - first
        return tokens[~video] - (0 if first else self.layout.num_video_tokens)

    def position(self) -> Tensor:
        """int64 ``[S]``: where each token stands in ``order``."""
        inverse = torch.empty_like(self.order)
        inverse[self.order] = torch.arange(self.order.numel(), device="cpu")
        return inverse

    def take(self, x: Tensor, dim: int, stream: str = "all") -> Tensor:
        """This rank's part of ``x``, which every rank has whole, in token order along ``dim``.

        The gradient of ``x`` is what this rank's tokens give; that of the other ranks is theirs.
        """
        _check_stream(stream)
        index = self.local_tokens(stream, x.device)
        video = self.layout.num_video_tokens
        expected = {"all": self.layout.num_tokens, "video": video, "text": self.layout.num_tokens - video}[stream]
        if x.shape[dim] != expected:
            raise ConfigError(
                f"fpsattention.parallel.Sharding.take: x has {x.shape[dim]} tokens in dimension {dim}, expected {expected} ({stream})"
            )
        return x.index_select(dim, index)

    def gather(self, x: Tensor, dim: int, stream: str = "all") -> Tensor:
        """The whole of ``x`` in token order, on every rank, from the parts that the ranks hold.

        Differentiable: its adjoint adds up the gradients of all ranks. So with one loss that every rank computes alike, the *mean* over
        the ranks of a parameter's gradients, which DDP and FSDP take, is the gradient of that loss.
        """
        _check_stream(stream)
        wanted = self.local_tokens(stream, x.device).numel()
        if x.shape[dim] != wanted:
            raise ConfigError(
                f"fpsattention.parallel.Sharding.gather: x has {x.shape[dim]} tokens in dimension {dim}, expected this rank's {wanted}"
            )
        return _Gather.apply(x, dim, self, stream)

    # Tables of the ops -------------------------------------------------------------------------------------------------------

    def slots(self, device: torch.device) -> Tensor:
        """``token_of_slot`` where tokens are numbered as in ``order``: int32 ``[num_slots]``."""

        def make() -> Tensor:
            slots = self.layout.cpu().token_of_slot.long()
            return torch.where(slots < 0, -1, self.position()[slots.clamp_min(0)]).to(torch.int32)

        return self._on("slots", device, make)

    def owner_of_tile(self) -> Tensor:
        """int64 ``[num_tiles]``: the rank that holds a tile. Of whole tiles."""

        def make() -> Tensor:
            layout = self.layout.cpu()
            rank_of_token = torch.empty_like(self.order)
            rank_of_token[self.order] = torch.repeat_interleave(torch.arange(self.size), torch.tensor(self.counts))
            return rank_of_token[layout.token_of_slot.long()[layout.tile_block_offsets[:-1].long() * BLOCK]]

        return self._copies.get("owner of tile", make)

    def owner_of_block(self) -> Tensor:
        """int64 ``[num_blocks]``."""
        return self.owner_of_tile()[self.layout.cpu().tile_of_block.long()]

    def blocks(self, rank: int) -> Tensor:
        """int64: the blocks of a rank, ascending."""
        return self._copies.get(f"blocks {rank}", lambda: torch.nonzero(self.owner_of_block() == rank).squeeze(1))

    def local_tables(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """``token_of_slot`` and ``tile_block_offsets`` of this rank's tiles, tokens numbered as it holds them."""

        def slots() -> Tensor:
            mine = self.slots(torch.device("cpu")).view(-1, BLOCK)[self.blocks(self.rank)].reshape(-1)
            return torch.where(mine < 0, -1, mine - self.starts[self.rank]).to(torch.int32)

        def offsets() -> Tensor:
            sizes = self.layout.cpu().tile_block_offsets.diff()[self.owner_of_tile() == self.rank]
            return torch.cat([sizes.new_zeros(1), sizes.cumsum(0, dtype=torch.int32)])

        return self._on("local slots", device, slots), self._on("local offsets", device, offsets)

    def block_places(self, device: torch.device) -> Tensor | None:
        """Where each block stands among those of rank 0, 1, ...; None: in its own place."""

        def make() -> Tensor:
            return torch.cat([self.blocks(rank) for rank in range(self.size)]).argsort()

        places = self._on("block places", torch.device("cpu"), make)
        if self._copies.get("blocks in order", lambda: torch.equal(places, torch.arange(places.numel()))):
            return None
        return self._on("block places", device, make)

    def extra_rows(self, device: torch.device) -> Tensor:
        """Rows D to D + 7 of ``v8t``, which nobody sends: e4m3 ones in valid slots of the first, as bytes ``[num_blocks, 8, 128]``."""

        def make() -> Tensor:
            valid = (self.layout.cpu().token_of_slot >= 0).view(-1, BLOCK)[:, v_slot_order()]
            rows = torch.zeros(valid.shape[0], V_EXTRA_ROWS, BLOCK, dtype=torch.uint8, device="cpu")
            rows[:, 0] = valid.to(torch.uint8) * 0x38
            return rows

        return self._on("extra rows", device, make)

    def k_mean_sample(self, stride: int, tile_order: bool, device: torch.device) -> tuple[Tensor, int]:
        """Which of this rank's tokens the mean of K is taken over, and how many there are in all: every ``stride``-th of the sequence, as one process
        has it, whose video tokens are in raster or in tile order."""

        def make() -> Tensor:
            place = torch.arange(self.layout.num_tokens)
            if tile_order:
                slots = self.layout.cpu().token_of_slot.long()
                # Tiles of the video come before those of the text.
                video = slots[slots >= 0][: self.layout.num_video_tokens]
                place[video] = torch.arange(video.numel()) + video.min()
            return torch.nonzero(place[self.tokens(self.rank)] % stride == 0).squeeze(1)

        return self._on(f"sample {stride} {tile_order}", device, make), -(-self.layout.num_tokens // stride)


def _check_stream(stream: str) -> None:
    if stream not in STREAMS:
        raise ConfigError(
            f"fpsattention.parallel.Sharding: stream {stream!r}, expected one of {', '.join(map(repr, STREAMS))}"
        )


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, sharding: Sharding, stream: str) -> Tensor:
        ctx.dim, ctx.sharding, ctx.stream = dim, sharding, stream
        shapes = [list(x.shape) for _ in range(sharding.size)]
        for rank, shape in enumerate(shapes):
            shape[dim] = sharding.tokens(rank, stream).numel()
        sizes = [num_bytes(shape, x.dtype) for shape in shapes]
        parts = exchange([to_bytes(x)] * sharding.size, sizes, sharding.group, "gather").wait()
        whole = torch.cat([from_bytes(part, shape, x.dtype) for part, shape in zip(parts, shapes, strict=True)], dim)
        order = torch.cat([sharding.tokens(rank, stream) for rank in range(sharding.size)])
        return whole.index_select(dim, order.argsort().to(x.device))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        sharding, dim = ctx.sharding, ctx.dim
        pieces = [
            grad.index_select(dim, sharding.tokens(rank, ctx.stream).to(grad.device)) for rank in range(sharding.size)
        ]
        mine = pieces[sharding.rank]
        sizes = [num_bytes(mine.shape, grad.dtype)] * sharding.size
        parts = exchange([to_bytes(piece) for piece in pieces], sizes, sharding.group, "gather").wait()
        total = from_bytes(parts[0], mine.shape, mine.dtype).float()
        for part in parts[1:]:
            total = total + from_bytes(part, mine.shape, mine.dtype).float()
        return total.to(grad.dtype), None, None, None


def shard_tokens(layout: TileLayout, mesh: Any = None, *, whole_tiles: bool = True, streams: str = "apart") -> Sharding:
    """Deal the tokens of a sequence to the ranks of a group.

    Args:
        layout: tiles of the sequence.
        mesh: a 1-D DeviceMesh or a ProcessGroup; None: all processes.
        whole_tiles: whole tiles, in the order of the tiles, so that q, k and v can be quantized before they are sent; False: ranges of tokens, as
            ``torch.tensor_split`` cuts them.
        streams: of ranges: "apart": video and text are cut one by one, and a rank holds a part of each; "joint": the sequence is cut as it is.

    A rank holds its video and text tokens in the order of the sequence: text last or first. Whole tiles are cut so that the numbers of
    tokens are as equal as tiles allow; text tiles (at most 512 tokens) go to the first ranks that have none.

    Raises:
        ConfigError: no process group, or fewer video tiles (tokens) than ranks.
    """
    check_layout(layout, "parallel.shard_tokens")
    if streams not in ("apart", "joint"):
        raise ConfigError(f"fpsattention.parallel.shard_tokens: streams {streams!r}, expected 'apart' or 'joint'")
    return _shard_tokens(layout.cpu(), group_of(mesh, "parallel.shard_tokens"), bool(whole_tiles), streams)


@lru_cache(maxsize=64)
def _shard_tokens(layout: TileLayout, group: dist.ProcessGroup, whole_tiles: bool, streams: str) -> Sharding:
    size = dist.get_world_size(group)
    available, what = (layout.num_video_tiles, "video tiles") if whole_tiles else (layout.num_video_tokens, "tokens")
    if available < size:
        raise ConfigError(
            f"fpsattention.parallel.shard_tokens: grid {layout.grid} has {available} {what}, expected at least one for each of the "
            f"{size} ranks: use fewer ranks, or a smaller tile"
        )
    with plain_tensors():
        if whole_tiles:
            video, text = _by_tiles(layout, size)
        elif streams == "joint":
            video, text = list(torch.arange(layout.num_tokens).tensor_split(size)), [torch.arange(0)] * size
        else:
            first = layout.text_len if layout.text_position == "prefix" else 0
            of_video = torch.arange(layout.num_video_tokens) + first
            of_text = torch.arange(layout.text_len) + (0 if first else layout.num_video_tokens)
            video, text = list(of_video.tensor_split(size)), list(of_text.tensor_split(size))
        prefix = layout.text_position == "prefix"
        ranks = [torch.cat([t, v] if prefix else [v, t]) for v, t in zip(video, text, strict=True)]
        return Sharding(layout, group, torch.cat(ranks), tuple(rank.numel() for rank in ranks), whole_tiles)


def _by_tiles(layout: TileLayout, size: int) -> tuple[list[Tensor], list[Tensor]]:
    """Video and text tokens of every rank, tile by tile."""
    slots, offsets = layout.token_of_slot.long(), (layout.tile_block_offsets.long() * BLOCK).tolist()
    tiles = [slots[a:b][slots[a:b] >= 0] for a, b in zip(offsets, offsets[1:], strict=False)]
    count = layout.num_video_tiles
    bounds = cut_evenly([tile.numel() for tile in tiles[:count]], size)
    video = [torch.cat(tiles[a:b]) for a, b in zip(bounds, bounds[1:], strict=False)]
    shares = np.array_split(np.arange(count, layout.num_tiles), size)
    return video, [torch.cat([tiles[i] for i in share]) if len(share) else slots[:0] for share in shares]


def cut_evenly(weights: Sequence[int], parts: int) -> list[int]:
    """Bounds of ``parts`` non-empty ranges, each near an equal share of the weights: every bound is the one nearest its target."""
    sums = np.cumsum([0, *weights])
    bounds = [0]
    for part in range(1, parts):
        nearest = int(np.abs(sums - sums[-1] * part / parts).argmin())
        bounds.append(min(max(nearest, bounds[-1] + 1), len(weights) - (parts - part)))
    return [*bounds, len(weights)]
