"""One block as a list of kernels, each with its FLOPs and bytes: before and after.

Both lists are those of compiled blocks (``compile_repeated_blocks``), where elementwise work between two matrix products is one kernel:
``docs/end_to_end.md`` says how that was counted. Bytes are those that must move, each tensor once per kernel; weights count, scales and
tables do not where they are below a thousandth of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .models import Model

PARTS = ("attention", "quantize", "linears", "cross-attention", "norms")


@dataclass(frozen=True)
class Kernel:
    """``engine`` says which rate its FLOPs run at: "bf16", "fp8", "attention bf16", "attention fp8", or "memory"."""

    name: str
    part: str
    flops: float
    bytes: float
    engine: str

    def floor(self, peak_bf16: float, peak_fp8: float, peak_memory: float) -> float:
        """Seconds at the peaks of the datasheet: nothing can be faster."""
        peak = peak_fp8 if "fp8" in self.engine else peak_bf16
        return max(self.flops / peak, self.bytes / peak_memory)


@dataclass(frozen=True)
class Shape:
    """Sizes of one block's work: video tokens, and what its self-attention multiplies.

    Attributes:
        tokens: of the video.
        slots: of q, k and v in tile order, padding included, text too.
        pairs: of query and key slots that the sparse kernel multiplies, per head.
    """

    tokens: int
    slots: int
    pairs: float


def block_kernels(
    model: Model, shape: Shape, *, attention: str, linears: str, single: bool = False, prepare: bool = False
) -> list[Kernel]:
    """The kernels of one block.

    Args:
        attention: "bf16" (dense) or "fp8" (block-sparse).
        linears: "bf16" or "fp8".
        single: the second kind of block of a joint model.
        prepare: norms and RoPE of q and k run in the quantizer, where attention is FP8.
    """
    if model.blocks == "cross":
        return list(_cross(model, shape, attention, linears, prepare))
    block = _single if single else _double
    return list(block(model, shape, attention, linears, prepare))


def _linear(name: str, rows: int, k: int, n: int, precision: str, reads: int = 1) -> Iterator[Kernel]:
    """One matrix product, or (``reads`` > 1) several of one input; with FP8 its weights are quantized first."""
    inside = 1 if precision == "fp8" else 2
    if precision == "fp8":
        yield Kernel(f"{name}: weights to e4m3", "linears", 0, 3.0 * k * n, "memory")
    moved = inside * (reads * rows * k + k * n) + 2 * rows * n
    yield Kernel(name, "linears", 2.0 * rows * k * n, moved, precision)


def _attention(
    model: Model, shape: Shape, tokens: int, precision: str, prepare: bool, beside: float = 0
) -> Iterator[Kernel]:
    """From projections on. ``beside``: elements of text and video that are put beside each other, after the norms and before."""
    d = model.width
    prepared = prepare and precision == "fp8"
    if not prepared:
        yield _norm("RMSNorm and RoPE of q and k", 2.0 * (tokens if not beside else shape.tokens) * d, 2, 2)
    if beside:
        yield _norm("text beside video: q, k, v", beside, 2, 2)
    if precision == "bf16":
        yield Kernel("self-attention, dense", "attention", 4.0 * tokens**2 * d, 8.0 * tokens * d, "attention bf16")
        return
    # q, k, v once, v a second time for its maximum, every eighth k for its mean; three tensors of e4m3 out. A norm across heads reads q
    # and k a second time.
    name = "RMSNorm, RoPE, quantize to tile order" if prepared else "quantize to tile order"
    again = 4 if prepared and model.blocks == "cross" else 0
    moved = (6 + 2 + 0.25 + again) * tokens * d + 3.0 * shape.slots * d
    yield Kernel(name, "quantize", 0, moved, "memory")
    moved = 3.0 * shape.slots * d + 2.0 * tokens * d
    yield Kernel("self-attention, block-sparse", "attention", 4.0 * shape.pairs * d, moved, "attention fp8")


def _norm(name: str, elements: float, read: float, written: float) -> Kernel:
    """Bytes per element that are read and written."""
    return Kernel(name, "norms", 0, elements * (read + written), "memory")


def _cross(model: Model, shape: Shape, attention: str, linears: str, prepare: bool) -> Iterator[Kernel]:
    s, d, f, text = shape.tokens, model.width, model.ffn, model.text
    out = 1 if linears == "fp8" else 2  # bytes of the next product's input
    rows = " and rows to e4m3" if linears == "fp8" else ""
    yield _norm(f"norm, modulation{rows}", s * d, 2, out)
    yield from _linear("q, k, v", s, d, 3 * d, linears, reads=3)
    yield from _attention(model, shape, s, attention, prepare)
    if linears == "fp8":
        yield _norm("rows to e4m3", s * d, 2, 1)
    yield from _linear("attention output", s, d, d, linears)
    yield _norm(f"gate, residual, norm{rows}", s * d, 4, 2 + out)
    yield from _linear("cross q", s, d, d, linears)
    yield from _linear("cross k, v (text)", text, d, 2 * d, "bf16", reads=2)
    yield _norm("RMSNorm of cross q", s * d, 2, 2)
    yield Kernel("cross-attention", "cross-attention", 4.0 * s * text * d, 4.0 * (s + text) * d, "attention bf16")
    if linears == "fp8":
        yield _norm("rows to e4m3", s * d, 2, 1)
    yield from _linear("cross output", s, d, d, linears)
    yield _norm(f"residual, norm, modulation{rows}", s * d, 4, 2 + out)
    yield from _linear("feed-forward, up", s, d, f, linears)
    yield _norm(f"GELU{rows}", s * f, 2, out)
    yield from _linear("feed-forward, down", s, f, d, linears)
    yield _norm("gate, residual", s * d, 4, 2)


def _double(model: Model, shape: Shape, attention: str, linears: str, prepare: bool) -> Iterator[Kernel]:
    s, d, f, text = shape.tokens, model.width, model.ffn, model.text
    out = 1 if linears == "fp8" else 2
    rows = " and rows to e4m3" if linears == "fp8" else ""
    yield _norm(f"norm, modulation{rows}", s * d, 2, out)
    yield from _linear("q, k, v", s, d, 3 * d, linears, reads=3)
    yield from _attention(model, shape, s + text, attention, prepare, beside=3.0 * (s + text) * d)
    if linears == "fp8":
        yield _norm("rows to e4m3", s * d, 2, 1)
    yield from _linear("attention output", s, d, d, linears)
    yield _norm(f"gate, residual, norm, modulation{rows}", s * d, 4, 2 + out)
    yield from _linear("feed-forward, up", s, d, f, linears)
    yield _norm(f"GELU{rows}", s * f, 2, out)
    yield from _linear("feed-forward, down", s, f, d, linears)
    yield _norm("gate, residual", s * d, 4, 2)
    yield from _linear("text: projections and feed-forward", text, d, 4 * d + 2 * f, "bf16", reads=5)


def _single(model: Model, shape: Shape, attention: str, linears: str, prepare: bool) -> Iterator[Kernel]:
    n, d, f = shape.tokens + model.text, model.width, model.ffn
    out = 1 if linears == "fp8" else 2
    rows = " and rows to e4m3" if linears == "fp8" else ""
    yield _norm(f"text beside video, norm, modulation{rows}", n * d, 2, 2 + out)
    yield from _linear("q, k, v", n, d, 3 * d, linears, reads=3)
    yield from _linear("feed-forward, up", n, d, f, linears)
    yield from _attention(model, shape, n, attention, prepare)
    yield _norm(f"GELU, beside the attention's output{rows}", n * (d + f), 2, out)
    yield from _linear("output and feed-forward, down", n, d + f, d, linears)
    yield _norm("gate, residual", n * d, 4, 2)
