// The producer warp: takes work items, walks their block lists, loads Q, K and V^T with TMA.
//
// Ring order is K0 K1 V0 K2 V1 ... as the consumers start QK of block j + 1 before PV of block j.
#pragma once

#include "common/device_check.h"
#include "common/sm90/tma.h"
#include "forward/sm90/arguments.h"
#include "forward/sm90/storage.h"

namespace fpsattn::sm90::forward {

template <class C>
struct Producer {
  const Arguments& args;
  Storage<C>& shared;
  const uint32_t lane = threadIdx.x % 32;
  RingPosition<C::kItems> item_slot;
  RingPosition<C::kStages> k_slot, v_slot;

  // Longest lists first, so that the last items to finish are short ones. The first gridDim.x items are dealt out, the
  // others go to whoever is free.
  __device__ int32_t next(int32_t current) const {
    int32_t item = 0;
    if (lane == 0) item = current < 0 ? blockIdx.x : gridDim.x + atomicAdd(args.next_item, 1);
    return __shfl_sync(~0u, item, 0);
  }

  __device__ void run() {
    for (int32_t item = next(-1); item < args.num_items; item = next(item)) load_item(item);
    if (lane == 0) {
      shared.item_empty[item_slot.stage].wait(item_slot.parity ^ 1);
      shared.item[item_slot.stage].count = -1;
      shared.item_full[item_slot.stage].arrive();
    }
  }

  __device__ void load_item(int32_t item) {
    const int32_t batch_head = args.head_order[item / args.num_blocks];
    const int64_t lists = list_head(args.kv, batch_head / args.heads, batch_head % args.heads);
    const int32_t q_block = args.block_order[lists * args.num_blocks + item % args.num_blocks];
    const int32_t tile = args.tile_of_block[q_block];
    trap_if(tile < 0 || tile >= args.kv.rows);
    const int64_t row = lists * args.kv.rows + tile;
    const int32_t count = args.kv.num_blocks[row];
    trap_if(count < 0 || count > args.kv.max_blocks);
    const int32_t first_block = batch_head * args.num_blocks;

    if (lane == 0) load_q(first_block, WorkItem{batch_head, q_block, count});
    item_slot.advance();

    int32_t previous = 0;
    for (int32_t start = 0; start < count; start += 32) {
      // Lane i fetches entry start + i, and its scale, for the whole warp.
      int32_t my_block = 0;
      float my_scale = 0.0f;
      if (start + static_cast<int32_t>(lane) < count) {
        my_block = args.kv.indices[row * args.kv.max_blocks + start + lane];
        trap_if(my_block < 0 || my_block >= args.num_blocks);
        if constexpr (!C::kKScalePerToken) my_scale = args.k_scale[static_cast<int64_t>(first_block) + my_block];
      }
      for (int32_t i = 0; i < 32 && start + i < count; ++i) {
        const int32_t block = first_block + __shfl_sync(~0u, my_block, i);
        const float scale = __shfl_sync(~0u, my_scale, i);
        if (lane == 0) {
          load_k(block, scale);
          if (start + i > 0) load_v(previous);
        }
        previous = block;
      }
    }
    if (count > 0 && lane == 0) load_v(previous);
    __syncwarp();
  }

 private:  // one thread each
  __device__ void load_q(int32_t first_block, const WorkItem& item) {
    const uint32_t s = item_slot.stage;
    shared.item_empty[s].wait(item_slot.parity ^ 1);
    shared.item[s] = item;
    if (item.count == 0) {
      shared.item_full[s].arrive();
      return;
    }
    const uint32_t v_scale_bytes = args.head_dim * sizeof(float);
    shared.item_full[s].arrive_and_expect_tx(C::QTile::kBytes + v_scale_bytes);
    load_tile<typename C::QTile>(shared.q[s], args.q_map, shared.item_full[s], (first_block + item.q_block) * C::kRows,
                                 CacheHint::EVICT_FIRST);
    bulk_load(shared.v_scale[s], args.v_scale + static_cast<int64_t>(item.batch_head) * args.head_dim, v_scale_bytes,
              shared.item_full[s]);
  }

  __device__ void load_k(int32_t block, float scale) {
    const uint32_t s = k_slot.stage;
    shared.k_empty[s].wait(k_slot.parity ^ 1);
    if constexpr (C::kKScalePerToken) {
      shared.k_full[s].arrive_and_expect_tx(C::KTile::kBytes + sizeof(shared.k_scale[s]));
      bulk_load(shared.k_scale[s], args.k_scale + static_cast<int64_t>(block) * kBlockSlots, sizeof(shared.k_scale[s]),
                shared.k_full[s]);
    } else {
      shared.k_scale[s][0] = scale;
      shared.k_full[s].arrive_and_expect_tx(C::KTile::kBytes);
    }
    load_tile<typename C::KTile>(shared.k[s], args.k_map, shared.k_full[s], block * C::KTile::kRows,
                                 CacheHint::EVICT_LAST);
    k_slot.advance();
  }

  __device__ void load_v(int32_t block) {
    const uint32_t s = v_slot.stage;
    shared.v_empty[s].wait(v_slot.parity ^ 1);
    shared.v_full[s].arrive_and_expect_tx(C::VTile::kBytes);
    load_tile<typename C::VTile>(shared.v[s], args.v_map, shared.v_full[s], block * C::VTile::kRows,
                                 CacheHint::EVICT_LAST);
    v_slot.advance();
  }
};

}  // namespace fpsattn::sm90::forward
