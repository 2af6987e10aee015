"""Tiles of a video token grid: which token sits in which slot.

A *tile* is a box of the ``(T, H, W)`` grid; it owns ``ceil(tokens / 128)`` whole blocks of 128 slots, valid slots first. Video
tiles come in raster order of the tile grid, then the text tiles (at most 512 tokens each). Words: ``docs/layout.md``.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import BuildError, ConfigError, UnsupportedError
from .plain import Cache, constant, on_default_stream, plain_tensors

BLOCK = 128  # slots of a block
TEXT_TILE = 512  # tokens of a text tile, the last one may have fewer
TEXT_POSITIONS = ("suffix", "prefix", "none")
_PLAN_CACHE_SIZE = 64

Int3 = tuple[int, int, int]
TABLES = (
    "token_of_slot",
    "slot_of_token",
    "tile_of_block",
    "tile_block_offsets",
    "tile_tokens",
)  # tensors of a TileLayout


@dataclass(frozen=True, eq=False, repr=False)
class TileLayout:
    """Which token sits in which slot. Made by :func:`plan`; the tensors are shared, so do not write to them.

    Any other order of the tokens (a semantic permutation, say) is this same class with another ``token_of_slot`` and its
    inverse: see :meth:`permuted`.
    """

    grid: Int3  # video tokens (T, H, W)
    tile: Int3  # nominal tile, the largest size along each axis
    tile_grid: Int3  # tiles along each axis
    tile_sizes: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]  # tokens along each axis, tile by tile
    text_len: int
    text_position: str  # "suffix", "prefix" or "none"
    num_tokens: int  # S: video and text
    num_tiles: int  # video and text
    num_blocks: int
    num_slots: int  # num_blocks * 128
    token_of_slot: Tensor  # int32 [num_slots], -1 in padding
    slot_of_token: Tensor  # int32 [num_tokens]
    tile_of_block: Tensor  # int32 [num_blocks]
    tile_block_offsets: Tensor  # int32 [num_tiles + 1], first block of each tile
    tile_tokens: Tensor  # int32 [num_tiles], valid tokens of each tile
    _copies: Cache | None = None  # by device, shared by the copies; None: made anew whenever asked for

    def __repr__(self) -> str:
        text = f", text_len={self.text_len}, text_position={self.text_position!r}" if self.text_len else ""
        return (
            f"TileLayout(grid={self.grid}, tile={self.tile}{text}: {self.num_tiles} tiles, {self.num_blocks} blocks, "
            f"utilization {self.utilization:.3f}, on {self.device})"
        )

    @property
    def utilization(self) -> float:
        """Tokens per slot: 1 means no padding."""
        return self.num_tokens / self.num_slots

    @property
    def num_video_tiles(self) -> int:
        """Tiles before the text tiles."""
        return self.tile_grid[0] * self.tile_grid[1] * self.tile_grid[2]

    @property
    def num_video_tokens(self) -> int:
        """T * H * W."""
        return self.grid[0] * self.grid[1] * self.grid[2]

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.token_of_slot.device

    @property
    def block_tokens(self) -> Tensor:
        """Valid slots of each block, int32 ``[num_blocks]``."""
        return (self.token_of_slot.view(-1, BLOCK) >= 0).sum(-1, dtype=torch.int32)

    def to(self, device: torch.device | str) -> TileLayout:
        """The same layout with its tensors on ``device``. The copy is made once and kept."""
        device = _canonical(device)
        if device == self.device:
            return self
        if self._copies is None or torch.compiler.is_compiling():
            return self._moved(device)
        self._copies.get(self.device, lambda: self)
        return self._copies.get(device, lambda: self._moved(device))

    def _moved(self, device: torch.device) -> TileLayout:
        with on_default_stream(device):
            return replace(self, **{name: getattr(self, name).to(device) for name in TABLES})

    def cpu(self) -> TileLayout:
        """``to("cpu")``."""
        return self.to("cpu")

    def permuted(self, token_order: Tensor) -> TileLayout:
        """The same tiles filled with other tokens: token ``i`` of this layout's order is replaced by ``token_order[i]``.

        Args:
            token_order: integer ``[num_tokens]``, a permutation of all tokens, in the order of the valid slots.
        """
        if not isinstance(token_order, Tensor) or token_order.is_floating_point() or token_order.dtype == torch.bool:
            raise ConfigError(
                f"fpsattention.TileLayout.permuted: token_order {shown(token_order)}, expected a tensor of integers "
                f"[{self.num_tokens}]"
            )
        with plain_tensors():
            order = token_order.to(self.device, torch.int32)
            expected = torch.arange(self.num_tokens, dtype=torch.int32, device=self.device)
            if order.shape != expected.shape or not torch.equal(order.sort().values, expected):
                raise ConfigError(
                    f"fpsattention.TileLayout.permuted: token_order {tuple(token_order.shape)} is not a permutation of the "
                    f"{self.num_tokens} tokens, expected every token exactly once"
                )
            valid = (self.token_of_slot >= 0).nonzero().squeeze(1)
            token_of_slot = self.token_of_slot.clone()
            token_of_slot[valid] = order
            slot_of_token = torch.empty_like(self.slot_of_token)
            slot_of_token[order.long()] = valid.to(torch.int32)
            return replace(self, token_of_slot=token_of_slot, slot_of_token=slot_of_token, _copies=Cache())

    def in_tile_order(self) -> TileLayout:
        """The same tiles for a sequence whose video tokens come in the order of the slots already; other tokens stay where they are.

        Then the tokens of a block are consecutive rows of the sequence, and what is written in token order is in tile order, too.
        """
        with plain_tensors():
            order = self.token_of_slot[self.token_of_slot >= 0]  # video tiles come first
            return self.permuted(
                torch.cat([order[: self.num_video_tokens].sort().values, order[self.num_video_tokens :]])
            )

    def to_tile_order(self) -> Tensor:
        """int64 ``[T * H * W]``: the video token, in raster order, that comes i-th in tile order."""
        with plain_tensors():
            video = self.token_of_slot[self.token_of_slot >= 0][: self.num_video_tokens].long()
            return video - video.min()

    def same_as(self, other: TileLayout) -> bool:
        """True if tokens, slots and tiles are the same (wherever the tensors are)."""
        a, b = self.cpu(), check_layout(other, "TileLayout.same_as").cpu()
        return a is b or (
            (a.grid, a.tile_sizes, a.text_len, a.text_position) == (b.grid, b.tile_sizes, b.text_len, b.text_position)
            and torch.equal(a.token_of_slot, b.token_of_slot)
        )

    def describe(self) -> str:
        """A few lines for people."""

        def axis(name: str, sizes: Sequence[int]) -> str:
            runs: list[tuple[int, int]] = []
            for size in sizes:
                runs = [*runs[:-1], (size, runs[-1][1] + 1)] if runs and runs[-1][0] == size else [*runs, (size, 1)]
            return f"{name}: " + " + ".join(f"{count} x {size}" if count > 1 else str(size) for size, count in runs)

        volume = self.tile[0] * self.tile[1] * self.tile[2]
        lines = [
            f"grid {_by(self.grid)} = {self.num_video_tokens} video tokens"
            + (f", {self.text_len} text tokens ({self.text_position})" if self.text_len else ""),
            f"tile {_by(self.tile)} = {volume} tokens in {-(-volume // BLOCK)} blocks; "
            f"{_by(self.tile_grid)} = {self.num_video_tiles} video tiles"
            + (f", {self.num_tiles - self.num_video_tiles} text tiles" if self.text_len else ""),
            "sizes " + "; ".join(axis(name, sizes) for name, sizes in zip("THW", self.tile_sizes, strict=True)),
            f"{self.num_blocks} blocks = {self.num_slots} slots: {self.num_slots / self.num_tokens:.3f} slots per token, "
            f"utilization {100 * self.utilization:.1f} %",
        ]
        return "\n".join(lines)


def plan(
    grid: Sequence[int], tile: Sequence[int] | None = None, text_len: int = 0, text_position: str = "suffix"
) -> TileLayout:
    """Cut a token grid into tiles.

    Args:
        grid: ``(T, H, W)`` video tokens.
        tile: ``(tT, tH, tW)``, any size; sizes beyond the grid are clamped to it. None: the tile of at most 512 tokens
            (temporal 2..8, aspect <= 2.5) that needs the fewest slots.
        text_len: text tokens of the same sequence, beside the video tokens.
        text_position: whether the text tokens come after the video ("suffix"), before it ("prefix") or nowhere ("none").

    Along an axis all sizes are ``t`` with a smaller last one (clipped) or, where the largest still is ``t``, differ by at most
    one (balanced): whichever needs fewer slots. So ``plan(grid, plan(grid).tile)`` is ``plan(grid)`` again.

    Returns:
        The layout on the CPU, from a bounded cache (:func:`clear_plan_cache`).

    Raises:
        ConfigError: on sizes below 1, on non-integers, on text without a position, on more than 2^31 - 1 slots.
    """
    arguments = _checked(grid, tile, text_len, text_position)
    if not torch.compiler.is_compiling():
        return _plan(*arguments)
    sizes, tables = _plan_fields(*arguments)  # a constant of the graph for each grid
    return TileLayout(*sizes, *tables)


def cached_plan(grid: Sequence[int], tile: Sequence[int] | None, text_len: int, text_position: str) -> TileLayout:
    """:func:`plan` from the cache, also while a compiler is at work."""
    return _plan(*_checked(grid, tile, text_len, text_position))


def _checked(
    grid: Sequence[int], tile: Sequence[int] | None, text_len: int, text_position: str
) -> tuple[Int3, Int3 | None, int, str]:
    if not isinstance(text_position, str) or text_position not in TEXT_POSITIONS:
        raise ConfigError(
            f"fpsattention.plan: text_position {shown(text_position)}, expected one of {', '.join(map(repr, TEXT_POSITIONS))}"
        )
    wanted = None if tile is None else int3(tile, "plan: tile")
    return int3(grid, "plan: grid"), wanted, integer(text_len, "plan: text_len"), text_position


@constant
def _plan_fields(grid: Int3, tile: Int3 | None, text_len: int, text_position: str) -> tuple[tuple[Any, ...], ...]:
    layout = _plan(grid, tile, text_len, text_position)
    names = [f.name for f in fields(TileLayout) if f.name not in (*TABLES, "_copies")]
    return tuple(getattr(layout, name) for name in names), tuple(getattr(layout, name) for name in TABLES)


def clear_plan_cache() -> None:
    """Forget cached layouts and masks (their copies on devices go when nothing else holds them)."""
    _plan.cache_clear()
    for clear in _CLEAR_WITH_PLANS:
        clear()


_CLEAR_WITH_PLANS: list[Any] = []  # cache_clear functions of modules that cache what belongs to a layout


@lru_cache(maxsize=_PLAN_CACHE_SIZE)
def _plan(grid: Int3, tile: Int3 | None, text_len: int, text_position: str) -> TileLayout:
    values: dict[str, Any] = dict(core().plan(grid, tile, text_len, text_position))
    with plain_tensors():
        values |= {name: torch.from_numpy(values[name]) for name in TABLES}
        return TileLayout(**values, _copies=Cache())


def core() -> Any:
    """The compiled module ``fpsattention._C``. It is loaded here, so that importing the package needs no compiled part.

    Raises:
        BuildError: if it is missing or does not load.
    """
    try:
        from .. import _C
    except ImportError as error:
        raise BuildError(
            f"fpsattention: the compiled module fpsattention._C is missing or does not load ({error}): install the package with "
            "`pip install .` in the repository root"
        ) from error
    return _C


def int3(value: Any, what: str) -> Int3:
    """Three integers that fit 32 bits, or ConfigError about ``what`` ("plan: grid")."""
    hint = "expected three integers (T, H, W)"
    sequence = value.ndim == 1 if isinstance(value, np.ndarray) else isinstance(value, Sequence)
    if not sequence or isinstance(value, (str, bytes)) or len(value) != 3:
        raise ConfigError(f"fpsattention.{what} {shown(value)}, {hint}")
    t, h, w = (integer(v, what, value, hint) for v in value)
    return t, h, w


def integer(value: Any, what: str, whole: Any = None, hint: str = "expected an integer") -> int:
    """An integer that fits 32 bits, or ConfigError about ``what``, which shows ``whole`` (None: the value)."""
    problem = ""
    try:
        if isinstance(value, (bool, Tensor)):  # True is no size; reading a tensor could synchronize with a device
            raise TypeError
        number = operator.index(value)
        if abs(number) < 2**31:
            return number
        problem, hint = " is too large", f"{hint} below 2^31"
    except TypeError:
        pass
    raise ConfigError(f"fpsattention.{what} {shown(value if whole is None else whole)}{problem}, {hint}")


def shown(value: Any) -> str:
    """A value for an error message, on one short line; tensors and arrays by type, for reading them may be slow."""
    try:
        if isinstance(value, (Tensor, np.ndarray)):
            text = f"{type(value).__name__} {tuple(value.shape)} of {value.dtype}"
        else:
            text = repr(value)
    except Exception:  # a repr of somebody else's, a tensor without a shape
        text = f"a {type(value).__name__}"
    text = " ".join(text.split())
    return text if len(text) <= 80 else f"{text[:77]}..."


def check_layout(layout: Any, what: str) -> TileLayout:
    """A layout, or ConfigError about ``what`` ("dense_mask")."""
    if not isinstance(layout, TileLayout):
        raise ConfigError(
            f"fpsattention.{what}: layout is a {type(layout).__name__}, expected one of fpsattention.plan"
        )
    return layout


def _by(sizes: Sequence[int]) -> str:
    return " x ".join(map(str, sizes))


def _canonical(device: torch.device | str) -> torch.device:
    """``cuda`` names the current device: tensors there say ``cuda:0``."""
    try:
        device = torch.device(device)
    except (RuntimeError, TypeError, ValueError, OverflowError):
        raise ConfigError(f"fpsattention: device {shown(device)}, expected one that torch.device takes") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UnsupportedError(
            f"fpsattention: device {device} was asked for, but torch sees no GPU: run `fpsattn doctor`"
        )
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device
