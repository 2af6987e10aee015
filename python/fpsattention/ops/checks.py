"""Argument checks of the ops ``quantize`` and ``prepare``; those of ``forward``, ``backward`` and ``jvp`` are in ``checks_attention.py``.

By metadata: used by the fake kernels (so also under ``torch.compile``) and by the CPU kernels. ``csrc/torch/check.h`` has the same
checks for the sm_90a kernels. ``values=True`` reads the tensors, too: only the CPU kernels ask for that, as the sm_90a kernels must not
wait for the device.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .checks_tensors import (
    _divides,
    _dtype,
    _dtypes_of,
    _fail,
    _holds,
    _offsets,
    _same_device,
    _shape,
    _token_tensor,
    check_offset_values,
    check_slot_values,
    check_slots,
)
from .norm_rope import NORMS
from .reference import BLOCK, INT8

HEAD_DIMS = (64, 96, 128)  # of the ops, ascending; attend() pads others to the next one
_HEAD_DIMS_TEXT = f"{', '.join(map(str, HEAD_DIMS[:-1]))} and {HEAD_DIMS[-1]}"
GRANULARITIES = {"tile": 0, "block": 1, "token": 2}
#: "int8": of Q and K, op code INT8 in the place of a granularity; "paper": ``published.py``.
PRECISIONS = ("fp8", "int8", "paper")
E4M3 = torch.float8_e4m3fn


def kernel_dim(dim: int) -> int | None:
    """The head dimension that runs ``dim``: the next of ``HEAD_DIMS``, None beyond the last."""
    for wide in HEAD_DIMS:  # ascending; a loop, as Dynamo does not take min with a default
        if wide >= dim:
            return wide
    return None


def check_qkv(op: str, q: Tensor, k: Tensor, v: Tensor, kv_shape: tuple[Any, ...] | None = None) -> None:
    """``kv_shape``: of k and v; None: that of q."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        _token_tensor(op, name, x)
        _dtype(op, name, x, *_dtypes_of(q.device))
        if x.dtype != q.dtype:
            _fail(op, name, f"has dtype {x.dtype}, expected {q.dtype} like q")
        _shape(op, name, x, tuple(q.shape) if kv_shape is None or name == "q" else kv_shape)
        if 0 in x.shape:
            _fail(op, name, f"has shape {tuple(x.shape)}: no size may be 0")
    if q.shape[3] not in HEAD_DIMS:
        _fail(op, "q", f"has head dimension {q.shape[3]}, supported are {_HEAD_DIMS_TEXT}")


def check_quantize(
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
    values: bool = False,
) -> None:
    op = "quantize"
    if q.dim() != 4 or k.dim() != 4:
        check_qkv(op, q, k, v)  # which says so
    kv_heads, kv_tokens = k.shape[1], q.shape[2] if kv_token_of_slot is None else k.shape[2]
    check_qkv(op, q, k, v, (q.shape[0], kv_heads, kv_tokens, q.shape[3]))
    _divides(op, "k", kv_heads, q.shape[1])
    _same_device(
        op, q.device, k=k, v=v, token_of_slot=token_of_slot, tile_block_offsets=tile_block_offsets,
        k_mean=k_mean, v_absmax=v_absmax, kv_token_of_slot=kv_token_of_slot, kv_tile_block_offsets=kv_tile_block_offsets,
    )  # fmt: skip
    check_slots(op, token_of_slot, q.shape[0], q.shape[1])
    _offsets(op, "tile_block_offsets", tile_block_offsets)
    if (kv_token_of_slot is None) != (kv_tile_block_offsets is None):
        missing = "kv_token_of_slot" if kv_token_of_slot is None else "kv_tile_block_offsets"
        _fail(op, missing, "is missing: both or none of kv_token_of_slot and kv_tile_block_offsets")
    if kv_token_of_slot is not None and kv_tile_block_offsets is not None:
        check_slots(op, kv_token_of_slot, q.shape[0], kv_heads, "kv_token_of_slot")
        _offsets(op, "kv_tile_block_offsets", kv_tile_block_offsets)
    elif token_of_slot.dim() == 3 and kv_heads != q.shape[1]:
        _fail(op, "kv_token_of_slot", "is missing, but token_of_slot differs from head to head and k has fewer heads")
    if granularity not in (0, 1, 2, INT8):
        _fail(op, "granularity", f"is {granularity}, expected 0 (tile), 1 (block), 2 (token) or 3 (INT8, block)")
    if k_mean_stride < 1:
        _fail(op, "k_mean_stride", f"is {k_mean_stride}, expected at least 1")
    for name, x in (("k_mean", k_mean), ("v_absmax", v_absmax)):
        if x is not None:
            _dtype(op, name, x, torch.float32)
            _shape(op, name, x, (q.shape[0], kv_heads, q.shape[3]))
    if values:
        _table_values(op, token_of_slot, tile_block_offsets, q.shape[2], "")
        if kv_token_of_slot is not None and kv_tile_block_offsets is not None:
            _table_values(op, kv_token_of_slot, kv_tile_block_offsets, k.shape[2], "kv_")


