"""Block masks: which KV blocks the queries of a tile visit, in which order.

A pattern is a :class:`BlockMask`: per query tile a list of KV blocks (128 slots). Kernels know nothing else, so a new pattern is
a new function that returns one. Lists of the builders start with the query's own tile, then ascend.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError, UnsupportedError
from . import exact, flex
from .plain import Cache, constant, is_fake, on_default_stream, plain_tensors
from .tiles import _CLEAR_WITH_PLANS, BLOCK, TEXT_TILE, Int3, TileLayout, check_layout, core, int3, shown

_MASK_CACHE_SIZE = 64


class Lists(NamedTuple):
    """What the ops read of a mask and its layout, in their order; shapes as in :class:`BlockMask` and ``TileLayout``."""

    token_of_slot: Tensor
    tile_of_block: Tensor
    tile_block_offsets: Tensor
    kv_num_blocks: Tensor
    kv_indices: Tensor
    q_num_blocks: Tensor | None  # the transpose: only for a backward
    q_indices: Tensor | None

    def to(self, device: torch.device | str) -> Lists:
        """The same on ``device``."""
        moved = (x if x is None else x.to(device) for x in self)
        return Lists(*moved)  # type: ignore[arg-type]  # None stays where None was


@dataclass(frozen=True, eq=False, repr=False)
class BlockMask:
    """Lists of KV blocks, one per query tile. Immutable; the tensors are shared, so do not write to them.

    Args:
        layout: the tiles and slots.
        kv_num_blocks: int32 ``[Bm, Hm, num_tiles]``, length of each list; ``Bm`` is 1 or B, ``Hm`` is 1 or H.
        kv_indices: int32 ``[Bm, Hm, num_tiles, max_kv]``, KV blocks in visiting order; entries beyond the length do not matter.

    Shapes, dtypes and devices are always checked. Values (range, duplicates) are checked here for tensors on the CPU; elsewhere
    that would wait for the device: call :meth:`validate` if the lists are not known to be right.

    Raises:
        ConfigError: naming the place of the first mistake.
    """

    layout: TileLayout
    kv_num_blocks: Tensor
    kv_indices: Tensor
    _transposed: tuple[Tensor, Tensor] | None = field(default=None, repr=False)
    _copies: Cache | None = field(
        default=None, repr=False
    )  # by device, shared by the copies; None: made anew when asked for
    _trusted: bool = field(default=False, repr=False)  # lists of a builder or of another mask: nothing to check

    def __post_init__(self) -> None:
        if self._trusted:
            return
        _check_structure(self.layout, self.kv_num_blocks, self.kv_indices)
        if torch.compiler.is_compiling() or is_fake(self.kv_indices):
            return
        values: dict[str, Any] = {"_copies": Cache()}
        for name in ("kv_num_blocks", "kv_indices"):
            if getattr(self, name).is_inference():
                with plain_tensors():
                    values[name] = getattr(self, name).clone()
        if self.device.type == "cpu":
            self.validate()
            values["_transposed"] = _transpose_on_cpu(self.layout, self.kv_num_blocks, self.kv_indices)
        for name, value in values.items():
            object.__setattr__(self, name, value)  # the dataclass is frozen

    def __repr__(self) -> str:
        lists = "x".join(map(str, self.kv_num_blocks.shape))
        return f"BlockMask({lists} lists of up to {self.kv_indices.shape[-1]} KV blocks, {self.layout!r})"

    @classmethod
    def from_tiles(cls, layout: TileLayout, tiles: Tensor | np.ndarray | Sequence[Any]) -> BlockMask:
        """From a boolean matrix: ``tiles[..., i, j]`` says that query tile i attends key tile (or KV block) j.

        Args:
            tiles: bool ``[num_tiles, num_tiles]`` or ``[num_tiles, num_blocks]``, with ``[Hm]`` or ``[Bm, Hm]`` in front if wanted.
                Text tiles are the last rows and columns; nothing is added to what the matrix says. Read on the CPU.
        """
        check_layout(layout, "BlockMask.from_tiles")
        try:
            matrix = tiles if isinstance(tiles, Tensor) else torch.as_tensor(tiles, device="cpu")
        except (TypeError, ValueError, RuntimeError, OverflowError):
            raise ConfigError(
                f"fpsattention.BlockMask.from_tiles: tiles {shown(tiles)}, expected a boolean matrix"
            ) from None
        if matrix.is_nested or matrix.is_meta:
            raise ConfigError("fpsattention.BlockMask.from_tiles: tiles is a nested or a meta tensor, expected values")
        shape = tuple(matrix.shape)
        if matrix.dtype != torch.bool:
            raise ConfigError(f"fpsattention.BlockMask.from_tiles: tiles is {matrix.dtype}, expected torch.bool")
        columns = (layout.num_tiles, layout.num_blocks)
        if not 2 <= matrix.ndim <= 4 or matrix.shape[-2] != layout.num_tiles or matrix.shape[-1] not in columns:
            raise ConfigError(
                f"fpsattention.BlockMask.from_tiles: tiles has shape {shape}, expected [num_tiles, num_tiles] = "
                f"[{columns[0]}, {columns[0]}] or [num_tiles, num_blocks] = [{columns[0]}, {columns[1]}], with [Hm] or [Bm, Hm] "
                "in front if expected"
            )
        if 0 in shape:
            raise ConfigError(f"fpsattention.BlockMask.from_tiles: tiles has shape {shape}, expected no empty size")
        matrix = matrix.reshape((1,) * (4 - matrix.ndim) + shape)
        with plain_tensors():
            offsets = layout.cpu().tile_block_offsets.numpy()
            mask = _from_numpy(layout.cpu(), core().lists_from_matrix(offsets, matrix.cpu().contiguous().numpy()))
        return mask.to(layout.device)

    @classmethod
    def from_keep(cls, layout: TileLayout, keep: Tensor, max_kv: int | None = None) -> BlockMask:
        """From a boolean matrix on any device, without waiting for it: fixed shapes, so it can be compiled and captured.

        Args:
            layout: the tiles; its tables are moved to the device of ``keep``.
            keep: bool ``[Bm, Hm, num_tiles, num_blocks]``: query tile i visits KV block j. Nothing is added to it.
            max_kv: width of the lists, at least the longest of them, if the caller knows one (a top-k does): list memory is
                ``Bm * Hm * num_tiles * max_kv`` integers instead of ``... * num_blocks``. On the CPU a row that does not fit is an
                error; elsewhere, where reading it would wait, its last entries (the highest blocks) are left out.

        Lists are those of :meth:`from_tiles`: the own tile first, then ascending.

        Raises:
            ConfigError: on another dtype, shape or width.
        """
        wanted = (layout.num_tiles, layout.num_blocks)
        if not isinstance(keep, Tensor) or keep.dtype != torch.bool:
            came = keep.dtype if isinstance(keep, Tensor) else type(keep).__name__
            raise ConfigError(f"fpsattention.BlockMask.from_keep: keep is {came}, expected a torch.bool tensor")
        if keep.ndim != 4 or tuple(keep.shape[2:]) != wanted or 0 in keep.shape:
            raise ConfigError(
                f"fpsattention.BlockMask.from_keep: keep has shape {tuple(keep.shape)}, expected [Bm, Hm, num_tiles, num_blocks] = "
                f"[Bm, Hm, {wanted[0]}, {wanted[1]}]"
            )
        width = layout.num_blocks if max_kv is None else max_kv
        if not 1 <= width <= layout.num_blocks:
            raise ConfigError(
                f"fpsattention.BlockMask.from_keep: max_kv {max_kv}, expected 1 to num_blocks = {layout.num_blocks}"
            )
        layout = layout.to(keep.device)
        own = layout.tile_of_block == torch.arange(layout.num_tiles, device=keep.device).unsqueeze(-1)
        counts, indices = _lists_of_keep(keep, own, width)
        if width < layout.num_blocks:
            if keep.device.type == "cpu" and not torch.compiler.is_compiling() and not is_fake(keep):
                longest = int(counts.max())
                if longest > width:
                    raise ConfigError(
                        f"fpsattention.BlockMask.from_keep: max_kv {max_kv}, expected at least the longest list, {longest} blocks"
                    )
            counts = counts.clamp_max(width)
        return trusted_mask(layout, counts, indices)

    @classmethod
    def stack(cls, masks: Sequence[BlockMask]) -> BlockMask:
        """Several masks of one layout as one batch, lists padded to a common length: ``Bm`` is the sum of theirs.

        With one mask per level, ``stack(levels).select(level)`` gives every sample its own, without leaving the device.
        """
        if not isinstance(masks, Sequence) or not masks or not all(isinstance(mask, BlockMask) for mask in masks):
            raise ConfigError(
                f"fpsattention.BlockMask.stack: masks {shown(masks)}, expected a list of one BlockMask or more"
            )
        first = masks[0]
        heads = max(mask.kv_num_blocks.shape[1] for mask in masks)
        width = max(mask.kv_indices.shape[-1] for mask in masks)
        for i, mask in enumerate(masks):
            if not mask.layout.same_as(first.layout):
                raise ConfigError(
                    f"fpsattention.BlockMask.stack: masks[{i}] has tiles {mask.layout.tile} on grid {mask.layout.grid}, masks[0] "
                    f"has {first.layout.tile} on {first.layout.grid}, expected one layout"
                )
            if mask.kv_num_blocks.shape[1] not in (1, heads):
                raise ConfigError(
                    f"fpsattention.BlockMask.stack: masks[{i}] has {mask.kv_num_blocks.shape[1]} heads, expected 1 or {heads}"
                )
            if mask.device != first.device:
                raise ConfigError(
                    f"fpsattention.BlockMask.stack: masks[{i}] is on {mask.device}, masks[0] on {first.device}, expected one device"
                )
        return cls(first.layout, *_stacked(masks, heads, width))

    def select(self, index: Tensor) -> BlockMask:
        """The batch entries ``index`` (integer ``[B]``, on the mask's device) as a new mask: one gather, no synchronization.

        The transpose is gathered, too, where the mask has it.
        """
        if not isinstance(index, Tensor) or index.is_nested:
            raise ConfigError(
                f"fpsattention.BlockMask.select: index {shown(index)}, expected an int32 or int64 tensor [B] on {self.device}"
            )
        if index.ndim != 1 or index.dtype not in (torch.int32, torch.int64) or index.device != self.device:
            raise ConfigError(
                f"fpsattention.BlockMask.select: index is {index.dtype} {tuple(index.shape)} on {index.device}, expected int32 or "
                f"int64 [B] on {self.device}"
            )
        try:
            return self._selected(index)
        except IndexError as error:  # on the CPU; elsewhere a wrong index cannot be seen without waiting
            raise ConfigError(
                f"fpsattention.BlockMask.select: index holds a value outside of 0 to {self.shape[0] - 1} ({error})"
            ) from None

    def _selected(self, index: Tensor) -> BlockMask:
        transposed = None
        if self._transposed is not None:
            transposed = (self._transposed[0].index_select(0, index), self._transposed[1].index_select(0, index))
        return trusted_mask(
            self.layout, self.kv_num_blocks.index_select(0, index), self.kv_indices.index_select(0, index), transposed
        )

    @property
    def device(self) -> torch.device:
        """Where the lists are."""
        return self.kv_indices.device

    @property
    def shape(self) -> tuple[int, int]:
        """``(Bm, Hm)``."""
        return self.kv_num_blocks.shape[0], self.kv_num_blocks.shape[1]

    @property
    def q_num_blocks(self) -> Tensor:
        """int32 ``[Bm, Hm, num_blocks]``: see :meth:`transpose`."""
        return self.transpose()[0]

    @property
    def q_indices(self) -> Tensor:
        """int32 ``[Bm, Hm, num_blocks, max_q]``: see :meth:`transpose`."""
        return self.transpose()[1]

    def with_exact(self, ranges: Sequence[tuple[int, int]]) -> BlockMask:
        """The same mask, in which ``(start, stop)`` ranges of tokens (numbered as in q) attend everything and are attended by everything.

        Lists know tiles and blocks, so everything that shares a tile or a block with such a token does, too. Waits for the
        device, unless the mask is on the CPU. Raises ConfigError for ranges outside of the sequence.
        """
        return exact.with_exact(self, exact.token_ranges(ranges, self.layout.num_tokens, "BlockMask.with_exact"))

    def transpose(self) -> tuple[Tensor, Tensor]:
        """``(q_num_blocks, q_indices)``: per KV block the query blocks that visit it, ascending.

        Masks made on the CPU have it from the start, with lists as wide as the longest, and take it along to other devices. For a mask
        made elsewhere it is computed at every call, with lists as wide as there are blocks, so that nothing waits: keep it with
        :meth:`with_transpose` where the mask serves more than one call.
        """
        return self.with_transpose()._transposed  # type: ignore[return-value]  # it has one

    def with_transpose(self) -> BlockMask:
        """The same mask, holding its transpose."""
        if self._transposed is not None:
            return self
        if self.device.type == "cpu" and not torch.compiler.is_compiling() and not is_fake(self.kv_indices):
            transposed = _transpose_on_cpu(self.layout, self.kv_num_blocks, self.kv_indices)
        else:
            transposed = _transpose_on_device(self)
        return trusted_mask(self.layout, self.kv_num_blocks, self.kv_indices, transposed)

    def lists(self, transposed: bool) -> Lists:
        """The tables of the ops; ``transposed``: in any case with the lists that a backward walks, else where the mask has them."""
        layout = self.layout
        return Lists(
            layout.token_of_slot, layout.tile_of_block, layout.tile_block_offsets, self.kv_num_blocks, self.kv_indices,
            *(self.transpose() if transposed else self._transposed or (None, None)),
        )  # fmt: skip

    @property
    def density(self) -> float:
        """Attended (query token, key token) pairs / S^2, averaged over batch and heads. Exact counts of valid tokens."""
        return float(self.densities().mean())

    @property
    def sparsity(self) -> float:
        """``1 - density``."""
        return 1.0 - self.density

    def densities(self) -> Tensor:
        """Density of every batch entry and head, float64 ``[Bm, Hm]`` on the CPU."""
        layout = self.layout.cpu()
        with plain_tensors():
            keys = layout.block_tokens.long()[self.kv_indices.cpu().long().clamp(0, layout.num_blocks - 1)]
            listed = torch.arange(keys.shape[-1], device="cpu") < self.kv_num_blocks.cpu().unsqueeze(-1)
            pairs = ((keys * listed).sum(-1) * layout.tile_tokens.long()).sum(-1)
            return pairs.double() / float(layout.num_tokens) ** 2

    def validate(self) -> BlockMask:
        """Check every value (range, duplicates), copying to the CPU where needed; returns the mask itself."""
        with plain_tensors():
            self._validate()
        return self

    def _validate(self) -> None:
        core().validate_lists(self.kv_num_blocks.cpu().numpy(), self.kv_indices.cpu().numpy(), self.layout.num_blocks)

    def to(self, device: torch.device | str) -> BlockMask:
        """The same mask, its layout and its transpose included, on ``device``. The copy is made once and kept, like the layout's."""
        layout = self.layout.to(device)
        if layout.device == self.device:
            return self if layout is self.layout else self._replaced(layout, lambda x: x)
        if self._copies is None or torch.compiler.is_compiling():
            return self._moved(layout)
        self._copies.get(self.device, lambda: self)
        return self._copies.get(layout.device, lambda: self._moved(layout))

    def _moved(self, layout: TileLayout) -> BlockMask:
        with on_default_stream(layout.device):
            return self._replaced(layout, lambda x: x.to(layout.device))

    def _replaced(self, layout: TileLayout, move: Callable[[Tensor], Tensor]) -> BlockMask:
        transposed = None if self._transposed is None else (move(self._transposed[0]), move(self._transposed[1]))
        return trusted_mask(layout, move(self.kv_num_blocks), move(self.kv_indices), transposed, self._copies)

    def to_blocks(self) -> Tensor:
        """Bool ``[Bm, Hm, num_tiles, num_blocks]``: query tile i visits KV block j."""
        listed = torch.arange(self.kv_indices.shape[-1], device=self.device) < self.kv_num_blocks.unsqueeze(-1)
        # Unlisted entries go to an extra column, which is dropped.
        columns = torch.where(listed, self.kv_indices, self.layout.num_blocks).long()
        blocks = torch.zeros(
            *self.kv_num_blocks.shape, self.layout.num_blocks + 1, dtype=torch.bool, device=self.device
        )
        return blocks.scatter(-1, columns, True)[..., :-1]

    def to_token_mask(self) -> Tensor:
        """Bool ``[Bm, Hm, S, S]``: query token i attends key token j. Quadratic in S: for tests and the reference."""
        block_of_token = (self.layout.slot_of_token // BLOCK).to(self.device)
        tile_of_token = self.layout.tile_of_block.to(self.device)[block_of_token]
        return self.to_blocks()[:, :, tile_of_token][..., block_of_token]

    def to_flex(self) -> torch.nn.attention.flex_attention.BlockMask:
        """The same pattern for ``flex_attention`` over slot-ordered q, k, v; padding keys are masked. See :func:`flex.to_flex`."""
        return flex.to_flex(self)

    @classmethod
    def from_flex(cls, layout: TileLayout, block_mask: torch.nn.attention.flex_attention.BlockMask) -> BlockMask:
        """From a FlexAttention mask over the slots of ``layout``. See :func:`flex.from_flex`."""
        return cls.from_tiles(layout, flex.from_flex(layout, block_mask))

    def describe(self) -> str:
        """A few lines for people."""
        counts = self.kv_num_blocks
        shortest, longest = int(counts.min()), int(counts.max())
        length = str(shortest) if shortest == longest else f"{shortest} to {longest}"
        return "\n".join(
            [
                self.layout.describe(),
                f"mask of {self.shape[0]} x {self.shape[1]} (batch x heads): every tile visits {length} of "
                f"{self.layout.num_blocks} KV blocks",
                f"density {self.density:.4f}: {100 * self.sparsity:.1f} % of the (query, key) pairs are skipped",
            ]
        )


def sliding_tile_mask(layout: TileLayout, window: Sequence[int]) -> BlockMask:
    """Sliding tile window (STA, arXiv 2502.04507): every video tile attends the ``window`` of tiles around it.

    Args:
        layout: the tiles.
        window: ``(wT, wH, wW)`` in tiles. On an axis of ``n`` tiles the window of tile ``c`` starts at
            ``clamp(c - w // 2, 0, n - w)``: at a border it is shifted inwards, so every tile attends the same number of tiles.

    Text tiles are attended by all and attend all.

    Raises:
        ConfigError: if a size is below 1 or larger than the grid of tiles.
    """
    return _windowed(check_layout(layout, "sliding_tile_mask"), int3(window, "sliding_tile_mask: window"))


def dense_mask(layout: TileLayout) -> BlockMask:
    """Every tile attends every tile."""
    return _windowed(check_layout(layout, "dense_mask"), layout.tile_grid)


def _windowed(layout: TileLayout, window: Int3) -> BlockMask:
    if not torch.compiler.is_compiling():
        return cached_mask(layout, window)
    fields = _window_fields(layout.tile_sizes, layout.num_tiles, layout.num_blocks, layout.text_len, window)
    kv_num_blocks, kv_indices, *transposed = (x.to(layout.device) for x in fields)
    return trusted_mask(layout, kv_num_blocks, kv_indices, (transposed[0], transposed[1]), None)


@constant
def _window_fields(
    tile_sizes: Sequence[Sequence[int]], num_tiles: int, num_blocks: int, text_len: int, window: Int3
) -> tuple[Tensor, ...]:
    """The lists of a window from the sizes of tiles, which a trace knows: the tables themselves it does not read."""
    tokens = [t * h * w for t, h, w in itertools.product(*tile_sizes)]
    tokens += [min(TEXT_TILE, text_len - start) for start in range(0, text_len, TEXT_TILE)]
    offsets = np.cumsum([0, *(-(-n // BLOCK) for n in tokens)], dtype=np.int32)
    if (len(tokens), offsets[-1]) != (num_tiles, num_blocks):
        raise UnsupportedError(
            f"fpsattention.sliding_tile_mask: a layout of {num_tiles} tiles and {num_blocks} blocks whose tile sizes make {len(tokens)} "
            f"and {offsets[-1]}, expected one of fpsattention.plan: make its mask outside of torch.compile"
        )
    with plain_tensors():
        lists = core().sliding_tile_lists(tuple(len(sizes) for sizes in tile_sizes), offsets, window)
        return tuple(torch.from_numpy(x) for x in (*lists, *core().transpose_lists(*lists, offsets)))


@lru_cache(maxsize=_MASK_CACHE_SIZE)
def cached_mask(layout: TileLayout, window: Int3) -> BlockMask:
    """:func:`sliding_tile_mask` from the cache, also while a compiler is at work."""
    with plain_tensors():
        offsets = layout.cpu().tile_block_offsets.numpy()
        mask = _from_numpy(layout.cpu(), core().sliding_tile_lists(layout.tile_grid, offsets, window))
    return mask.to(layout.device)


_CLEAR_WITH_PLANS.append(cached_mask.cache_clear)


def _from_numpy(layout: TileLayout, lists: tuple[np.ndarray, np.ndarray]) -> BlockMask:
    kv_num_blocks, kv_indices = torch.from_numpy(lists[0]), torch.from_numpy(lists[1])
    return trusted_mask(
        layout, kv_num_blocks, kv_indices, _transpose_on_cpu(layout, kv_num_blocks, kv_indices), Cache()
    )


def trusted_mask(
    layout: TileLayout,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    transposed: tuple[Tensor, Tensor] | None = None,
    copies: Cache | None = None,
) -> BlockMask:
    """A mask whose lists come from a builder or from another mask: nothing to check."""
    return BlockMask(layout, kv_num_blocks, kv_indices, transposed, copies, True)


def _stacked(masks: Sequence[BlockMask], heads: int, width: int) -> tuple[Tensor, Tensor]:
    counts = torch.cat([mask.kv_num_blocks.expand(-1, heads, -1) for mask in masks])
    indices = [torch.nn.functional.pad(mask.kv_indices, (0, width - mask.kv_indices.shape[-1])) for mask in masks]
    return counts, torch.cat([i.expand(-1, heads, -1, -1) for i in indices])


def _transpose_on_cpu(layout: TileLayout, kv_num_blocks: Tensor, kv_indices: Tensor) -> tuple[Tensor, Tensor]:
    with plain_tensors():
        offsets = layout.cpu().tile_block_offsets.numpy()
        counts, indices = core().transpose_lists(kv_num_blocks.numpy(), kv_indices.numpy(), offsets)
        return torch.from_numpy(counts), torch.from_numpy(indices)


def _lists_of_keep(keep: Tensor, first: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Lengths ``[...]`` and lists ``[..., width]`` (int32) of the true columns of ``keep [..., n]``, those of ``first [..., n]``
    before the others, each ascending. Two running sums and a scatter: linear, of fixed shapes, the same bits every time."""
    leading = keep & first
    others = keep & ~first
    num_leading = leading.sum(-1, keepdim=True, dtype=torch.int32)
    place = torch.where(
        leading, leading.cumsum(-1, dtype=torch.int32), num_leading + others.cumsum(-1, dtype=torch.int32)
    )
    # Unlisted columns, and those beyond the width, go to an extra entry, which is dropped.
    place = torch.where(keep & (place <= width), place - 1, width)
    columns = torch.arange(keep.shape[-1], dtype=torch.int32, device=keep.device).expand(keep.shape)
    lists = torch.zeros(*keep.shape[:-1], width + 1, dtype=torch.int32, device=keep.device)
    lists.scatter_(-1, place.long(), columns)
    return keep.sum(-1, dtype=torch.int32), lists[..., :-1].contiguous()


def _transpose_on_device(mask: BlockMask) -> tuple[Tensor, Tensor]:
    """The transpose with fixed shapes: no synchronization. Two kernels on a GPU, else torch operations."""
    if mask.device.type == "cuda":
        from ..ops.blocks import MAX_BLOCKS
        from ..ops.core import sm90_missing

        blocks = mask.layout.num_blocks
        if blocks <= MAX_BLOCKS and sm90_missing() is None:
            offsets = mask.layout.tile_block_offsets.to(mask.device)
            lists = mask.kv_num_blocks.contiguous(), mask.kv_indices.contiguous()
            made: tuple[Tensor, Tensor] = torch.ops.fpsattn.transpose_blocks(
                *lists, offsets, num_blocks=blocks, width=blocks
            )
            return made
    query_blocks = mask.to_blocks()[:, :, mask.layout.tile_of_block.to(mask.device)]  # [Bm, Hm, query block, KV block]
    visits = query_blocks.transpose(-1, -2)
    return _lists_of_keep(visits, torch.zeros_like(visits[..., :1, :]), visits.shape[-1])


def _check_structure(layout: TileLayout, kv_num_blocks: Tensor, kv_indices: Tensor) -> None:
    check_layout(layout, "BlockMask")
    for name, tensor, ndim, wanted in (
        ("kv_num_blocks", kv_num_blocks, 3, "[Bm, Hm, num_tiles]"),
        ("kv_indices", kv_indices, 4, "[Bm, Hm, num_tiles, max_kv]"),
    ):
        if not isinstance(tensor, Tensor):
            raise ConfigError(f"fpsattention.BlockMask: {name} is {type(tensor).__name__}, expected a torch.Tensor")
        if tensor.dtype != torch.int32:
            raise ConfigError(f"fpsattention.BlockMask: {name} is {tensor.dtype}, expected torch.int32")
        if tensor.ndim != ndim or tensor.shape[2] != layout.num_tiles or 0 in tensor.shape:
            raise ConfigError(
                f"fpsattention.BlockMask: {name} has shape {tuple(tensor.shape)}, expected {wanted} with num_tiles = "
                f"{layout.num_tiles}: a row per query tile, video tiles first, then text tiles"
            )
    if kv_num_blocks.shape != kv_indices.shape[:3]:
        raise ConfigError(
            f"fpsattention.BlockMask: kv_indices has shape {tuple(kv_indices.shape)}, expected the first three sizes of "
            f"kv_num_blocks {tuple(kv_num_blocks.shape)}"
        )
    if kv_num_blocks.device != kv_indices.device:
        raise ConfigError(
            f"fpsattention.BlockMask: kv_num_blocks is on {kv_num_blocks.device} and kv_indices on {kv_indices.device}, expected "
            "one device"
        )
