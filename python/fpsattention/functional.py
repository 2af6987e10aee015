"""``fpsattention.attention``: FP8 + tile-sparse attention of video tokens in one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import ConfigError, UnsupportedError
from .layout import masks
from .layout.exact import cached_exact, token_ranges
from .layout.masks import Lists
from .layout.tiles import TEXT_POSITIONS, cached_plan, int3, integer, shown
from .ops.attend import attend
from .ops.backends import BACKENDS
from .ops.checks import GRANULARITIES, HEAD_DIMS, PRECISIONS, kernel_dim
from .ops.lists import planned_lists, traced
from .ops.prepare import Norm, Rope

LAYOUTS = ("NHD", "HND")
FP32_MAX = float(np.finfo(np.float32).max)


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
    exact: Sequence[tuple[int, int]] = (),
    granularity: str | Sequence[int] = "tile",
    precision: str = "fp8",
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
    softmax_scale: float | None = None,
    norm: Norm | None = None,
    rope: Rope | None = None,
    hadamard: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """FP8 self-attention over a block-sparse pattern of 3D tiles, differentiable straight through the quantizers.

    Args:
        q, k, v: ``(B, S, H, D)`` ("NHD") or ``(B, H, S, D)`` ("HND"), BF16 or FP16 (FP32 on the CPU too), any strides. D is 64,
            96 or 128, or any other one below, which is padded to the next of them with zeros. k and v may have fewer heads
            (grouped queries: query head h attends head ``h // (H / Hk)``; nothing is repeated). S = T * H * W video tokens in raster order (T slowest) and ``text_len`` text tokens.
        grid: ``(T, H, W)``, the token grid of the video.
        tile: ``(tT, tH, tW)``; None: the planner's choice. Part of the meaning of ``window``.
        window: ``(wT, wH, wW)`` sliding tile window, in tiles; text tokens attend and are attended by everything. None with no
            ``block_mask``: every token attends every token.
        block_mask: any pattern, made for this grid and text length; instead of ``tile`` and ``window``.
        exact: ``(start, stop)`` ranges of tokens, numbered as in q, that attend and are attended by everything whatever the window
            or mask says (a first frame, references), with all that shares a tile or a block with them: :meth:`BlockMask.with_exact`.
        granularity: what shares one FP8 scale of Q and of K: "tile", "block" (128 slots), "token", or a size ``(t, h, w)`` in tokens, a multiple of
            the tile on each axis (or as large as the grid), as FPSAttention's paper has it: a box of several tiles. Sizes not in traced calls.
        precision: of Q and K: "fp8" (e4m3), or "int8" as in SageAttention (arXiv 2411.10958): one scale per block, absmax / 127, whatever
            ``granularity`` says. P and V are e4m3 in both. "paper": as "fp8", with P as FPSAttention's paper has it, ``e4m3(448 exp(x - m))``
            summed before it is rounded. INT8 and "paper" run on the CPU and in the reference only.
        scale, softmax_scale: two names of the softmax scale, > 0; None: ``1 / sqrt(D)``.
        smooth_k: subtract the mean of K before quantizing (changes the error, not the result).
        pow2_scales: round scales up to powers of two: exact dequantization in BF16, a larger quantization error. The same forward is
            computed with and without gradients.
        text_len, text_position: text tokens of the same sequence, after ("suffix") or before ("prefix") the video.
        return_lse: also return the log-sum-exp of the scores, f32 ``(B, H, S)``, natural logarithm, not differentiable.
        backend: "sm90" (Hopper GPUs), "cpu", "reference" (slow, plain PyTorch), or "auto": by the device of q.
        k_mean: f32 ``(B, H of k, D)``, subtracted instead of the computed mean.
        v_absmax: f32 ``(B, H of k, D)``, taken for V's scales instead of the computed maximum; values beyond it saturate.
        deterministic: same bits on repeat in the backward too.
        norm, rope: q and k are raw projections, which are normalized and rotated first, in FP32 without rounding in between:
            ``fpsattention.Norm``, ``fpsattention.Rope``. D is 64, 96 or 128. Gradients are those of the raw tensors and of the norm's weights.
        hadamard: rotate q and k by a Hadamard matrix before they are quantized: exact in the scores, and a smaller error where single
            values are outliers (``docs/numerics.md``). Costs a product with a constant matrix. Not together with norm or rope.

    Under autocast q, k and v are cast as those of ``scaled_dot_product_attention`` are.

    Returns:
        ``out`` in the shape, layout and dtype of q; with ``return_lse`` the pair ``(out, lse)``.

    Raises:
        ConfigError: an argument is wrong. UnsupportedError: this device or build cannot do it. BuildError: not built.

    A row with nothing to attend gives 0 (lse -inf). A NaN or Inf in q, k or v makes every output that attends it NaN.
    Numerics: ``docs/numerics.md``. Method: FPSAttention, arXiv 2506.04648; windows: Sliding Tile Attention, arXiv 2502.04507.
    """
    _choice("tensor_layout", tensor_layout, LAYOUTS)
    _check_tensors(q, k, v, tensor_layout)
    if isinstance(granularity, (list, tuple)):
        granularity = int3(granularity, "attention: granularity")
    else:
        _choice("granularity", granularity, tuple(GRANULARITIES))
        assert isinstance(granularity, str)
    _choice("precision", precision, PRECISIONS)
    _choice("backend", backend, BACKENDS)
    kv_heads = k.shape[2 if tensor_layout == "NHD" else 1]
    mask = _resolve_lists(
        grid,
        tile,
        window,
        block_mask,
        exact,
        text_len,
        text_position,
        q,
        tensor_layout,
        not isinstance(granularity, str),
    )
    if k_mean is not None and not smooth_k:
        raise _fail("k_mean is given but smooth_k is False: nothing would be subtracted")
    return_lse = _flag("return_lse", return_lse)
    out, lse = attend(
        q, k, v, mask,
        granularity=granularity,
        precision=precision,
        scale=_scale(scale, softmax_scale),
        smooth_k=_flag("smooth_k", smooth_k),
        pow2_scales=_flag("pow2_scales", pow2_scales),
        k_mean=_statistic("k_mean", k_mean, q, kv_heads),
        v_absmax=_statistic("v_absmax", v_absmax, q, kv_heads),
        deterministic=_flag("deterministic", deterministic),
        norm=_instance("norm", norm, Norm),
        rope=_instance("rope", rope, Rope),
        hadamard=_flag("hadamard", hadamard),
        tensor_layout=tensor_layout,
        backend=backend,
    )  # fmt: skip
    return (out, lse) if return_lse else out


# Arguments ---------------------------------------------------------------------------------------------------------------
# Only what the caller's words mean is checked here; dtypes, head dimensions and the like are the ops' to check.


def _check_tensors(q: Tensor, k: Tensor, v: Tensor, tensor_layout: str) -> None:
    axes = "(B, S, H, D)" if tensor_layout == "NHD" else "(B, H, S, D)"
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise _fail(f"{name} is a {type(x).__name__}, expected a tensor")
        if x.is_nested or x.layout != torch.strided:
            raise _fail(f"{name} is a nested or sparse tensor, expected a dense one: call once per length")
        if x.dim() != 4:
            raise _fail(f"{name} has shape {tuple(x.shape)}, expected {axes} for tensor_layout={tensor_layout!r}")
        if x.device != q.device:
            raise _fail(f"{name} is on {x.device}, expected {q.device} like q")
        if x.shape != q.shape and (name == "q" or not _fewer_heads(x, q, tensor_layout)):
            raise _fail(
                f"{name} has shape {tuple(x.shape)}, expected {tuple(q.shape)} like q, or fewer heads that divide those of q: "
                "this is self-attention"
            )
    if 0 in q.shape:
        raise _fail(f"q has shape {tuple(q.shape)}: no size may be 0")
    if kernel_dim(q.shape[3]) is None:
        raise _fail(f"q has head dimension {q.shape[3]}, supported are 1 to {HEAD_DIMS[-1]}")


def _fewer_heads(x: Tensor, q: Tensor, tensor_layout: str) -> bool:
    """Grouped queries: all sizes are those of q, and the heads divide its heads."""
    axis = 2 if tensor_layout == "NHD" else 1
    others = [size for i, size in enumerate(x.shape) if i != axis] == [
        size for i, size in enumerate(q.shape) if i != axis
    ]
    return others and x.shape[axis] > 0 and q.shape[axis] % x.shape[axis] == 0


def _choice(name: str, value: Any, options: Sequence[str]) -> str:
    if not isinstance(value, str) or value not in options:
        raise _fail(f"{name} {shown(value)}, expected one of {', '.join(map(repr, options))}")
    return value


def _instance(name: str, value: Any, kind: type) -> Any:
    if value is not None and not isinstance(value, kind):
        raise _fail(f"{name} is a {type(value).__name__}, expected fpsattention.{kind.__name__}")
    return value


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise _fail(f"{name} {shown(value)}, expected True or False")
    return bool(value)


def _scale(scale: Any, softmax_scale: Any) -> float | None:
    if scale is not None and softmax_scale is not None:
        raise _fail("scale and softmax_scale are both given, expected one of them: they mean the same")
    name, value = ("softmax_scale", softmax_scale) if scale is None else ("scale", scale)
    if value is None:
        return None
    number = isinstance(value, (int, float, np.number)) and not isinstance(value, (bool, np.complexfloating))
    if not number or not 0 < value <= FP32_MAX:
        raise _fail(f"{name} {shown(value)}, expected a finite number > 0")
    return float(value)


def _statistic(name: str, x: Any, q: Tensor, heads: int) -> Tensor | None:
    """``k_mean`` or ``v_absmax``: f32 ``(B, H, D)`` beside k."""
    if x is None:
        return None
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.is_nested or x.layout != torch.strided:
        what = f"has dtype {x.dtype}" if isinstance(x, Tensor) else f"is a {type(x).__name__}"
        raise _fail(f"{name} {what}, expected a tensor of floats (B, H, D)")
    want = (q.shape[0], heads, q.shape[3])
    if tuple(x.shape) != want or x.device != q.device:
        raise _fail(f"{name} has shape {tuple(x.shape)} on {x.device}, expected (B, H, D) = {want} on {q.device}")
    return x.detach().float()


def _sizes(name: str, value: Any) -> Any:
    """Three sizes as a tuple. Sizes that a graph leaves open stay so: the op that plans checks them when it runs."""
    if torch.compiler.is_compiling() and isinstance(value, (tuple, list)) and len(value) == 3:
        if all(isinstance(size, int) for size in value):
            return tuple(value)
        raise _fail(f"{name} {value}, expected three integers (T, H, W)")
    return int3(value, f"attention: {name}")


# Mask --------------------------------------------------------------------------------------------------------------------


def _resolve_lists(
    grid: Any,
    tile: Any,
    window: Any,
    block_mask: Any,
    exact: Any,
    text_len: Any,
    text_position: Any,
    q: Tensor,
    tensor_layout: str,
    grouped: bool,
) -> masks.BlockMask | Lists:
    """The mask of the call, ``grouped``: or else ready tables of it on the device of q."""
    grid, tile, window = (
        x if x is None else _sizes(name, x) for name, x in (("grid", grid), ("tile", tile), ("window", window))
    )
    if grid is None:
        raise _fail("grid None, expected three integers (T, H, W)")
    if not (torch.compiler.is_compiling() and isinstance(text_len, int)):
        text_len = integer(text_len, "attention: text_len")
    _choice("text_position", text_position, TEXT_POSITIONS)
    _check_tokens(grid, text_len, q, tensor_layout)
    if exact and traced(q.device):
        raise UnsupportedError(
            "fpsattention.attention: exact is given in a traced call, expected a mask made outside of it: "
            "block_mask=mask.with_exact(ranges)"
        )
    if grouped and traced(q.device):
        raise UnsupportedError(
            "fpsattention.attention: granularity is a size in a traced call, expected 'tile', 'block' or 'token' there; levels of a schedule may "
            "have sizes in graphs"
        )
    if block_mask is None and (exact or grouped):
        planned = cached_plan(grid, tile, text_len, text_position)
        size = planned.tile_grid if window is None else int3(window, "sliding_tile_mask: window")
        return cached_exact(planned, size, token_ranges(exact, planned.num_tokens, "attention"))
    if block_mask is None:
        lists = (grid, tile, window, text_len, text_position, q.device)
        return Lists(*torch.ops.fpsattn.lists(*lists)) if traced(q.device) else planned_lists(*lists)
    if not isinstance(block_mask, masks.BlockMask):
        raise _fail(
            f"block_mask is a {type(block_mask).__name__}, expected fpsattention.BlockMask (BlockMask.from_flex converts)"
        )
    if window is not None:
        raise _fail(f"window {window} and block_mask are both given: pass one of them")
    layout = block_mask.layout
    if tuple(layout.grid) != grid or layout.text_len != text_len:
        raise _fail(
            f"block_mask was made for grid {tuple(layout.grid)} with {layout.text_len} text tokens, "
            f"the call says grid {grid} with text_len={text_len}"
        )
    if text_len and layout.text_position != text_position:
        raise _fail(f"block_mask was made for text_position {layout.text_position!r}, the call says {text_position!r}")
    if tile is not None and tuple(layout.tile) != tile:
        raise _fail(f"block_mask was made for tile {tuple(layout.tile)}, the call says {tile}: leave tile out")
    batch, heads = q.shape[0], q.shape[2 if tensor_layout == "NHD" else 1]
    of_batch, of_heads = block_mask.shape
    if of_batch not in (1, batch) or of_heads not in (1, heads):
        raise _fail(
            f"block_mask has lists for {of_batch} samples and {of_heads} heads, "
            f"expected {batch} or 1 samples and {heads} or 1 heads like q"
        )
    return block_mask.with_exact(exact) if exact else block_mask


def _check_tokens(grid: tuple[int, int, int], text_len: int, q: Tensor, tensor_layout: str) -> None:
    axis, other = (1, 2) if tensor_layout == "NHD" else (2, 1)
    num_tokens, video = q.shape[axis], grid[0] * grid[1] * grid[2]
    if min(grid) < 1 or text_len < 0 or video + text_len == num_tokens:
        return  # the planner says what is wrong with sizes below 1
    has = f"{video} tokens" if text_len == 0 else f"{video} tokens and {text_len} text tokens (text_len)"
    if q.shape[other] == video + text_len:
        layout, axes = ("HND", "(B, H, S, D)") if tensor_layout == "NHD" else ("NHD", "(B, S, H, D)")
        hint = f'if q is {axes}, pass tensor_layout="{layout}"'
    else:
        hint = f"pass text_len={num_tokens - video} or fix grid" if num_tokens > video else "fix grid"
    raise _fail(f"grid {grid} has {has} but q has {num_tokens}: {hint}")
