"""Argument checks of the ops ``forward``, ``backward`` and ``jvp``; see ``checks.py``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .checks import _HEAD_DIMS_TEXT, E4M3, HEAD_DIMS, check_prepare, check_quantize
from .checks_tensors import (
    CPU_DTYPES,
    _divides,
    _dtype,
    _dtypes_of,
    _fail,
    _holds,
    _int32,
    _same_device,
    _shape,
    _token_tensor,
    check_list_values,
    check_lists,
    check_slot_values,
    check_slots,
    check_softmax_scale,
    check_tile_of_block,
)
from .reference import BLOCK, V_EXTRA_ROWS, Operands, code_dim

OUT_DTYPES = CPU_DTYPES  # that forward writes, on any device


def check_quantized(
    op: str,
    q8: Tensor,
    k8: Tensor,
    v8t: Tensor,
    q_scale: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    token_of_slot: Tensor,
) -> None:
    _dtype(op, "q8", q8, E4M3, *((torch.int8,) if q8.device.type in ("cpu", "meta") else ()))
    if v_scale.dim() != 3 or v_scale.shape[2] not in HEAD_DIMS:
        _fail(
            op,
            "v_scale",
            f"has shape {tuple(v_scale.shape)}, expected (B, H, D), and supported D are {_HEAD_DIMS_TEXT}",
        )
    dim = v_scale.shape[2]
    columns = code_dim(dim)
    _shape(op, "q8", q8, ("B", "H", "num_blocks", BLOCK, columns))
    batch, heads, num_blocks = q8.shape[:3]
    check_slots(op, token_of_slot, batch, heads)
    if not _holds(token_of_slot.shape[-1] == num_blocks * BLOCK):
        _fail(op, "token_of_slot", f"has {token_of_slot.shape[-1]} slots, expected the {num_blocks * BLOCK} of q8")
    _shape(op, "k8", k8, (batch, "H", "num_blocks", BLOCK, columns))
    kv_heads, kv_blocks = k8.shape[1:3]
    _divides(op, "k8", kv_heads, heads)
    for name, x, dtype in (("k8", k8, q8.dtype), ("v8t", v8t, E4M3)):
        _dtype(op, name, x, dtype)
    _shape(op, "v8t", v8t, (batch, kv_heads, kv_blocks, columns + V_EXTRA_ROWS, BLOCK))
    for name, x, shape in (("q_scale", q_scale, (batch, heads, num_blocks)), ("k_scale", k_scale, k8.shape[:3])):
        _dtype(op, name, x, torch.float32)
        _shape(op, name, x, (*shape, BLOCK) if x.dim() == 4 else tuple(shape))
    _dtype(op, "v_scale", v_scale, torch.float32)
    _shape(op, "v_scale", v_scale, (batch, kv_heads, dim))
    _same_device(
        op, q8.device, k8=k8, v8t=v8t, q_scale=q_scale, k_scale=k_scale, v_scale=v_scale, token_of_slot=token_of_slot
    )


def check_forward(
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
    values: bool = False,
) -> None:
    op = "forward"
    check_quantized(op, q8, k8, v8t, q_scale, k_scale, v_scale, token_of_slot)
    batch, heads, num_blocks = q8.shape[:3]
    _int32(op, "tile_of_block", tile_of_block, (num_blocks,))
    check_lists(op, "kv", kv_num_blocks, kv_indices, batch, heads, "num_tiles")
    _same_device(
        op,
        q8.device,
        tile_of_block=tile_of_block,
        kv_num_blocks=kv_num_blocks,
        kv_indices=kv_indices,
        q_k_mean=q_k_mean,
    )
    if num_tokens < 1 or not _holds(num_tokens <= num_blocks * BLOCK):
        _fail(op, "num_tokens", f"is {num_tokens}, expected 1 to {num_blocks * BLOCK}")
    if out_dtype not in OUT_DTYPES:
        _fail(op, "out_dtype", f"is {out_dtype}, expected one of {', '.join(str(d) for d in OUT_DTYPES)}")
    if q_k_mean is not None:
        _dtype(op, "q_k_mean", q_k_mean, torch.float32)
        _shape(op, "q_k_mean", q_k_mean, (batch, heads, num_tokens))
    if values:
        _list_values(op, num_tokens, softmax_scale, k8, token_of_slot, tile_of_block, kv_num_blocks, kv_indices)


def _list_values(
    op: str,
    num_tokens: int,
    softmax_scale: float,
    k8: Tensor,
    token_of_slot: Tensor,
    tile_of_block: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
) -> None:
    check_softmax_scale(op, softmax_scale)
    check_slot_values(op, token_of_slot, num_tokens)
    check_tile_of_block(op, tile_of_block, kv_num_blocks.shape[2])
    check_list_values(op, "kv", kv_num_blocks, kv_indices, k8.shape[2])


def check_saved(
    op: str,
    out: Tensor,
    operands: Operands,
    row_max: Tensor,
    row_sum: Tensor,
    token_of_slot: Tensor,
    tile_of_block: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    kv_token_of_slot: Tensor | None,
) -> None:
    """What backward and jvp take of a forward."""
    check_quantized(op, *operands, token_of_slot)
    batch, heads, num_blocks = operands.q8.shape[:3]
    dim = operands.v_scale.shape[2]
    if kv_token_of_slot is not None:
        check_slots(op, kv_token_of_slot, batch, operands.k8.shape[1], "kv_token_of_slot")
    of_keys = token_of_slot if kv_token_of_slot is None else kv_token_of_slot
    if not _holds(of_keys.shape[-1] == operands.k8.shape[2] * BLOCK):
        _fail(op, "k8", f"has {operands.k8.shape[2]} blocks, expected those of its table of {of_keys.shape[-1]} slots")
    _token_tensor(op, "out", out)
    _dtype(op, "out", out, *_dtypes_of(operands.q8.device))
    _shape(op, "out", out, (batch, heads, "S", dim))
    if out.shape[2] < 1 or not _holds(out.shape[2] <= num_blocks * BLOCK):
        _fail(op, "out", f"has {out.shape[2]} tokens, expected 1 to {num_blocks * BLOCK}")
    for name, x in (("row_max", row_max), ("row_sum", row_sum)):
        _dtype(op, name, x, torch.float32)
        _shape(op, name, x, (batch, heads, num_blocks * BLOCK))
    _int32(op, "tile_of_block", tile_of_block, (num_blocks,))
    check_lists(op, "kv", kv_num_blocks, kv_indices, batch, heads, "num_tiles")
    _same_device(
        op, operands.q8.device, out=out, row_max=row_max, row_sum=row_sum, tile_of_block=tile_of_block,
        kv_num_blocks=kv_num_blocks, kv_indices=kv_indices, kv_token_of_slot=kv_token_of_slot,
    )  # fmt: skip


def _like_out(op: str, out: Tensor, **tensors: Tensor | None) -> None:
    for name, x in tensors.items():
        if x is not None:
            _token_tensor(op, name, x)
            _dtype(op, name, x, out.dtype)
            _shape(op, name, x, tuple(out.shape))
    _same_device(op, out.device, **tensors)


def check_backward(
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
    q_num_blocks: Tensor,
    q_indices: Tensor,
    kv_token_of_slot: Tensor | None = None,
    *,
    softmax_scale: float,
    deterministic: bool = False,
    num_kv_tokens: int = 0,
    values: bool = False,
) -> None:
    op, operands = "backward", Operands(q8, k8, v8t, q_scale, k_scale, v_scale)
    lists = (token_of_slot, tile_of_block, kv_num_blocks, kv_indices)
    check_saved(op, out, operands, row_max, row_sum, *lists, kv_token_of_slot)
    _like_out(op, out, grad_out=grad_out)
    batch, heads = q8.shape[:2]
    check_lists(op, "q", q_num_blocks, q_indices, batch, heads, k8.shape[2])
    most = 0 if kv_token_of_slot is None else k8.shape[2] * BLOCK
    if not _holds(min(most, 1) <= num_kv_tokens <= most):
        _fail(
            op,
            "num_kv_tokens",
            f"is {num_kv_tokens}, expected {f'1 to {most}' if most else 'none'}: the tokens of kv_token_of_slot",
        )
    _same_device(op, out.device, q_num_blocks=q_num_blocks, q_indices=q_indices)
    if values:
        _list_values(op, out.shape[2], softmax_scale, k8, *lists)
        if kv_token_of_slot is not None:
            check_slot_values(op, kv_token_of_slot, num_kv_tokens, "kv_token_of_slot")
        check_list_values(op, "q", q_num_blocks, q_indices, q8.shape[2])


def check_jvp(
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
    values: bool = False,
) -> None:
    op, operands = "jvp", Operands(q8, k8, v8t, q_scale, k_scale, v_scale)
    lists = (token_of_slot, tile_of_block, kv_num_blocks, kv_indices)
    check_saved(op, out, operands, row_max, row_sum, *lists, kv_token_of_slot)
    _like_out(op, out, q_tangent=q_tangent)
    tokens = out.shape[2] if kv_token_of_slot is None else "S of k"
    for name, x in (("k_tangent", k_tangent), ("v_tangent", v_tangent)):
        if x is not None:
            _token_tensor(op, name, x)
            _dtype(op, name, x, out.dtype)
            _shape(op, name, x, (out.shape[0], k8.shape[1], tokens, out.shape[3]))
    _same_device(op, out.device, k_tangent=k_tangent, v_tangent=v_tangent)
    if values:
        _list_values(op, out.shape[2], softmax_scale, k8, *lists)
        of_keys = k_tangent if k_tangent is not None else v_tangent
        if kv_token_of_slot is not None and of_keys is not None:
            check_slot_values(op, kv_token_of_slot, of_keys.shape[2], "kv_token_of_slot")


#: Of every op, by its name.
CHECKS: dict[str, Callable[..., None]] = {
    "quantize": check_quantize,
    "prepare": check_prepare,
    "forward": check_forward,
    "backward": check_backward,
    "jvp": check_jvp,
}
