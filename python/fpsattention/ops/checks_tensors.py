"""What the checks of all ops are made of (``checks.py``, ``checks_attention.py``): of tensors, tables and lists."""

from __future__ import annotations

import math
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..errors import ConfigError
from .reference import BLOCK

KERNEL_DTYPES = (torch.bfloat16, torch.float16)  # of the sm_90a kernels
CPU_DTYPES = (*KERNEL_DTYPES, torch.float32)


def _fail(op: str, argument: str, text: str) -> NoReturn:
    raise ConfigError(f"fpsattention.{op}: {argument} {text}")


def _holds(condition: bool | torch.SymBool) -> bool:
    """A condition on sizes; one that a trace cannot know (sizes that an op computes when the graph runs) counts as true."""
    if isinstance(condition, bool):
        return condition
    from torch.fx.experimental.symbolic_shapes import guard_or_true

    return guard_or_true(condition)


def _shape(op: str, name: str, x: Tensor, want: tuple[Any, ...]) -> None:
    """``want`` holds sizes, or names for free ones."""
    if x.dim() != len(want) or not all(
        isinstance(w, str) or _holds(s == w) for s, w in zip(x.shape, want, strict=True)
    ):
        text = ", ".join(str(w) for w in want)
        _fail(op, name, f"has shape {tuple(x.shape)}, expected ({text})")


def _dtype(op: str, name: str, x: Tensor, *want: torch.dtype) -> None:
    if x.dtype not in want:
        _fail(op, name, f"has dtype {x.dtype}, expected {' or '.join(str(w) for w in want)}")


def _same_device(op: str, device: torch.device, **tensors: Tensor | None) -> None:
    for name, x in tensors.items():
        if x is not None and x.device != device:
            _fail(op, name, f"is on {x.device}, expected {device} like the other tensors")


def _token_tensor(op: str, name: str, x: Tensor) -> None:
    if x.dim() != 4:
        _fail(op, name, f"has shape {tuple(x.shape)}, expected (B, H, S, D)")
    if x.stride(3) != 1:
        _fail(op, name, f"has stride {x.stride(3)} in D, expected 1: pass {name}.contiguous()")


def _int32(op: str, name: str, x: Tensor, want: tuple[Any, ...]) -> None:
    _dtype(op, name, x, torch.int32)
    _shape(op, name, x, want)


def _dtypes_of(device: torch.device) -> tuple[torch.dtype, ...]:
    return CPU_DTYPES if device.type in ("cpu", "meta") else KERNEL_DTYPES


def _divides(op: str, name: str, kv_heads: int, heads: int) -> None:
    if kv_heads < 1 or heads % kv_heads:
        _fail(op, name, f"has {kv_heads} heads, expected a divisor of the {heads} of q")


def _offsets(op: str, name: str, x: Tensor) -> None:
    _int32(op, name, x, ("num_tiles + 1",))
    if x.shape[0] < 2:
        _fail(op, name, f"has {x.shape[0]} entries, expected num_tiles + 1")


def check_slots(op: str, token_of_slot: Tensor, batch: int, heads: int, name: str = "token_of_slot") -> None:
    """One table, or one per head."""
    per_head = token_of_slot.dim() == 3
    _int32(op, name, token_of_slot, (batch, heads, "num_blocks * 128") if per_head else ("num_blocks * 128",))
    if token_of_slot.shape[-1] == 0 or token_of_slot.shape[-1] % BLOCK:
        _fail(op, name, f"has {token_of_slot.shape[-1]} entries, expected a positive multiple of {BLOCK}")