def _table_values(op: str, token_of_slot: Tensor, tile_block_offsets: Tensor, tokens: int, side: str) -> None:
    check_slot_values(op, token_of_slot, tokens, f"{side}token_of_slot")
    check_offset_values(op, tile_block_offsets, token_of_slot.shape[-1] // BLOCK, f"{side}tile_block_offsets")


def check_hidden(q: Tensor, hidden: Tensor, token_of_slot: Tensor) -> None:
    if token_of_slot.dim() != 1:
        _fail("attention_masked", "token_of_slot", f"has shape {tuple(token_of_slot.shape)}, expected one table")
    _dtype("attention_masked", "hidden", hidden, torch.bool)
    _shape("attention_masked", "hidden", hidden, (q.shape[0], q.shape[2]))
    _same_device("attention_masked", q.device, hidden=hidden)


def check_prepare(
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
) -> None:
    op = "prepare"
    check_quantize(q, k, v, token_of_slot, tile_block_offsets, k_mean, v_absmax, **options)
    _shape(op, "k", k, tuple(q.shape))
    batch, heads, tokens, dim = q.shape
    if norm not in NORMS.values():
        _fail(op, "norm", f"is {norm}, expected {', '.join(f'{code} ({name})' for name, code in NORMS.items())}")
    if not (math.isfinite(eps) and eps >= 0):
        _fail(op, "eps", f"is {eps}, expected a finite number >= 0")
    has_run = not (isinstance(weights_end, int) and weights_end == -1)
    inside = _holds(weights_begin >= 0) and _holds(weights_begin <= weights_end) and _holds(weights_end <= tokens)
    if not (inside if has_run else weights_begin == 0):
        _fail(
            op,
            "weights_end",
            f"is {weights_end} and weights_begin {weights_begin}, expected a run of the {tokens} tokens of q, or -1 and 0: the rotated ones",
        )
    channels = heads * dim if norm == NORMS["rms_across_heads"] else dim
    given = {"q_weight": q_weight, "k_weight": k_weight, "q_bias": q_bias, "k_bias": k_bias}
    for name, x in given.items():
        if x is None:
            continue
        if norm == NORMS["none"]:
            _fail(op, name, "is given but norm is 0 (none)")
        if x.dim() != 2 or x.shape[0] not in (1, 2) or x.shape[1] != channels:
            _fail(
                op,
                name,
                f"has shape {tuple(x.shape)}, expected (1, {channels}), or 2 rows: of a run of tokens and of the others",
            )
        if x.shape[0] == 2 and cos is None and not has_run:
            _fail(op, name, "has 2 rows but there is no rope and no run of tokens, which says whose the first row is")
    if (cos is None) != (sin is None):
        _fail(op, "sin" if sin is None else "cos", "is missing: both or none of cos and sin")
    for name, x in (("cos", cos), ("sin", sin)):
        if x is not None:
            _dtype(op, name, x, torch.float32)
            _shape(op, name, x, ("1 or B", "1 or H", "n", dim // 2))
            if (
                x.shape[0] not in (1, batch)
                or x.shape[1] not in (1, heads)
                or (cos is not None and x.shape != cos.shape)
            ):
                _fail(
                    op,
                    name,
                    f"has shape {tuple(x.shape)}, expected (1 or {batch}, 1 or {heads}, n, {dim // 2}), cos like sin",
                )
    if cos is not None and (first_rotated < 0 or not _holds(first_rotated + cos.shape[2] <= tokens)):
        _fail(
            op,
            "cos",
            f"has {cos.shape[2]} tokens from first_rotated={first_rotated} on, expected at most the {tokens} of q",
        )
    _same_device(op, q.device, **given, cos=cos, sin=sin)
