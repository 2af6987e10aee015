"""Text of different lengths in one batch: the keys that the mask of a model hides, on the device, without waiting for it."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..ops import hidden
from .token_order import moved

if TYPE_CHECKING:
    from .core_calls import CoreCall
    from .token_order import Order


class Masked(NamedTuple):
    """k and v for the FP8 launch, which keys it hides (bool ``[B, S]``), and the mask of the model's own call."""

    k: Tensor
    v: Tensor
    hidden: Tensor
    mask: Tensor

    def select(self, samples: Tensor) -> Masked:
        """Those of some samples."""
        return Masked(*(x.index_select(0, samples) for x in self))


def unexplained(core: CoreCall, known: bool) -> str | None:
    """Why the mask of a call cannot be a mask over the keys, or None; ``known``: the model has such masks."""
    mask, batch, count = core.mask, core.q.shape[0], core.q.shape[1]
    if not known:
        return "got an attention mask, expected None (the block mask comes from the schedule)"
    if not (isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.ndim == 4):
        kind = getattr(mask, "dtype", type(mask).__name__)
        return f"got an attention mask of type {kind}, expected bool (B, 1, 1, S) or (B, 1, S, S)"
    if (
        mask.shape[0] not in (1, batch)
        or mask.shape[1] != 1
        or mask.shape[2] not in (1, count)
        or mask.shape[3] != count
    ):
        return f"got an attention mask of shape {tuple(mask.shape)}, expected {(batch, 1, 1, count)} or {(batch, 1, count, count)}"
    return None


def masked(core: CoreCall, text_first: bool, order: Order | None) -> Masked:
    """What the mask ``(B, 1, 1 or S, S)`` of a call hides: the keys that a row of the video does not attend. In masks of
    ``(S, S)``, rows of padding may attend others, or nothing; nobody reads them."""
    mask = core.mask
    assert mask is not None
    hides = ~mask[:, 0, -1 if text_first else 0].expand(core.q.shape[0], -1)
    if order is not None:
        hides = moved(hides, 1, order.to_tile)
    return Masked(*hidden.fill(core.k, core.v, hides, text_first), hides, mask.expand(core.q.shape[0], -1, -1, -1))
