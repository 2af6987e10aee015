"""Ulysses: every rank attends all tokens of some heads (DeepSpeed-Ulysses, arXiv 2309.14509).

Two exchanges, which give one process's bits: :func:`to_heads` and :func:`to_tokens` move q, k, v and the output as they are (whatever attention runs in
between), and :class:`QuantizedUlysses` sends e4m3 and scales, which whole tiles allow. Both are differentiable; gradients travel in the
dtype of the output.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..layout.masks import Lists
from ..ops.reference import Operands, scale_of, to_e4m3
from .collectives import exchange, from_bytes, num_bytes, pack, to_bytes, unpack
from .heads import Heads, cut_lists
from .options import Options, global_statistics, quantize, v_rows, whole_v
from .sharding import Sharding

E4M3 = torch.float8_e4m3fn


# As they are ---------------------------------------------------------------------------------------------------------------


def _scatter_heads(x: Tensor, sharding: Sharding, heads: Heads, what: str) -> Tensor:
    """``(n, B, S_local, H, D)`` to ``(n, B, S, H_local, D)``, tokens in the order of the ranks."""
    n, batch, _, _, dim = x.shape
    mine = len(heads.of[sharding.rank])
    chunks = [to_bytes(heads.cut(x, 3, rank)) for rank in range(sharding.size)]
    shapes = [(n, batch, count, mine, dim) for count in sharding.counts]
    parts = exchange(chunks, [num_bytes(shape, x.dtype) for shape in shapes], sharding.group, what).wait()
    return torch.cat([from_bytes(part, shape, x.dtype) for part, shape in zip(parts, shapes, strict=True)], dim=2)


def _scatter_tokens(x: Tensor, sharding: Sharding, heads: Heads, what: str) -> Tensor:
    """The way back: ``(n, B, S, H_local, D)`` to ``(n, B, S_local, H, D)``."""
    n, batch, _, _, dim = x.shape
    chunks = [to_bytes(piece) for piece in x.split(list(sharding.counts), dim=2)]
    shapes = [(n, batch, sharding.num_local, len(of), dim) for of in heads.of]
    parts = exchange(chunks, [num_bytes(shape, x.dtype) for shape in shapes], sharding.group, what).wait()
    return heads.restore([from_bytes(p, shape, x.dtype) for p, shape in zip(parts, shapes, strict=True)], dim=3)


class _ToHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sharding: Sharding, heads: Heads, what: str) -> Tensor:
        ctx.where = sharding, heads
        return _scatter_heads(x, sharding, heads, what)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        sharding, heads = ctx.where
        return _scatter_tokens(grad, sharding, heads, "gradients"), None, None, None


class _ToTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sharding: Sharding, heads: Heads, what: str) -> Tensor:
        ctx.where = sharding, heads
        return _scatter_tokens(x, sharding, heads, what)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        sharding, heads = ctx.where
        return _scatter_heads(grad, sharding, heads, "gradients"), None, None, None


def to_heads(q: Tensor, k: Tensor, v: Tensor, sharding: Sharding, heads: Heads) -> tuple[Tensor, Tensor, Tensor]:
    """This rank's tokens of all heads, ``(B, S_local, H, D)``, to all tokens, in token order, of this rank's heads, ``(B, S, H_local, D)``."""
    whole = _ToHeads.apply(torch.stack([q, k, v]), sharding, heads, "qkv")
    if not sharding.in_order:
        whole = whole.index_select(2, sharding.position_on(whole.device))
    return whole[0], whole[1], whole[2]


def to_tokens(out: Tensor, sharding: Sharding, heads: Heads) -> Tensor:
    """The way back of the output, ``(B, S, H_local, D)`` in token order to ``(B, S_local, H, D)``."""
    if not sharding.in_order:
        out = out.index_select(1, sharding.order_on(out.device))
    return _ToTokens.apply(out.unsqueeze(0), sharding, heads, "out")[0]


# As FP8 --------------------------------------------------------------------------------------------------------------------


def _exchange_operands(z: Operands, sharding: Sharding, heads: Heads) -> Operands:
    """Operands of this rank's tiles, all heads, to those of all tiles, this rank's heads."""
    rank, batch, dim = sharding.rank, z.q8.shape[0], z.q8.shape[4]
    per_token = z.q_scale.dim() == 4
    sent = (z.q8, z.k8, v_rows(z.v8t), z.q_scale, z.k_scale)
    chunks = [pack(*(heads.cut(x, 1, other) for x in sent)) for other in range(sharding.size)]
    mine = len(heads.of[rank])

    def parts_of(other: int) -> list[tuple[Sequence[int], torch.dtype]]:
        blocks = sharding.blocks(other).numel()
        scales = ((batch, mine, blocks, 128) if per_token else (batch, mine, blocks), torch.float32)
        rows = ((batch, mine, blocks, 128, dim), E4M3)
        return [rows, rows, ((batch, mine, blocks, dim, 128), E4M3), scales, scales]

    shapes = [parts_of(other) for other in range(sharding.size)]
    sizes = [sum(num_bytes(*part) for part in parts) for parts in shapes]
    received = exchange(chunks, sizes, sharding.group, "qkv").wait()
    tensors = [unpack(flat, *parts) for flat, parts in zip(received, shapes, strict=True)]
    places = sharding.block_places(z.q8.device)

    def joined(i: int) -> Tensor:
        pieces = [parts[i] for parts in tensors]
        x = torch.cat([piece.view(torch.uint8) if piece.dtype == E4M3 else piece for piece in pieces], dim=2)
        x = x if places is None else x.index_select(2, places)
        return x.view(E4M3) if pieces[0].dtype == E4M3 else x

    v8t = whole_v(joined(2), sharding.extra_rows(z.q8.device))
    return Operands(joined(0), joined(1), v8t, joined(3), joined(4), heads.cut(z.v_scale, 1, rank).contiguous())


def _send_output(out: Tensor, lse: Tensor, sharding: Sharding, heads: Heads, options: Options) -> tuple[Tensor, Tensor]:
    """``(B, S, H_local, D)`` and ``(B, S, H_local)``, tokens in the order of the ranks, to ``(B, S_local, H, D)`` and ``(B, S_local, H)``."""
    batch, dim, dtype = out.shape[0], out.shape[3], out.dtype
    tensors = [out, lse]
    if options.fp8_output:
        scale = scale_of(out.float().abs().amax(-1), pow2=False)
        tensors = [to_e4m3(out.float() / scale.unsqueeze(-1)), lse, scale]
    pieces = [x.split(list(sharding.counts), dim=1) for x in tensors]
    chunks = [pack(*(piece[rank] for piece in pieces)) for rank in range(sharding.size)]
    shapes = [[((batch, sharding.num_local, len(of), *x.shape[3:]), x.dtype) for x in tensors] for of in heads.of]  # type: list[list[tuple[Sequence[int], torch.dtype]]]
    sizes = [sum(num_bytes(*part) for part in parts) for parts in shapes]
    received = exchange(chunks, sizes, sharding.group, "out").wait()
    parts = [unpack(flat, *shape) for flat, shape in zip(received, shapes, strict=True)]
    if options.fp8_output:
        for part in parts:
            part[0] = (part[0].float() * part[2].unsqueeze(-1)).to(dtype)
    assert parts[0][0].shape[-1] == dim
    return heads.restore([part[0] for part in parts], 2), heads.restore([part[1] for part in parts], 2)


class QuantizedUlysses(torch.autograd.Function):
    """Quantize here, exchange e4m3 and scales, attend this rank's heads, send the output back."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, lists: Lists, sharding: Sharding, heads: Heads, options: Options,
        k_mean: Tensor | None, v_absmax: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """q, k, v ``(B, H, S_local, D)``; returns the output likewise, and the lse ``(B, H, S_local)``."""
        k_mean, v_absmax = global_statistics(k, v, sharding, options, k_mean, v_absmax)
        mine, q_k_mean = quantize(q, k, v, sharding, options, k_mean, v_absmax)
        z = _exchange_operands(mine, sharding, heads)
        lists = cut_lists(lists, heads, sharding.rank)._replace(token_of_slot=sharding.slots(q.device))
        num_tokens, batch, dim = sharding.layout.num_tokens, q.shape[0], q.shape[3]
        if z.q8.shape[1]:
            out, lse, row_max, row_sum = torch.ops.fpsattn.forward(
                *z, lists.token_of_slot, lists.tile_of_block, lists.kv_num_blocks, lists.kv_indices, None,
                num_tokens=num_tokens, softmax_scale=options.softmax_scale, out_dtype=options.out_dtype,
            )  # fmt: skip
        else:  # more ranks than heads
            out = q.new_empty(batch, 0, num_tokens, dim, dtype=options.out_dtype)
            lse = row_max = row_sum = q.new_empty(batch, 0, num_tokens, dtype=torch.float32)
        ctx.where, ctx.options, ctx.dtype = (sharding, heads), options, q.dtype
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(out, *z, row_max, row_sum, *(x for x in lists if x is not None))
        mine_out, mine_lse = _send_output(out.transpose(1, 2), lse.transpose(1, 2), sharding, heads, options)
        mine_lse = mine_lse.transpose(1, 2) + options.softmax_scale * q_k_mean
        ctx.mark_non_differentiable(mine_lse)
        return mine_out.transpose(1, 2), mine_lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, *_: Any) -> tuple[Any, ...]:
        if grad_out is None:
            return (None,) * 9
        (sharding, heads), options = ctx.where, ctx.options
        out, *z, row_max, row_sum, slots, tile_of_block, _offsets, kv_num, kv, q_num, q_indices = ctx.saved_tensors
        grad = grad_out.to(options.out_dtype).transpose(1, 2).unsqueeze(0)
        grad = _scatter_heads(grad, sharding, heads, "gradients")[0].transpose(1, 2)
        if out.shape[1]:
            gradients = torch.ops.fpsattn.backward(
                grad, out, *z, row_max, row_sum, slots, tile_of_block, kv_num, kv, q_num, q_indices,
                softmax_scale=options.softmax_scale, deterministic=options.deterministic,
            )  # fmt: skip
        else:
            gradients = (grad, grad, grad)
        stacked = torch.stack([g.transpose(1, 2) for g in gradients])
        dq, dk, dv = _scatter_tokens(stacked, sharding, heads, "gradients").transpose(2, 3)
        return dq.to(ctx.dtype), dk.to(ctx.dtype), dv.to(ctx.dtype), *(None,) * 6
