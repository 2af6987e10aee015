"""The reference: what fpsattention computes, step by step, in plain PyTorch. Obvious, never tuned, and the law.

Every other implementation (``cpu.py``, the sm_90a kernels) is tested against this file. Section numbers in the comments
are those of ``docs/numerics.md``. Shapes: q, k, v, out are ``(B, H, S, D)``; slot-ordered tensors are
``(B, H, num_blocks, 128, ...)``. Method: FPSAttention, arXiv 2506.04648, with the numerics described in ``docs/numerics.md``.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .norm_rope import norm_rope

BLOCK = 128
E4M3_MAX = 448.0
SCALE_FLOOR = 2.0**-100  # keeps 1 / scale and the remainder of a corrected division in FP32's normal range
P_SHIFT = 8  # P = e4m3(2^(x - m + 8)) <= 256 < 448
CODE_SLOTS = {64: 96, 128: 96}  # by columns of codes: the first slots of a block, whose P comes from `exponent_codes`
CODE_SLOPE = -1 / 64  # of h, per octave
CODE_ORIGIN = 1 - 264.125 / 2048  # h of y = 0
LEAST_CODE_ARGUMENT = 1 - 547 / 2048  # h of the greatest code, 126
CODE_REST = 21.5  # v = 512 h + CODE_REST, and 1/4 in the inner halves of octaves
CODE_TOP = 0x6000 + 46  # FP16 bits of v at code 0, were the grid of v that of [256, 512) everywhere
LOG2E = math.log2(math.e)
V_EXTRA_ROWS = 8
# Position p of a group of 16 in v8t holds slot V_SLOT_ORDER[p] (the FP32 accumulator fragment of QK^T read as an 8-bit operand).
V_SLOT_ORDER = (0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15)
TILE, BLOCKWISE, TOKEN = 0, 1, 2  # granularity codes of the ops
INT8 = 3  # likewise: Q and K in INT8 instead of e4m3, scales per block
INT8_MAX = 127.0


class Operands(NamedTuple):
    """What forward and backward read of a :class:`Quantized`: its first six tensors."""

    q8: Tensor
    k8: Tensor
    v8t: Tensor
    q_scale: Tensor
    k_scale: Tensor
    v_scale: Tensor


class Quantized(NamedTuple):
    """What the quantizer hands to the attention kernels (``torch.ops.fpsattn.quantize`` returns the same, in this order)."""

    q8: Tensor  # e4m3 or int8 [B, H, num_blocks, 128, C], C = code_dim(D)
    k8: Tensor  # likewise
    v8t: Tensor  # e4m3 [B, H, num_blocks, C + 8, 128]
    q_scale: Tensor  # f32 [B, H, num_blocks] or, per token, [B, H, num_blocks, 128]
    k_scale: Tensor  # likewise
    v_scale: Tensor  # f32 [B, H, D]
    k_mean: Tensor  # f32 [B, H, D], zeros without smoothing
    q_k_mean: Tensor  # f32 [B, H, S]: q . k_mean
    q_block_sum: Tensor  # f32 [B, H, num_blocks, D]: sum over the tokens of a block; [B, H, 0, D] where not asked for
    k_block_sum: Tensor  # likewise, of K with its mean

    @property
    def operands(self) -> Operands:
        """The tensors that forward and backward take."""
        return Operands(self.q8, self.k8, self.v8t, self.q_scale, self.k_scale, self.v_scale)


class Forward(NamedTuple):
    """Result of :func:`forward`."""

    out: Tensor  # (B, H, S, D)
    lse: Tensor  # f32 (B, H, S), natural logarithm
    row_max: Tensor  # f32 (B, H, num_blocks * 128), integers in log2 units
    row_sum: Tensor  # f32 (B, H, num_blocks * 128)


def attention_fp64(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    """Exact dense masked attention in FP64: ``softmax(scale * q k^T) v``.

    Args:
        q, k, v: ``(B, H, S, D)``, any float dtype.
        mask: bool, broadcastable to ``(B, H, S, S)``; True = attends. A row without True gives zeros.
        scale: default ``1 / sqrt(D)``.
    """
    q, k, v = q.double(), k.double(), v.double()
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = scale * q @ k.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    probabilities = torch.softmax(scores, dim=-1)
    if mask is not None:  # softmax of an empty row is NaN
        probabilities = torch.where(mask.any(-1, keepdim=True), probabilities, 0.0)
    return probabilities @ v


# Quantization (step 2) ---------------------------------------------------------------------------------------------------


def to_e4m3(x: Tensor) -> Tensor:
    """FP32 to e4m3: nearest even, saturating at 448; NaN stays NaN."""
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def to_int8(x: Tensor) -> Tensor:
    """FP32 to INT8: nearest, half away from zero, saturating at 127; NaN becomes 0 (its scale is NaN)."""
    return (x.sign() * (x.abs() + 0.5).floor()).clamp(-INT8_MAX, INT8_MAX).nan_to_num(0.0).to(torch.int8)


def scale_of(absmax: Tensor, pow2: bool, largest: float = E4M3_MAX) -> Tensor:
    """``absmax / largest``; 1 for an all-zero group, NaN for a group with a NaN or an Inf; with ``pow2``, rounded up to 2^n."""
    scale = (absmax / largest).clamp_min(SCALE_FLOOR)
    if pow2:
        mantissa, exponent = torch.frexp(scale)  # scale = mantissa * 2^exponent, mantissa in [0.5, 1)
        scale = torch.ldexp(torch.ones_like(scale), torch.where(mantissa == 0.5, exponent - 1, exponent))
    scale = torch.where(absmax == 0, 1.0, scale)
    return torch.where(torch.isfinite(absmax), scale, math.nan)


def code_dim(dim: int) -> int:
    """C: how many columns the codes of a head dimension D have, 64 or 128. Those beyond D are the codes of zeros."""
    return 64 if dim <= 64 else 128


def code_columns(x: Tensor, value: float = 0.0) -> Tensor:
    """``(..., D)`` to ``(..., C)``."""
    return torch.nn.functional.pad(x, (0, code_dim(x.shape[-1]) - x.shape[-1]), value=value)


def block_sum(x: Tensor, token_of_slot: Tensor) -> Tensor:
    """Sum of the tokens of each block, FP32 ``(B, H, num_blocks, D)``, in a fixed order: each 16 slots one after another, then the
    8 sums one after another."""
    valid = (token_of_slot >= 0).unflatten(-1, (-1, BLOCK)).unsqueeze(-1)
    slots = torch.where(valid, gather_slots(x.float(), token_of_slot), 0.0).unflatten(3, (BLOCK // 16, 16))
    groups = torch.zeros_like(slots[..., 0, :])
    for i in range(16):
        groups = groups + slots[..., i, :]
    total = groups[..., 0, :]
    for g in range(1, BLOCK // 16):
        total = total + groups[..., g, :]
    return total


def gather_slots(x: Tensor, token_of_slot: Tensor) -> Tensor:
    """``(B, H, S, D)`` to ``(B, H, num_blocks, 128, D)``; a padding slot repeats slot 0 of its own block."""
    slots = token_of_slot.long().unflatten(-1, (-1, BLOCK))
    source = torch.where(slots < 0, slots[..., :1], slots).flatten(-2)
    return _rows(x, source).unflatten(2, (-1, BLOCK))


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows of ``(B, H, n, ...)`` by an index for all, ``[m]``, or one per head, ``[B, H, m]``."""
    if index.dim() == 1:
        return x[:, :, index]
    index = index.expand(*x.shape[:2], -1)
    return x.gather(2, index.reshape(*index.shape, *(1,) * (x.dim() - 3)).expand(*index.shape, *x.shape[3:]))


