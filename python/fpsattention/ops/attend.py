"""``attend``: tensors and a block mask in, attention out. What ``fpsattention.attention`` and the model integrations call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, UnsupportedError
from ..layout.masks import BlockMask, Lists
from ..layout.scale_groups import scale_groups
from . import autograd, prepare, published
from .backends import reference_attention, resolve_backend
from .checks import GRANULARITIES, HEAD_DIMS, INT8, kernel_dim
from .prepare import Norm, Rope
from .rotation import rotate
from .selection import Selection

Granularity = str | tuple[int, int, int]  # of the scales of Q and K
K_MEAN_TOKENS = 1024  # the mean of K is taken over at least so many tokens ...
K_MEAN_MAX_STRIDE = 8  # ... and at least every eighth one


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask | Lists | Selection,
    *,
    granularity: Granularity = "tile",
    precision: str = "fp8",
    scale: float | None = None,
    smooth_k: bool = True,
    pow2_scales: bool = False,
    k_mean: Tensor | None = None,
    v_absmax: Tensor | None = None,
    hidden: Tensor | None = None,
    keys: tuple[Tensor, Tensor] | None = None,
    deterministic: bool = False,
    norm: Norm | None = None,
    rope: Rope | None = None,
    hadamard: bool = False,
    tensor_layout: str = "NHD",
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Block-sparse FP8 attention, differentiable straight through the quantizers.

    Args:
        q, k, v: ``(B, S, H, D)`` ("NHD") or ``(B, H, S, D)`` ("HND"), one dtype and device, any strides; S as in ``mask.layout``. k and v
            may have fewer heads, a divisor of H (grouped queries): query head h attends their head ``h // (H / Hk)``.
            D up to 128: where the ops have no such D, zeros are appended up to the next of 64, 96 and 128. Zeros change no
            score, scale or maximum; they cost a copy and the time of the larger D.
        mask: whom the tokens attend, taken to the device of q; or its ready tables there, with the transpose if q, k or v wants
            a gradient; or what makes them when q and k are quantized (:func:`attend_selected`).
        hidden: bool ``[B, S]`` on the device of q: keys that no row attends; k and v are then those of :func:`hidden.fill`.
        keys: ``(token_of_slot, tile_block_offsets)`` of k and v, where they have other tokens or another order than q; ``mask`` is
            then ready tables, whose rows are query tiles, and whose entries are blocks of these.
        granularity: a size of scale groups needs a BlockMask, whose tiles it groups.
        others: as in :func:`fpsattention.attention`; ``k_mean`` and ``v_absmax`` are f32 ``(B, Hk, D)`` on the device of q.

    Returns:
        ``out`` like q, as a view of ``(B, S, H, D)`` memory, and ``lse`` f32 ``(B, H, S)``.

    Raises:
        ConfigError, UnsupportedError: from the backend and the ops, which check shapes, dtypes and devices.
    """
    return _attend(
        q, k, v, mask, granularity=granularity, precision=precision, scale=scale, smooth_k=smooth_k, pow2_scales=pow2_scales, k_mean=k_mean,
        v_absmax=v_absmax, hidden=hidden, keys=keys, deterministic=deterministic, norm=norm, rope=rope, hadamard=hadamard, tensor_layout=tensor_layout,
        backend=backend,
    )[:2]  # fmt: skip


