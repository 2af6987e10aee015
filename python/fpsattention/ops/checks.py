"""Argument checks of the ops, by metadata only: used by the fake kernels (so also under ``torch.compile``) and by the CPU kernels.

``csrc/torch/check.h`` has the same checks for the sm_90a kernels. Value checks (:func:`check_list_values`) read the
tensors, so only the CPU kernels make them; the sm_90a kernels must not wait for the device.
"""

from __future__ import annotations

import math
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..errors import ConfigError
from .norm_rope import NORMS
from .reference import BLOCK, INT8, V_EXTRA_ROWS, Operands, code_dim

HEAD_DIMS = (64, 96, 128)  # of the ops, ascending; attend() pads others to the next one
_HEAD_DIMS_TEXT = f"{', '.join(map(str, HEAD_DIMS[:-1]))} and {HEAD_DIMS[-1]}"
GRANULARITIES = {"tile": 0, "block": 1, "token": 2}
#: "int8": of Q and K, op code INT8 in the place of a granularity; "paper": ``published.py``.
PRECISIONS = ("fp8", "int8", "paper")
E4M3 = torch.float8_e4m3fn
KERNEL_DTYPES = (torch.bfloat16, torch.float16)  # of the sm_90a kernels
CPU_DTYPES = (*KERNEL_DTYPES, torch.float32)
OUT_DTYPES = CPU_DTYPES  # that forward writes, on any device


def _fail(op: str, argument: str, text: str) -> NoReturn:
    raise ConfigError(f"fpsattention.{op}: {argument} {text}")


def _holds(condition: bool | torch.SymBool) -> bool:
    """A condition on sizes; one that a trace cannot know (sizes that an op computes when the graph runs) counts as true."""
    if isinstance(condition, bool):
        return condition
    from torch.fx.experimental.symbolic_shapes import guard_or_true

    return guard_or_true(condition)


def _shape(op: str, name: str, x: Tensor, want: tuple[Any, ...]) -> None:
    """``want`` holds sizes, or names for free ones."""
    if x.dim() != len(want) or not all(
        isinstance(w, str) or _holds(s == w) for s, w in zip(x.shape, want, strict=True)
    ):
        text = ", ".join(str(w) for w in want)
        _fail(op, name, f"has shape {tuple(x.shape)}, expected ({text})")


def _dtype(op: str, name: str, x: Tensor, *want: torch.dtype) -> None:
    if x.dtype not in want:
        _fail(op, name, f"has dtype {x.dtype}, expected {' or '.join(str(w) for w in want)}")


def _same_device(op: str, device: torch.device, **tensors: Tensor | None) -> None:
    for name, x in tensors.items():
        if x is not None and x.device != device:
            _fail(op, name, f"is on {x.device}, expected {device} like the other tensors")


def _token_tensor(op: str, name: str, x: Tensor) -> None:
    if x.dim() != 4:
        _fail(op, name, f"has shape {tuple(x.shape)}, expected (B, H, S, D)")
    if x.stride(3) != 1:
        _fail(op, name, f"has stride {x.stride(3)} in D, expected 1: pass {name}.contiguous()")


def _int32(op: str, name: str, x: Tensor, want: tuple[Any, ...]) -> None:
    _dtype(op, name, x, torch.int32)
    _shape(op, name, x, want)


def _dtypes_of(device: torch.device) -> tuple[torch.dtype, ...]:
    return CPU_DTYPES if device.type in ("cpu", "meta") else KERNEL_DTYPES


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


def _divides(op: str, name: str, kv_heads: int, heads: int) -> None:
    if kv_heads < 1 or heads % kv_heads:
        _fail(op, name, f"has {kv_heads} heads, expected a divisor of the {heads} of q")


def _offsets(op: str, name: str, x: Tensor) -> None:
    _int32(op, name, x, ("num_tiles + 1",))
    if x.shape[0] < 2:
        _fail(op, name, f"has {x.shape[0]} entries, expected num_tiles + 1")


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


def check_slots(op: str, token_of_slot: Tensor, batch: int, heads: int, name: str = "token_of_slot") -> None:
    """One table, or one per head."""
    per_head = token_of_slot.dim() == 3
    _int32(op, name, token_of_slot, (batch, heads, "num_blocks * 128") if per_head else ("num_blocks * 128",))
    if token_of_slot.shape[-1] == 0 or token_of_slot.shape[-1] % BLOCK:
        _fail(op, name, f"has {token_of_slot.shape[-1]} entries, expected a positive multiple of {BLOCK}")


