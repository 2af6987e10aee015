"""FP8 linear layers: e4m3 activations with a scale per token, e4m3 weights with a scale per output channel, 16-bit master weights.

    X~ = e4m3(X / s_x) s_x,  s_x [M, 1] = absmax of a row / 448          Y = X~ W~^T + b
    W~ = e4m3(W / s_w) s_w,  s_w [N, 1] = absmax of an output channel / 448

Scales and rounding are those of q and k (``reference.scale_of``, ``reference.to_e4m3``; ``docs/numerics.md``, FP8 linears). The
backward is straight-through: ``dX = dY W~``, ``dW = dY^T X~``, ``db`` the sum of dY, from the tensors that the forward multiplied.
Weights are quantized in every call: they are a few percent of the activations' bytes, and nothing can go stale when they are merged,
swapped, moved or trained.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..errors import ConfigError, UnsupportedError
from .attend import autocast
from .reference import scale_of, to_e4m3

ALIGNMENT = 16  # of both sizes of a weight: what torch._scaled_mm takes


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """One scale per row.

    Args:
        x: ``[M, K]``, any float dtype.

    Returns:
        e4m3 ``[M, K]`` and f32 scales ``[M, 1]``: absmax / 448, 1 for a row of zeros; a row with a NaN or an Inf is NaN.
    """
    low, high = torch.aminmax(x, dim=1, keepdim=True)
    scale = scale_of(torch.maximum(-low, high).float(), pow2=False)
    return to_e4m3(x / scale), scale


def why_not(device: torch.device) -> str | None:
    """Why FP8 products do not run on a device (one clause of a sentence), or None. The CPU computes the same in FP32."""
    if device.type in ("cpu", "meta"):
        return None
    if device.type != "cuda" or torch.version.hip is not None:
        return f"FP8 linears do not run on {device.type}, expected a CUDA GPU or the CPU"
    capability = torch.cuda.get_device_capability(device)
    if capability < (9, 0):
        return f"FP8 linears need compute capability 9.0, {device} has {capability[0]}.{capability[1]}"
    return None


def multiply(
    x8: Tensor, x_scale: Tensor, w8: Tensor, w_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """``(x8 x_scale) (w8 w_scale)^T + bias``, ``[M, N]`` in ``dtype``.

    Sums are FP32. GPUs write BF16, so any other dtype is that, cast.
    """
    if x8.device.type == "cuda":
        return scaled_mm(x8, x_scale, w8, w_scale, bias).to(dtype)
    out = (x8.float() @ w8.float().t()) * x_scale * w_scale.t()
    return (out if bias is None else out + bias.float()).to(dtype)


def scaled_mm(x8: Tensor, x_scale: Tensor, w8: Tensor, w_scale: Tensor, bias: Tensor | None) -> Tensor:
    """:func:`multiply` of the GPU, BF16: without fast accumulation, whose 13 bits lose a fifth of a long sum of one sign
    (docs/numerics.md)."""
    bias = None if bias is None else bias.to(torch.bfloat16)
    return torch._scaled_mm(x8, w8.t(), x_scale, w_scale.t(), bias=bias, out_dtype=torch.bfloat16, use_fast_accum=False)


class _Linear(torch.autograd.Function):
    """``x [M, K]`` is there for its gradient; what is multiplied are ``x8`` and ``x_scale``."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, x8: Tensor, x_scale: Tensor, dtype: torch.dtype
    ) -> Tensor:
        ctx.save_for_backward(weight, x8, x_scale)
        ctx.dtypes = x.dtype, None if bias is None else bias.dtype
        with torch.autocast(x.device.type, enabled=False):  # codes are multiplied as they are
            return multiply(x8, x_scale, *quantize_rows(weight), bias, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, x8, x_scale = ctx.saved_tensors
        x_dtype, bias_dtype = ctx.dtypes
        dx = dw = db = None
        with torch.autocast(grad.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                w8, w_scale = quantize_rows(weight)
                dx = (grad @ (w8.float() * w_scale).to(grad.dtype)).to(x_dtype)
            if ctx.needs_input_grad[1]:
                dw = (grad.t() @ (x8.float() * x_scale).to(grad.dtype)).to(weight.dtype)
            if ctx.needs_input_grad[2]:
                db = grad.sum(0, dtype=torch.float32).to(bias_dtype)
        return dx, dw, db, None, None, None


def fp8_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, quantized: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """``torch.nn.functional.linear`` in FP8, differentiable straight through the quantizers.

    Args:
        x: ``(..., K)``. Under autocast it is cast as ``linear`` casts it.
        weight: ``(N, K)``, 16-bit or FP32 master weights; K and N multiples of 16.
        bias: ``(N,)`` or None.
        quantized: ``quantize_rows`` of x as ``[M, K]``, where several layers read the same x.

    Returns:
        ``(..., N)``, in the dtype of x.

    Raises:
        ConfigError: sizes or dtypes do not fit. UnsupportedError: this device has no FP8 products.
    """
    x = autocast(x)
    if weight.dim() != 2 or x.shape[-1] != weight.shape[1]:
        raise ConfigError(
            f"fpsattention.fp8_linear: x of shape {tuple(x.shape)} and weight {tuple(weight.shape)}, expected (..., K) and (N, K)"
        )
    if weight.shape[0] % ALIGNMENT or weight.shape[1] % ALIGNMENT:
        raise ConfigError(
            f"fpsattention.fp8_linear: weight has shape {tuple(weight.shape)}, expected multiples of {ALIGNMENT}"
        )
    if not (x.is_floating_point() and weight.is_floating_point()) or x.device != weight.device:
        raise ConfigError(
            f"fpsattention.fp8_linear: x is {x.dtype} on {x.device}, weight {weight.dtype} on {weight.device}, expected floats on one device"
        )
    if (reason := why_not(x.device)) is not None:
        raise UnsupportedError(f"fpsattention.fp8_linear: {reason}")
    rows = x.reshape(-1, x.shape[-1])
    x8, x_scale = quantized if quantized is not None else quantize_rows(rows.detach())
    return _Linear.apply(rows, weight, bias, x8, x_scale, x.dtype).unflatten(0, x.shape[:-1])