def attend_selected(
    q: Tensor, k: Tensor, v: Tensor, selection: Selection, **options: Any
) -> tuple[Tensor, Lists, Tensor]:
    """:func:`attend` under lists that a pattern makes of the sums by block that quantizing q and k leaves behind: neither is read again.

    Returns:
        ``out``; the lists, with the transpose where ``selection.transposed``; densities f64 ``[B, 2]``, selected and kernel.
    """
    out, _, *_, kv_num_blocks, kv_indices, q_num_blocks, q_indices, densities = _attend(q, k, v, selection, **options)
    walked = (q_num_blocks, q_indices) if selection.transposed else (None, None)
    return out, Lists(*selection[:3], kv_num_blocks, kv_indices, *walked), densities


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask | Lists | Selection,
    *,
    granularity: Granularity = "tile",
    precision: str = "fp8",
    scale: float | None = None,
    smooth_k: bool = True,
    pow2_scales: bool = False,
    k_mean: Tensor | None = None,
    v_absmax: Tensor | None = None,
    hidden: Tensor | None = None,
    keys: tuple[Tensor, Tensor] | None = None,
    deterministic: bool = False,
    norm: Norm | None = None,
    rope: Rope | None = None,
    hadamard: bool = False,
    tensor_layout: str = "NHD",
    backend: str = "auto",
) -> tuple[Any, ...]:
    """out, lse, and whatever else the op gives."""
    backend = resolve_backend(backend, q)
    if precision == "int8" and backend == "sm90":
        raise UnsupportedError(
            "fpsattention.attention: precision 'int8' on the sm_90a kernels, which multiply Q and K in FP8 only: use precision='fp8' there, "
            "or CPU tensors to see what INT8 would cost"
        )
    if precision == "paper" and backend == "sm90":
        raise UnsupportedError(
            "fpsattention.attention: precision 'paper' on the sm_90a kernels, whose P is 2^(x - m + 8) of an integer maximum: use "
            "precision='fp8' there, or CPU tensors or backend='reference' to see what the published P costs"
        )
    if _autocasts(q.device.type):
        q, k, v = autocast(q), autocast(k), autocast(v)
    if tensor_layout == "NHD":
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if not q.stride(3) == k.stride(3) == v.stride(3) == 1:
        q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    weights = () if norm is None else norm.tensors
    backward = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, *weights))
    if not isinstance(granularity, str):
        if not isinstance(mask, BlockMask):
            raise ConfigError(
                f"fpsattention.attention: granularity {tuple(granularity)} with ready tables, expected a BlockMask: a group is made of its tiles"
            )
        if torch.compiler.is_compiling():
            raise UnsupportedError(
                f"fpsattention.attention: granularity {tuple(granularity)} in a compiled graph, supported are 'tile', 'block' and 'token' there, "
                "and sizes in levels of a schedule"
            )
        mask, granularity = scale_groups(mask.to(q.device), granularity, backward), "tile"
    lists = mask.to(q.device).lists(backward) if isinstance(mask, BlockMask) else mask
    dim = int(q.shape[3])
    zeros = (0, (kernel_dim(dim) or dim) - dim)
    prepared = norm is not None or rope is not None
    if zeros[1] and prepared:
        raise UnsupportedError(
            f"fpsattention.attention: norm and rope were asked for head dimension {dim}, supported are {HEAD_DIMS}: apply them before"
        )
    if zeros[1]:
        q, k, v = (torch.nn.functional.pad(x, zeros) for x in (q, k, v))
        k_mean, v_absmax = (None if x is None else torch.nn.functional.pad(x, zeros) for x in (k_mean, v_absmax))
    if hadamard and prepared:
        raise UnsupportedError(
            "fpsattention.attention: hadamard was asked for with norm or rope, supported is one of them: the rotation comes after RoPE"
        )
    if hadamard:
        q, k = rotate(q), rotate(k)
        k_mean = None if k_mean is None else rotate(k_mean)
    options: dict[str, Any] = {
        "granularity": INT8 if precision == "int8" else GRANULARITIES[granularity],
        "softmax_scale": dim**-0.5 if scale is None else scale,
        "smooth_k": smooth_k,
        "pow2_scales": pow2_scales,
        "k_mean_stride": k_mean_stride(k.shape[2]),
    }
    if keys is not None and (prepared or hidden is not None or isinstance(lists, Selection)):
        raise UnsupportedError(
            "fpsattention.attention: keys of their own were given with norm, rope, hidden or a selection by sums over blocks, supported is "
            "none of these"
        )
    names = ("kv_token_of_slot", "kv_tile_block_offsets")
    key_tables: dict[str, Any] = {} if keys is None else dict(zip(names, keys, strict=True))
    rest: tuple[Any, ...] = ()
    if precision == "paper" and prepared:
        raise UnsupportedError(
            "fpsattention.attention: norm and rope were asked for at precision 'paper', supported are precision='fp8', or tensors that have them"
        )
    if isinstance(lists, Selection):
        if prepared or backend == "reference" or precision == "paper":
            raise UnsupportedError(
                "fpsattention.attention: a selection by sums over blocks was given with norm, rope, precision 'paper' or backend='reference', "
                "supported are ready lists"
            )
        out, lse, *rest = autograd.call(
            "attention_selected", q, k, v, *lists[:4], k_mean, v_absmax, hidden, pattern=lists.pattern,
            transposed=lists.transposed, head_dim=dim, **options, deterministic=deterministic,
        )  # fmt: skip
    elif precision == "paper":
        out, lse = published.attention(
            q, k, v, lists, k_mean=k_mean, v_absmax=v_absmax, hidden=hidden, **key_tables, **options
        )
    elif prepared:
        out, lse = prepare.attend(
            q,
            k,
            v,
            lists,
            norm,
            rope,
            k_mean,
            v_absmax,
            hidden,
            backend=backend,
            deterministic=deterministic,
            **options,
        )
    elif backend == "reference":
        out, lse = reference_attention(
            q, k, v, lists, k_mean=k_mean, v_absmax=v_absmax, hidden=hidden, **key_tables, **options
        )
    elif hidden is not None:
        out, lse, *_ = autograd.call(
            "attention_masked", q, k, v, *lists, k_mean, v_absmax, hidden, **options, deterministic=deterministic
        )
    else:
        out, lse, *_ = autograd.call(
            "attention", q, k, v, *lists, k_mean, v_absmax, *(keys or ()), **options, deterministic=deterministic
        )
    out = out[..., :dim] if zeros[1] else out
    return (out.transpose(1, 2) if tensor_layout == "NHD" else out), lse, *rest


def _autocasts(device: str) -> bool:
    return device in ("cpu", "cuda") and torch.is_autocast_enabled(device)


def autocast(x: Tensor) -> Tensor:
    """As the inputs of ``scaled_dot_product_attention`` under autocast: floats, FP64 aside, in the dtype of autocast."""
    if not _autocasts(device := x.device.type):
        return x
    return x.to(torch.get_autocast_dtype(device)) if x.is_floating_point() and x.dtype != torch.float64 else x


def k_mean_stride(tokens: int) -> int:
    """By branches: torch.export gets ``max(1, min(8, n))`` of a symbolic size inside ``torch.cond`` wrong."""
    if tokens < 2 * K_MEAN_TOKENS:
        return 1
    return K_MEAN_MAX_STRIDE if tokens >= K_MEAN_MAX_STRIDE * K_MEAN_TOKENS else tokens // K_MEAN_TOKENS
