// What forward_launch.cu makes of ForwardParams: kernel arguments, and the workspace cut into pieces.
#pragma once

#include <cuda.h>

#include "common/indexing.h"
#include "fpsattn/params.h"

namespace fpsattn::sm90::forward {

// A place in the order of work (schedule.cu).
struct alignas(16) QueryBlock {
  int32_t block;
  int32_t tile;    // its row of the lists
  int32_t length;  // of that list
  int32_t unused;
};

struct Arguments {
  CUtensorMap q_map;  // [B H num_blocks 128][C] bytes, box 128 x C
  CUtensorMap k_map;  // [B Hk num_kv_blocks 128][C] bytes, box 128 x C
  CUtensorMap v_map;  // [B Hk num_kv_blocks (C + 8)][128] bytes, box (C + 8) x 128

  int32_t cluster_size;  // 1 or 2 CTAs
  int32_t head_dim;      // D: columns of out and of v_scale. C = Config::kHeadDim is more for D = 96
  int32_t batch_heads, heads, num_tokens, num_blocks;  // batch_heads = B H
  int32_t group, num_kv_blocks;                        // (batch, head) i attends i / group of the B Hk of K and V
  float scale_log2;                                    // softmax_scale * log2(e)
  float softmax_scale;
  bool q_scale_per_token;
  DType out_dtype;
  const float *q_scale, *k_scale, *v_scale, *q_k_mean;
  SlotTable token_of_slot;
  const int32_t* tile_of_block;
  BlockLists kv;

  TokenTensor out;
  float *lse, *row_max, *row_sum;

  // Made by schedule.cu before the kernel starts
  int32_t *next_pair, *next_single;  // counters: pairs, and query blocks without a partner, that were handed out
  const int32_t* num_pairs;          // of a (batch, head); 0 without clusters
  const int32_t* head_order;         // [B H]: heaviest (batch, head) first
  const QueryBlock* block_order;     // [Bm, Hm, num_blocks]: num_pairs pairs, then the others; longest list first
};

// The caller's workspace (16-byte aligned), cut into pieces.
struct Workspace {
  QueryBlock* block_order;                       // [Bm, Hm, num_blocks]
  int64_t* load;                                 // [Bm, Hm]: KV blocks on all lists, once per query block
  int32_t *next_pair, *next_single, *num_pairs;  // [1]
  int32_t* head_order;                           // [B H]
  size_t bytes;

  static Workspace at(void* base, const ForwardParams& params) {
    const size_t lists = static_cast<size_t>(params.kv.batch) * params.kv.heads;
    const size_t batch_heads = static_cast<size_t>(params.size.batch) * params.size.heads;
    Workspace pieces;
    pieces.block_order = static_cast<QueryBlock*>(base);
    pieces.load = reinterpret_cast<int64_t*>(pieces.block_order + lists * params.size.num_blocks);
    pieces.next_pair = reinterpret_cast<int32_t*>(pieces.load + lists);
    pieces.next_single = pieces.next_pair + 1;
    pieces.num_pairs = pieces.next_pair + 2;
    pieces.head_order = pieces.next_pair + 3;
    pieces.bytes = lists * (sizeof(QueryBlock) * params.size.num_blocks + 8) + 4 * (3 + batch_heads);
    return pieces;
  }
};

}  // namespace fpsattn::sm90::forward
