// Transposition: lists become rows of bits, and bits are read by columns.
//
// A warp of transpose_kernel owns 32 KV blocks: it reads the same word of 32 query tiles at a time, turns it over with 32 ballots, and lane c appends
// the query blocks of the tiles that visit its block, in their order: the same lists every time, without atomics on them.
#pragma once

#include "common/device_check.h"
#include "patterns/sm90/select_kernel.h"

namespace fpsattn::sm90::patterns {

inline constexpr int kMaxWords = kMaxSelectBlocks / 32;

// bits [lists, num_tiles, words]: a warp per row.
__global__ void __launch_bounds__(kWarps * 32) bits_kernel(const TransposeParams params, uint32_t* bits, int words) {
  __shared__ uint32_t rows[kWarps][kMaxWords];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + warp;
  if (row >= static_cast<int64_t>(params.kv.batch) * params.kv.heads * params.kv.rows) return;
  for (int word = lane; word < words; word += 32) rows[warp][word] = 0;
  __syncwarp();
  const int32_t* const list = params.kv.indices + row * params.kv.max_blocks;
  const int length = min(params.kv.num_blocks[row], params.kv.max_blocks);
  for (int entry = lane; entry < length; entry += 32) {
    const int block = list[entry];
    trap_if(block < 0 || block >= params.num_blocks);
    atomicOr(&rows[warp][block / 32], 1u << (block % 32));
  }
  __syncwarp();
  for (int word = lane; word < words; word += 32) bits[row * words + word] = rows[warp][word];
}

__global__ void __launch_bounds__(kWarps * 32)
    transpose_kernel(const TransposeParams params, const uint32_t* bits, int words) {
  const int lane = threadIdx.x % 32;
  const int64_t item = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (item >= static_cast<int64_t>(params.kv.batch) * params.kv.heads * words) return;
  const int64_t list = item / words;
  const int word = static_cast<int>(item % words), tiles = params.kv.rows;
  const int block = word * 32 + lane;
  int32_t* const out = params.q_indices + (list * params.num_blocks + block) * params.width;
  int length = 0;
  for (int base = 0; base < tiles; base += 32) {
    const uint32_t row = base + lane < tiles ? bits[(list * tiles + base + lane) * words + word] : 0;
    uint32_t column = 0;
#pragma unroll
    for (int c = 0; c < 32; ++c) {
      const uint32_t visits = __ballot_sync(kAllLanes, (row >> c) & 1);
      if (lane == c) column = visits;
    }
    while (column != 0) {
      const int tile = base + __ffs(column) - 1;
      column &= column - 1;
      const int end = params.tile_block_offsets[tile + 1];
      for (int query_block = params.tile_block_offsets[tile]; query_block < end; ++query_block, ++length) {
        if (length < params.width) out[length] = query_block;
      }
    }
  }
  if (block < params.num_blocks) params.q_num_blocks[list * params.num_blocks + block] = min(length, params.width);
}

}  // namespace fpsattn::sm90::patterns
