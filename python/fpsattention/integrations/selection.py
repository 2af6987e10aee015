"""Levels whose masks are made from the q and k at hand: what makes them, how long they stay, what they cost."""

from __future__ import annotations

import json
import threading
import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..layout.masks import BlockMask, Lists
from ..layout.plain import plain_tensors
from ..layout.tiles import BLOCK, TileLayout
from ..ops.selection import Selection, measured, width_of
from ..patterns import BoundPattern, Clustered
from ..schedule import Level

#: A step of a sampling run: (run, sigmas of the samples). None: not a step of a run that could be seen.
Step = tuple[int, Hashable] | None


@dataclass(frozen=True, eq=False)
class Selector:
    """What makes the lists of a level from q and k, of one layout.

    Attributes:
        level: name. text: the pattern as JSON. refresh: as in the level.
        tables: ``token_of_slot``, ``tile_of_block`` (in a graph maybe with an entry too much), ``tile_block_offsets`` on the device, and
            ``sizes`` (``ops.selection.sizes_of``).
        transposed: a backward may follow.
        pools: means over blocks are all that the pattern reads: its lists are made where q and k are quantized.
        pattern, layout: outside of graphs; the layout on the device.
        exact: outside of graphs, bool ``[num_blocks]`` on the device: blocks of frames that are dense in both directions.
        fresh: in a graph whose lists stay for some steps, whether they are due: a bool scalar on the CPU. None: made every time.
    """

    level: str
    granularity: str
    text: str
    refresh: int
    tables: tuple[Tensor, ...]
    transposed: bool
    pools: bool
    pattern: BoundPattern | None = None
    layout: TileLayout | None = None
    exact: Tensor | None = None
    fresh: Tensor | None = None

    def kept_size(self, rows: int) -> int:
        """Elements of the buffer of :meth:`pack`, for ``rows`` samples times heads."""
        return rows * (self.tables[2].shape[0] - 1) * (1 + width_of(self.tables[3])) + 1

    def pack(self, lists: Lists) -> Tensor:
        """Lengths and lists in one flat tensor, with an element that means nothing (see :mod:`.graph`)."""
        flat = (lists.kv_num_blocks.flatten(), lists.kv_indices.flatten())
        return torch.cat([*flat, flat[0].new_zeros(1)])

    def unpack(self, kept: Tensor, batch: int, heads: int) -> Lists:
        """The lists of :meth:`pack`, without a transpose: views."""
        tiles, width = self.tables[2].shape[0] - 1, width_of(self.tables[3])
        strides = (heads * tiles * width, tiles * width, width, 1)
        counts = kept.as_strided((batch, heads, tiles), (heads * tiles, tiles, 1))
        indices = kept.as_strided((batch, heads, tiles, width), strides, batch * heads * tiles)
        return Lists(*self.selection()[:3], counts, indices, None, None)

    def selection(self) -> Selection:
        """What makes the lists from sums over blocks."""
        token_of_slot, tile_of_block, tile_block_offsets, sizes = self.tables
        tile_of_block = tile_of_block.as_strided((token_of_slot.shape[0] // BLOCK,), (1,))
        return Selection(token_of_slot, tile_of_block, tile_block_offsets, sizes, self.text, self.transposed)

    def traced(self, q: Tensor, k: Tensor, v: Tensor) -> Lists:
        """The lists as an op of a graph; q, k, v ``(B, H, S, D)``."""
        token_of_slot, tile_of_block, tile_block_offsets, sizes = self.tables
        kv_num_blocks, kv_indices, q_num_blocks, q_indices = torch.ops.fpsattn.pattern_lists(
            q.detach(), k.detach(), v.detach(), token_of_slot, tile_block_offsets, sizes,
            pattern=self.text, granularity=self.granularity, transposed=self.transposed,
        )  # fmt: skip
        layout = token_of_slot, tile_of_block.as_strided((token_of_slot.shape[0] // BLOCK,), (1,)), tile_block_offsets
        walked = (q_num_blocks, q_indices) if self.transposed else (None, None)
        return Lists(*layout, kv_num_blocks, kv_indices, *walked)


def text_of(level: Level) -> str:
    """Its pattern as JSON, "" where it has none that reads q and k."""
    return json.dumps(level.pattern.to_dict(), sort_keys=True) if level.pattern is not None and level.dynamic else ""


@dataclass(frozen=True)
class _Kept:
    made: BlockMask | Clustered | Lists
    densities: Tensor
    signature: tuple[Any, ...]
    index: int


class Selections:
    """What patterns made for the layers of a transformer: kept for some steps per thread, and counted on the device."""

    def __init__(self) -> None:
        self._local = threading.local()
        self._lock = threading.Lock()
        self._owner: weakref.ref[threading.Thread] | None = None
        self._sums: dict[
            tuple[int, str, torch.device], Tensor
        ] = {}  # f64 [3]: selected, kernel, both times samples; samples

    def __reduce__(self) -> tuple[type[Selections], tuple[()]]:
        return Selections, ()  # a copy of a model starts anew

    def clear(self) -> None:
        """Forget the masks of this thread, and all counts."""
        self.forget()
        with self._lock:
            self._sums.clear()

    def make(
        self,
        layer: int,
        samples: Hashable,
        selector: Selector,
        step: Step,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attend: Callable[[Selection], tuple[Tensor, Lists, Tensor]],
    ) -> tuple[BlockMask | Clustered | Lists, Tensor | None]:
        """The mask or lists of a layer (or the permutation and mask, ``Clustered``) for q, k, v ``(B, H, S, D)``.

        A mask stays for ``refresh`` different steps of a run, counted over all levels; the forwards of one step share it.
        ``samples``: which samples of the batch these are. ``attend``: runs the attention of q, k and v, whose output, lists and densities it
        gives. The second result is that output, where lists had to be made and are made so.
        """
        pattern = selector.pattern
        assert pattern is not None
        key = (layer, samples, selector.level)
        signature = (selector.text, id(selector.layout), id(selector.exact), tuple(q.shape), q.device)
        kept, index = self._of_run(step)
        entry, out = kept.get(key), None
        stays = selector.refresh > 1 and entry is not None and index - entry.index < selector.refresh
        if entry is None or entry.signature != signature or not stays:
            made: BlockMask | Clustered | Lists
            if selector.pools:
                out, made, densities = attend(selector.selection())
                densities = densities.mean(0)
            else:
                before = {}
                if pattern.pattern.permutes and entry is not None and entry.signature == signature:
                    before = {"previous": entry.made}
                made, densities = measured(
                    pattern, selector.granularity, selector.layout, q, k, v, selector.exact, **before
                )
            entry = _Kept(made, densities, signature, index)
            if step is not None:
                kept[key] = entry
        self._count(layer, selector.level, entry.densities, q.shape[0])
        return entry.made, out

    def due(self, key: Hashable, signature: Hashable, refresh: int, step: Step) -> bool:
        """Whether the lists ``key`` that graphs keep in buffers are to be made at a step, as :meth:`make` decides it."""
        kept, index = self._of_run(step)
        entry: Any = kept.get(key)
        if entry is not None and entry[0] == signature and index - entry[1] < refresh:
            return False
        kept[key] = (signature, index)  # type: ignore[assignment]
        return True

    def owned(self) -> bool:
        """Whether the buffers of compiled layers are this thread's: they are one set, and the first thread's until it ends."""
        with self._lock:
            owner = None if self._owner is None else self._owner()
            if owner is None or not owner.is_alive():
                self._owner = weakref.ref(threading.current_thread())
                return True
            return owner is threading.current_thread()

    def forget(self) -> None:
        """Nothing that this thread keeps is used again."""
        self._local.__dict__.clear()

    def _of_run(self, step: Step) -> tuple[dict[Hashable, _Kept], int]:
        """What this thread keeps of the run, and the place of the step in it."""
        if step is None:
            return {}, 0
        state = self._local.__dict__
        if state.get("run") != step[0]:
            state.update(run=step[0], steps={}, kept={})
        steps: dict[Hashable, int] = state["steps"]
        return state["kept"], steps.setdefault(step[1], len(steps))

    def _count(self, layer: int, level: str, densities: Tensor, samples: int) -> None:
        key = (layer, level, densities.device)
        with self._lock:
            if key not in self._sums:
                with plain_tensors():
                    self._sums[key] = torch.zeros(3, dtype=torch.float64).to(densities.device)
            total = self._sums[key]
            total[:2].add_(densities, alpha=samples)
            total[2].add_(samples)

    def densities(self, layer: int, level: str) -> tuple[float, float] | None:
        """Selected and kernel density of a layer at a level, mean over samples and heads; None: never made. Waits for the device."""
        with self._lock:
            sums = [total.tolist() for (at, name, _), total in self._sums.items() if (at, name) == (layer, level)]
        samples = sum(total[2] for total in sums)
        if not samples:
            return None
        return sum(total[0] for total in sums) / samples, sum(total[1] for total in sums) / samples
