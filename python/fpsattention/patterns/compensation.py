"""Compensation for skipped tiles: one pseudo-key per skipped tile in the same softmax.

A tile of n keys that a query does not visit stands in with its mean key and mean value, n times:
``weight = n exp(scale q . mean(k))``, value ``mean(v)``. Exact where the keys of a tile are equal; by Jensen's inequality never too heavy otherwise. The
coarse branches of BLADE and VSA are relatives (BLADE's stands in for *all* keys beside the visited ones).

The visited part is the FP8 op as it is; the pseudo-keys are a small dense product in FP32, and both are joined by their log-sum-exps, which is the same as one
softmax. In the backward the op gets the joint normaliser and the joint output, so its gradients are those of one softmax, too. A kernel
that did it in one pass would need a bias per (query tile, key), ``log n`` or -inf, for one block of pseudo-keys per 128 tiles.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError
from ..layout.masks import BlockMask, Lists
from ..ops.attend import K_MEAN_MAX_STRIDE, K_MEAN_TOKENS
from ..ops.backends import resolve_backend
from ..ops.checks import GRANULARITIES
from .blocks import check_tensors, pool_blocks, tables, tile_means

UNITS = ("tile", "block")
_CHUNK = 4096  # query tokens whose scores of all pseudo-keys are held at once


def pseudo_blocks(mask: BlockMask, unit: str = "tile") -> int:
    """Blocks of 128 pseudo-keys, what a query block pays more."""
    layout = mask.layout
    return -(-(layout.num_tiles if unit == "tile" else layout.num_blocks) // 128)


def compensated_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    *,
    unit: str = "tile",
    granularity: str = "tile",
    scale: float | None = None,
    smooth_k: bool = True,
    pow2_scales: bool = False,
    deterministic: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """FP8 attention under ``mask`` with a pseudo-key for every skipped tile; differentiable in q, k and v, through the means as well.

    Args:
        q, k, v: ``(B, H, S, D)`` as in :func:`fpsattention.attention`.
        unit: what a pseudo-key stands for: "tile", if none of its blocks is visited, or "block".
        others: as in :func:`fpsattention.attention`; the backends "cpu" and "sm90".

    Returns:
        ``out`` ``(B, H, S, D)`` and the joint ``lse`` f32 ``(B, H, S)``, not differentiable. Where nothing is skipped, both are those of
        the plain call, bit for bit.
    """
    layout = mask.layout
    check_tensors("compensated_attention", layout, q=q, k=k, v=v)
    if unit not in UNITS:
        raise ConfigError(f"fpsattention.patterns.compensated_attention: unit {unit!r}, expected one of {UNITS}")
    if granularity not in GRANULARITIES:
        raise ConfigError(
            f"fpsattention.patterns.compensated_attention: granularity {granularity!r}, expected one of {tuple(GRANULARITIES)}"
        )
    backend = resolve_backend(backend, q)
    if backend == "reference":
        raise ConfigError("fpsattention.patterns.compensated_attention: backend 'reference', expected 'cpu' or 'sm90'")
    mask = mask.to(q.device)
    backward = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    with torch.no_grad():
        bias = _bias(mask, unit)
    means = [pool_blocks(x, layout) for x in (k, v)]
    if unit == "tile":
        means = [tile_means(x, layout) for x in means]
    options = {
        "granularity": GRANULARITIES[granularity],
        "softmax_scale": q.shape[3] ** -0.5 if scale is None else float(scale),
        "smooth_k": smooth_k,
        "pow2_scales": pow2_scales,
        "k_mean_stride": max(1, min(K_MEAN_MAX_STRIDE, q.shape[2] // K_MEAN_TOKENS)),
        "deterministic": deterministic,
    }
    rows = tables(layout, q.device).tile_of_token
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    return _Compensated.apply(q, k, v, *means, bias, rows, mask.lists(backward), options)


def _bias(mask: BlockMask, unit: str) -> Tensor:
    """``log n`` of every pseudo-key that a query tile sees, -inf for the others: f32 ``[Bm, Hm, tiles, pseudo-keys]``."""
    t = tables(mask.layout, mask.device)
    visited, tokens = mask.to_blocks(), t.block_tokens
    if unit == "tile":
        visited = (visited.float() @ t.own.float().T) > 0
        tokens = t.tokens_of_tile.sum(-1)
    return tokens.log().expand(visited.shape).masked_fill(visited, -math.inf)


def _scores(q: Tensor, keys: Tensor, bias: Tensor, rows: Tensor, scale: float, at: slice) -> Tensor:
    """Of a chunk of queries and all pseudo-keys, ``log n`` included: f32 ``[B, H, chunk, pseudo-keys]``."""
    return scale * (q[:, :, at].float() @ keys.transpose(-1, -2)) + bias[:, :, rows[at]]


def _chunks(tokens: int) -> list[slice]:
    return [slice(start, min(start + _CHUNK, tokens)) for start in range(0, tokens, _CHUNK)]


class _Compensated(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        keys: Tensor,
        values: Tensor,
        bias: Tensor,
        rows: Tensor,
        lists: Lists,
        options: dict[str, Any],
    ) -> tuple[Tensor, Tensor]:
        keys, values = keys.detach(), values.detach()
        visited, visited_lse, *operands = torch.ops.fpsattn.attention(
            q.detach(), k.detach(), v.detach(), *lists, **options
        )
        scale = options["softmax_scale"]
        out, lse = torch.empty_like(visited), torch.empty_like(visited_lse)
        for at in _chunks(q.shape[2]):
            scores = _scores(q, keys, bias, rows, scale, at)
            extra_lse = scores.logsumexp(-1)
            joint = torch.logaddexp(visited_lse[:, :, at], extra_lse)
            somewhere = torch.isfinite(joint) | joint.isnan()  # -inf: nothing to attend
            share = torch.where(somewhere, (visited_lse[:, :, at] - joint).exp(), 0.0).unsqueeze(-1)
            weights = torch.where(somewhere.unsqueeze(-1), (scores - joint.unsqueeze(-1)).exp(), 0.0)
            out[:, :, at] = (visited[:, :, at].float() * share + weights @ values).to(out.dtype)
            lse[:, :, at] = joint
        ctx.save_for_backward(q, keys, values, bias, rows, out, lse, visited_lse, *operands, *lists)
        ctx.options = options
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor, _: Tensor) -> tuple[Any, ...]:
        q, keys, values, bias, rows, out, lse, visited_lse, *rest = ctx.saved_tensors
        operands, row_max, row_sum, lists = rest[:6], rest[6], rest[7], Lists(*rest[8:])
        scale = ctx.options["softmax_scale"]
        grad_out = grad_out.to(out.dtype).contiguous()
        # The op divides by its row sums: give it the joint ones.
        slots = lists.token_of_slot.long()
        growth = (lse - visited_lse).exp()[:, :, slots.clamp_min(0)]
        row_sum = torch.where((slots >= 0) & (row_sum > 0), row_sum * growth, row_sum)
        dq, dk, dv = torch.ops.fpsattn.backward(
            grad_out, out, *operands, row_max, row_sum, lists.token_of_slot, lists.tile_of_block, lists.kv_num_blocks,
            lists.kv_indices, lists.q_num_blocks, lists.q_indices, softmax_scale=scale,
            deterministic=ctx.options["deterministic"],
        )  # fmt: skip
        d_keys, d_values = torch.zeros_like(keys), torch.zeros_like(values)
        d_extra = torch.empty(q.shape, dtype=torch.float32, device=q.device)
        for at in _chunks(q.shape[2]):
            joint = lse[:, :, at].unsqueeze(-1)
            scores = _scores(q, keys, bias, rows, scale, at)
            weights = torch.where(joint == -math.inf, 0.0, (scores - joint).exp())
            do = grad_out[:, :, at].float()
            delta = (do * out[:, :, at].float()).sum(-1, keepdim=True)
            d_scores = weights * (do @ values.transpose(-1, -2) - delta) * scale
            d_extra[:, :, at] = d_scores @ keys
            d_keys += d_scores.transpose(-1, -2) @ q[:, :, at].float()
            d_values += weights.transpose(-1, -2) @ do
        return (dq.float() + d_extra).to(dq.dtype), dk, dv, d_keys, d_values, *(None,) * 4