def check_lists(op: str, kind: str, num_blocks: Tensor, indices: Tensor, batch: int, heads: int, rows: Any) -> None:
    """``kind`` is "kv" or "q": prefix of the argument names."""
    _int32(op, f"{kind}_num_blocks", num_blocks, ("1 or B", "1 or H", rows))
    _int32(
        op, f"{kind}_indices", indices, (num_blocks.shape[0], num_blocks.shape[1], num_blocks.shape[2], f"max_{kind}")
    )
    if num_blocks.shape[0] not in (1, batch) or num_blocks.shape[1] not in (1, heads):
        _fail(
            op, f"{kind}_num_blocks",
            f"has shape {tuple(num_blocks.shape)}, expected ({batch} or 1, {heads} or 1, {rows}) for {batch} samples and {heads} heads",
        )  # fmt: skip


def check_softmax_scale(op: str, softmax_scale: float) -> None:
    """A scale <= 0 would turn the block maxima, taken before scaling, into minima."""
    if not (math.isfinite(softmax_scale) and softmax_scale > 0):
        _fail(op, "softmax_scale", f"is {softmax_scale}, expected a finite number > 0")


def check_slot_values(op: str, token_of_slot: Tensor, num_tokens: int, name: str = "token_of_slot") -> None:
    """Every token in exactly one slot, and slot 0 of every block valid; of every table."""
    if token_of_slot.dim() == 3:
        for table in token_of_slot.flatten(0, 1):
            check_slot_values(op, table, num_tokens, name)
        return
    low, high = (int(x) for x in torch.aminmax(token_of_slot))
    if low < -1 or high >= num_tokens:
        _fail(op, name, f"holds values from {low} to {high}, expected -1 to {num_tokens - 1}")
    if bool((token_of_slot.view(-1, BLOCK)[:, 0] < 0).any()):
        _fail(
            op,
            name,
            f"has a block whose slot 0 is padding: valid slots come first in each of its {BLOCK}-slot blocks",
        )
    counts = torch.bincount(token_of_slot[token_of_slot >= 0], minlength=num_tokens)
    if int(counts.min()) != 1 or int(counts.max()) != 1:
        token = int(torch.nonzero(counts != 1)[0])
        _fail(
            op,
            name,
            f"holds token {token} {int(counts[token])} times, expected every token of {num_tokens} once",
        )


def check_offset_values(op: str, tile_block_offsets: Tensor, num_blocks: int, name: str = "tile_block_offsets") -> None:
    sizes = tile_block_offsets.diff()
    if int(tile_block_offsets[0]) != 0 or int(tile_block_offsets[-1]) != num_blocks or int(sizes.min()) < 1:
        _fail(
            op,
            name,
            f"must rise from 0 to num_blocks = {num_blocks}, came {tile_block_offsets.tolist()[:8]}...",
        )


def check_tile_of_block(op: str, tile_of_block: Tensor, num_tiles: int) -> None:
    low, high = (int(x) for x in torch.aminmax(tile_of_block))
    if low < 0 or high >= num_tiles:
        _fail(
            op,
            "tile_of_block",
            f"holds tiles {low} to {high}, expected 0 to {num_tiles - 1} (the rows of kv_num_blocks)",
        )


def check_list_values(op: str, kind: str, num_blocks: Tensor, indices: Tensor, limit: int) -> None:
    low, high = (int(x) for x in torch.aminmax(num_blocks))
    if low < 0 or high > indices.shape[-1]:
        _fail(
            op,
            f"{kind}_num_blocks",
            f"holds lengths {low} to {high}, expected 0 to {indices.shape[-1]} (the last size of {kind}_indices)",
        )
    if high == 0:
        return
    used = torch.arange(indices.shape[-1], device=indices.device) < num_blocks.unsqueeze(-1)
    bad = used & ((indices < 0) | (indices >= limit))
    if bool(bad.any()):
        value = int(indices[bad][0])
        _fail(op, f"{kind}_indices", f"holds block {value}, expected 0 to {limit - 1}")
    unused = -1 - torch.arange(indices.shape[-1], dtype=torch.int32, device=indices.device)
    keys = torch.where(used, indices, unused).sort(dim=-1).values
    if bool((keys.diff(dim=-1) == 0).any()):
        _fail(op, f"{kind}_indices", "lists a block twice in one row: every block at most once")