def _group_scales(blocks: Tensor, offsets: list[int], granularity: int, pow2: bool) -> Tensor:
    """Scale of every slot, ``(B, H, num_blocks, 128)``. Padding repeats a valid slot of its block: it cannot change a maximum."""
    per_slot = blocks.abs().amax(-1)
    if granularity == TOKEN:
        return scale_of(per_slot, pow2)
    per_block = per_slot.amax(-1)
    if granularity == TILE:
        tiles = [
            per_block[:, :, a:b].amax(-1, keepdim=True).expand(-1, -1, b - a)
            for a, b in zip(offsets, offsets[1:], strict=False)
        ]
        per_block = torch.cat(tiles, dim=-1)
    largest = INT8_MAX if granularity == INT8 else E4M3_MAX
    return scale_of(per_block, pow2, largest).unsqueeze(-1).expand(-1, -1, -1, BLOCK)


def quantize(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    token_of_slot: Tensor,
    tile_block_offsets: Tensor,
    k_mean: Tensor | None = None,
    v_absmax: Tensor | None = None,
    kv_token_of_slot: Tensor | None = None,
    kv_tile_block_offsets: Tensor | None = None,
    *,
    granularity: int,
    smooth_k: bool,
    pow2_scales: bool,
    k_mean_stride: int = 1,
    block_sums: bool = False,
) -> Quantized:
    """Tile order, K smoothing, scales and e4m3 bytes (steps 1 and 2 of ``docs/numerics.md``).

    Args:
        q, k, v: ``(B, H, S, D)``; k and v may have fewer heads, a divisor of H: query head h attends their head ``h // (H / Hk)``.
        token_of_slot: int32 ``[num_slots]``, -1 in padding, or a table per head, ``[B, H, num_slots]``.
        tile_block_offsets: int32 ``[num_tiles + 1]``.
        kv_token_of_slot, kv_tile_block_offsets: of k and v, where they have other tokens or another order than q.
        granularity: 0 tile, 1 block (128 slots), 2 token; 3: INT8 q8 and k8, scales per block.
        k_mean_stride: the mean of K is taken over tokens 0, n, 2n, ...
        k_mean, v_absmax: f32 ``[B, Hk, D]``; computed where None. Values of V beyond ``v_absmax`` saturate.
        block_sums: whether ``q_block_sum`` and ``k_block_sum`` are wanted.
    """
    q, k, v = q.float(), k.float(), v.float()
    dim = q.shape[3]
    kv_slots = token_of_slot if kv_token_of_slot is None else kv_token_of_slot
    q_block_sum, k_block_sum = (
        block_sum(x, slots) if block_sums else x.new_empty(*x.shape[:2], 0, dim)
        for x, slots in ((q, token_of_slot), (k, kv_slots))
    )
    q, k, v = (code_columns(x) for x in (q, k, v))
    k_mean, v_absmax = (x if x is None else code_columns(x) for x in (k_mean, v_absmax))
    offsets = tile_block_offsets.tolist()
    kv_offsets = offsets if kv_tile_block_offsets is None else kv_tile_block_offsets.tolist()
    valid = (kv_slots >= 0).unflatten(-1, (-1, BLOCK))

    if not smooth_k:
        k_mean = torch.zeros_like(k[:, :, 0])
    elif k_mean is None:
        k_mean = k[:, :, ::k_mean_stride].mean(dim=2)
    q_k_mean = (q * k_mean.repeat_interleave(q.shape[1] // k.shape[1], 1).unsqueeze(2)).sum(-1)

    q_blocks = gather_slots(q, token_of_slot)
    k_blocks = gather_slots(k - k_mean.unsqueeze(2), kv_slots)
    q_scale = _group_scales(q_blocks, offsets, granularity, pow2_scales)
    k_scale = _group_scales(k_blocks, kv_offsets, granularity, pow2_scales)
    rounded = to_int8 if granularity == INT8 else to_e4m3
    q8 = rounded(q_blocks / q_scale.unsqueeze(-1))
    k8 = rounded(k_blocks / k_scale.unsqueeze(-1))

    v_scale = scale_of(v.abs().amax(2) if v_absmax is None else v_absmax.float(), pow2_scales)
    v = torch.where(v.isinf(), math.nan, v)  # with a given v_absmax, an Inf must not saturate to a number
    v_blocks = gather_slots(v, kv_slots) / v_scale[:, :, None, None]
    v_blocks = torch.where(valid[..., None], v_blocks, 0.0).transpose(-1, -2)  # (B, H, num_blocks, D, 128)
    extra = torch.zeros_like(v_blocks[..., :V_EXTRA_ROWS, :])
    extra[..., 0, :] = valid.float()
    v8t = to_e4m3(torch.cat([v_blocks, extra], dim=-2)[..., v_slot_order()])

    if granularity != TOKEN:
        q_scale, k_scale = q_scale[..., 0], k_scale[..., 0]
    v_scale, k_mean = v_scale[..., :dim].contiguous(), k_mean[..., :dim].float().contiguous()
    return Quantized(
        q8, k8, v8t, q_scale.contiguous(), k_scale.contiguous(), v_scale, k_mean, q_k_mean, q_block_sum, k_block_sum
    )


def prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    token_of_slot: Tensor,
    tile_block_offsets: Tensor,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    q_bias: Tensor | None = None,
    k_bias: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    k_mean: Tensor | None = None,
    v_absmax: Tensor | None = None,
    *,
    norm: int,
    eps: float,
    rope_halves: bool = False,
    first_rotated: int = 0,
    weights_begin: int = 0,
    weights_end: int = -1,
    **options: Any,
) -> Quantized:
    """:func:`quantize` of raw projections: norm and RoPE of q and k in FP32 first (step 0 of ``docs/numerics.md``)."""
    position: dict[str, Any] = {"norm": norm, "eps": eps, "rope_halves": rope_halves, "first_rotated": first_rotated}
    position |= {"weights_begin": weights_begin, "weights_end": weights_end}
    q = norm_rope(q, q_weight, q_bias, cos, sin, **position)
    k = norm_rope(k, k_weight, k_bias, cos, sin, **position)
    return quantize(q, k, v, token_of_slot, tile_block_offsets, k_mean, v_absmax, **options)


# Attention (steps 3 to 7) ------------------------------------------------------------------------------------------------


def v_slot_order() -> Tensor:
    """Slot that each of the 128 positions of a block of v8t holds."""
    return torch.arange(BLOCK, device="cpu").view(-1, 16)[:, list(V_SLOT_ORDER)].reshape(-1)


def exponent_codes(y: Tensor) -> Tensor:
    """e4m3 codes near those of ``2^y``, uint8, without an exponential: FP16 roundings of two lines, then integers. NaN gives 0.

    The code of ``2^y`` grows by 8 per octave and is nearly linear in between: h is the line, and 1/4 less in the inner halves of
    octaves. FP16 rounds h in [1/2, 1], where its grid is the same everywhere. That of v is 1/4 below 512 and 1/2 above, so its bits, and
    the code with them, fall half as fast there, nearly as ``2^y`` does among e4m3's subnormals. Up to there the code of ``2^(y + n)`` is
    that of ``2^y`` plus ``8 n``.
    """
    h = (CODE_ORIGIN + CODE_SLOPE * y.double()).float().clamp(LEAST_CODE_ARGUMENT, 1.0).half()
    inner = h.view(torch.int16) & 16 == 0
    v = (512 * h.double() + CODE_REST + 0.25 * inner).half()
    codes = (CODE_TOP - v.view(torch.int16).int()) >> 2
    return torch.where(y.isnan(), 0, codes).to(torch.uint8)


def probabilities(y: Tensor, dim: int) -> Tensor:
    """P of exponents ``y = x - m + 8``, ``(..., 128)`` FP64, slots of one block: e4m3 values as FP32. NaN stays NaN."""
    p = to_e4m3(torch.exp2(y.float())).float()
    coded = y[..., : CODE_SLOTS[dim]]
    p[..., : CODE_SLOTS[dim]] = (
        exponent_codes(coded).view(torch.float8_e4m3fn).float().masked_fill(coded.isnan(), math.nan)
    )
    return p


def _token_order(x: Tensor, token_of_slot: Tensor) -> Tensor:
    """``(B, H, num_slots, ...)`` to ``(B, H, S, ...)``: padding sorts to the end."""
    slots = torch.where(token_of_slot < 0, token_of_slot.shape[-1], token_of_slot).argsort(-1)
    return _rows(x, slots[..., : int((token_of_slot >= 0).sum(-1).max())])


def _per_slot(scale: Tensor) -> Tensor:
    """Scales as ``(B, H, num_blocks, 128)``, whichever granularity they came in."""
    return scale if scale.dim() == 4 else scale.unsqueeze(-1).expand(*scale.shape, BLOCK)


def _scores(product: Tensor, q_scale: Tensor, k_scale: Tensor, softmax_scale: float, k_per_token: bool) -> Tensor:
    """Section 3 of one block, ``[128, 128]`` in log2 units. Where the roundings fall is part of P's definition, in every pass."""
    scale_log2 = softmax_scale * LOG2E
    if k_per_token:
        return (product * k_scale) * (q_scale[:, None] * scale_log2)
    return product * (q_scale[:, None] * k_scale * scale_log2)


def _dequantized_v(v8t: Tensor) -> tuple[Tensor, Tensor]:
    """Raw e4m3 values of V, ``(B, H, num_blocks, 128, D)`` in slot order, and the ones row, ``(B, H, num_blocks, 128)``."""
    rows = v8t.float()[..., v_slot_order().argsort()]
    return rows[..., :-V_EXTRA_ROWS, :].transpose(-1, -2), rows[..., -V_EXTRA_ROWS, :]


def forward(
    q8: Tensor,
    k8: Tensor,
    v8t: Tensor,
    q_scale: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    token_of_slot: Tensor,
    tile_of_block: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    q_k_mean: Tensor | None = None,
    *,
    num_tokens: int,
    softmax_scale: float,
    out_dtype: torch.dtype,
) -> Forward:
    """Block-sparse attention on quantized operands, a Python loop over (batch, head, query block, KV block).

    ``kv_num_blocks [Bm, Hm, num_tiles]`` and ``kv_indices [Bm, Hm, num_tiles, max_kv]`` list the KV blocks that a query
    tile visits, in that order. D is the length of ``v_scale``; columns of codes beyond D are dropped at the end. K and V may have
    fewer heads and other blocks than Q.
    """
    batch, heads, num_blocks, _, dim = q8.shape
    group = heads // k8.shape[1]
    head_dim, v_scale = v_scale.shape[-1], code_columns(v_scale, 1.0)
    q_raw, k_raw = q8.float(), k8.float()
    v_raw, ones = _dequantized_v(v8t)
    k_per_token = k_scale.dim() == 4
    q_scale, k_scale = _per_slot(q_scale), _per_slot(k_scale)

    out = q_raw.new_zeros(batch, heads, num_blocks, BLOCK, dim)
    row_max = q_raw.new_zeros(batch, heads, num_blocks, BLOCK)
    row_sum = q_raw.new_zeros(batch, heads, num_blocks, BLOCK)
    for b in range(batch):
        for h in range(heads):
            counts = kv_num_blocks[b % kv_num_blocks.shape[0], h % kv_num_blocks.shape[1]].tolist()
            indices = kv_indices[b % kv_indices.shape[0], h % kv_indices.shape[1]].tolist()
            for i in range(num_blocks):
                tile = int(tile_of_block[i])
                if counts[tile] == 0:
                    continue  # step 7: an empty row stays 0, with row_sum 0
                m = q_raw.new_full((BLOCK,), -math.inf)
                l = q_raw.new_zeros(BLOCK)
                o = q_raw.new_zeros(BLOCK, dim)
                for j in indices[tile][: counts[tile]]:
                    key = b, h // group, j
                    # Section 3: scores in log2 units.
                    product = q_raw[b, h, i] @ k_raw[key].T
                    x = _scores(product, q_scale[b, h, i], k_scale[key], softmax_scale, k_per_token)
                    # Section 4: integer running maximum, probabilities in e4m3 with the offset 8.
                    m_new = torch.maximum(m, x.amax(-1).ceil())
                    p = probabilities(x.double() - m_new[:, None] + P_SHIFT, dim)
                    rescale = torch.where(m_new == m, 1.0, torch.exp2(m - m_new))
                    # Section 5: the normaliser is the sum of the quantized probabilities of valid keys.
                    l = l * rescale + p @ ones[key]
                    o = o * rescale[:, None] + p @ v_raw[key]
                    m = m_new
                out[b, h, i] = o * v_scale[b, h // group] / l[:, None]
                row_max[b, h, i], row_sum[b, h, i] = m, l

    # Section 6: token order, natural logarithm; an empty row has log2(0) = -inf.
    lse = (row_max - P_SHIFT + torch.log2(row_sum)) / LOG2E
    valid = (token_of_slot >= 0).unflatten(-1, (num_blocks, BLOCK))
    lse = _token_order(lse.flatten(2), token_of_slot)
    if q_k_mean is not None:
        lse = lse + softmax_scale * q_k_mean
    out = _token_order(out[..., :head_dim].flatten(2, 3), token_of_slot).to(out_dtype)
    return Forward(out, lse, torch.where(valid, row_max, 0.0).flatten(2), torch.where(valid, row_sum, 0.0).flatten(2))


def backward(
    grad_out: Tensor,
    out: Tensor,
    q8: Tensor,
    k8: Tensor,
    v8t: Tensor,
    q_scale: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    row_max: Tensor,
    row_sum: Tensor,
    token_of_slot: Tensor,
    tile_of_block: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    kv_token_of_slot: Tensor | None = None,
    *,
    softmax_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Straight-through gradients ``(dq, dk, dv)``, each like its tensor, FP32 (``docs/numerics.md``, Backward).

    The quantizers and the K smoothing pass gradients as identity. The probabilities are the quantized ones of the forward,
    ``p = P(x - m + 8) / l``, in dV as in dS, so that ``delta = rowsum(dO * O)`` is exact. dK and dV sum over the query heads of a head.
    """
    batch, heads, num_blocks, _, dim = q8.shape
    group = heads // k8.shape[1]
    head_dim, v_scale = v_scale.shape[-1], code_columns(v_scale, 1.0)
    k_per_token = k_scale.dim() == 4
    q_scale, k_scale = _per_slot(q_scale), _per_slot(k_scale)
    q = q8.float() * q_scale.unsqueeze(-1)
    k = k8.float() * k_scale.unsqueeze(-1)
    v_raw, ones = _dequantized_v(v8t)
    v = v_raw * v_scale[:, :, None, None]
    valid = (token_of_slot >= 0).unflatten(-1, (num_blocks, BLOCK))
    do = torch.where(valid[..., None], gather_slots(code_columns(grad_out.float()), token_of_slot), 0.0)
    delta = (do * gather_slots(code_columns(out.float()), token_of_slot)).sum(-1)
    row_max = row_max.unflatten(2, (num_blocks, BLOCK))
    row_sum = row_sum.unflatten(2, (num_blocks, BLOCK))

    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for b in range(batch):
        for h in range(heads):
            counts = kv_num_blocks[b % kv_num_blocks.shape[0], h % kv_num_blocks.shape[1]].tolist()
            indices = kv_indices[b % kv_indices.shape[0], h % kv_indices.shape[1]].tolist()
            for i in range(num_blocks):
                tile = int(tile_of_block[i])
                m, l = row_max[b, h, i, :, None], row_sum[b, h, i, :, None]
                for j in indices[tile][: counts[tile]]:
                    key = b, h // group, j
                    product = q8[b, h, i].float() @ k8[key].float().T
                    x = _scores(product, q_scale[b, h, i], k_scale[key], softmax_scale, k_per_token)
                    p = probabilities(x.double() - m + P_SHIFT, dim) * ones[key]
                    p = torch.where(l == 0, 0.0, p / l)  # padding query slots have l = 0
                    dp = do[b, h, i] @ v[key].T
                    ds = p * (dp - delta[b, h, i, :, None]) * softmax_scale
                    dv[key] += p.T @ do[b, h, i]
                    dq[b, h, i] += ds @ k[key]
                    dk[key] += ds.T @ q[b, h, i]

    kv_slots = token_of_slot if kv_token_of_slot is None else kv_token_of_slot
    dq, dk, dv = (
        _token_order(g[..., :head_dim].flatten(2, 3), slots)
        for g, slots in ((dq, token_of_slot), (dk, kv_slots), (dv, kv_slots))
    )
    return dq, dk, dv


def jvp(
    q_tangent: Tensor | None,
    k_tangent: Tensor | None,
    v_tangent: Tensor | None,
    out: Tensor,
    q8: Tensor,
    k8: Tensor,
    v8t: Tensor,
    q_scale: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    row_max: Tensor,
    row_sum: Tensor,
    token_of_slot: Tensor,
    tile_of_block: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    kv_token_of_slot: Tensor | None = None,
    *,
    softmax_scale: float,
) -> Tensor:
    """Straight-through tangent of ``out`` along the tangents of q, k, v (None: zero), ``(B, H, S, D)`` FP32.

    The adjoint of :func:`backward`: ``<grad_out, jvp(t)> = <backward(grad_out), t>``.
    """
    batch, heads, num_blocks, _, dim = q8.shape
    group = heads // k8.shape[1]
    head_dim, v_scale = v_scale.shape[-1], code_columns(v_scale, 1.0)
    k_per_token = k_scale.dim() == 4
    q_scale, k_scale = _per_slot(q_scale), _per_slot(k_scale)
    q = q8.float() * q_scale.unsqueeze(-1)
    k = k8.float() * k_scale.unsqueeze(-1)
    v_raw, ones = _dequantized_v(v8t)
    v = v_raw * v_scale[:, :, None, None]
    kv_slots = token_of_slot if kv_token_of_slot is None else kv_token_of_slot
    q_dot, k_dot, v_dot = (
        torch.zeros_like(like) if x is None else gather_slots(code_columns(x.float()), slots)
        for x, like, slots in ((q_tangent, q, token_of_slot), (k_tangent, k, kv_slots), (v_tangent, v, kv_slots))
    )
    o = gather_slots(code_columns(out.float()), token_of_slot)
    row_max = row_max.unflatten(2, (num_blocks, BLOCK))
    row_sum = row_sum.unflatten(2, (num_blocks, BLOCK))

    o_dot = torch.zeros_like(q)
    for b in range(batch):
        for h in range(heads):
            counts = kv_num_blocks[b % kv_num_blocks.shape[0], h % kv_num_blocks.shape[1]].tolist()
            indices = kv_indices[b % kv_indices.shape[0], h % kv_indices.shape[1]].tolist()
            for i in range(num_blocks):
                tile = int(tile_of_block[i])
                m, l = row_max[b, h, i, :, None], row_sum[b, h, i, :, None]
                for j in indices[tile][: counts[tile]]:
                    key = b, h // group, j
                    product = q8[b, h, i].float() @ k8[key].float().T
                    x = _scores(product, q_scale[b, h, i], k_scale[key], softmax_scale, k_per_token)
                    p = probabilities(x.double() - m + P_SHIFT, dim) * ones[key]
                    p = torch.where(l == 0, 0.0, p / l)
                    s_dot = softmax_scale * (q_dot[b, h, i] @ k[key].T + q[b, h, i] @ k_dot[key].T)
                    p_dot = p * s_dot
                    o_dot[b, h, i] += p @ v_dot[key] + p_dot @ v[key] - p_dot.sum(-1, keepdim=True) * o[b, h, i]
    return _token_order(o_dot[..., :head_dim].flatten(2, 3), token_of_slot)


def fake_quantize(x: Tensor, scale: Tensor) -> Tensor:
    """``scale * e4m3(x / scale)`` whose gradient is the identity (straight-through)."""
    return x + (to_e4m3(x.detach() / scale).to(x.dtype) * scale - x).detach()
