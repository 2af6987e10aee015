"""A mask that stays for several denoising steps: selecting is paid once per so many steps."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

from ..layout.masks import BlockMask
from .blocks import check_count


@dataclass
class _Kept:
    mask: BlockMask
    signature: tuple[Any, ...]
    steps: set[Hashable]


class Refresh:
    """Keeps the mask of each layer for ``every`` steps.

    ``refresh(key, step, q, k, layout)`` is the pattern's mask; it is built at the first step and then at every ``every``-th *different* step. A
    step is named, not counted: several forwards of one step (classifier-free guidance, recomputation) share a mask.

    Args:
        pattern: a bound pattern (``patterns.get``), or any ``(q, k, layout, **tensors) -> BlockMask``.
        every: steps that a mask stays, >= 1.

    What is kept belongs to the calling thread: threads at other steps neither see nor disturb it. A call with another layout, shape or
    device builds anew.
    """

    def __init__(self, pattern: Callable[..., BlockMask], every: int):
        check_count("Refresh", "every", every)
        self.pattern, self.every = pattern, every
        self._local = threading.local()

    def __call__(self, key: Hashable, step: Hashable, q: Any, k: Any, layout: Any, **tensors: Any) -> BlockMask:
        """The mask of layer ``key`` at ``step`` (a sigma or an index; on the host)."""
        kept: dict[Hashable, _Kept] = self._local.__dict__.setdefault("kept", {})
        signature = (id(layout), tuple(q.shape), q.device)
        entry = kept.get(key)
        if entry is not None and entry.signature == signature:
            if step in entry.steps:
                return entry.mask
            if len(entry.steps) < self.every:
                entry.steps.add(step)
                return entry.mask
        mask = self.pattern(q, k, layout, **tensors)
        kept[key] = _Kept(mask, signature, {step})
        return mask

    def clear(self) -> None:
        """Forget the masks of this thread: before another video."""
        self._local.__dict__.pop("kept", None)
