"""Everything that is compared, one adapter of a few lines each; this library first.

An adapter takes a ``Workload`` and a device and returns a ``Prepared``, or raises ``Absent`` with the reason. Imports of
a peer stay inside its adapter: what is not installed costs nothing. To add one, write a function and a line in ``PEERS``,
or put both into a file of your own and give it as ``--peers-file``.

Tensors are (B, H, S, D) views of (B, S, H, D) memory; an output is (B, H, S, D), any strides.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.suite.workloads import BLOCK, Inputs, Workload

E4M3_MAX = 448.0


class Absent(Exception):
    """This peer cannot be measured here; the text says why."""


@dataclass
class Prepared:
    """``run`` is all that a user pays, from BF16 q, k, v to BF16 out; ``stages`` are its parts, timed alone.

    ``sparse``: attends the workload's block mask (else everything). ``flops``: FLOP that it multiplies, padding included.
    ``train``: differentiable call, where there is one.
    """

    run: Callable[[Inputs], torch.Tensor]
    flops: int
    sparse: bool = False
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


def need(module: str, hint: str) -> Any:
    """Imports a peer's module, or says that it is absent."""
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


def per_head_fp8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(e4m3, scale [B, H]) of a (B, H, S, D) tensor: one scale per head, as FP8 peers leave it to their callers."""
    scale = x.abs().amax(dim=(2, 3)).float().clamp_min(1e-12) / E4M3_MAX
    return (x / scale[:, :, None, None].to(x.dtype)).to(torch.float8_e4m3fn), scale


class PerSet:
    """Remembers one value per input set, so that a stage can be timed without the stage before it."""

    def __init__(self, make: Callable[[Inputs], Any]):
        self._make = make
        self._values: dict[int, Any] = {}

    def __call__(self, inputs: Inputs) -> Any:
        if inputs.index not in self._values:
            self._values[inputs.index] = self._make(inputs)
        return self._values[inputs.index]


def to_slots(x: torch.Tensor, workload: Workload) -> torch.Tensor:
    """(B, H, S, D) to (B, H, slots, D) in tiled order, contiguous; padding repeats token 0."""
    return x.index_select(2, workload.tables["token_of_slot"].clamp_min(0))


def to_tokens(x: torch.Tensor, workload: Workload) -> torch.Tensor:
    """(B, H, slots, D) back to (B, H, S, D)."""
    return x.index_select(2, workload.tables["slot_of_token"])


def block_map(workload: Workload) -> torch.Tensor:
    """bool [Hm, num_blocks, num_blocks]: which KV blocks each query block multiplies (batch 0)."""
    counts, indices = workload.mask.kv_num_blocks[0], workload.mask.kv_indices[0].long()
    heads, tiles, columns = indices.shape
    listed = torch.arange(columns, device=indices.device) < counts[..., None]
    blocks = int(workload.layout.num_blocks)
    tile_map = torch.zeros(heads, tiles, blocks + 1, dtype=torch.bool, device=indices.device)
    tile_map.scatter_(2, torch.where(listed, indices, blocks), True)
    return tile_map[:, workload.tables["tile_of_block"].long(), :blocks]


def valid_slots(workload: Workload, size: int) -> torch.Tensor:
    """int32 [slots / size]: valid tokens in every group of ``size`` slots."""
    return (workload.tables["token_of_slot"] >= 0).view(-1, size).sum(1).int()


# This library ----------------------------------------------------------------------------------------------------------


def fpsattn(workload: Workload, device: str, granularity: str = "tile") -> Prepared:
    import fpsattention as fps
    import fpsattention.ops.core

    tables, mask = workload.tables, workload.mask
    level = {"tile": 0, "block": 1, "token": 2}[granularity]

    def attention(x: Inputs, pow2_scales: bool = False) -> torch.Tensor:
        return fps.attention(
            x.q, x.k, x.v, grid=workload.shape.grid, tile=tuple(workload.layout.tile), block_mask=mask,
            granularity=granularity, tensor_layout="HND", pow2_scales=pow2_scales,
        )  # fmt: skip

    def quantize(x: Inputs) -> Any:
        return torch.ops.fpsattn.quantize(
            x.q, x.k, x.v, tables["token_of_slot"], tables["tile_block_offsets"], granularity=level, smooth_k=True,
            pow2_scales=False,
        )  # fmt: skip

    quantized = PerSet(quantize)

    def forward(x: Inputs) -> Any:
        q8, k8, v8t, q_scale, k_scale, v_scale, _, q_k_mean = quantized(x)
        return torch.ops.fpsattn.forward(
            q8, k8, v8t, q_scale, k_scale, v_scale, tables["token_of_slot"], tables["tile_of_block"], mask.kv_num_blocks,
            mask.kv_indices, num_tokens=workload.shape.tokens, softmax_scale=workload.softmax_scale,
            out_dtype=torch.bfloat16, q_k_mean=q_k_mean,
        )  # fmt: skip

    return Prepared(
        attention, workload.computed_flops(), sparse=True, stages={"quantize": quantize, "attention": forward},
        train=lambda x: attention(x, pow2_scales=True),
    )  # fmt: skip


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

        return Prepared(run, workload.shape.dense_flops(), train=run)

    return prepare


def flex(workload: Workload, device: str) -> Prepared:
    from torch.nn.attention.flex_attention import flex_attention

    mask = workload.mask.to_flex()
    call = torch.compile(flex_attention, dynamic=False) if device == "cuda" else flex_attention
    permute = PerSet(lambda x: [to_slots(t, workload) for t in (x.q, x.k, x.v)])

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return call(q, k, v, block_mask=mask, scale=workload.softmax_scale)  # type: ignore[return-value]

    def run(x: Inputs) -> torch.Tensor:
        return to_tokens(attention(*(to_slots(t, workload) for t in (x.q, x.k, x.v))), workload)

    return Prepared(
        run, workload.computed_flops(), sparse=True, train=run, note="permuted to tiles and back by index_select",
        stages={"permute": lambda x: [to_slots(t, workload) for t in (x.q, x.k, x.v)], "attention": lambda x: attention(*permute(x))},
    )  # fmt: skip


# FlashAttention-3 ------------------------------------------------------------------------------------------------------


def _first(result: Any) -> torch.Tensor:
    return result[0] if isinstance(result, tuple) else result


def flash3_bf16(workload: Workload, device: str) -> Prepared:
    need_cuda(device)
    need_dense(workload)
    call = need("flash_attn_interface", "FlashAttention-3: build its hopper/ folder").flash_attn_func
    run = lambda x: _first(call(*x.nhd(), softmax_scale=workload.softmax_scale)).transpose(1, 2)  # noqa: E731
    return Prepared(run, workload.shape.dense_flops(), train=run)


def flash3_fp8(workload: Workload, device: str) -> Prepared:
    need_cuda(device)
    need_dense(workload)
    call = need("flash_attn_interface", "FlashAttention-3: build its hopper/ folder").flash_attn_func

    def cast(x: Inputs) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [per_head_fp8(t) for t in (x.q, x.k, x.v)]

    def attention(casts: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
        (q, sq), (k, sk), (v, sv) = casts
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        out = call(q, k, v, softmax_scale=workload.softmax_scale, q_descale=sq, k_descale=sk, v_descale=sv)
        return _first(out).transpose(1, 2)

    ready = PerSet(cast)
    return Prepared(
        lambda x: attention(cast(x)), workload.shape.dense_flops(), note="cast by eager torch, one scale per head",
        stages={"quantize": cast, "attention": lambda x: attention(ready(x))},
    )  # fmt: skip


# cuDNN FP8 -------------------------------------------------------------------------------------------------------------


def cudnn_fp8(workload: Workload, device: str) -> Prepared:
    need_cuda(device)
    need_dense(workload)
    cudnn = need("cudnn", "pip install nvidia-cudnn-frontend")
    s = workload.shape
    dim = [s.batch, s.heads, s.tokens, s.head_dim]
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

    def cast(x: Inputs) -> list[tuple[torch.Tensor, torch.Tensor]]:
        result = []
        for t in (x.q, x.k, x.v):
            scale = t.abs().amax().float() / E4M3_MAX
            result.append(((t / scale.to(t.dtype)).to(torch.float8_e4m3fn), scale.view(1, 1, 1, 1)))
        return result

    def raw(casts: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
        result = torch.empty_strided(dim, stride, dtype=torch.float8_e4m3fn, device=device)
        values = [*(scale for _, scale in casts), descale_s, scale_s, state["scale_o"]]
        pack = {tensor: data for tensor, (data, _) in zip((q, k, v), casts, strict=True)}
        pack.update(zip(scales, values, strict=True))
        pack.update({out: result, amax_s: seen_s, amax_o: seen_o})
        graph.execute(pack, workspace, handle=handle)
        return result

    def attention(casts: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
        if "descale_o" not in state:
            raw(casts)
            state["scale_o"], state["descale_o"] = (
                E4M3_MAX / seen_o.clamp_min(1e-12),
                seen_o.clamp_min(1e-12) / E4M3_MAX,
            )
        return raw(casts)

    ready = PerSet(cast)
    cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream().cuda_stream)
    return Prepared(
        lambda x: attention(cast(x)).to(torch.bfloat16) * state["descale_o"].to(torch.bfloat16), s.dense_flops(),
        stages={"quantize": cast, "attention": lambda x: attention(ready(x))}, note="output is e4m3, widened afterwards",
    )  # fmt: skip


# SageAttention, SpargeAttn ---------------------------------------------------------------------------------------------


def sage(workload: Workload, device: str) -> Prepared:
    need_cuda(device)
    need_dense(workload)
    call = need("sageattention", "SageAttention >= 2.2 from source").sageattn_qk_int8_pv_fp8_cuda_sm90
    scale = workload.softmax_scale
    run = lambda x: call(*x.nhd(), tensor_layout="NHD", is_causal=False, sm_scale=scale).transpose(1, 2)  # noqa: E731
    return Prepared(run, workload.shape.dense_flops())


def sparge(workload: Workload, device: str) -> Prepared:
    need_cuda(device)
    call = need("spas_sage_attn", "SpargeAttn from source").block_sparse_sage2_attn_cuda
    # On sm90 its blocks are 64 queries x 128 keys. It has no notion of padding inside a block: padding keys are attended.
    mask = block_map(workload).repeat_interleave(2, dim=1).to(torch.int8)
    mask = mask.expand(workload.shape.batch, workload.shape.heads, -1, -1).contiguous()

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return call(
            q, k, v, mask_id=mask, scale=workload.softmax_scale, tensor_layout="HND", output_dtype=torch.bfloat16
        )

    ready = PerSet(lambda x: [to_slots(t, workload) for t in (x.q, x.k, x.v)])
    return Prepared(
        lambda x: to_tokens(attention(*(to_slots(t, workload) for t in (x.q, x.k, x.v))), workload), workload.computed_flops(),
        sparse=True, stages={"attention": lambda x: attention(*ready(x))},
        note="padding slots are attended (its error includes them); its own quantization is inside `attention`",
    )  # fmt: skip


# FlashInfer ------------------------------------------------------------------------------------------------------------


def flashinfer_fp8(workload: Workload, device: str) -> Prepared:
    need_cuda(device)
    need_dense(workload)
    call = need("flashinfer", "pip install flashinfer-python").single_prefill_with_kv_cache
    if workload.shape.batch != 1:
        raise Absent("single_prefill_with_kv_cache takes one sequence")

    def cast(x: Inputs) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [per_head_fp8(t) for t in (x.q, x.k, x.v)]

    def attention(casts: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
        (q, sq), (k, sk), (v, sv) = casts
        q, k, v = (t[0].transpose(0, 1).contiguous() for t in (q, k, v))
        out = call(
            q, k, v, scale_q=sq[0], scale_k=sk[0], scale_v=sv[0], o_dtype=torch.bfloat16, backend="fa3",
            sm_scale=workload.softmax_scale,
        )  # fmt: skip
        return out.transpose(0, 1)[None]

    ready = PerSet(cast)
    return Prepared(
        lambda x: attention(cast(x)), workload.shape.dense_flops(), note="cast by eager torch, one scale per head",
        stages={"quantize": cast, "attention": lambda x: attention(ready(x))},
    )  # fmt: skip


def flashinfer_sparse(workload: Workload, device: str) -> Prepared:
    need_cuda(device)
    flashinfer = need("flashinfer", "pip install flashinfer-python")
    heads = workload.shape.heads
    sizes = valid_slots(workload, BLOCK).expand(heads, -1).contiguous()
    wrapper = flashinfer.VariableBlockSparseAttentionWrapper(
        torch.empty(512 << 20, dtype=torch.uint8, device=device), backend="fa3"
    )
    wrapper.plan(
        block_mask_map=block_map(workload).expand(heads, -1, -1).contiguous(), block_row_sz=sizes, block_col_sz=sizes,
        num_qo_heads=heads, num_kv_heads=heads, head_dim=workload.shape.head_dim, q_data_type=torch.bfloat16,
        sm_scale=workload.softmax_scale,
    )  # fmt: skip
    order = workload.tables["token_of_slot"]
    order = order[order >= 0]  # blocks may have any size here: tokens in tiled order, no padding
    back = torch.argsort(order)
    pack = lambda x: [t[0].index_select(1, order) for t in (x.q, x.k, x.v)]  # noqa: E731
    ready = PerSet(pack)
    return Prepared(
        lambda x: wrapper.run(*pack(x)).index_select(1, back)[None], workload.computed_flops(), sparse=True,
        stages={"permute": pack, "attention": lambda x: wrapper.run(*ready(x))}, note="BF16; planned once, outside the timing",
    )  # fmt: skip


# FastVideo -------------------------------------------------------------------------------------------------------------


def vsa(workload: Workload, device: str) -> Prepared:
    need_cuda(device)
    call = need(
        "fastvideo_kernel.block_sparse_attn", "a fastvideo-kernel with block_sparse_attn"
    ).block_sparse_attn_from_indices
    s = workload.shape
    mask = block_map(workload).repeat_interleave(2, 1).repeat_interleave(2, 2)  # its blocks have 64 tokens
    sizes = valid_slots(workload, 64)
    mask &= sizes[None, None, :] > 0
    counts = mask.sum(-1).int().expand(s.batch, s.heads, -1).contiguous()
    indices = mask.int().argsort(dim=-1, descending=True, stable=True).int().expand(s.batch, s.heads, -1, -1)
    indices = indices[..., : int(counts.max())].contiguous()
    ready = PerSet(lambda x: [to_slots(t, workload) for t in (x.q, x.k, x.v)])
    attention = lambda tensors: _first(call(*tensors, indices, counts, sizes))  # noqa: E731
    return Prepared(
        lambda x: to_tokens(attention([to_slots(t, workload) for t in (x.q, x.k, x.v)]), workload),
        4 * 64 * 64 * s.head_dim * int(counts.long().sum()), sparse=True,
        stages={"attention": lambda x: attention(ready(x))}, note="BF16; the kernel under VSA, given the same mask",
    )  # fmt: skip


def sta(workload: Workload, device: str) -> Prepared:
    need_cuda(device)
    call = need("fastvideo_kernel", "fastvideo-kernel from source").sliding_tile_attention
    grid = "x".join(map(str, workload.shape.grid))
    if grid not in ("30x48x80", "36x48x48", "18x48x80") or tuple(workload.layout.tile) != (6, 8, 8) or workload.dense:
        raise Absent("takes grids 30x48x80, 36x48x48, 18x48x80 with tile 6x8x8 and a window only")
    windows = [list(workload.window or ())] * workload.shape.heads
    attention = lambda tensors: call(*tensors, windows, 0, False, grid)  # noqa: E731
    ready = PerSet(lambda x: [to_slots(t, workload) for t in (x.q, x.k, x.v)])
    return Prepared(
        lambda x: to_tokens(attention([to_slots(t, workload) for t in (x.q, x.k, x.v)]), workload),
        workload.computed_flops(), sparse=True, stages={"attention": lambda x: attention(ready(x))}, note="BF16",
    )  # fmt: skip


PEERS = (
    Peer("fpsattn", "fpsattention, scales per tile", "fp8", fpsattn, own=True),
    Peer(
        "fpsattn-token",
        "fpsattention, scales per token",
        "fp8",
        lambda w, d: fpsattn(w, d, "token"),
        own=True,
        quick=False,
    ),
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
