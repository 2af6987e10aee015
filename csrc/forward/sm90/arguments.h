// What forward_launch.cu makes of ForwardParams: kernel arguments, and the workspace cut into pieces.
#pragma once

#include <cuda.h>

#include "common/indexing.h"
#include "fpsattn/params.h"

namespace fpsattn::sm90::forward {

struct Arguments {
  CUtensorMap q_map;  // [B H num_blocks 128][C] bytes, box 128 x C
  CUtensorMap k_map;  // likewise
  CUtensorMap v_map;  // [B H num_blocks (C + 8)][128] bytes, box (C + 8) x 128

  int32_t head_dim;  // D: columns of out and of v_scale. C = Config::kHeadDim is more for D = 96
  int32_t heads, num_tokens, num_blocks, num_items;  // num_items = B H num_blocks
  float scale_log2;                                  // softmax_scale * log2(e)
  float softmax_scale;
  bool q_scale_per_token;
  bool fp16_out;
  const float *q_scale, *k_scale, *v_scale, *q_k_mean;
  const int32_t *token_of_slot, *tile_of_block;
  BlockLists kv;

  TokenTensor out;
  float *lse, *row_max, *row_sum;

  // Made by schedule.cu before the kernel starts
  int32_t* next_item;          // counter behind the first gridDim.x items
  const int32_t* head_order;   // [B H]: heaviest (batch, head) first
  const int32_t* block_order;  // [Bm, Hm, num_blocks]: query blocks, longest list first
};

// The caller's workspace, cut into pieces.
struct Workspace {
  int64_t* load;         // [Bm, Hm]: KV blocks on all lists, once per query block
  int32_t* next_item;    // [1]
  int32_t* head_order;   // [B H]
  int32_t* block_order;  // [Bm, Hm, num_blocks]
  size_t bytes;

  static Workspace at(void* base, const ForwardParams& params) {
    const size_t lists = static_cast<size_t>(params.kv.batch) * params.kv.heads;
    const size_t batch_heads = static_cast<size_t>(params.size.batch) * params.size.heads;
    Workspace pieces;
    pieces.load = static_cast<int64_t*>(base);
    pieces.next_item = reinterpret_cast<int32_t*>(pieces.load + lists);
    pieces.head_order = pieces.next_item + 1;
    pieces.block_order = pieces.head_order + batch_heads;
    pieces.bytes = 8 * lists + 4 * (1 + batch_heads + lists * params.size.num_blocks);
    return pieces;
  }
};

}  // namespace fpsattn::sm90::forward
