"""Accuracy beside speed: a few rows of the output against FP64 attention under the same mask."""

from __future__ import annotations

from typing import Any

import torch

from .workloads import BLOCK, Inputs, Workload

# The design's bound for normal inputs at D = 128 and 4096 keys is 0.056 / 0.9984; its exact test is in tests/. Here it is a
# guard against a kernel that is fast because it is wrong, on other lengths and head dimensions, so a quarter wider.
REL_L1_LIMIT = 0.07
COSINE_LIMIT = 0.9975
GRAD_REL_L1_LIMIT = 0.2  # a guard of the same kind on dQ; tests/ hold gradients to the reference's own bounds


def sample_tokens(num_tokens: int, rows: int) -> torch.Tensor:
    """``rows`` token indices spread over the sequence, first and last among them."""
    return torch.linspace(0, num_tokens - 1, min(rows, num_tokens)).round().long().unique()


def attended(workload: Workload, tokens: torch.Tensor) -> torch.Tensor | None:
    """bool [rows, S]: which keys each sampled query attends (head 0 of the mask); None where it is all."""
    if workload.dense:
        return None
    slot_of_token = workload.layout.slot_of_token.to("cpu", torch.int64)
    tile_of_block = workload.layout.tile_of_block.to("cpu", torch.int64)
    counts = workload.mask.kv_num_blocks[0, 0].to("cpu", torch.int64)
    indices = workload.mask.kv_indices[0, 0].to("cpu", torch.int64)
    key_block = slot_of_token // BLOCK
    result = torch.zeros(len(tokens), len(slot_of_token), dtype=torch.bool)
    for row, token in enumerate(tokens.tolist()):
        tile = tile_of_block[slot_of_token[token] // BLOCK]
        allowed = torch.zeros(int(workload.layout.num_blocks), dtype=torch.bool)
        allowed[indices[tile, : counts[tile]]] = True
        result[row] = allowed[key_block]
    return result


def reference_rows(
    inputs: Inputs, head: int, tokens: torch.Tensor, allowed: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """FP64 [rows, D]: attention of the sampled queries of batch 0, one head, from the unquantized inputs."""
    q, k, v = (tensor.detach()[0, head].double() for tensor in (inputs.q, inputs.k, inputs.v))
    scores = q[tokens.to(q.device)] @ k.T * scale
    if allowed is not None:
        scores.masked_fill_(~allowed.to(scores.device), float("-inf"))
    return torch.softmax(scores, dim=-1) @ v


def compare(out: torch.Tensor, reference: torch.Tensor) -> dict[str, float]:
    """Relative L1 (sum |x - y| / sum |y|), cosine and root mean square error of all elements together."""
    x, y = out.double().flatten(), reference.double().flatten()
    return {
        "rel_l1": ((x - y).abs().sum() / y.abs().sum()).item(),
        "cosine": (torch.dot(x, y) / (x.norm() * y.norm())).item(),
        "rmse": (x - y).square().mean().sqrt().item(),
    }  # fmt: skip


class Judge:
    """Holds the FP64 rows of one workload and input set, for every implementation to be held against."""

    def __init__(self, workload: Workload, inputs: Inputs, rows: int = 48):
        self._tokens = sample_tokens(workload.shape.tokens, rows)
        self._heads = sorted({0, workload.shape.heads - 1})
        self._scale = workload.softmax_scale
        self._allowed = allowed = attended(workload, self._tokens)
        self._references: dict[bool, list[torch.Tensor]] = {}
        masks = {False: None, True: allowed}  # keyed by "sparse"
        for sparse, mask in masks.items():
            if sparse and mask is None:
                self._references[True] = self._references[False]
                continue
            self._references[sparse] = [
                reference_rows(inputs, head, self._tokens, mask, workload.softmax_scale) for head in self._heads
            ]

    def judge(self, out: torch.Tensor, *, sparse: bool) -> dict[str, Any]:
        """Figures of an output (B, H, S, D) against FP64 under the block mask (``sparse``) or without one.

        This is rounding error only: what a mask leaves out is in the reference too. A NaN makes ``finite`` False.
        """
        tokens = self._tokens.to(out.device)
        rows = torch.cat([out.detach()[0, head][tokens] for head in self._heads])
        reference = torch.cat(self._references[sparse]).to(out.device)
        finite = bool(torch.isfinite(rows).all())
        figures: dict[str, Any] = compare(rows, reference) if finite else {"rel_l1": None, "cosine": None, "rmse": None}
        return {
            **figures, "finite": finite, "rows": len(self._tokens), "heads": len(self._heads),
            "against": "FP64, same block mask" if sparse else "FP64, dense",
        }  # fmt: skip

    def judge_grad_q(
        self, grad_q: torch.Tensor, grad_out: torch.Tensor, inputs: Inputs, *, sparse: bool
    ) -> dict[str, Any]:
        """Figures of dQ: the one gradient of which a row needs no other query. dK and dV are held by the tests."""
        tokens = self._tokens.to(grad_q.device)
        mask = self._allowed if sparse else None
        rows, references = [], []
        for head in self._heads:
            q, k, v = (tensor.detach()[0, head].double() for tensor in (inputs.q, inputs.k, inputs.v))
            q = q[tokens].requires_grad_()
            scores = q @ k.T * self._scale
            if mask is not None:
                scores = scores.masked_fill(~mask.to(scores.device), float("-inf"))
            out = torch.softmax(scores, dim=-1) @ v
            references.append(torch.autograd.grad(out, q, grad_out[0, head][tokens].double())[0])
            rows.append(grad_q[0, head][tokens])
        figures = compare(torch.cat(rows), torch.cat(references))
        return {**figures, "rows": len(self._tokens), "heads": len(self._heads),
                "against": f"FP64 dQ, {'same block mask' if sparse else 'dense'}"}  # fmt: skip

    def sparsity(self) -> dict[str, float]:
        """What the mask itself costs: FP64 under the mask against FP64 without. On random data it says little."""
        return compare(torch.cat(self._references[True]), torch.cat(self._references[False]))


def within_limits(figures: dict[str, Any]) -> bool:
    return bool(figures["finite"]) and figures["rel_l1"] <= REL_L1_LIMIT and figures["cosine"] >= COSINE_LIMIT
