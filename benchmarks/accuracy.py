"""Accuracy beside speed: a few rows of an output against FP64 attention of the unquantized inputs under the same mask.

What a mask leaves out is in the reference too: this is rounding error only.
"""

from __future__ import annotations

from typing import Any

import torch

from fpsattention.analysis import ErrorSum
from fpsattention.layout.tiles import BLOCK
from fpsattention.ops.reference import attention_fp64

from .workloads import Inputs, Workload

# The design's bound for normal inputs at D = 128 and 4096 keys is 0.056 / 0.9984; its exact test is in tests/. Here it is a
# guard against a kernel that is fast because it is wrong, on other lengths and head dimensions, so a quarter wider.
REL_L1_LIMIT, COSINE_LIMIT = 0.07, 0.9975
GRAD_REL_L1_LIMIT = 0.2  # a guard of the same kind on dQ; tests/ hold gradients to the reference's own bounds


def sampled_rows(workload: Workload, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token indices [rows] spread over the sequence, first and last among them, and which keys each attends, bool [rows, S]."""
    tokens = torch.linspace(0, workload.shape.tokens - 1, rows).round().long().unique().to(workload.device)
    block_of_token = workload.layout.slot_of_token.long() // BLOCK
    return tokens, workload.query_blocks()[block_of_token[tokens]][:, block_of_token]


def judge(workload: Workload, inputs: Inputs, out: torch.Tensor, *, sparse: bool, rows: int, grad_out: torch.Tensor | None = None,
          grad_q: torch.Tensor | None = None) -> dict[str, Any]:  # fmt: skip
    """Metrics of sampled rows of ``out`` (1, H, S, D), first and last head; of ``grad_q`` where it is given, the one gradient of which a
    row needs no other query. ``sparse``: against FP64 under the mask, else against dense FP64."""
    tokens, allowed = sampled_rows(workload, rows)
    sums = ErrorSum()
    for head in sorted({0, workload.shape.heads - 1}):
        q, k, v = (t.detach()[:, head : head + 1].double() for t in (inputs.q, inputs.k, inputs.v))
        q = q[:, :, tokens].requires_grad_(grad_q is not None)
        reference = attention_fp64(q, k, v, allowed if sparse else None, workload.softmax_scale)
        if grad_q is None:
            sums.add(out[:, head : head + 1, tokens], reference)
        else:
            (reference,) = torch.autograd.grad(reference, q, grad_out[:, head : head + 1, tokens].double())
            sums.add(grad_q[:, head : head + 1, tokens], reference)
    what = "dQ" if grad_q is not None else "output"
    return {**sums.result(), "rows": len(tokens), "against": f"FP64 {what}, {'same block mask' if sparse else 'dense'}"}


def within_limits(figures: dict[str, Any], *, gradient: bool = False) -> bool:
    """Whether figures of this library pass the guard."""
    if gradient:
        return figures["finite"] and figures["rel_l1"] <= GRAD_REL_L1_LIMIT
    return figures["finite"] and figures["rel_l1"] <= REL_L1_LIMIT and figures["cosine"] >= COSINE_LIMIT
