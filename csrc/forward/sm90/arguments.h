// Kernel arguments: what launch.cuh makes of ForwardParams.
#pragma once

#include <cuda.h>

#include "common/block_lists.h"
#include "fpsattn/params.h"

namespace fpsattn::sm90::forward {

struct Arguments {
  CUtensorMap q_map;  // [B H num_blocks 128][D] bytes, box 128 x D
  CUtensorMap k_map;  // likewise
  CUtensorMap v_map;  // [B H num_blocks (D + 8)][128] bytes, box (D + 8) x 128

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

}  // namespace fpsattn::sm90::forward
