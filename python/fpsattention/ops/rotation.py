"""Hadamard rotation of q and k, against single outliers: one large value sets the FP8 scale of a whole block.

``(q R)(k R)^T = q k^T`` for an orthogonal ``R``, so after RoPE nothing changes but the rounding: an outlier's energy is spread over all channels
of its token (QuaRot, arXiv 2404.00456; SpinQuant, arXiv 2405.16406). ``R`` is the Walsh-Hadamard matrix over ``sqrt(n)``, block by block where D is
no power of two (D = 96: three blocks of 32). ``docs/numerics.md`` has what it gains, and where it loses.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ..layout.plain import constant, plain_tensors


@constant
def hadamard(n: int, device: torch.device) -> Tensor:
    """The orthonormal Walsh-Hadamard matrix, f32 ``(n, n)``; ``n`` a power of two. Symmetric: its own inverse."""
    return _hadamard(n, device)


@lru_cache(maxsize=16)
def _hadamard(n: int, device: torch.device) -> Tensor:
    with plain_tensors():
        matrix = torch.ones(1, 1)
        while matrix.shape[0] < n:
            matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
        return (matrix / n**0.5).to(device)


def rotate(x: Tensor) -> Tensor:
    """``x R`` over the last axis, in FP32, in the dtype of ``x``. Differentiable; its own inverse up to rounding.

    It is a product with a constant matrix: D FMAs per element and a trip over ``x``; no kernel does it on the way.
    """
    dim = int(x.shape[-1])
    block = dim & -dim  # the largest power of two that divides D
    matrix = hadamard(block, x.device)
    blocks = x.float().unflatten(-1, (dim // block, block))
    return (blocks @ matrix).flatten(-2).to(x.dtype)
