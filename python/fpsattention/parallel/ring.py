"""Halo and ring: every rank attends its own queries, and fetches the keys and values that these visit.

Only KV blocks that some query tile of a rank lists travel to it, as e4m3 and scales. "halo" fetches all of them, then makes one call whose lists keep their
order, so the output has one process's bits. "ring" takes one rank's blocks after the other, rank r those of r - s in step s, so that it holds two
shards at a time and the next one travels meanwhile; the parts are merged by row maxima and sums, as in Ring Attention (arXiv 2310.01889):

    m = max m_i      l = sum l_i 2^(m_i - m)      O = sum O_i l_i 2^(m_i - m) / l

The row maxima of the ops are integers, so the weights are exact. P is rounded against the running maximum, which starts anew with every rank:
so ring differs from one process by rounding.

A rank's problem has the queries of its own blocks, and the keys of its own where they are visited, then of those fetched: keys with tables of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ..layout.masks import Lists
from ..layout.plain import plain_tensors
from ..layout.tiles import BLOCK
from ..ops.blocks import transpose_blocks
from ..ops.reference import Operands
from .collectives import Pending, exchange, num_bytes, pack, unpack
from .options import Options, global_statistics, quantize, v_rows, whole_v
from .sharding import Sharding

E4M3 = torch.float8_e4m3fn
_problems: WeakIdKeyDictionary = WeakIdKeyDictionary()  # by the tensor of the lists


@dataclass(frozen=True, eq=False)
class Problem:
    """One call of the ops on one rank.

    Attributes:
        lists: tables of its own queries; entries are blocks of the keys. None: its queries visit nothing here.
        keys: ``token_of_slot`` of the keys: own ones if ``with_own``, then the fetched ones.
        with_own: its own keys are among them.
        fetched: from each rank, how many blocks come.
        fetched_tokens: likewise, tokens.
        extra: rows D to D + 7 of ``v8t`` of the fetched blocks, as bytes.
        sent: to each rank, which of the own blocks go there (int64, numbered among the own).
        sent_tokens: likewise, the tokens in them, numbered as this rank holds them.
        moves: any rank fetches anything.
    """

    lists: Lists | None
    keys: Tensor
    with_own: bool
    fetched: tuple[int, ...]
    fetched_tokens: tuple[int, ...]
    extra: Tensor
    sent: tuple[Tensor, ...]
    sent_tokens: tuple[Tensor, ...]
    moves: bool


def problems_of(lists: Lists, sharding: Sharding, ring: bool) -> tuple[Problem, ...]:
    """The calls that this rank makes: one, or with ``ring`` one per rank. Kept as long as the lists; reads them on the host, once."""
    known = _problems.setdefault(lists.kv_indices, {})
    key = (id(sharding), ring, lists.q_indices is not None)
    if key not in known or known[key][0] is not sharding:
        with plain_tensors():
            device = lists.kv_indices.device
            known[key] = (sharding, _problems_of(lists.to("cpu"), sharding, ring, device))
    return known[key][1]


def visited_blocks(lists: Lists, sharding: Sharding) -> Tensor:
    """bool ``[ranks, num_blocks]`` on the CPU: whether some query tile of a rank visits a block, in any sample and head."""
    counts, indices = lists.kv_num_blocks.cpu(), lists.kv_indices.cpu().long()
    num_blocks = sharding.layout.num_blocks
    listed = torch.arange(indices.shape[-1], device="cpu") < counts.unsqueeze(-1)
    columns = torch.where(listed, indices, num_blocks)
    visits = torch.zeros(*counts.shape, num_blocks + 1, dtype=torch.bool, device="cpu").scatter_(-1, columns, True)
    by_tile = visits[..., :-1].any(0).any(0)
    owner = sharding.owner_of_tile()
    return torch.stack([by_tile[owner == rank].any(0) for rank in range(sharding.size)])


def _problems_of(lists: Lists, sharding: Sharding, ring: bool, device: torch.device) -> tuple[Problem, ...]:
    visited, owner = visited_blocks(lists, sharding), sharding.owner_of_block()
    size, rank = sharding.size, sharding.rank
    steps = [[(r, (r - step) % size) for r in range(size)] for step in range(size)]  # (who fetches, from whom)
    if not ring:
        steps = [[pair for step in steps for pair in step]]
    return tuple(_problem(lists, sharding, pairs, visited, owner, rank, device) for pairs in steps)


def _problem(
    lists: Lists, sharding: Sharding, pairs: Sequence[tuple[int, int]], visited: Tensor, owner: Tensor, rank: int,
    device: torch.device,
) -> Problem:  # fmt: skip
    def travelling(to: int, source: int) -> Tensor:
        moves = to != source and (to, source) in pairs
        return torch.nonzero(visited[to] & (owner == source)).squeeze(1) if moves else owner[:0]

    ranks = range(sharding.size)
    own = sharding.blocks(rank)
    fetched = [travelling(rank, source) for source in ranks]
    sent = [travelling(to, rank) for to in ranks]
    moves = any(travelling(to, source).numel() for to, source in pairs)

    slots = sharding.slots(torch.device("cpu")).view(-1, BLOCK)
    local = torch.full_like(owner, -1)
    local[own] = torch.arange(own.numel())
    positions = slots.long() - sharding.starts[rank]  # of own tokens
    sent_tokens = [positions[blocks][slots[blocks] >= 0].to(device) for blocks in sent]

    token_of_slot = torch.where(slots[own] >= 0, positions[own], -1)
    with_own = (rank, rank) in pairs
    others = slots[torch.cat(fetched)] >= 0
    numbers = others.flatten().cumsum(0).view_as(others) - 1 + (sharding.num_local if with_own else 0)
    keys = torch.cat([token_of_slot if with_own else token_of_slot[:0], torch.where(others, numbers, -1)])

    blocks = torch.cat([own if with_own else own[:0], *fetched])
    place = torch.full_like(owner, -1)
    place[blocks] = torch.arange(blocks.numel())
    allowed = place >= 0
    tiles = sharding.owner_of_tile() == rank
    counts, indices = _restricted(lists.kv_num_blocks[:, :, tiles], lists.kv_indices[:, :, tiles], allowed, place)
    sizes = lists.tile_block_offsets.diff()[tiles]
    offsets = torch.cat([sizes.new_zeros(1), sizes.cumsum(0, dtype=torch.int32)])
    tables = None
    if bool(counts.any()):
        transposed: tuple[Any, ...] = (None, None)
        if lists.q_indices is not None:
            transposed = transpose_blocks(counts, indices, offsets, num_blocks=blocks.numel(), width=own.numel())
        tile_of_block = torch.repeat_interleave(torch.arange(sizes.numel(), dtype=torch.int32), sizes.long())
        slots_of_own = token_of_slot.reshape(-1).to(torch.int32)
        tables = Lists(slots_of_own, tile_of_block, offsets, counts, indices, *transposed).to(device)
    extra = sharding.extra_rows(torch.device("cpu"))[torch.cat(fetched)].to(device)
    tokens = tuple(int((slots[part] >= 0).sum()) for part in fetched)
    return Problem(
        tables, keys.reshape(-1).to(device, torch.int32), with_own, tuple(part.numel() for part in fetched), tokens, extra,
        tuple(local[part].to(device) for part in sent), tuple(sent_tokens), moves,
    )  # fmt: skip


def _restricted(counts: Tensor, indices: Tensor, allowed: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
    """Lists of the allowed blocks only, in their order, numbered by ``place``."""
    indices = indices.long().clamp(0, place.numel() - 1)
    kept = (torch.arange(indices.shape[-1]) < counts.unsqueeze(-1)) & allowed[indices]
    order = (~kept).to(torch.uint8).argsort(dim=-1, stable=True)
    new_counts = kept.sum(-1, dtype=torch.int32)
    width = max(1, int(new_counts.max()))
    new = place[indices.gather(-1, order)[..., :width]].clamp_min(0).to(torch.int32)
    return new_counts.contiguous(), new.contiguous()


# Tensors -------------------------------------------------------------------------------------------------------------------


def _fetch(mine: Operands, problem: Problem, sharding: Sharding) -> Pending | None:
    """Starts the exchange of K and V; None where nothing moves."""
    if not problem.moves:
        return None
    sent = (mine.k8, v_rows(mine.v8t), mine.k_scale)
    chunks = [pack(*(_rows(x, index) for x in sent)) for index in problem.sent]
    sizes = [sum(num_bytes(*part) for part in _parts(mine, count)) for count in problem.fetched]
    return exchange(chunks, sizes, sharding.group, "kv", wait=False)


def _parts(mine: Operands, blocks: int) -> list[tuple[Sequence[int], torch.dtype]]:
    batch, heads, _, _, dim = mine.k8.shape
    scales = (batch, heads, blocks, *mine.k_scale.shape[3:])
    return [
        ((batch, heads, blocks, BLOCK, dim), E4M3),
        ((batch, heads, blocks, dim, BLOCK), E4M3),
        (scales, torch.float32),
    ]


def _arrived(pending: Pending | None, mine: Operands, problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """k8, v8t and k_scale of the fetched blocks, rank after rank."""
    if pending is None:
        return tuple(x[:, :, :0] for x in (mine.k8, mine.v8t, mine.k_scale))  # type: ignore[return-value]
    parts = [unpack(flat, *_parts(mine, n)) for flat, n in zip(pending.wait(), problem.fetched, strict=True)]
    k8, rows, scale = (_cat([part[i] for part in parts]) for i in range(3))
    return k8, whole_v(rows, problem.extra), scale


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """Blocks of ``x [B, H, blocks, ...]``."""
    if x.dtype == E4M3:
        return x.view(torch.uint8).index_select(2, index).view(E4M3)
    return x.index_select(2, index)


def _cat(tensors: Sequence[Tensor], dim: int = 2) -> Tensor:
    if tensors[0].dtype == E4M3:
        return torch.cat([x.view(torch.uint8) for x in tensors], dim).view(E4M3)
    return torch.cat(list(tensors), dim)


def _operands(mine: Operands, fetched: tuple[Tensor, Tensor, Tensor], problem: Problem) -> Operands:
    """Own queries, and the keys of the problem."""
    own = mine.k8, mine.v8t, mine.k_scale
    if problem.with_own and fetched[0].shape[2]:
        keys = [_cat(pair) for pair in zip(own, fetched, strict=True)]
    else:
        keys = list(own if problem.with_own else fetched)
    return mine._replace(k8=keys[0], v8t=keys[1], k_scale=keys[2])


def _forward(
    z: Operands, problem: Problem, sharding: Sharding, options: Options, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """``out [B, H, S_local, D]``, row maximum and sum ``[B, H, own slots]`` of one problem."""
    lists = problem.lists
    assert lists is not None
    out, _, row_max, row_sum = torch.ops.fpsattn.forward(
        *z, lists.token_of_slot, lists.tile_of_block, lists.kv_num_blocks, lists.kv_indices, None,
        num_tokens=sharding.num_local, softmax_scale=options.softmax_scale, out_dtype=dtype,
    )  # fmt: skip
    return out, row_max, row_sum


class _Merge:
    """Running sum of parts over disjoint keys; rows without keys have a sum of 0."""

    def __init__(self, mine: Operands, sharding: Sharding):
        (batch, heads, blocks), dim = mine.q8.shape[:3], mine.v_scale.shape[2]
        device = mine.q8.device
        self.out = torch.zeros(batch, heads, sharding.num_local, dim, device=device)
        self.row_max = torch.zeros(batch, heads, blocks * BLOCK, device=device)
        self.row_sum = torch.zeros(batch, heads, blocks * BLOCK, device=device)
        slots, _ = sharding.local_tables(device)
        self.slot_of_token = torch.nonzero(slots >= 0).squeeze(1)[slots[slots >= 0].argsort()]

    def add(self, out: Tensor, row_max: Tensor, row_sum: Tensor) -> None:
        """``out`` is normalized by ``row_sum``."""
        none, new = self.row_sum == 0, row_sum == 0
        m = torch.where(none, row_max, torch.where(new, self.row_max, torch.maximum(self.row_max, row_max)))
        old_sum = torch.where(none, 0.0, self.row_sum * torch.exp2(self.row_max - m))
        new_sum = torch.where(new, 0.0, row_sum * torch.exp2(row_max - m))
        total = old_sum + new_sum
        share = torch.where(total == 0, 0.0, new_sum / total).index_select(2, self.slot_of_token).unsqueeze(-1)
        self.out += (out.float() - self.out) * share
        self.row_max, self.row_sum = m, total


class RingAttention(torch.autograd.Function):
    """Halo (one problem) or ring (one per rank)."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, problems: tuple[Problem, ...], sharding: Sharding, options: Options,
        k_mean: Tensor | None, v_absmax: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """q, k, v ``(B, H, S_local, D)``; returns the output likewise, and the lse ``(B, H, S_local)``."""
        k_mean, v_absmax = global_statistics(k, v, sharding, options, k_mean, v_absmax)
        mine, q_k_mean = quantize(q, k, v, sharding, options, k_mean, v_absmax)
        merge = _Merge(mine, sharding)
        one = len(problems) == 1
        partial = options.out_dtype if one else torch.float32  # rounded once, when merged
        out: Tensor | None = None
        kept: tuple[Tensor, ...] = ()
        pending = _fetch(mine, problems[0], sharding)
        for i, problem in enumerate(problems):
            fetched = _arrived(pending, mine, problem)
            if i + 1 < len(problems):  # travels while this one is attended
                pending = _fetch(mine, problems[i + 1], sharding)
            kept = (
                fetched if one else ()
            )  # also by a rank that visits nothing: whether to fetch again must be one answer
            if problem.lists is None:
                continue
            out, row_max, row_sum = _forward(_operands(mine, fetched, problem), problem, sharding, options, partial)
            if one:
                merge.row_max, merge.row_sum = row_max, row_sum
            else:
                merge.add(out, row_max, row_sum)
        if not one or out is None:
            out = merge.out.to(options.out_dtype)
        ctx.where, ctx.options, ctx.problems, ctx.dtype = sharding, options, problems, q.dtype
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(out, *mine, merge.row_max, merge.row_sum, *kept)
        lse = (merge.row_max - 8 + torch.log2(merge.row_sum)) * 0.6931471805599453  # docs/numerics.md, 6
        lse = lse.index_select(2, merge.slot_of_token) + options.softmax_scale * q_k_mean
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, *_: Any) -> tuple[Any, ...]:
        if grad_out is None:
            return (None,) * 8
        sharding, options, problems = ctx.where, ctx.options, ctx.problems
        out, *saved = ctx.saved_tensors
        mine, row_max, row_sum, kept = Operands(*saved[:6]), saved[6], saved[7], tuple(saved[8:])
        grad_out = grad_out.to(options.out_dtype)
        totals = [torch.zeros(out.shape, dtype=torch.float32, device=out.device) for _ in range(3)]
        refetch = len(problems) > 1
        pending = _fetch(mine, problems[0], sharding) if refetch else None
        for i, problem in enumerate(problems):
            fetched = _arrived(pending, mine, problem) if refetch else kept
            if i + 1 < len(problems):
                pending = _fetch(mine, problems[i + 1], sharding)
            gradients = _backward(grad_out, out, mine, fetched, row_max, row_sum, problem, options)
            own, others = gradients if gradients is not None else ([], None)
            for total, part in zip(totals, own, strict=False):  # of q alone where no own key is visited
                total += part.float()
            _return_gradients(totals, others, problem, sharding, options.out_dtype)
        dq, dk, dv = (total.to(ctx.dtype) for total in totals)
        return dq, dk, dv, *(None,) * 5


