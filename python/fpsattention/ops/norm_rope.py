"""Norm and rotary embedding of raw queries and keys, as ``prepare`` computes them: FP32, every operation rounded once, no FMA, and no
rounding to 16 bits in between. The order of every sum is part of the definition (``docs/numerics.md``), so all implementations have the same bits.

Shapes: ``x (B, H, S, D)``. *Rotated* tokens are those that the rotary tables speak of, a run of the sequence; the others pass as the norm leaves
them. Of weights of two rows the first is for a run of tokens as well (the video), the second for the others (text with norms of its own): the
rotated run, where nothing else is said.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

NORMS = {"none": 0, "rms": 1, "rms_across_heads": 2, "layer": 3}
NONE, RMS, RMS_ACROSS_HEADS, LAYER = NORMS.values()
CHUNK = 8  # channels that one thread of a kernel holds: summed one after another


def ordered_sum(x: Tensor) -> Tensor:
    """Sum over D, FP32: the 8 channels of a chunk one after another, then chunk i and chunk i + n/2 pairwise, n a power of two
    (D = 96: 16 chunks, the last four 0)."""
    chunks = x.unflatten(-1, (-1, CHUNK))
    sums = chunks[..., 0]
    for channel in range(1, CHUNK):
        sums = sums + chunks[..., channel]
    count = 1 << (sums.shape[-1] - 1).bit_length()
    sums = torch.nn.functional.pad(sums, (0, count - sums.shape[-1]))
    while count > 1:
        count //= 2
        sums = sums[..., :count] + sums[..., count:]
    return sums[..., 0]


def norm_statistics(
    x: Tensor, norm: int, eps: float, total: Callable[[Tensor], Tensor] = ordered_sum
) -> tuple[Tensor, Tensor]:
    """``(centred, factor)``: x, less its mean for a LayerNorm, and ``1 / sqrt(mean of centred^2 + eps)``, ``(B, 1 or H, S, 1)``."""
    heads, dim = x.shape[1], x.shape[3]
    if norm == LAYER:
        x = x - (total(x) / dim).unsqueeze(-1)
    squares = total(x * x)
    if norm == RMS_ACROSS_HEADS:
        across = squares[:, :1]
        for head in range(1, heads):
            across = across + squares[:, head : head + 1]
        squares, dim = across, heads * dim
    # Two operations, each correctly rounded: through FP64, as torch's FP32 sqrt is not (and rounding twice does no harm to these two).
    root = (squares / dim + eps).double().sqrt().float()
    return x, (1.0 / root.double()).float().unsqueeze(-1)


def per_token(weight: Tensor, shape: torch.Size, first_row: slice) -> Tensor:
    """``[G, n]`` (n: D, or H * D; G: 1, or 2, of the tokens ``first_row`` and of the others) as ``(1, 1 or H, 1 or S, D)``."""
    rows = weight.float().unflatten(1, (-1, shape[3]))  # [G, 1 or H, D]
    if rows.shape[0] == 1:
        return rows[0].unsqueeze(1).unsqueeze(0)
    inside = torch.zeros(shape[2], dtype=torch.bool, device=weight.device)
    inside[first_row] = True
    return torch.where(inside[:, None], rows[0].unsqueeze(1), rows[1].unsqueeze(1)).unsqueeze(0)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, halves: bool, rotated: slice) -> Tensor:
    """``(a, b) -> (a cos - b sin, b cos + a sin)`` of channels ``2i, 2i + 1``, or ``i, i + D/2`` with ``halves``."""
    dim = x.shape[3]
    video = x[:, :, rotated]
    a, b = (video[..., : dim // 2], video[..., dim // 2 :]) if halves else (video[..., 0::2], video[..., 1::2])
    a, b = a * cos - b * sin, b * cos + a * sin
    video = torch.cat([a, b], dim=-1) if halves else torch.stack([a, b], dim=-1).flatten(3)
    return torch.cat([x[:, :, : rotated.start], video, x[:, :, rotated.stop :]], dim=2)


def rotated_tokens(x: Tensor, cos: Tensor | None, first: int) -> slice:
    """The run of tokens of ``x`` that the tables speak of; all where there are none."""
    return slice(0, x.shape[2]) if cos is None else slice(first, first + cos.shape[2])


def first_row_tokens(rotated: slice, begin: int, end: int) -> slice:
    """The run of tokens that the first row of weights is for: ``begin`` to ``end``, or the rotated ones where ``end`` is -1."""
    return rotated if isinstance(end, int) and end == -1 else slice(begin, end)


def norm_rope(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    *,
    norm: int,
    eps: float,
    rope_halves: bool,
    first_rotated: int,
    weights_begin: int = 0,
    weights_end: int = -1,
) -> Tensor:
    """Raw queries or keys to normalized and rotated ones, FP32.

    Args:
        x: ``(B, H, S, D)``, any float dtype.
        weight, bias: ``[G, D]``, across heads ``[G, H * D]``; None: 1 and 0. G = 2: of a run of tokens and of the others.
        cos, sin: ``(1 or B, 1 or H, n, D/2)`` of tokens ``first_rotated .. first_rotated + n - 1``, or None.
        norm: one of ``NORMS``.
        weights_begin, weights_end: the first row is for tokens ``weights_begin .. weights_end - 1``; ``weights_end = -1``: for the rotated
            ones (all, where nothing is rotated).
    """
    x, rotated = x.float(), rotated_tokens(x, cos, first_rotated)
    first_row = first_row_tokens(rotated, weights_begin, weights_end)
    if norm != NONE:
        x, factor = norm_statistics(x, norm, eps)
        x = x * factor
    if weight is not None:
        x = x * per_token(weight, x.shape, first_row)
    if bias is not None:
        x = x + per_token(bias, x.shape, first_row)
    return x if cos is None or sin is None else rotate(x, cos, sin, rope_halves, rotated)


def norm_rope_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    *,
    norm: int,
    eps: float,
    rope_halves: bool,
    first_rotated: int,
    weights_begin: int = 0,
    weights_end: int = -1,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients ``(dx, dweight, dbias)`` of :func:`norm_rope`, FP32, from the gradient of its result.

    With ``h = centred * factor`` and ``g = w * grad``: ``dx = factor * (g - h * mean(g h))``, less ``factor * mean(g)`` for a LayerNorm.
    """
    rotated = rotated_tokens(x, cos, first_rotated)
    first_row = first_row_tokens(rotated, weights_begin, weights_end)
    grad, x = grad.float(), x.float()
    if cos is not None and sin is not None:
        grad = rotate(grad, cos, -sin, rope_halves, rotated)
    hat, factor = (x, None) if norm == NONE else norm_statistics(x, norm, eps, lambda t: t.sum(-1))
    hat = hat if factor is None else hat * factor
    d_weight = None if weight is None else _of_rows(grad * hat, weight, first_row)
    d_bias = None if bias is None else _of_rows(grad, bias, first_row)
    grad = grad if weight is None else grad * per_token(weight, x.shape, first_row)
    if factor is None:
        return grad, d_weight, d_bias
    over = (1, 3) if norm == RMS_ACROSS_HEADS else (3,)
    d_x = grad - hat * (grad * hat).mean(over, keepdim=True)
    if norm == LAYER:
        d_x = d_x - grad.mean(over, keepdim=True)
    return d_x * factor, d_weight, d_bias


def _of_rows(per_element: Tensor, like: Tensor, first_row: slice) -> Tensor:
    """``(B, H, S, D)`` summed over what shares a row of ``like [G, n]``: the adjoint of :func:`per_token`."""
    per_token_sum = (
        per_element.sum(0) if like.shape[1] != per_element.shape[3] else per_element.sum((0, 1)).unsqueeze(0)
    )
    if like.shape[0] == 1:
        return per_token_sum.sum(1).reshape(1, -1)
    # The others by themselves: what is left of the sum of all would be its rounding errors where they are few.
    inside = per_token_sum[:, first_row].sum(1)  # (1 or H, D)
    others = per_token_sum[:, : first_row.start].sum(1) + per_token_sum[:, first_row.stop :].sum(1)
    return torch.stack([inside.reshape(-1), others.reshape(-1)])
