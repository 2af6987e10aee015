"""``torch.ops.fpsattn.*``: loads the libraries and registers kernels, fakes and derivatives.

Shapes (NB = num_blocks, blocks of 128 slots; S = video and text tokens; token tensors have unit stride in D). k and v may have fewer
heads than q (a divisor: query head h attends their head ``h // (H / Hk)``) and, where ``kv_token_of_slot`` and ``kv_tile_block_offsets``
are given, other tokens or another order: in all shapes of theirs H is then Hk, S is Sk, NB is theirs. A ``token_of_slot`` is one
table for all or, int32 [B, H, NB * 128], one per head.

``quantize(q, k, v, token_of_slot, tile_block_offsets, k_mean=None, v_absmax=None, kv_token_of_slot=None, kv_tile_block_offsets=None,
*, granularity, smooth_k, pow2_scales, k_mean_stride=1, block_sums=False) -> (q8, k8, v8t, q_scale, k_scale, v_scale, k_mean_used, q_k_mean, q_block_sum, k_block_sum)``
    q, k, v (B, H, S, D), D in {64, 96, 128}; token_of_slot int32 [NB * 128], -1 in padding; tile_block_offsets int32 [num_tiles + 1];
    granularity 0 tile, 1 block, 2 token, 3 (CPU only) INT8 q8 and k8, scales per block; k_mean, v_absmax f32 [B, H, D], computed where None.
    q8, k8 e4m3 [B, H, NB, 128, C]; v8t e4m3 [B, H, NB, C + 8, 128]; C = D, or 128 for D = 96, the rest zeros; q_scale, k_scale f32 [B, H, NB], per token
    [B, H, NB, 128]; v_scale f32 [B, H, D]; k_mean_used f32 [B, H, D]; q_k_mean f32 [B, H, S].
    q_block_sum, k_block_sum f32 [B, H, NB, D] with block_sums, else [B, H, 0, D]: sums of the tokens of each block of q and of k
    (nothing subtracted), at no extra read. Divided by the valid slots of the block they are the means that patterns score by.
``prepare(q, k, v, token_of_slot, tile_block_offsets, q_weight=None, k_weight=None, q_bias=None, k_bias=None, cos=None, sin=None,
k_mean=None, v_absmax=None, *, norm, eps, rope_halves=False, first_rotated=0, weights_begin=0, weights_end=-1, ...) -> as quantize``
    quantize of raw projections: norm and RoPE of q and k first, in FP32. weights and biases [1 or 2, D], across heads
    [1 or 2, H * D]; cos, sin f32 (1 or B, 1 or H, n, D/2); norm and what follows: ``norm_rope.py``.
``forward(q8, ..., v_scale, token_of_slot, tile_of_block, kv_num_blocks, kv_indices, q_k_mean=None, *, num_tokens,
softmax_scale, out_dtype) -> (out, lse, row_max, row_sum)``
    tile_of_block int32 [NB]; kv_num_blocks int32 [1 or B, 1 or H, num_tiles]; kv_indices int32 [., ., num_tiles, max_kv].
    out (B, H, S, D), a view of (B, S, H, D) memory, of any ``out_dtype`` of bf16, f16, f32 whatever was quantized; lse f32 [B, H, S]; row_max, row_sum f32 [B, H, NB * 128].
``backward(grad_out, out, q8, ..., v_scale, row_max, row_sum, token_of_slot, tile_of_block, kv_num_blocks, kv_indices,
q_num_blocks, q_indices, kv_token_of_slot=None, *, softmax_scale, deterministic=False, num_kv_tokens=0) -> (dq, dk, dv)``
    num_kv_tokens: Sk, with kv_token_of_slot. q_num_blocks int32 [., ., NB], q_indices int32 [., ., NB, max_q]: the query blocks that visit a KV block.
``jvp(q_tangent, k_tangent, v_tangent, out, q8, ..., v_scale, row_max, row_sum, token_of_slot, tile_of_block, kv_num_blocks,
kv_indices, kv_token_of_slot=None, *, softmax_scale) -> out_tangent``
    tangents like q, k, v, or None; out_tangent like out. CPU only.
``attention(q, k, v, token_of_slot, tile_of_block, tile_block_offsets, kv_num_blocks, kv_indices, q_num_blocks=None,
q_indices=None, k_mean=None, v_absmax=None, kv_token_of_slot=None, kv_tile_block_offsets=None, *, ...) -> (out, lse, q8, k8, v8t, q_scale, k_scale, v_scale, row_max, row_sum)``
    quantize, then forward: a composite on every device. Differentiable in q, k, v through ``out`` (``autograd.py``).
``attention_masked(q, k, v, ..., v_absmax, hidden, *, ...)``
    ``attention`` of q, k, v from ``hidden.fill``, without the keys where ``hidden``, bool [B, S], is true. Every argument is given.
``attention_selected(q, k, v, token_of_slot, tile_of_block, tile_block_offsets, sizes, k_mean, v_absmax, hidden, *, pattern, transposed,
head_dim, ...) -> (..., row_sum, kv_num_blocks, kv_indices, q_num_blocks, q_indices, densities)``
    quantize with block_sums, the lists that a pattern makes of these sums (``selection.py``), forward: q and k are read once. head_dim:
    channels that count, the others are zeros; densities f64 [B, 2], selected and kernel. Derivatives as of ``attention``; the lists have none.
``attention_prepared(q, k, v, ..., q_indices, q_weight, k_weight, q_bias, k_bias, cos, sin, k_mean, v_absmax, hidden, *, norm, eps, ...)``
    prepare, then forward, likewise; without hidden keys where ``hidden`` is given. Differentiable in q, k, v, weights and biases.
``lists(grid, tile, window, text_len, text_position, device) -> (token_of_slot, ..., q_indices)``
    the tables of a planned grid: see ``lists.py``.
``select_blocks(values, ...)``, ``transpose_blocks(kv_num_blocks, ...)``
    lists made from scores, and their transpose: see ``blocks.py``.
``pattern_lists(q, k, v, token_of_slot, tile_block_offsets, *, pattern, ...) -> (kv_num_blocks, ..., q_indices)``
    the lists of a content pattern: see ``selection.py``.

CUDA tensors go to the sm_90a kernels, CPU tensors to ``cpu.py``; with ``FPSATTN_SM90_ON_HOST=1`` at the time of loading (device
code runs on the host, in an emulator) CPU tensors go to the sm_90a kernels, too. Bad arguments raise
:class:`~fpsattention.errors.ConfigError`, whichever kernel they meet.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ..errors import BuildError, UnsupportedError, of_library
from ..layout.tiles import core
from . import autograd, blocks, cpu, fakes, lists, selection, vmap
from .checks import check_hidden
from .checks_attention import CHECKS
from .hidden import hide, slots, without_keys
from .reference import Forward, Quantized
from .selection import fake_lists_of_sums, lists_of_sums

REINSTALL = "pip install --force-reinstall --no-deps . (in the source folder)"
KERNEL_OPS = ("quantize", "prepare", "forward", "backward")  # those with sm_90a kernels
LIST_OPS = ("select_blocks", "transpose_blocks")  # likewise: lists of a mask
JVP_SCHEMA = (
    "(Tensor? q_tangent, Tensor? k_tangent, Tensor? v_tangent, Tensor out, Tensor q8, Tensor k8, Tensor v8t, Tensor q_scale, "
    "Tensor k_scale, Tensor v_scale, Tensor row_max, Tensor row_sum, Tensor token_of_slot, Tensor tile_of_block, "
    "Tensor kv_num_blocks, Tensor kv_indices, Tensor? kv_token_of_slot=None, *, float softmax_scale) -> Tensor out_tangent"
)


MASKED_SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor token_of_slot, Tensor tile_of_block, Tensor tile_block_offsets, Tensor kv_num_blocks, "
    "Tensor kv_indices, Tensor? q_num_blocks, Tensor? q_indices, Tensor? k_mean, Tensor? v_absmax, Tensor hidden, *, int granularity, "
    "float softmax_scale, bool smooth_k, bool pow2_scales, SymInt k_mean_stride=1, bool deterministic=False) -> (Tensor out, Tensor lse, "
    "Tensor q8, Tensor k8, Tensor v8t, Tensor q_scale, Tensor k_scale, Tensor v_scale, Tensor row_max, Tensor row_sum)"
)

PREPARED_SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor token_of_slot, Tensor tile_of_block, Tensor tile_block_offsets, Tensor kv_num_blocks, "
    "Tensor kv_indices, Tensor? q_num_blocks, Tensor? q_indices, Tensor? q_weight, Tensor? k_weight, Tensor? q_bias, Tensor? k_bias, "
    "Tensor? cos, Tensor? sin, Tensor? k_mean, Tensor? v_absmax, Tensor? hidden, *, int norm, float eps, bool rope_halves, "
    "SymInt first_rotated, SymInt weights_begin, SymInt weights_end, int granularity, float softmax_scale, bool smooth_k, "
    "bool pow2_scales, SymInt k_mean_stride, bool deterministic) -> (Tensor out, Tensor lse, Tensor q8, Tensor k8, Tensor v8t, "
    "Tensor q_scale, Tensor k_scale, Tensor v_scale, Tensor row_max, Tensor row_sum)"
)


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
    other = other_cuda(core().build_info().get("cuda_version", ""), torch.version.cuda)
    if other:
        return other
    try:
        torch.ops.load_library(str(kernels))
    except OSError as error:
        return f"{kernels.name} does not load ({error.__cause__ or error})"
    return None


def other_cuda(built: str, running: str | None) -> str | None:
    """Why kernels built with CUDA ``built`` cannot share a process with a torch of CUDA ``running`` (None: a CPU build), or None.

    Kernels and torch must use one CUDA runtime, and a runtime is of one major version.
    """
    majors = [version.partition(".")[0] for version in (built, running or "")]
    if all(majors) and majors[0] != majors[1]:
        return f"the kernels were built with CUDA {built} but torch runs with CUDA {running}: {REINSTALL} with nvcc of CUDA {majors[1]}"
    return None


_kernels_missing = _load()
_on_host = _kernels_missing is None and os.environ.get("FPSATTN_SM90_ON_HOST") == "1"  # what the library saw, too


def sm90_missing() -> str | None:
    """Why the sm_90a kernels cannot be called in this process (one clause of a sentence), or None where they can."""
    return _kernels_missing


def sm90_on_host() -> bool:
    """Whether device code runs on the host (an emulator), so that CPU tensors go to the sm_90a kernels in this process."""
    return _on_host


# Kernels -----------------------------------------------------------------------------------------------------------------


def _attention_selected(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    token_of_slot: Tensor,
    tile_of_block: Tensor,
    tile_block_offsets: Tensor,
    sizes: Tensor,
    k_mean: Tensor | None,
    v_absmax: Tensor | None,
    hidden: Tensor | None,
    *,
    pattern: str,
    transposed: bool,
    head_dim: int,
    make: Callable[..., tuple[tuple[Tensor, ...], Tensor]] = lists_of_sums,
    **options: Any,
) -> tuple[Tensor, ...]:
    """The composite whose lists are made in between, by ``make``."""
    made: list[Tensor] = []

    def select(q_block_sum: Tensor, k_block_sum: Tensor) -> tuple[Tensor, ...]:
        sums = (x[..., :head_dim] for x in (q_block_sum, k_block_sum))
        lists, densities = make(
            *sums, sizes, pattern=pattern, transposed=transposed, tile_block_offsets=tile_block_offsets
        )
        made.extend((*lists, densities))
        return lists

    tables = (token_of_slot, tile_of_block, tile_block_offsets)
    return (
        *_attention(q, k, v, *tables, k_mean=k_mean, v_absmax=v_absmax, hidden=hidden, select=select, **options),
        *made,
    )


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    token_of_slot: Tensor,
    tile_of_block: Tensor,
    tile_block_offsets: Tensor,
    kv_num_blocks: Tensor | None = None,
    kv_indices: Tensor | None = None,
    q_num_blocks: Tensor | None = None,
    q_indices: Tensor | None = None,
    k_mean: Tensor | None = None,
    v_absmax: Tensor | None = None,
    kv_token_of_slot: Tensor | None = None,
    kv_tile_block_offsets: Tensor | None = None,
    *,
    hidden: Tensor | None = None,
    select: Callable[[Tensor, Tensor], tuple[Tensor, ...]] | None = None,
    granularity: int,
    softmax_scale: float,
    smooth_k: bool,
    pow2_scales: bool,
    k_mean_stride: int = 1,
    deterministic: bool = False,
) -> tuple[Tensor, ...]:
    """The composite, of both ops; ``q_num_blocks``, ``q_indices`` and ``deterministic`` are for the backward. ``select``: makes the lists."""
    _keep_for_stream(
        q, token_of_slot, tile_of_block, tile_block_offsets, kv_num_blocks, kv_indices, q_num_blocks, q_indices,
        kv_token_of_slot, kv_tile_block_offsets,
    )  # fmt: skip
    z = Quantized(
        *torch.ops.fpsattn.quantize(
            q, k, v, token_of_slot, tile_block_offsets, k_mean, v_absmax, kv_token_of_slot, kv_tile_block_offsets,
            granularity=granularity, smooth_k=smooth_k, pow2_scales=pow2_scales, k_mean_stride=k_mean_stride,
            block_sums=select is not None,
        )
    )  # fmt: skip
    if select is not None:
        kv_num_blocks, kv_indices, q_num_blocks, q_indices = select(z.q_block_sum, z.k_block_sum)
    assert kv_num_blocks is not None and kv_indices is not None  # given or made
    lists = (token_of_slot, tile_of_block, kv_num_blocks, kv_indices, q_indices)
    return _of_quantized(z, q, *lists, hidden, softmax_scale)


def _attention_masked(*args: Any, **options: Any) -> tuple[Tensor, ...]:
    *args_of_attention, hidden = args
    return _attention(*args_of_attention, hidden=hidden, **options)


def _attention_prepared(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    token_of_slot: Tensor,
    tile_of_block: Tensor,
    tile_block_offsets: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    q_num_blocks: Tensor | None,
    q_indices: Tensor | None,
    *tensors: Tensor | None,
    softmax_scale: float,
    deterministic: bool,
    **options: Any,
) -> tuple[Tensor, ...]:
    """The composite of ``prepare``; ``tensors``: weights to ``v_absmax``, then ``hidden``."""
    tables = (token_of_slot, tile_of_block, tile_block_offsets, kv_num_blocks, kv_indices)
    _keep_for_stream(q, *tables, q_num_blocks, q_indices)
    *prepared, hidden = tensors
    z = Quantized(*torch.ops.fpsattn.prepare(q, k, v, token_of_slot, tile_block_offsets, *prepared, **options))
    assert kv_num_blocks is not None and kv_indices is not None  # given or made
    lists = (token_of_slot, tile_of_block, kv_num_blocks, kv_indices, q_indices)
    return _of_quantized(z, q, *lists, hidden, softmax_scale)


def _of_quantized(
    z: Quantized,
    q: Tensor,
    token_of_slot: Tensor,
    tile_of_block: Tensor,
    kv_num_blocks: Tensor | None,
    kv_indices: Tensor | None,
    q_indices: Tensor | None,
    hidden: Tensor | None,
    softmax_scale: float,
) -> tuple[Tensor, ...]:
    if hidden is not None:
        check_hidden(q, hidden, token_of_slot)
        hidden = slots(hidden, token_of_slot)
        z = hide(z, hidden)
    f = Forward(
        *torch.ops.fpsattn.forward(
            *z.operands, token_of_slot, tile_of_block, kv_num_blocks, kv_indices, z.q_k_mean,
            num_tokens=q.shape[2], softmax_scale=softmax_scale, out_dtype=q.dtype,
        )
    )  # fmt: skip
    if hidden is not None and q_indices is not None and (_on_host or q.device.type != "cpu"):
        z = z._replace(k8=without_keys(z.k8, hidden))  # the sm_90a backward reads no ones
    return (f.out, f.lse, *z.operands, f.row_max, f.row_sum)


def _keep_for_stream(q: Tensor, *tables: Tensor | None) -> None:
    """Cached tables are of the default stream (``layout.plain``): another one must be known to the allocator, or a table that leaves
    the cache could be overwritten while a kernel still reads it."""
    if q.device.type != "cuda" or isinstance(q, FakeTensor):
        return
    stream = torch.cuda.current_stream(q.device)
    if stream != torch.cuda.default_stream(q.device):
        for table in tables:
            if table is not None:
                table.record_stream(stream)


def _checked(op: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
    """The CPU kernel behind the checks of metadata and values."""
    check = CHECKS[op]

    def run(*args: Any, **options: Any) -> Any:
        check(*args, **options, values=True)
        # Autocast reaches into the torch calls of a kernel, whose FP32 matmuls must stay FP32.
        with torch.autocast("cpu", enabled=False):
            return kernel(*args, **options)

    return run


def _no_jvp_kernel(*args: Any, **options: Any) -> Any:
    raise UnsupportedError(
        "fpsattention.attention: a forward-mode derivative (torch.func.jvp, torch.autograd.forward_ad) was asked on the sm_90a "
        "kernels, which have none: use CPU tensors, or reverse mode"
    )


def _translated(op: str) -> Callable[..., Any]:
    """The kernel of whatever device, its C++ errors as ours."""
    overload = getattr(torch.ops.fpsattn, op).default

    def run(keyset: Any, *args: Any, **options: Any) -> Any:
        try:
            return overload.redispatch(keyset & _BELOW_BACKEND_SELECT, *args, **options)
        except RuntimeError as error:
            ours = None if isinstance(error, UnsupportedError) else of_library(str(error))
            if ours is None:
                raise
            raise ours from None

    return run


_BELOW_BACKEND_SELECT = torch._C._dispatch_keyset_full_after(torch._C.DispatchKey.BackendSelect)


def _register() -> None:
    impl = torch.library.impl
    torch.library.define("fpsattn::jvp", JVP_SCHEMA)
    torch.library.define("fpsattn::attention_masked", MASKED_SCHEMA)
    torch.library.define("fpsattn::attention_selected", selection.ATTENTION_SCHEMA)
    impl("fpsattn::attention", "CompositeExplicitAutograd")(_attention)
    impl("fpsattn::attention_masked", "CompositeExplicitAutograd")(_attention_masked)
    impl("fpsattn::attention_selected", "CompositeExplicitAutograd")(_attention_selected)
    torch.library.register_fake("fpsattn::attention_selected")(partial(_attention_selected, make=fake_lists_of_sums))
    torch.library.define("fpsattn::attention_prepared", PREPARED_SCHEMA)
    impl("fpsattn::attention_prepared", "CompositeExplicitAutograd")(_attention_prepared)
    if not _on_host:
        for op in KERNEL_OPS:
            impl(f"fpsattn::{op}", "CPU")(_checked(op, getattr(cpu, op)))
    impl("fpsattn::jvp", "CPU")(_no_jvp_kernel if _on_host else _checked("jvp", cpu.jvp))
    impl("fpsattn::jvp", "CUDA")(_no_jvp_kernel)
    for op in (*KERNEL_OPS, "jvp"):
        torch.library.register_fake(f"fpsattn::{op}")(fakes.of(op))
    if _kernels_missing is None:
        for op in (*KERNEL_OPS, *LIST_OPS):  # BackendSelect comes before the kernels of all devices
            _LIBRARY.impl(op, _translated(op), "BackendSelect", with_keyset=True)
    lists.register()
    selection.register()
    blocks.register(_on_host)
    autograd.register(_LIBRARY)
    for op in ("attention", "attention_masked", "attention_selected", *KERNEL_OPS, "jvp"):
        torch.library.register_vmap(f"fpsattn::{op}", vmap.rule(op))


_LIBRARY = torch.library.Library("fpsattn", "FRAGMENT")
_register()
