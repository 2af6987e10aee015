"""What making a mask costs: FLOPs and bytes of every tensor operation, counted on shapes alone (nothing is computed)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from ..layout.masks import BlockMask
from ..layout.tiles import TileLayout
from .pattern import BoundPattern


class Cost(NamedTuple):
    """Of one mask of one layer.

    Attributes:
        flops: of matrix products, a multiplication and an addition counting two.
        bytes: read and written by all operations, none of them fused; views are free.
        pooling_bytes: the part of ``bytes`` that operations on whole tensors of tokens take (what a quantizer that also pools would save).
        list_bytes: of the finished lists.
        launches: operations that are no views: kernels, at least.
    """

    flops: int
    bytes: int
    pooling_bytes: int
    list_bytes: int
    launches: int


class _Counter(TorchDispatchMode):
    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.bytes = self.token_bytes = self.launches = 0
        self.tokens = tokens

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        made = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        if made and not func.is_view and func.namespace in ("aten", "fpsattn") and "detach" not in func.name():
            moved = sum(x.numel() * x.element_size() for x in (*given, *made))
            self.bytes += moved
            self.launches += 1
            if any(x.numel() >= self.tokens for x in given):
                self.token_bytes += moved
        return out


def cost(
    pattern: BoundPattern,
    layout: TileLayout,
    *,
    batch: int = 1,
    heads: int,
    dim: int,
    dtype: torch.dtype = torch.bfloat16,
) -> Cost:
    """Cost of ``pattern`` on q, k (and v, lse where it reads them) ``(batch, heads, S, dim)``. A static pattern costs nothing per step.

    Runs the pattern on the meta device, so any size is free to ask for, and nothing in it can depend on values.
    """
    if pattern.static:
        mask = pattern(None, None, layout)
        return Cost(0, 0, 0, _list_bytes(mask), 0)
    on_meta = layout.to("meta")
    shape = (batch, heads, layout.num_tokens, dim)
    inputs: dict[str, Any] = {name: torch.empty(shape, dtype=dtype, device="meta") for name in ("q", "k", "v")}
    inputs["lse"] = torch.empty(shape[:3], device="meta")
    pattern(**inputs, layout=on_meta)  # tables and samples are made once per layout
    with _Counter(batch * heads * layout.num_tokens * dim) as counter, FlopCounterMode(display=False) as flops:
        mask = pattern(**inputs, layout=on_meta)
    return Cost(flops.get_total_flops(), counter.bytes, counter.token_bytes, _list_bytes(mask), counter.launches)


def _list_bytes(mask: BlockMask) -> int:
    return sum(x.numel() * x.element_size() for x in (mask.kv_num_blocks, mask.kv_indices))
