"""Keys that a mask hides, sample by sample, told on the device: padded text.

The tables of slots are those of a batch. What hides a key in one sample is what hides a padding slot in all (``docs/numerics.md``, Padding): V and the
row of ones are 0 there, so it adds nothing to the output and the normaliser, and K repeats a key that counts, so it moves no maximum.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .reference import BLOCK, Quantized


def fill(k: Tensor, v: Tensor, hidden: Tensor, text_first: bool) -> tuple[Tensor, Tensor]:
    """k and v ``(B, S, H, D)`` for the quantizer: hidden keys repeat one that counts, and their values are 0, so that what is there
    changes no scale and no maximum. No gradient passes there. Queries stay: the mask says nothing about rows.

    Args:
        hidden: bool ``[B, S]``.
        text_first: the text, which every row attends, is at the beginning; the key that is repeated is one of its own.
    """
    counts = (~hidden).to(torch.uint8)
    index = counts.argmax(1) if text_first else hidden.shape[1] - 1 - counts.flip(1).argmax(1)
    index = index[:, None, None, None].expand(-1, 1, k.shape[2], k.shape[3])
    where = hidden[:, :, None, None]
    return torch.where(where, k.detach().gather(1, index), k), v.masked_fill(where, 0)


def slots(hidden: Tensor, token_of_slot: Tensor) -> Tensor:
    """``hidden`` of every slot, bool ``[B, num_blocks, 128]``; False in padding."""
    of_slot = hidden.index_select(1, token_of_slot.clamp_min(0).long()) & (token_of_slot >= 0)
    return of_slot.unflatten(1, (-1, BLOCK))


def hide(z: Quantized, hidden: Tensor) -> Quantized:
    """``z``, quantized from :func:`fill`, without the ones of hidden slots (bool ``[B, num_blocks, 128]``)."""
    dim = z.q8.shape[-1]
    # Position 4 a + 2 b + c of a group of 16 holds slot 8 b + 2 a + c: reference.V_SLOT_ORDER.
    order = hidden.unflatten(2, (-1, 2, 4, 2)).transpose(3, 4).flatten(2)
    rows = z.v8t.view(torch.uint8)
    ones = rows[..., dim : dim + 1, :].masked_fill(order[:, None, :, None], 0)
    return z._replace(v8t=torch.cat([rows[..., :dim, :], ones, rows[..., dim + 1 :, :]], 3).view(torch.float8_e4m3fn))


def without_keys(k8: Tensor, hidden: Tensor) -> Tensor:
    """K of a backward, 0 where hidden: as in padding slots it adds nothing to dQ."""
    return k8.view(torch.uint8).masked_fill(hidden[:, None, :, :, None], 0).view(torch.float8_e4m3fn)
