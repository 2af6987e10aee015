"""One block before and after, as Markdown: what docs/end_to_end.md shows."""

from __future__ import annotations

from ..analysis.markdown import table
from .forward import CONFIGURATIONS, Estimate, shape_of
from .kernels import block_kernels


def block_tables(estimate: Estimate) -> str:
    """A table of kernels for the baseline's block, and one for the block with FP8 attention and linears."""
    model, gpu = estimate.model, estimate.gpu
    shape, _ = shape_of(model, estimate.grid, estimate.asked)
    rates = {"bf16": gpu.bf16, "fp8": gpu.fp8, "memory": gpu.memory, "attention bf16": gpu.baselines[estimate.baseline],
             "attention fp8": gpu.attention[model.head_dim]}  # fmt: skip
    blocks = []
    for title, configuration in (("Before", CONFIGURATIONS[0]), ("After", CONFIGURATIONS[2])):
        rows, total = [], [0.0, 0.0, 0.0, 0.0]
        kernels = block_kernels(
            model, shape, attention=configuration.attention, linears=configuration.linears, prepare=estimate.prepare
        )
        for kernel in kernels:
            floor = kernel.floor(gpu.peak_bf16, gpu.peak_fp8, gpu.peak_memory)
            seconds = max(kernel.flops / rates[kernel.engine].value, kernel.bytes / gpu.memory.value)
            numbers = (kernel.flops / 1e12, kernel.bytes / 1e9, 1e3 * floor, 1e3 * seconds)
            total = [a + b for a, b in zip(total, numbers, strict=True)]
            rows.append([kernel.name, kernel.part, *map(_cell, numbers)])
        rows.append([f"{len(rows)} kernels", "", *map(_cell, total)])
        head = ["kernel", "part", "TFLOP", "GB", "floor, ms", "predicted, ms"]
        blocks.append(f"**{title}**\n\n{table(head, rows)}")
    return "\n\n".join(blocks)


def _cell(number: float) -> str:
    return "-" if number == 0 else f"{number:.2f}" if number < 10 else f"{number:.1f}"