def _backward(
    grad_out: Tensor, out: Tensor, mine: Operands, fetched: tuple[Tensor, Tensor, Tensor], row_max: Tensor, row_sum: Tensor,
    problem: Problem, options: Options,
) -> tuple[list[Tensor], list[Tensor]] | None:  # fmt: skip
    """Gradients of the own q, k, v, and those of the fetched k, v; None: nothing is visited."""
    lists = problem.lists
    if lists is None:
        return None
    count = out.shape[2] if problem.with_own else 0
    dq, dk, dv = torch.ops.fpsattn.backward(
        *(x if x.stride(3) == 1 else x.contiguous() for x in (grad_out, out)), *_operands(mine, fetched, problem),
        row_max, row_sum, lists.token_of_slot, lists.tile_of_block, lists.kv_num_blocks, lists.kv_indices, lists.q_num_blocks,
        lists.q_indices, problem.keys, softmax_scale=options.softmax_scale, deterministic=options.deterministic,
        num_kv_tokens=count + sum(problem.fetched_tokens),
    )  # fmt: skip
    return [dq, *(g[:, :, :count] for g in (dk, dv) if count)], [g[:, :, count:] for g in (dk, dv)]


def _return_gradients(
    totals: list[Tensor], others: list[Tensor] | None, problem: Problem, sharding: Sharding, dtype: torch.dtype
) -> None:
    """Sends the gradients of fetched K and V to their ranks, and adds up in FP32 what comes for the own ones."""
    if not problem.moves:
        return
    batch, heads, _, dim = totals[0].shape
    if others is None:
        others = [totals[0].new_zeros(batch, heads, sum(problem.fetched_tokens), dim, dtype=dtype) for _ in range(2)]
    pieces = [x.split(list(problem.fetched_tokens), dim=2) for x in others]
    chunks = [pack(pieces[0][rank], pieces[1][rank]) for rank in range(sharding.size)]
    shapes = [(batch, heads, tokens.numel(), dim) for tokens in problem.sent_tokens]
    sizes = [2 * num_bytes(shape, dtype) for shape in shapes]
    received = exchange(chunks, sizes, sharding.group, "gradients").wait()
    for flat, shape, tokens in zip(received, shapes, problem.sent_tokens, strict=True):
        for total, part in zip(totals[1:], unpack(flat, (shape, dtype), (shape, dtype)), strict=True):
            total.index_add_(2, tokens, part.float())
