"""``fpsattention.attention``: FP8 + tile-sparse attention of video tokens in one call."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .errors import ConfigError
from .layout import masks
from .layout.masks import Lists
from .ops.attend import attend
from .ops.checks import CPU_DTYPES, GRANULARITIES, HEAD_DIMS, kernel_dim
from .ops.lists import planned_lists, traced

LAYOUTS = ("NHD", "HND")


def _fail(text: str) -> ConfigError:
    return ConfigError(f"fpsattention.attention: {text}")


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: Sequence[int],
    *,
    tile: Sequence[int] | None = None,
    window: Sequence[int] | None = None,
    block_mask: masks.BlockMask | None = None,
    granularity: str = "tile",
    scale: float | None = None,
    smooth_k: bool = True,
    pow2_scales: bool = False,
    text_len: int = 0,
    text_position: str = "suffix",
    tensor_layout: str = "NHD",
    return_lse: bool = False,
    backend: str = "auto",
    k_mean: Tensor | None = None,
    v_absmax: Tensor | None = None,
    deterministic: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """FP8 self-attention over a block-sparse pattern of 3D tiles, differentiable straight through the quantizers.

    Args:
        q, k, v: ``(B, S, H, D)`` ("NHD") or ``(B, H, S, D)`` ("HND"), BF16 or FP16 (FP32 on the CPU too), any strides. D is 64
            or 128, or any smaller one, which is padded to the next of them with zeros. S = T * H * W video tokens in raster order (T slowest) and ``text_len`` text tokens.
        grid: ``(T, H, W)``, the token grid of the video.
        tile: ``(tT, tH, tW)``; None: the planner's choice. Part of the meaning of ``window``.
        window: ``(wT, wH, wW)`` sliding tile window, in tiles; text tokens attend and are attended by everything. None with no
            ``block_mask``: every token attends every token.
        block_mask: any pattern, made for this grid and text length; instead of ``tile`` and ``window``.
        granularity: what shares one FP8 scale of Q and of K: "tile", "block" (128 slots) or "token".
        scale: softmax scale, > 0; None: ``1 / sqrt(D)``.
        smooth_k: subtract the mean of K before quantizing (changes the error, not the result).
        pow2_scales: round scales up to powers of two: exact dequantization in BF16, a larger quantization error.
        text_len, text_position: text tokens of the same sequence, after ("suffix") or before ("prefix") the video.
        return_lse: also return the log-sum-exp of the scores, f32 ``(B, H, S)``, natural logarithm, not differentiable.
        backend: "sm90" (Hopper GPUs), "cpu", "reference" (slow, plain PyTorch), or "auto": by the device of q.
        k_mean: f32 ``(B, H, D)``, subtracted instead of the computed mean.
        v_absmax: f32 ``(B, H, D)``, taken for V's scales instead of the computed maximum; values beyond it saturate.
        deterministic: same bits on repeat in the backward too.

    Returns:
        ``out`` in the shape, layout and dtype of q; with ``return_lse`` the pair ``(out, lse)``.

    Raises:
        ConfigError: an argument is wrong. UnsupportedError: this device or build cannot do it. BuildError: not built.

    A row with nothing to attend gives 0 (lse -inf). A NaN or Inf in q, k or v makes every output that attends it NaN.
    Numerics: ``docs/numerics.md``. Method: FPSAttention, arXiv 2506.04648; windows: Sliding Tile Attention, arXiv 2502.04507.
    """
    _check_tensors(q, k, v, tensor_layout)
    num_tokens, heads = (q.shape[1], q.shape[2]) if tensor_layout == "NHD" else (q.shape[2], q.shape[1])
    if granularity not in GRANULARITIES:
        raise _fail(f"granularity {granularity!r}, expected one of {', '.join(map(repr, GRANULARITIES))}")
    if scale is not None and not (math.isfinite(scale) and scale > 0):
        raise _fail(f"scale {scale}, expected a finite number > 0")
    extra = [_statistic(name, x, q, heads) for name, x in (("k_mean", k_mean), ("v_absmax", v_absmax))]
    if k_mean is not None and not smooth_k:
        raise _fail("k_mean is given but smooth_k is False: nothing would be subtracted")
    mask = _resolve_lists(
        grid, tile, window, block_mask, text_len, text_position, (q.shape[0], heads, num_tokens), q.device
    )
    out, lse = attend(
        q, k, v, mask,
        granularity=granularity,
        scale=scale,
        smooth_k=bool(smooth_k),
        pow2_scales=bool(pow2_scales),
        k_mean=extra[0],
        v_absmax=extra[1],
        deterministic=bool(deterministic),
        tensor_layout=tensor_layout,
        backend=backend,
    )  # fmt: skip
    return (out, lse) if return_lse else out


# Arguments ---------------------------------------------------------------------------------------------------------------


def _check_tensors(q: Tensor, k: Tensor, v: Tensor, tensor_layout: str) -> None:
    if tensor_layout not in LAYOUTS:
        raise _fail(f"tensor_layout {tensor_layout!r}, expected 'NHD' for (B, S, H, D) or 'HND' for (B, H, S, D)")
    axes = "(B, S, H, D)" if tensor_layout == "NHD" else "(B, H, S, D)"
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise _fail(f"{name} is a {type(x).__name__}, expected a tensor")
        if x.dim() != 4:
            raise _fail(f"{name} has shape {tuple(x.shape)}, expected {axes} for tensor_layout={tensor_layout!r}")
        if x.dtype not in CPU_DTYPES:
            raise _fail(f"{name} has dtype {x.dtype}, expected bfloat16, float16 or, on the CPU, float32")
        if x.dtype != q.dtype:
            raise _fail(f"{name} has dtype {x.dtype}, expected {q.dtype} like q")
        if x.device != q.device:
            raise _fail(f"{name} is on {x.device}, expected {q.device} like q")
        if x.shape != q.shape:
            raise _fail(f"{name} has shape {tuple(x.shape)}, expected {tuple(q.shape)} like q: this is self-attention")
    if 0 in q.shape:
        raise _fail(f"q has shape {tuple(q.shape)}: no size may be 0")
    if kernel_dim(q.shape[3]) is None:
        raise _fail(f"q has head dimension {q.shape[3]}, supported are 1 to {HEAD_DIMS[-1]}")


def _statistic(name: str, x: Tensor | None, q: Tensor, heads: int) -> Tensor | None:
    """``k_mean`` or ``v_absmax``: f32 ``(B, H, D)`` beside q."""
    if x is None:
        return None
    want = (q.shape[0], heads, q.shape[3])
    if tuple(x.shape) != want or x.device != q.device:
        raise _fail(f"{name} has shape {tuple(x.shape)} on {x.device}, expected (B, H, D) = {want} on {q.device}")
    return x.detach().float()


# Mask --------------------------------------------------------------------------------------------------------------------


def _resolve_lists(
    grid: Sequence[int],
    tile: Sequence[int] | None,
    window: Sequence[int] | None,
    block_mask: masks.BlockMask | None,
    text_len: int,
    text_position: str,
    sizes: tuple[int, int, int],
    device: torch.device,
) -> masks.BlockMask | Lists:
    """The mask of the call on ``device``. ``sizes``: batch, heads, tokens of q."""
    batch, heads, num_tokens = sizes
    grid = _constants(grid)
    _check_tokens(grid, text_len, num_tokens)
    if block_mask is None:
        lists = (grid, _constants(tile), _constants(window), text_len, text_position, device)
        return Lists(*torch.ops.fpsattn.lists(*lists)) if traced(device) else planned_lists(*lists)
    if window is not None:
        raise _fail(f"window {tuple(window)} and block_mask are both given: pass one of them")
    if not isinstance(block_mask, masks.BlockMask):
        raise _fail(
            f"block_mask is a {type(block_mask).__name__}, expected fpsattention.BlockMask (BlockMask.from_flex converts)"
        )
    layout = block_mask.layout
    if tuple(layout.grid) != grid or layout.text_len != text_len:
        raise _fail(
            f"block_mask was made for grid {tuple(layout.grid)} with {layout.text_len} text tokens, "
            f"the call says grid {grid} with text_len={text_len}"
        )
    if text_len and layout.text_position != text_position:
        raise _fail(f"block_mask was made for text_position {layout.text_position!r}, the call says {text_position!r}")
    if tile is not None and tuple(layout.tile) != _constants(tile):
        raise _fail(f"block_mask was made for tile {tuple(layout.tile)}, the call says {tuple(tile)}: leave tile out")
    of_batch, of_heads = block_mask.kv_num_blocks.shape[:2]
    if of_batch not in (1, batch) or of_heads not in (1, heads):
        raise _fail(
            f"block_mask has lists for {of_batch} samples and {of_heads} heads, "
            f"expected {batch} or 1 samples and {heads} or 1 heads like q"
        )
    return block_mask.to(device)


def _check_tokens(grid: Sequence[int] | None, text_len: int, num_tokens: int) -> None:
    if grid is None or len(grid) != 3 or not isinstance(text_len, int):
        return  # the planner says what is wrong
    video = grid[0] * grid[1] * grid[2]
    if min(grid) < 1 or text_len < 0 or video + text_len == num_tokens:
        return
    has = f"{video} tokens" if text_len == 0 else f"{video} tokens and {text_len} text tokens (text_len)"
    hint = f"pass text_len={num_tokens - video} or fix grid" if num_tokens > video else "fix grid"
    raise _fail(f"grid {grid} has {has} but q has {num_tokens}: {hint}")


def _constants(sizes: Any) -> Any:
    """Three sizes as a tuple where they are a sequence; anything else is left to the planner's error."""
    return tuple(sizes) if isinstance(sizes, (tuple, list, torch.Size)) else sizes