def check_lists(op: str, kind: str, num_blocks: Tensor, indices: Tensor, batch: int, heads: int, rows: Any) -> None:
    """``kind`` is "kv" or "q": prefix of the argument names."""
    _int32(op, f"{kind}_num_blocks", num_blocks, ("1 or B", "1 or H", rows))
    _int32(
        op, f"{kind}_indices", indices, (num_blocks.shape[0], num_blocks.shape[1], num_blocks.shape[2], f"max_{kind}")
    )
    if num_blocks.shape[0] not in (1, batch) or num_blocks.shape[1] not in (1, heads):
        _fail(
            op, f"{kind}_num_blocks",
            f"has shape {tuple(num_blocks.shape)}, expected ({batch} or 1, {heads} or 1, {rows}) for {batch} samples and {heads} heads",
        )  # fmt: skip


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
) -> None:
    op, operands = "backward", Operands(q8, k8, v8t, q_scale, k_scale, v_scale)
    check_saved(
        op, out, operands, row_max, row_sum, token_of_slot, tile_of_block, kv_num_blocks, kv_indices, kv_token_of_slot
    )
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
) -> None:
    op, operands = "jvp", Operands(q8, k8, v8t, q_scale, k_scale, v_scale)
    check_saved(
        op, out, operands, row_max, row_sum, token_of_slot, tile_of_block, kv_num_blocks, kv_indices, kv_token_of_slot
    )
    _like_out(op, out, q_tangent=q_tangent)
    tokens = out.shape[2] if kv_token_of_slot is None else "S of k"
    for name, x in (("k_tangent", k_tangent), ("v_tangent", v_tangent)):
        if x is not None:
            _token_tensor(op, name, x)
            _dtype(op, name, x, out.dtype)
            _shape(op, name, x, (out.shape[0], k8.shape[1], tokens, out.shape[3]))
    _same_device(op, out.device, k_tangent=k_tangent, v_tangent=v_tangent)


# Values (CPU only) -------------------------------------------------------------------------------------------------------


