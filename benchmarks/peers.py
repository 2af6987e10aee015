"""Everything that is compared, one adapter of a few lines each; this library first.

An adapter takes a ``Workload`` and a device and returns a ``Prepared``, or raises ``Absent`` with the reason. Imports of
a peer stay inside its adapter: what is not installed costs nothing. To add one, write a function and a line in ``PEERS``,
or put both into a file of your own and give it as ``--peers-file``.

Tensors are (1, H, S, D) views of (1, S, H, D) memory; an output is (1, H, S, D), any strides.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

import fpsattention as fps
from fpsattention.layout.tiles import BLOCK
from fpsattention.ops.reference import E4M3_MAX

from .workloads import Inputs, Workload

Casts = list[tuple[torch.Tensor, torch.Tensor]]  # of q, k and v: e4m3, scale
CAST = "cast by eager torch, one scale per head"


class Absent(Exception):
    """This peer cannot be measured here; the text says why."""


@dataclass
class Prepared:
    """``run`` is all that a user pays, from BF16 q, k, v to BF16 out; ``stages`` are its parts, timed alone.

    ``sparse``: attends the workload's block mask (else everything). ``flops``: FLOP that it multiplies, padding included.
    ``train``: differentiable call, where there is one; ``run`` itself for most.
    """

    run: Callable[[Inputs], torch.Tensor]
    sparse: bool = False
    flops: int | None = None  # None: the computed blocks of the workload, or dense attention over its tokens
    stages: dict[str, Callable[[Inputs], Any]] = field(default_factory=dict)
    train: Callable[[Inputs], torch.Tensor] | None = None
    note: str | None = None


@dataclass(frozen=True)
class Peer:
    """``own``: this library, whose mistakes fail the run. ``quick``: also measured in a quick run."""

    name: str
    title: str
    precision: str
    prepare: Callable[[Workload, str], Prepared]
    own: bool = False
    quick: bool = True


def need(module: str, hint: str, device: str) -> Any:
    """Imports a peer's module, or says that it, or the GPU that it needs, is absent."""
    need_cuda(device)
    if importlib.util.find_spec(module.split(".")[0]) is None:
        raise Absent(f"no module {module} ({hint})")
    try:
        return importlib.import_module(module)
    except Exception as error:  # a peer built for another torch fails in many ways
        raise Absent(f"import {module}: {type(error).__name__}: {error}"[:300]) from error


def need_cuda(device: str) -> None:
    if device != "cuda":
        raise Absent("needs a CUDA device")


def need_dense(workload: Workload) -> None:
    if not workload.dense:
        raise Absent("attends everything: measured at density 1 and as the baseline only")


