"""``fpsattention.parallel.attention``: one sequence on several ranks."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError
from ..layout.masks import BlockMask, Lists, cached_mask
from ..layout.tiles import int3
from ..ops.attend import attend
from ..ops.checks import GRANULARITIES, HEAD_DIMS, kernel_dim
from ..ops.rotation import rotate
from .collectives import agree
from .heads import Heads, cut_lists, deal_heads
from .heads import head_costs as costs_of_heads
from .options import cut_dim, kernel_inputs, resolved
from .ring import RingAttention, problems_of
from .sharding import Sharding
from .ulysses import QuantizedUlysses, to_heads, to_tokens

SCHEMES = ("ulysses", "halo", "ring")
EXCHANGES = ("bf16", "fp8")
OUTPUTS = ("bf16", "fp8")

Pattern = Callable[[Tensor, Tensor, Any], BlockMask]


def _fail(text: str) -> ConfigError:
    return ConfigError(f"fpsattention.parallel.attention: {text}")


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sharding: Sharding,
    *,
    scheme: str = "ulysses",
    exchange: str = "fp8",
    window: Sequence[int] | None = None,
    block_mask: BlockMask | Pattern | None = None,
    granularity: str = "tile",
    scale: float | None = None,
    smooth_k: bool = True,
    pow2_scales: bool = False,
    k_mean: Tensor | None = None,
    v_absmax: Tensor | None = None,
    deterministic: bool = False,
    return_lse: bool = False,
    backend: str = "auto",
    head_costs: Sequence[float] | None = None,
    output: str = "bf16",
    check: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`fpsattention.attention` of a sequence whose tokens are spread over the ranks of ``sharding``; all of them call it alike.

    Args:
        q, k, v: ``(B, S_local, H, D)``: the tokens that this rank holds, in the order of ``sharding``; BF16 or FP16 (FP32 on the CPU).
        scheme: "ulysses": each rank attends all tokens of some heads; "halo": each fetches the keys and values that its own queries visit, then attends
            them at once; "ring": likewise, but from one rank after the other, and puts the parts together by their log-sum-exp.
        exchange: of "ulysses": "fp8": e4m3 and scales, needs whole tiles; "bf16": q, k, v as they are. Halo and ring send FP8.
        window, block_mask: as in :func:`fpsattention.attention`, of the whole sequence. With ``exchange="bf16"`` also a function
            ``(q, k, layout) -> BlockMask``, called after the exchange with ``(B, H_local, S, D)``.
        k_mean, v_absmax: f32 ``(B, H, D)`` for all tokens; None: taken over all ranks.
        head_costs: what heads cost, for dealing them to ranks; None: the blocks that the lists of each visit.
        output: "fp8": the output comes back as e4m3 with one scale per token and head. An element is off by at most 2^-4 of itself (2^-10 of
            the row's largest where that is more), and bytes are halved. Ulysses with FP8 exchange only.
        check: make sure that all ranks call alike (256 bytes each; see ``docs/scale.md``).
        others: as in :func:`fpsattention.attention`.

    Returns:
        ``out (B, S_local, H, D)``, with ``return_lse`` also the lse, f32 ``(B, H, S_local)``, which is not differentiable.

    Bits are those of one process on the CPU, and of one process that is given the same ``k_mean`` on a GPU, for "ulysses" and
    "halo" (gradients of "halo": of K and V, whose parts the ranks add up, to rounding). "ring" is within 3e-5 of it in FP32.

    Raises:
        ConfigError: an argument is wrong, or ranks differ. UnsupportedError: this device or build cannot do it.
        RuntimeError: the exchange failed: another rank ended, or the timeout of the process group passed.
    """
    _check(q, k, v, sharding, scheme, exchange, output, granularity)
    heads = None
    if callable(block_mask) and not isinstance(block_mask, BlockMask):
        if scheme != "ulysses" or exchange != "bf16":
            raise _fail("block_mask is a function, which needs whole q and k: pass scheme='ulysses', exchange='bf16'")
        lists, device = None, q.device
    else:
        mask = _mask(window, block_mask, sharding, q)
        lists, device = mask.to(q.device).lists(_wants_gradient(q, k, v)), q.device
    if check:
        shape = (q.shape[0], *q.shape[2:])
        pattern = "function" if lists is None else _described(lists)
        agree(
            f"{scheme}/{exchange}/{output} {sharding.describe()} B,H,D {shape} {q.dtype} {granularity} {pattern} grad={_wants_gradient(q, k, v)}",
            sharding.group, device,
        )  # fmt: skip
    options: dict[str, Any] = {
        "granularity": granularity, "scale": scale, "smooth_k": smooth_k, "pow2_scales": pow2_scales,
        "deterministic": deterministic, "backend": backend,
    }  # fmt: skip
    heads = deal(q.shape[2], sharding, lists, head_costs)
    if scheme == "ulysses" and exchange == "bf16":
        return _plain(q, k, v, sharding, heads, lists, block_mask, k_mean, v_absmax, return_lse, options)
    assert lists is not None
    out, lse = quantized(
        q, k, v, sharding, heads, lists, scheme=scheme, output=output, k_mean=k_mean, v_absmax=v_absmax, **options
    )
    return (out, lse) if return_lse else out


