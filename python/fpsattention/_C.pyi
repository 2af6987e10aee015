"""Compiled planner and list builders (csrc/bindings.cpp). ``tiles`` and ``masks`` are the public face."""

from typing import TypedDict

import numpy as np
import numpy.typing as npt

_Int32 = npt.NDArray[np.int32]
_Int3 = tuple[int, int, int]

class _Plan(TypedDict):
    grid: _Int3
    tile: _Int3
    tile_grid: _Int3
    tile_sizes: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
    text_len: int
    text_position: str
    num_tokens: int
    num_tiles: int
    num_blocks: int
    num_slots: int
    token_of_slot: _Int32
    slot_of_token: _Int32
    tile_of_block: _Int32
    tile_block_offsets: _Int32
    tile_tokens: _Int32

class _BuildInfo(TypedDict):
    version: str
    cuda: bool
    cuda_reason: str
    cuda_version: str
    ptx_only: bool
    torch_version: str
    compiler: str

def plan(grid: _Int3, tile: _Int3 | None, text_len: int, text_position: str) -> _Plan: ...
def choose_tile(grid: _Int3) -> _Int3: ...
def sliding_tile_lists(tile_grid: _Int3, tile_block_offsets: _Int32, window: _Int3) -> tuple[_Int32, _Int32]: ...
def lists_from_matrix(tile_block_offsets: _Int32, mask: npt.NDArray[np.bool_]) -> tuple[_Int32, _Int32]: ...
def transpose_lists(kv_num_blocks: _Int32, kv_indices: _Int32, tile_block_offsets: _Int32) -> tuple[_Int32, _Int32]: ...
def validate_lists(kv_num_blocks: _Int32, kv_indices: _Int32, num_blocks: int) -> None: ...
def build_info() -> _BuildInfo: ...
