"""What every scheme needs of a call before tensors move: kernel inputs, options, statistics over all ranks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError
from ..ops.attend import autocast, k_mean_stride
from ..ops.backends import resolve_backend
from ..ops.checks import GRANULARITIES, kernel_dim
from ..ops.reference import V_EXTRA_ROWS, Operands, Quantized
from .collectives import all_gather
from .sharding import Sharding


@dataclass(frozen=True)
class Options:
    """Of one call, as the ops take them."""

    granularity: int
    softmax_scale: float
    smooth_k: bool
    pow2_scales: bool
    k_mean_stride: int
    deterministic: bool
    out_dtype: torch.dtype
    fp8_output: bool = False  # the output travels as e4m3 with a scale per token and head
    tile_order: bool = (
        False  # of the video tokens of one process, which counts where the mean of K is over every n-th one
    )


def resolved(
    q: Tensor,
    num_tokens: int,
    *,
    granularity: str,
    scale: float | None,
    smooth_k: bool,
    pow2_scales: bool,
    deterministic: bool,
    backend: str,
    fp8_output: bool,
    tile_order: bool = False,
) -> Options:
    """Options for q ``(B, S_local, H, D)`` of a sequence of ``num_tokens``."""
    if resolve_backend(backend, q) == "reference":
        raise ConfigError(
            "fpsattention.parallel.attention: backend 'reference', expected 'auto', 'cpu' or 'sm90' with FP8 exchange"
        )
    scale = q.shape[3] ** -0.5 if scale is None else scale
    return Options(
        GRANULARITIES[granularity],
        scale,
        smooth_k,
        pow2_scales,
        k_mean_stride(num_tokens),
        deterministic,
        q.dtype,
        fp8_output,
        tile_order,
    )


def kernel_inputs(*tensors: Tensor) -> list[Tensor]:
    """``(B, S, H, D)`` as the ops take it: ``(B, H, S, D)``, unit stride and a head dimension that kernels have."""
    dim = tensors[0].shape[3]
    zeros = (kernel_dim(dim) or dim) - dim
    views = [autocast(x).transpose(1, 2) for x in tensors]
    if zeros:
        return [torch.nn.functional.pad(x, (0, zeros)) for x in views]
    return [x if x.stride(3) == 1 else x.contiguous() for x in views]


def global_statistics(
    k: Tensor, v: Tensor, sharding: Sharding, options: Options, k_mean: Tensor | None, v_absmax: Tensor | None
) -> tuple[Tensor, Tensor]:
    """K mean and V maximum over the tokens of all ranks, f32 ``[B, H, D]`` each, from k and v ``(B, H, S_local, D)``.

    One all-gather; sums are added in FP64 in the order of the ranks. FP64 holds the sum of 2^17 BF16 numbers exactly where the largest is at most
    2^28 times the smallest, so the mean does not depend on how the tokens are dealt, and is that of one process.
    """
    if not options.smooth_k:
        k_mean = k.new_zeros(k.shape[0], k.shape[1], k.shape[3], dtype=torch.float32)
    if k_mean is None or v_absmax is None:
        index, count = sharding.k_mean_sample(options.k_mean_stride, options.tile_order, k.device)
        sums = k.index_select(2, index).double().sum(2)
        low, high = torch.aminmax(v, dim=2)
        parts = all_gather(
            torch.stack([sums, torch.maximum(-low.double(), high.double())]), sharding.group, "statistics"
        )
        if k_mean is None:
            total = parts[0][0]
            for part in parts[1:]:
                total = total + part[0]
            k_mean = (total / count).float()
        if v_absmax is None:
            v_absmax = torch.stack([part[1] for part in parts]).amax(0).float()
    return k_mean, v_absmax


def quantize(
    q: Tensor, k: Tensor, v: Tensor, sharding: Sharding, options: Options, k_mean: Tensor, v_absmax: Tensor
) -> tuple[Operands, Tensor]:
    """This rank's tiles of q, k, v ``(B, H, S_local, D)`` as the operands of the whole sequence have them; and ``q_k_mean``."""
    slots, offsets = sharding.local_tables(q.device)
    z = Quantized(
        *torch.ops.fpsattn.quantize(
            q, k, v, slots, offsets, k_mean, v_absmax, granularity=options.granularity, smooth_k=options.smooth_k,
            pow2_scales=options.pow2_scales, k_mean_stride=options.k_mean_stride,
        )
    )  # fmt: skip
    return z.operands, z.q_k_mean


def v_rows(v8t: Tensor) -> Tensor:
    """What travels of ``v8t``: its D rows of values."""
    return v8t[..., :-V_EXTRA_ROWS, :]


def whole_v(rows: Tensor, extra: Tensor) -> Tensor:
    """``v8t`` from its D rows ``[B, H, NB, D, 128]`` and the extra ones ``[NB, 8, 128]`` (bytes)."""
    extra = extra.view(torch.float8_e4m3fn).expand(*rows.shape[:2], *extra.shape)
    return torch.cat([rows.view(torch.uint8), extra.view(torch.uint8)], dim=-2).view(torch.float8_e4m3fn)


def cut_dim(x: Tensor, dim: int) -> Tensor:
    """Without the zeros of :func:`kernel_inputs`."""
    return x if x.shape[-1] == dim else x[..., :dim]


def with_(options: Options, **changes: Any) -> Options:
    """A changed copy."""
    return replace(options, **changes)
