// Block lists made on the device: from scores of (query tile, KV block) pairs, and their transpose for the backward. Fixed shapes, no
// synchronization: both can be captured in a CUDA graph. Words: docs/layout.md; rules: docs/patterns.md.
#pragma once

#include <cuda_runtime_api.h>

#include "fpsattn/params.h"

namespace fpsattn {

inline constexpr int kMaxSelectBlocks = 4096;  // num_blocks of a row that a warp holds in registers: 524,288 slots

// A row keeps its largest video blocks: `count` of them, or (count < 0) the smallest set that holds `mass` of a row of weights in [0, 1], within
// min_count and max_count. Larger values come first, of equal ones the lower block; NaN is the largest. Weights are summed as
// integers, floor(w * 2^40), so the order of summation does not matter. Own blocks and text (rows and columns) are kept in any case.
struct SelectParams {
  int lists = 0;  // B * H
  int num_tiles = 0;
  int num_video_tiles = 0;  // the first ones
  int num_blocks = 0;
  int count = -1;
  int64_t mass = 0;  // times 2^40
  int min_count = 0;
  int max_count = 0;
  bool own_first = false;  // own blocks are counted, before all others
  int width = 0;           // of the lists; entries beyond it, the highest blocks, are left out

  const float* values = nullptr;                // [lists, num_tiles, num_blocks]
  const int32_t* tile_block_offsets = nullptr;  // [num_tiles + 1]
  const int32_t* block_tokens = nullptr;        // [num_blocks]

  int32_t* kv_num_blocks = nullptr;  // [lists, num_tiles]
  int32_t* kv_indices =
      nullptr;  // [lists, num_tiles, width]: own blocks, then the others, each ascending; rest not written
  int32_t* attended =
      nullptr;  // [lists, num_tiles, 2]: tokens of what the rule keeps, text included, and with own blocks
};

void select_blocks(const SelectParams& params, cudaStream_t stream);

// Per KV block the query blocks that visit it, ascending.
struct TransposeParams {
  int num_blocks = 0;
  int width = 0;                                // of the transposed lists
  BlockLists kv;                                // rows = num_tiles
  const int32_t* tile_block_offsets = nullptr;  // [num_tiles + 1]

  int32_t* q_num_blocks = nullptr;  // [kv.batch, kv.heads, num_blocks]
  int32_t* q_indices =
      nullptr;  // [kv.batch, kv.heads, num_blocks, width]; entries beyond a list's length are not written

  void* workspace = nullptr;  // transpose_workspace_bytes(params), 16-byte aligned
  size_t workspace_bytes = 0;
};

size_t transpose_workspace_bytes(const TransposeParams& params);
void transpose_blocks(const TransposeParams& params, cudaStream_t stream);

}  // namespace fpsattn