def to_fp8(x: torch.Tensor, absmax: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(e4m3, scale) of a (B, H, S, D) tensor, as FP8 peers leave it to their callers. absmax: of four dimensions."""
    scale = absmax.float().clamp_min(1e-12) / E4M3_MAX
    return (x / scale.to(x.dtype)).to(torch.float8_e4m3fn), scale


class PerSet:
    """Remembers one value per input set, so that a stage can be timed without the stage before it."""

    def __init__(self, make: Callable[[Inputs], Any]):
        self._make = make
        self._values: dict[int, Any] = {}

    def __call__(self, inputs: Inputs) -> Any:
        if inputs.index not in self._values:
            self._values[inputs.index] = self._make(inputs)
        return self._values[inputs.index]


def permuted(x: Inputs, workload: Workload) -> list[torch.Tensor]:
    """q, k, v as (1, H, slots, D) in tiled order, contiguous; padding repeats token 0."""
    slots = workload.layout.token_of_slot.clamp_min(0)
    return [t.index_select(2, slots) for t in (x.q, x.k, x.v)]


def in_tiles(workload: Workload, attention: Callable[..., torch.Tensor], **more: Any) -> Prepared:
    """A kernel that attends the mask in tiled order: ``attention(q, k, v)`` over slots, permuted before and after."""
    ready = PerSet(lambda x: permuted(x, workload))
    return Prepared(
        lambda x: attention(*permuted(x, workload)).index_select(2, workload.layout.slot_of_token), sparse=True,
        stages={"permute": lambda x: permuted(x, workload), "attention": lambda x: attention(*ready(x))}, **more,
    )  # fmt: skip


def casting(cast: Callable[[Inputs], Any], attention: Callable[[Any], torch.Tensor], **more: Any) -> Prepared:
    """A dense kernel that leaves the cast to FP8 to its caller."""
    ready = PerSet(cast)
    stages = {"quantize": cast, "attention": lambda x: attention(ready(x))}
    return Prepared(lambda x: attention(cast(x)), stages=stages, **more)


def per_head_casts(x: Inputs) -> Casts:
    """Scales [B, H]: one per head."""
    casts = (to_fp8(t, t.abs().amax((2, 3), keepdim=True)) for t in (x.q, x.k, x.v))
    return [(t, scale[:, :, 0, 0]) for t, scale in casts]


def valid_slots(workload: Workload, size: int) -> torch.Tensor:
    """int32 [slots / size]: valid tokens in every group of ``size`` slots."""
    return (workload.layout.token_of_slot >= 0).view(-1, size).sum(1).int()


# This library ----------------------------------------------------------------------------------------------------------


def fpsattn(workload: Workload, device: str, granularity: str = "tile") -> Prepared:
    def attention(x: Inputs, pow2_scales: bool = False) -> torch.Tensor:
        return fps.attention(
            x.q, x.k, x.v, grid=workload.shape.grid, block_mask=workload.mask, granularity=granularity, tensor_layout="HND",
            pow2_scales=pow2_scales,
        )  # fmt: skip

    quantize = lambda x: workload.quantize(x, granularity)  # noqa: E731
    quantized = PerSet(quantize)
    stages = {"quantize": quantize, "attention": lambda x: workload.forward(quantized(x))}
    return Prepared(attention, sparse=True, stages=stages, train=lambda x: attention(x, True))


fpsattn_token = partial(fpsattn, granularity="token")


# torch -----------------------------------------------------------------------------------------------------------------


def sdpa(backend: str) -> Callable[[Workload, str], Prepared]:
    def prepare(workload: Workload, device: str) -> Prepared:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        if backend != "MATH":
            need_cuda(device)
        elif device == "cuda":
            raise Absent("writes the whole score matrix: a stand-in for dry runs on a CPU")
        chosen = getattr(SDPBackend, backend)

        def run(x: Inputs) -> torch.Tensor:
            with sdpa_kernel(chosen):
                return F.scaled_dot_product_attention(x.q, x.k, x.v)

        return Prepared(run, train=run)

    return prepare


def flex(workload: Workload, device: str) -> Prepared:
    from torch.nn.attention.flex_attention import flex_attention

    mask = workload.mask.to_flex()
    call = torch.compile(flex_attention, dynamic=False) if device == "cuda" else flex_attention
    prepared = in_tiles(workload, lambda q, k, v: call(q, k, v, block_mask=mask, scale=workload.softmax_scale))
    return replace(prepared, train=prepared.run, note="permuted to tiles and back by index_select")


# FlashAttention-3 ------------------------------------------------------------------------------------------------------


def _first(result: Any) -> torch.Tensor:
    return result[0] if isinstance(result, tuple) else result


def flash3(workload: Workload, device: str) -> Callable[..., torch.Tensor]:
    need_dense(workload)
    call = need("flash_attn_interface", "FlashAttention-3: build its hopper/ folder", device).flash_attn_func
    return lambda *qkv, **more: _first(call(*qkv, softmax_scale=workload.softmax_scale, **more)).transpose(1, 2)


def flash3_bf16(workload: Workload, device: str) -> Prepared:
    call = flash3(workload, device)
    run = lambda x: call(*x.nhd())  # noqa: E731
    return Prepared(run, train=run)


def flash3_fp8(workload: Workload, device: str) -> Prepared:
    call = flash3(workload, device)

    def attention(casts: Casts) -> torch.Tensor:
        (q, sq), (k, sk), (v, sv) = casts
        return call(*(t.transpose(1, 2) for t in (q, k, v)), q_descale=sq, k_descale=sk, v_descale=sv)

    return casting(per_head_casts, attention, note=CAST)


# cuDNN FP8 -------------------------------------------------------------------------------------------------------------


def cudnn_fp8(workload: Workload, device: str) -> Prepared:
    need_dense(workload)
    cudnn = need("cudnn", "pip install nvidia-cudnn-frontend", device)
    s = workload.shape
    dim = [1, s.heads, s.tokens, s.head_dim]
    stride = [s.tokens * s.heads * s.head_dim, s.head_dim, s.heads * s.head_dim, 1]
    e4m3, fp32 = cudnn.data_type.FP8_E4M3, cudnn.data_type.FLOAT
    handle = cudnn.create_handle()
    graph = cudnn.pygraph(io_data_type=e4m3, intermediate_data_type=fp32, compute_data_type=fp32, handle=handle)
    q, k, v = (graph.tensor(name=name, dim=dim, stride=stride, data_type=e4m3) for name in "qkv")
    names = ("descale_q", "descale_k", "descale_v", "descale_s", "scale_s", "scale_o")
    scales = [graph.tensor(name=name, dim=[1] * 4, stride=[1] * 4, data_type=fp32) for name in names]
    out, _, amax_s, amax_o = graph.sdpa_fp8(
        q=q, k=k, v=v, **dict(zip(names, scales, strict=True)), is_inference=True, attn_scale=workload.softmax_scale,
        use_causal_mask=False, name="sdpa",
    )  # fmt: skip
    out.set_output(True).set_dim(dim).set_stride(stride).set_data_type(e4m3)
    for amax in (amax_s, amax_o):
        amax.set_output(True).set_dim([1] * 4).set_stride([1] * 4).set_data_type(fp32)
    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
    graph.check_support()
    graph.build_plans()
    workspace = torch.empty(max(1, graph.get_workspace_size()), dtype=torch.uint8, device=device)
    scalar = lambda value: torch.full((1, 1, 1, 1), value, dtype=torch.float32, device=device)  # noqa: E731
    # P is at most 1. The output's scale comes from the first call's own maximum, as delayed scaling would have it.
    descale_s, scale_s, state = scalar(1 / 256), scalar(256.0), {"scale_o": scalar(1.0)}
    seen_s, seen_o = scalar(0.0), scalar(0.0)

    def cast(x: Inputs) -> Casts:
        return [to_fp8(t, t.abs().amax().view(1, 1, 1, 1)) for t in (x.q, x.k, x.v)]

    def raw(casts: Casts) -> torch.Tensor:
        result = torch.empty_strided(dim, stride, dtype=torch.float8_e4m3fn, device=device)
        values = [*(scale for _, scale in casts), descale_s, scale_s, state["scale_o"]]
        pack = {tensor: data for tensor, (data, _) in zip((q, k, v), casts, strict=True)}
        pack.update(zip(scales, values, strict=True))
        pack.update({out: result, amax_s: seen_s, amax_o: seen_o})
        graph.execute(pack, workspace, handle=handle)
        return result

    def attention(casts: Casts) -> torch.Tensor:
        if "descale_o" not in state:
            raw(casts)
            state["descale_o"] = seen_o.clamp_min(1e-12) / E4M3_MAX
            state["scale_o"] = 1 / state["descale_o"]
        return raw(casts)

    cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream().cuda_stream)
    widened = lambda x: attention(cast(x)).to(torch.bfloat16) * state["descale_o"].to(torch.bfloat16)  # noqa: E731
    return replace(casting(cast, attention, note="output is e4m3, widened afterwards"), run=widened)


# SageAttention, SpargeAttn ---------------------------------------------------------------------------------------------


def sage(workload: Workload, device: str) -> Prepared:
    need_dense(workload)
    call = need("sageattention", "SageAttention >= 2.2 from source", device).sageattn_qk_int8_pv_fp8_cuda_sm90
    scale = workload.softmax_scale
    run = lambda x: call(*x.nhd(), tensor_layout="NHD", is_causal=False, sm_scale=scale).transpose(1, 2)  # noqa: E731
    return Prepared(run)


def sparge(workload: Workload, device: str) -> Prepared:
    call = need("spas_sage_attn", "SpargeAttn from source", device).block_sparse_sage2_attn_cuda
    # On sm90 its blocks are 64 queries x 128 keys. It has no notion of padding inside a block: padding keys are attended.
    mask = workload.query_blocks().repeat_interleave(2, dim=0).to(torch.int8)
    mask = mask.expand(1, workload.shape.heads, -1, -1).contiguous()
    return in_tiles(
        workload,
        lambda q, k, v: call(q, k, v, mask_id=mask, scale=workload.softmax_scale, tensor_layout="HND", output_dtype=torch.bfloat16),
        note="padding slots are attended (its error includes them); its own quantization is inside `attention`",
    )  # fmt: skip


# FlashInfer ------------------------------------------------------------------------------------------------------------


def flashinfer_fp8(workload: Workload, device: str) -> Prepared:
    need_dense(workload)
    call = need("flashinfer", "pip install flashinfer-python", device).single_prefill_with_kv_cache

    def attention(casts: Casts) -> torch.Tensor:
        (q, sq), (k, sk), (v, sv) = casts
        q, k, v = (t[0].transpose(0, 1).contiguous() for t in (q, k, v))
        out = call(
            q, k, v, scale_q=sq[0], scale_k=sk[0], scale_v=sv[0], o_dtype=torch.bfloat16, backend="fa3",
            sm_scale=workload.softmax_scale,
        )  # fmt: skip
        return out.transpose(0, 1)[None]

    return casting(per_head_casts, attention, note=CAST)


def flashinfer_sparse(workload: Workload, device: str) -> Prepared:
    flashinfer = need("flashinfer", "pip install flashinfer-python", device)
    heads = workload.shape.heads
    sizes = valid_slots(workload, BLOCK).expand(heads, -1).contiguous()
    workspace = torch.empty(512 << 20, dtype=torch.uint8, device=device)
    wrapper = flashinfer.VariableBlockSparseAttentionWrapper(workspace, backend="fa3")
    wrapper.plan(
        block_mask_map=workload.query_blocks().expand(heads, -1, -1).contiguous(), block_row_sz=sizes, block_col_sz=sizes,
        num_qo_heads=heads, num_kv_heads=heads, head_dim=workload.shape.head_dim, q_data_type=torch.bfloat16,
        sm_scale=workload.softmax_scale,
    )  # fmt: skip
    order = workload.layout.token_of_slot
    order = order[order >= 0]  # blocks may have any size here: tokens in tiled order, no padding
    back = torch.argsort(order)
    pack = lambda x: [t[0].index_select(1, order) for t in (x.q, x.k, x.v)]  # noqa: E731
    ready = PerSet(pack)
    return Prepared(
        lambda x: wrapper.run(*pack(x)).index_select(1, back)[None], sparse=True,
        stages={"permute": pack, "attention": lambda x: wrapper.run(*ready(x))}, note="BF16; planned once, outside the timing",
    )  # fmt: skip


# FastVideo -------------------------------------------------------------------------------------------------------------


def vsa(workload: Workload, device: str) -> Prepared:
    kernels = need("fastvideo_kernel.block_sparse_attn", "a fastvideo-kernel with block_sparse_attn", device)
    s = workload.shape
    mask = workload.query_blocks().repeat_interleave(2, 0).repeat_interleave(2, 1)  # its blocks have 64 tokens
    sizes = valid_slots(workload, 64)
    mask &= sizes > 0
    counts = mask.sum(-1).int().expand(1, s.heads, -1).contiguous()
    indices = mask.int().argsort(dim=-1, descending=True, stable=True).int().expand(1, s.heads, -1, -1)
    indices = indices[..., : int(counts.max())].contiguous()
    return in_tiles(
        workload, lambda q, k, v: _first(kernels.block_sparse_attn_from_indices(q, k, v, indices, counts, sizes)),
        flops=4 * 64 * 64 * s.head_dim * int(counts.long().sum()), note="BF16; the kernel under VSA, given the same mask",
    )  # fmt: skip


def sta(workload: Workload, device: str) -> Prepared:
    call = need("fastvideo_kernel", "fastvideo-kernel from source", device).sliding_tile_attention
    grid = "x".join(map(str, workload.shape.grid))
    if grid not in ("30x48x80", "36x48x48", "18x48x80") or tuple(workload.layout.tile) != (6, 8, 8) or workload.dense:
        raise Absent("takes grids 30x48x80, 36x48x48, 18x48x80 with tile 6x8x8 and a window only")
    windows = [list(workload.window or ())] * workload.shape.heads
    return in_tiles(workload, lambda q, k, v: call(q, k, v, windows, 0, False, grid), note="BF16")


# Dense BF16: the fastest of those measured together is what speed-ups are counted from.
BASELINES = ("sdpa-cudnn", "sdpa-flash", "fa3-bf16", "sdpa-math")

PEERS = (
    Peer("fpsattn", "fpsattention, scales per tile", "fp8", fpsattn, own=True),
    Peer("fpsattn-token", "fpsattention, scales per token", "fp8", fpsattn_token, own=True, quick=False),
    Peer("sdpa-cudnn", "torch SDPA, cuDNN", "bf16", sdpa("CUDNN_ATTENTION")),
    Peer("sdpa-flash", "torch SDPA, FlashAttention-2", "bf16", sdpa("FLASH_ATTENTION")),
    Peer("sdpa-math", "torch SDPA, plain", "bf16", sdpa("MATH")),
    Peer("flex", "FlexAttention, same block mask", "bf16", flex),
    Peer("fa3-bf16", "FlashAttention-3", "bf16", flash3_bf16),
    Peer("fa3-fp8", "FlashAttention-3 FP8", "fp8", flash3_fp8),
    Peer("cudnn-fp8", "cuDNN FP8", "fp8", cudnn_fp8),
    Peer("sage", "SageAttention sm90", "int8 QK, fp8 PV", sage),
    Peer("flashinfer-fp8", "FlashInfer FP8, Hopper", "fp8", flashinfer_fp8),
    Peer("flashinfer-sparse", "FlashInfer block-sparse", "bf16", flashinfer_sparse),
    Peer("sparge", "SpargeAttn, same block mask", "int8 QK, fp8 PV", sparge),
    Peer("vsa", "FastVideo VSA kernel, same block mask", "bf16", vsa),
    Peer("sta", "FastVideo STA, same window", "bf16", sta),
)
