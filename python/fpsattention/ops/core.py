"""``torch.ops.fpsattn.*``: loads the libraries, registers fakes, the CPU kernels (``cpu.py``) and autograd (``autograd.py``).

Shapes (NB = num_blocks, blocks of 128 slots; S = video and text tokens; token tensors have unit stride in D):

``quantize(q, k, v, token_of_slot, tile_block_offsets, k_mean=None, v_absmax=None, *, granularity, smooth_k, pow2_scales,
k_mean_stride=1) -> (q8, k8, v8t, q_scale, k_scale, v_scale, k_mean_used, q_k_mean)``
    q, k, v (B, H, S, D); token_of_slot int32 [NB * 128], -1 in padding; tile_block_offsets int32 [num_tiles + 1];
    granularity 0 tile, 1 block, 2 token; k_mean, v_absmax f32 [B, H, D], computed where None.
    q8, k8 e4m3 [B, H, NB, 128, D]; v8t e4m3 [B, H, NB, D + 8, 128]; q_scale, k_scale f32 [B, H, NB], per token
    [B, H, NB, 128]; v_scale f32 [B, H, D]; k_mean_used f32 [B, H, D]; q_k_mean f32 [B, H, S].
``forward(q8, ..., v_scale, token_of_slot, tile_of_block, kv_num_blocks, kv_indices, q_k_mean=None, *, num_tokens,
softmax_scale, out_dtype) -> (out, lse, row_max, row_sum)``
    tile_of_block int32 [NB]; kv_num_blocks int32 [1 or B, 1 or H, num_tiles]; kv_indices int32 [., ., num_tiles, max_kv].
    out (B, H, S, D), a view of (B, S, H, D) memory; lse f32 [B, H, S]; row_max, row_sum f32 [B, H, NB * 128].
``backward(grad_out, out, q8, ..., v_scale, row_max, row_sum, token_of_slot, tile_of_block, kv_num_blocks, kv_indices,
q_num_blocks, q_indices, *, softmax_scale, deterministic=False) -> (dq, dk, dv)``
    q_num_blocks int32 [., ., NB], q_indices int32 [., ., NB, max_q]: the query blocks that visit a KV block.
``attention(q, k, v, token_of_slot, tile_of_block, tile_block_offsets, kv_num_blocks, kv_indices, q_num_blocks=None,
q_indices=None, k_mean=None, v_absmax=None, *, ...) -> (out, lse, q8, k8, v8t, q_scale, k_scale, v_scale, row_max, row_sum)``
    quantize and forward in one, differentiable in q, k, v through ``out``.

Bad arguments raise :class:`~fpsattention.errors.ConfigError` (CPU, compile) or ``RuntimeError`` (the C++ of the sm_90a kernels).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import BuildError
from . import cpu
from .checks import (
    E4M3,
    check_backward,
    check_forward,
    check_list_values,
    check_offset_values,
    check_quantize,
    check_slot_values,
    check_softmax_scale,
    check_tile_of_block,
)
from .reference import BLOCK, TOKEN, V_EXTRA_ROWS

NAMESPACES = ("fpsattn", "fpsattn_sm90")
OPS = ("quantize", "forward", "backward", "attention")
REINSTALL = "pip install --force-reinstall --no-deps . (in the source folder)"


def library_dir() -> Path:
    """Folder of the compiled libraries."""
    return Path(__file__).resolve().parents[1] / "lib"


def _load() -> str | None:
    """Loads the schemas, then the sm_90a kernels; returns why the kernels are not there, or None."""
    schemas, kernels = (library_dir() / f"lib{name}.so" for name in ("fpsattn_torch", "fpsattn_torch_cuda"))
    if not schemas.exists():
        raise BuildError(f"fpsattention.ops: {schemas} is missing, so this package was never built: {REINSTALL}")
    try:
        torch.ops.load_library(str(schemas))
    except OSError as error:
        raise BuildError(
            f"fpsattention.ops: {schemas} does not load ({error}): torch >= 2.10 is needed, then {REINSTALL}"
        ) from error
    if not kernels.exists():
        return "this installation was built without CUDA kernels (no nvcc was found, or FPSATTN_BUILD_CUDA=OFF)"
    try:
        torch.ops.load_library(str(kernels))
    except OSError as error:
        return f"{kernels.name} does not load ({error.__cause__ or error})"
    return None


_kernels_missing = _load()


def sm90_missing() -> str | None:
    """Why the sm_90a kernels cannot be called in this process (one clause of a sentence), or None where they can."""
    return _kernels_missing


def sm90_on_host() -> bool:
    """Whether device code runs on the host (an emulator), so that the sm_90a kernels take CPU tensors."""
    return os.environ.get("FPSATTN_SM90_ON_HOST") == "1"


# Fakes -------------------------------------------------------------------------------------------------------------------


def _token_like(like: Tensor, batch: int, heads: int, tokens: int, dim: int, dtype: torch.dtype) -> Tensor:
    """Empty ``(B, H, S, D)`` over ``(B, S, H, D)`` memory."""
    return like.new_empty((batch, tokens, heads, dim), dtype=dtype).transpose(1, 2)


def _fake_quantize(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    token_of_slot: Tensor,
    tile_block_offsets: Tensor,
    k_mean: Tensor | None = None,
    v_absmax: Tensor | None = None,
    *,
    granularity: int,
    smooth_k: bool,
    pow2_scales: bool,
    k_mean_stride: int = 1,
) -> tuple[Tensor, ...]:
    check_quantize(q, k, v, token_of_slot, tile_block_offsets, granularity, k_mean_stride, k_mean, v_absmax)
    batch, heads, tokens, dim = q.shape
    num_blocks = token_of_slot.shape[0] // BLOCK
    scale_shape = (batch, heads, num_blocks, BLOCK) if granularity == TOKEN else (batch, heads, num_blocks)
    return (
        q.new_empty((batch, heads, num_blocks, BLOCK, dim), dtype=E4M3),
        q.new_empty((batch, heads, num_blocks, BLOCK, dim), dtype=E4M3),
        q.new_empty((batch, heads, num_blocks, dim + V_EXTRA_ROWS, BLOCK), dtype=E4M3),
        q.new_empty(scale_shape, dtype=torch.float32),
        q.new_empty(scale_shape, dtype=torch.float32),
        q.new_empty((batch, heads, dim), dtype=torch.float32),
        q.new_empty((batch, heads, dim), dtype=torch.float32),
        q.new_empty((batch, heads, tokens), dtype=torch.float32),
    )


def _fake_forward(
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
) -> tuple[Tensor, ...]:
    check_forward(
        q8, k8, v8t, q_scale, k_scale, v_scale, token_of_slot, tile_of_block, kv_num_blocks, kv_indices,
        num_tokens, out_dtype, q_k_mean,
    )  # fmt: skip
    batch, heads, num_blocks, _, dim = q8.shape
    return (
        _token_like(q8, batch, heads, num_tokens, dim, out_dtype),
        q8.new_empty((batch, heads, num_tokens), dtype=torch.float32),
        q8.new_empty((batch, heads, num_blocks * BLOCK), dtype=torch.float32),
        q8.new_empty((batch, heads, num_blocks * BLOCK), dtype=torch.float32),
    )


def _fake_backward(
    grad_out: Tensor, out: Tensor, q8: Tensor, *operands: Tensor, softmax_scale: float, deterministic: bool = False
) -> tuple[Tensor, ...]:
    check_backward(grad_out, out, q8, *operands)
    batch, heads, tokens, dim = out.shape
    return tuple(_token_like(out, batch, heads, tokens, dim, out.dtype) for _ in range(3))


def _fake_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    token_of_slot: Tensor,
    tile_of_block: Tensor,
    tile_block_offsets: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    q_num_blocks: Tensor | None = None,
    q_indices: Tensor | None = None,
    k_mean: Tensor | None = None,
    v_absmax: Tensor | None = None,
    *,
    granularity: int,
    softmax_scale: float,
    smooth_k: bool,
    pow2_scales: bool,
    k_mean_stride: int = 1,
    deterministic: bool = False,
) -> tuple[Tensor, ...]:
    q8, k8, v8t, q_scale, k_scale, v_scale, _, q_k_mean = _fake_quantize(
        q, k, v, token_of_slot, tile_block_offsets, granularity=granularity, smooth_k=smooth_k, pow2_scales=pow2_scales,
        k_mean_stride=k_mean_stride, k_mean=k_mean, v_absmax=v_absmax,
    )  # fmt: skip
    out, lse, row_max, row_sum = _fake_forward(
        q8, k8, v8t, q_scale, k_scale, v_scale, token_of_slot, tile_of_block, kv_num_blocks, kv_indices, q_k_mean,
        num_tokens=q.shape[2], softmax_scale=softmax_scale, out_dtype=q.dtype,
    )  # fmt: skip
    return (out, lse, q8, k8, v8t, q_scale, k_scale, v_scale, row_max, row_sum)


# CPU kernels -------------------------------------------------------------------------------------------------------------


def _cpu_quantize(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    token_of_slot: Tensor,
    tile_block_offsets: Tensor,
    k_mean: Tensor | None = None,
    v_absmax: Tensor | None = None,
    *,
    granularity: int,
    smooth_k: bool,
    pow2_scales: bool,
    k_mean_stride: int = 1,
) -> tuple[Tensor, ...]:
    check_quantize(q, k, v, token_of_slot, tile_block_offsets, granularity, k_mean_stride, k_mean, v_absmax)
    check_slot_values("quantize", token_of_slot, q.shape[2])
    check_offset_values("quantize", tile_block_offsets, token_of_slot.shape[0] // BLOCK)
    return cpu.quantize(
        q, k, v, token_of_slot, tile_block_offsets, granularity=granularity, smooth_k=smooth_k, pow2_scales=pow2_scales,
        k_mean_stride=k_mean_stride, k_mean=k_mean, v_absmax=v_absmax,
    )  # fmt: skip


def _cpu_forward(
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
) -> tuple[Tensor, ...]:
    operands = (q8, k8, v8t, q_scale, k_scale, v_scale, token_of_slot, tile_of_block, kv_num_blocks, kv_indices)
    check_forward(*operands, num_tokens, out_dtype, q_k_mean)
    check_softmax_scale("forward", softmax_scale)
    check_slot_values("forward", token_of_slot, num_tokens)
    check_tile_of_block("forward", tile_of_block, kv_num_blocks.shape[2])
    check_list_values("forward", "kv", kv_num_blocks, kv_indices, q8.shape[2])
    return cpu.forward(
        *operands, num_tokens=num_tokens, softmax_scale=softmax_scale, out_dtype=out_dtype, q_k_mean=q_k_mean
    )


def _cpu_backward(
    grad_out: Tensor, out: Tensor, q8: Tensor, *operands: Tensor, softmax_scale: float, deterministic: bool = False
) -> tuple[Tensor, ...]:
    check_backward(grad_out, out, q8, *operands)
    token_of_slot, tile_of_block, kv_num_blocks, kv_indices, q_num_blocks, q_indices = operands[-6:]
    check_softmax_scale("backward", softmax_scale)
    check_slot_values("backward", token_of_slot, out.shape[2])
    check_tile_of_block("backward", tile_of_block, kv_num_blocks.shape[2])
    check_list_values("backward", "kv", kv_num_blocks, kv_indices, q8.shape[2])
    check_list_values("backward", "q", q_num_blocks, q_indices, q8.shape[2])
    return cpu.backward(grad_out, out, q8, *operands[:-2], softmax_scale=softmax_scale)  # type: ignore[misc, call-arg, arg-type]  # checked above


def _cpu_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    token_of_slot: Tensor,
    tile_of_block: Tensor,
    tile_block_offsets: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    q_num_blocks: Tensor | None = None,
    q_indices: Tensor | None = None,
    k_mean: Tensor | None = None,
    v_absmax: Tensor | None = None,
    *,
    granularity: int,
    softmax_scale: float,
    smooth_k: bool,
    pow2_scales: bool,
    k_mean_stride: int = 1,
    deterministic: bool = False,
) -> tuple[Tensor, ...]:
    q8, k8, v8t, q_scale, k_scale, v_scale, _, q_k_mean = _cpu_quantize(
        q, k, v, token_of_slot, tile_block_offsets, granularity=granularity, smooth_k=smooth_k, pow2_scales=pow2_scales,
        k_mean_stride=k_mean_stride, k_mean=k_mean, v_absmax=v_absmax,
    )  # fmt: skip
    out, lse, row_max, row_sum = _cpu_forward(
        q8, k8, v8t, q_scale, k_scale, v_scale, token_of_slot, tile_of_block, kv_num_blocks, kv_indices, q_k_mean,
        num_tokens=q.shape[2], softmax_scale=softmax_scale, out_dtype=q.dtype,
    )  # fmt: skip
    return (out, lse, q8, k8, v8t, q_scale, k_scale, v_scale, row_max, row_sum)


def _register() -> None:
    from . import autograd

    fakes: dict[str, Any] = {
        "quantize": _fake_quantize, "forward": _fake_forward, "backward": _fake_backward, "attention": _fake_attention
    }  # fmt: skip
    kernels: dict[str, Any] = {
        "quantize": _cpu_quantize, "forward": _cpu_forward, "backward": _cpu_backward, "attention": _cpu_attention
    }  # fmt: skip
    # Autocast reaches into the torch calls of a CPU kernel, whose FP32 matmuls must stay FP32.
    no_autocast = torch.autocast("cpu", enabled=False)
    for name in OPS:
        torch.library.impl(f"fpsattn::{name}", "CPU")(no_autocast(kernels[name]))
        for namespace in NAMESPACES:
            torch.library.register_fake(f"{namespace}::{name}")(fakes[name])
    for namespace in NAMESPACES:
        autograd.register(namespace)


_register()
