"""``torch.vmap`` of the ops: the mapped axis is folded into the batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import UnsupportedError

TABLES = (
    "token_of_slot", "tile_of_block", "tile_block_offsets", "kv_token_of_slot", "kv_tile_block_offsets", "sizes",
)  # fmt: skip
LISTS = ("kv_num_blocks", "kv_indices", "q_num_blocks", "q_indices")


def rule(op: str, run: Callable[..., Any] | None = None) -> Callable[..., Any]:
    """The batching rule of an op, in the form that ``torch.library.register_vmap`` takes; ``run`` is called instead of the op."""
    overload = getattr(torch.ops.fpsattn, op).default
    run = overload if run is None else run
    names = [argument.name for argument in overload._schema.arguments if not argument.kwarg_only]

    def fold(info: Any, in_dims: tuple[int | None, ...], *args: Any, **options: Any) -> Any:
        if op == "prepare":
            raise UnsupportedError(
                f"fpsattention.{op}: vmap was asked for, which it has none of: fold the axis into the batch"
            )
        given = {name: (x, dim) for name, x, dim in zip(names, args, in_dims, strict=False)}
        size = info.batch_size
        batch = next(
            x.shape[0 if dim != 0 else 1]
            for name, (x, dim) in given.items()
            if name not in TABLES + LISTS and x is not None
        )
        lists_mapped = any(dim is not None for name, (_, dim) in given.items() if name in LISTS)
        folded = []
        for name, (x, dim) in given.items():
            if name in TABLES:
                if dim is not None or (x is not None and x.dim() > 1):
                    raise UnsupportedError(
                        f"fpsattention.{op}: vmap over {name} was asked for, supported is vmap over tensors of one tile layout"
                    )
            elif name in LISTS:
                if x is not None and (lists_mapped or x.shape[0] > 1):
                    x = _stack(x, dim, size)
                    x = x.expand(-1, batch, *x.shape[2:]).flatten(0, 1)
            elif x is not None:
                x = _stack(x, dim, size).flatten(0, 1)
                x = x if x.stride(-1) == 1 or x.dim() != 4 else x.contiguous()
            folded.append(x)
        outputs = run(*folded, **options)
        if isinstance(outputs, Tensor):
            return outputs.unflatten(0, (size, batch)), 0
        return tuple(x.unflatten(0, (size, batch)) for x in outputs), (0,) * len(outputs)

    return fold


def _stack(x: Tensor, dim: int | None, size: int) -> Tensor:
    return x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