def deal(num_heads: int, sharding: Sharding, lists: Lists | None, costs: Sequence[float] | None = None) -> Heads:
    """Heads of the ranks of ``sharding``, by the cost of their lists where these differ."""
    if costs is None and lists is not None:
        costs = costs_of_heads(lists)
    return deal_heads(num_heads, sharding.size, costs)


def quantized(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sharding: Sharding,
    heads: Heads,
    lists: Lists,
    *,
    scheme: str,
    output: str = "bf16",
    k_mean: Tensor | None = None,
    v_absmax: Tensor | None = None,
    hadamard: bool = False,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """The schemes that send FP8, arguments as in :func:`attention` and checked there: output ``(B, S_local, H, D)`` and lse."""
    dim = q.shape[3]
    prepared = resolved(q, sharding.layout.num_tokens, fp8_output=output == "fp8", **options)
    inputs = kernel_inputs(q, k, v)
    if hadamard:
        inputs = [rotate(inputs[0]), rotate(inputs[1]), inputs[2]]
    prepared = replace(prepared, out_dtype=inputs[0].dtype)
    zeros = inputs[0].shape[3] - dim
    k_mean, v_absmax = (
        x if x is None or not zeros else torch.nn.functional.pad(x, (0, zeros)) for x in (k_mean, v_absmax)
    )
    k_mean = rotate(k_mean) if hadamard and k_mean is not None else k_mean
    if scheme == "ulysses":
        out, lse = QuantizedUlysses.apply(*inputs, lists, sharding, heads, prepared, k_mean, v_absmax)
    else:
        problems = problems_of(lists, sharding, scheme == "ring")
        out, lse = RingAttention.apply(*inputs, problems, sharding, prepared, k_mean, v_absmax)
    return cut_dim(out, dim).transpose(1, 2), lse


def _plain(
    q: Tensor, k: Tensor, v: Tensor, sharding: Sharding, heads: Heads, lists: Lists | None, pattern: Any, k_mean: Tensor | None,
    v_absmax: Tensor | None, return_lse: bool, options: dict[str, Any],
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    q, k, v = to_heads(q, k, v, sharding, heads)
    of_rank = None if lists is None else cut_lists(lists, heads, sharding.rank)
    k_mean, v_absmax = (None if x is None else heads.cut(x, 1, sharding.rank) for x in (k_mean, v_absmax))
    # More ranks than heads: the output hangs on the inputs all the same, so that gradients travel back.
    if not q.shape[2]:
        out, lse = q + k + v, q.new_empty(q.shape[0], 0, q.shape[1], dtype=torch.float32)
    else:
        if of_rank is None:
            mask = pattern(q.transpose(1, 2), k.transpose(1, 2), sharding.layout)
            of_rank = mask.to(q.device).lists(_wants_gradient(q, k, v))
        out, lse = attend(q, k, v, of_rank, k_mean=k_mean, v_absmax=v_absmax, **options)
    out = to_tokens(out, sharding, heads)
    if not return_lse:
        return out
    lse = to_tokens(lse.transpose(1, 2).unsqueeze(-1), sharding, heads)
    return out, lse.squeeze(-1).transpose(1, 2)


# Arguments -------------------------------------------------------------------------------------------------------------------


def _wants_gradient(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def _check(
    q: Tensor, k: Tensor, v: Tensor, sharding: Any, scheme: Any, exchange: Any, output: Any, granularity: Any
) -> None:
    if not isinstance(sharding, Sharding):
        raise _fail(f"sharding is a {type(sharding).__name__}, expected one of fpsattention.parallel.shard_tokens")
    for name, value, known in (
        ("scheme", scheme, SCHEMES), ("exchange", exchange, EXCHANGES), ("output", output, OUTPUTS),
        ("granularity", granularity, tuple(GRANULARITIES)),
    ):  # fmt: skip
        if not isinstance(value, str) or value not in known:
            raise _fail(f"{name} {value!r}, expected one of {', '.join(map(repr, known))}")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor) or x.dim() != 4:
            raise _fail(f"{name} {getattr(x, 'shape', type(x).__name__)}, expected a tensor (B, S_local, H, D)")
        if x.shape != q.shape or x.dtype != q.dtype or x.device != q.device:
            raise _fail(
                f"{name} is {x.dtype} {tuple(x.shape)} on {x.device}, expected {q.dtype} {tuple(q.shape)} on {q.device} like q"
            )
    if q.shape[1] != sharding.num_local:
        raise _fail(
            f"q has {q.shape[1]} tokens, expected the {sharding.num_local} of rank {sharding.rank}: sharding.take(q, 1)"
        )
    if 0 in q.shape or kernel_dim(q.shape[3]) is None:
        raise _fail(f"q has shape {tuple(q.shape)}, expected no size 0 and a head dimension of at most {HEAD_DIMS[-1]}")
    if torch.compiler.is_compiling():
        raise _fail("it is being compiled, expected an eager call: leave it out with torch.compiler.disable")
    if not sharding.whole_tiles and (scheme != "ulysses" or exchange != "bf16"):
        raise _fail(
            f"scheme {scheme!r} with exchange {exchange!r} sends FP8, which needs whole tiles: shard_tokens(..., whole_tiles=True)"
        )
    if output == "fp8" and (scheme != "ulysses" or exchange != "fp8"):
        raise _fail("output 'fp8', expected 'bf16': only scheme='ulysses' with exchange='fp8' has it")


def _mask(window: Any, block_mask: Any, sharding: Sharding, q: Tensor) -> BlockMask:
    layout = sharding.layout
    if block_mask is None:
        return cached_mask(layout, layout.tile_grid if window is None else int3(window, "parallel.attention: window"))
    if not isinstance(block_mask, BlockMask):
        raise _fail(f"block_mask is a {type(block_mask).__name__}, expected fpsattention.BlockMask")
    if window is not None:
        raise _fail("window and block_mask are both given: pass one of them")
    if not block_mask.layout.same_as(layout):
        raise _fail(f"block_mask was made for {block_mask.layout!r}, expected the layout of sharding, {layout!r}")
    batch, heads = block_mask.shape
    if batch not in (1, q.shape[0]) or heads not in (1, q.shape[2]):
        raise _fail(
            f"block_mask has lists for {batch} samples and {heads} heads, expected 1 or {q.shape[0]}, and 1 or {q.shape[2]}"
        )
    return block_mask


def _described(lists: Lists) -> str:
    """Shapes, and on the CPU, where reading does not wait, a checksum."""
    text = f"lists {tuple(lists.kv_indices.shape)}"
    if lists.kv_indices.device.type != "cpu":
        return text
    return f"{text} {zlib.crc32(lists.kv_indices.numpy().tobytes(), zlib.crc32(lists.kv_num_blocks.numpy().tobytes())):08x}"
