"""Batches whose samples have text of different lengths: padding is left out, sample by sample.

Such a model hands its core a mask over the keys. What it says is known from the arguments of the forward (``Geometry.text_valid``), so
the samples are attended without their padding, which is what the mask means; rows of padding, which nothing reads, become 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
import torch.nn.functional
from torch import Tensor

from ..layout.plain import plain_tensors
from .levels import Call, Tokens, index_of

if TYPE_CHECKING:
    from .core_calls import CoreCall
    from .forward import Forward

TextValid = tuple[tuple[int, ...], ...]


def unexplained(core: CoreCall, forward: Forward | None, layer: int) -> str | None:
    """Why the mask of a call is not the padding that the forward tells of, or None. Read once per
    layer and padding, so that later steps do not wait for the device."""
    mask, batch, count = core.mask, core.q.shape[0], core.q.shape[1]
    if forward is None or forward.text_valid is None or forward.tokens is None:
        return "got an attention mask, wanted None (the block mask comes from the schedule)"
    text, tokens = forward.text_valid, forward.tokens
    if not (isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.ndim == 4):
        return f"got an attention mask of type {getattr(mask, 'dtype', type(mask).__name__)}, wanted bool (B, 1, 1, S) or (B, 1, S, S)"
    if mask.shape[0] != batch or len(text) != batch or mask.shape[1] != 1 or mask.shape[2] not in (1, count):
        return f"got an attention mask of shape {tuple(mask.shape)}, wanted {(batch, 1, 1, count)} or {(batch, 1, count, count)}"
    if mask.shape[3] != count:
        return f"got an attention mask of shape {tuple(mask.shape)}, wanted {count} keys"
    key = (layer, tokens, text, tuple(mask.shape))
    known = forward.owner.masks_read
    if key not in known:
        while len(known) > 4096:
            known.pop(next(iter(known)))
        keys = _valid_keys(tokens, text, mask.device)
        first = 0 if tokens.text_position == "suffix" else tokens.text_len  # rows of the video are those that count
        rows = mask[:, 0, [0, -1]] if mask.shape[2] == 1 else mask[:, 0, [first, first + tokens.video_tokens - 1]]
        known[key] = bool((rows == keys[:, None]).all())
    return None if known[key] else "got an attention mask that is not the padding of the text, wanted that or None"


def without(core: CoreCall, forward: Forward, group: int, run: Callable[[CoreCall, Call], Tensor]) -> Tensor:
    """The output ``(B, S, H, D)`` of a masked call, by calls without padding: samples of one length together."""
    tokens, text, device = forward.tokens, forward.text_valid, core.q.device
    assert tokens is not None and text is not None
    by_length: dict[int, list[int]] = {}
    for sample, valid in enumerate(text):
        by_length.setdefault(len(valid), []).append(sample)

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return core.dense(q, k, v, None)

    out: Tensor | None = None
    for length, samples in by_length.items():
        call = forward.call_of(tuple(samples), length, group, device)
        leading = all(text[sample] == tuple(range(length)) for sample in samples)
        if len(by_length) == 1 and leading and tokens.text_position == "suffix":  # no copies
            count = tokens.video_tokens + length
            part = replace(core, mask=None, dense=dense, **{n: getattr(core, n)[:, :count] for n in "qkv"})
            return torch.nn.functional.pad(run(part, call), (0, 0, 0, 0, 0, core.q.shape[1] - count))
        rows = index_of(tuple(samples), device)[:, None]
        columns = _token_indices(tokens, tuple(text[sample] for sample in samples), device)
        part = replace(core, mask=None, dense=dense, **{n: getattr(core, n)[rows, columns] for n in "qkv"})
        some = run(part, call)
        out = torch.zeros_like(core.v) if out is None else out
        out = out.index_put((rows, columns), some.to(out.dtype))
    assert out is not None
    return out


@lru_cache(maxsize=64)
def _token_indices(tokens: Tokens, text: TextValid, device: torch.device) -> Tensor:
    """Valid tokens of every sample, ``[B, n]``: the same number each, in the order of the sequence."""
    video, before = tokens.video_tokens, tokens.text_position == "prefix"
    with plain_tensors():
        grid = torch.arange(video) + (tokens.text_len if before else 0)
        parts = [torch.tensor(valid, dtype=torch.int64) + (0 if before else video) for valid in text]
        return torch.stack([torch.cat([part, grid] if before else [grid, part]) for part in parts]).to(device)


def _valid_keys(tokens: Tokens, text: TextValid, device: torch.device) -> Tensor:
    """bool ``[B, S]``."""
    keys = torch.zeros(len(text), tokens.video_tokens + tokens.text_len, dtype=torch.bool, device=device)
    for sample, valid in enumerate(text):
        keys[sample, _token_indices(tokens, (valid,), device)[0]] = True
    return keys