def check_quantize_values(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    token_of_slot: Tensor,
    tile_block_offsets: Tensor,
    k_mean: Tensor | None = None,
    v_absmax: Tensor | None = None,
    kv_token_of_slot: Tensor | None = None,
    kv_tile_block_offsets: Tensor | None = None,
    **options: Any,
) -> None:
    check_slot_values("quantize", token_of_slot, q.shape[2])
    check_offset_values("quantize", tile_block_offsets, token_of_slot.shape[-1] // BLOCK)
    if kv_token_of_slot is not None and kv_tile_block_offsets is not None:
        check_slot_values("quantize", kv_token_of_slot, k.shape[2], "kv_token_of_slot")
        check_offset_values(
            "quantize", kv_tile_block_offsets, kv_token_of_slot.shape[-1] // BLOCK, "kv_tile_block_offsets"
        )


def check_prepare_values(
    q: Tensor, k: Tensor, v: Tensor, token_of_slot: Tensor, tile_block_offsets: Tensor, *_: Any, **options: Any
) -> None:
    check_quantize_values(q, k, v, token_of_slot, tile_block_offsets)


def check_forward_values(
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
) -> None:
    check_softmax_scale("forward", softmax_scale)
    check_slot_values("forward", token_of_slot, num_tokens)
    check_tile_of_block("forward", tile_of_block, kv_num_blocks.shape[2])
    check_list_values("forward", "kv", kv_num_blocks, kv_indices, k8.shape[2])


def _check_saved_values(
    op: str,
    out: Tensor,
    token_of_slot: Tensor,
    tile_of_block: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    softmax_scale: float,
    k8: Tensor,
    kv_token_of_slot: Tensor | None,
    num_kv_tokens: int,
) -> None:
    check_softmax_scale(op, softmax_scale)
    check_slot_values(op, token_of_slot, out.shape[2])
    if kv_token_of_slot is not None:
        check_slot_values(op, kv_token_of_slot, num_kv_tokens, "kv_token_of_slot")
    check_tile_of_block(op, tile_of_block, kv_num_blocks.shape[2])
    check_list_values(op, "kv", kv_num_blocks, kv_indices, k8.shape[2])


def check_backward_values(
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
) -> None:
    lists = (token_of_slot, tile_of_block, kv_num_blocks, kv_indices)
    _check_saved_values("backward", out, *lists, softmax_scale, k8, kv_token_of_slot, num_kv_tokens)
    check_list_values("backward", "q", q_num_blocks, q_indices, q8.shape[2])


def check_jvp_values(
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
) -> None:
    of_keys = k_tangent if k_tangent is not None else v_tangent
    slots = None if of_keys is None else kv_token_of_slot
    lists = (token_of_slot, tile_of_block, kv_num_blocks, kv_indices)
    _check_saved_values("jvp", out, *lists, softmax_scale, k8, slots, 0 if of_keys is None else of_keys.shape[2])


def check_softmax_scale(op: str, softmax_scale: float) -> None:
    """A scale <= 0 would turn the block maxima, taken before scaling, into minima."""
    if not (math.isfinite(softmax_scale) and softmax_scale > 0):
        _fail(op, "softmax_scale", f"is {softmax_scale}, expected a finite number > 0")


def check_slot_values(op: str, token_of_slot: Tensor, num_tokens: int, name: str = "token_of_slot") -> None:
    """Every token in exactly one slot, and slot 0 of every block valid; of every table."""
    if token_of_slot.dim() == 3:
        for table in token_of_slot.flatten(0, 1):
            check_slot_values(op, table, num_tokens, name)
        return
    low, high = (int(x) for x in torch.aminmax(token_of_slot))
    if low < -1 or high >= num_tokens:
        _fail(op, name, f"holds values from {low} to {high}, expected -1 to {num_tokens - 1}")
    if bool((token_of_slot.view(-1, BLOCK)[:, 0] < 0).any()):
        _fail(
            op,
            name,
            f"has a block whose slot 0 is padding: valid slots come first in each of its {BLOCK}-slot blocks",
        )
    counts = torch.bincount(token_of_slot[token_of_slot >= 0], minlength=num_tokens)
    if int(counts.min()) != 1 or int(counts.max()) != 1:
        token = int(torch.nonzero(counts != 1)[0])
        _fail(
            op,
            name,
            f"holds token {token} {int(counts[token])} times, expected every token of {num_tokens} once",
        )


def check_offset_values(op: str, tile_block_offsets: Tensor, num_blocks: int, name: str = "tile_block_offsets") -> None:
    sizes = tile_block_offsets.diff()
    if int(tile_block_offsets[0]) != 0 or int(tile_block_offsets[-1]) != num_blocks or int(sizes.min()) < 1:
        _fail(
            op,
            name,
            f"must rise from 0 to num_blocks = {num_blocks}, came {tile_block_offsets.tolist()[:8]}...",
        )


def check_tile_of_block(op: str, tile_of_block: Tensor, num_tiles: int) -> None:
    low, high = (int(x) for x in torch.aminmax(tile_of_block))
    if low < 0 or high >= num_tiles:
        _fail(
            op,
            "tile_of_block",
            f"holds tiles {low} to {high}, expected 0 to {num_tiles - 1} (the rows of kv_num_blocks)",
        )


def check_list_values(op: str, kind: str, num_blocks: Tensor, indices: Tensor, limit: int) -> None:
    low, high = (int(x) for x in torch.aminmax(num_blocks))
    if low < 0 or high > indices.shape[-1]:
        _fail(
            op,
            f"{kind}_num_blocks",
            f"holds lengths {low} to {high}, expected 0 to {indices.shape[-1]} (the last size of {kind}_indices)",
        )
    if high == 0:
        return
    used = torch.arange(indices.shape[-1], device=indices.device) < num_blocks.unsqueeze(-1)
    bad = used & ((indices < 0) | (indices >= limit))
    if bool(bad.any()):
        value = int(indices[bad][0])
        _fail(op, f"{kind}_indices", f"holds block {value}, expected 0 to {limit - 1}")
    unused = -1 - torch.arange(indices.shape[-1], dtype=torch.int32, device=indices.device)
    keys = torch.where(used, indices, unused).sort(dim=-1).values
    if bool((keys.diff(dim=-1) == 0).any()):
        _fail(op, f"{kind}_indices", "lists a block twice in one row: every block at most once")
