// The producer warp: takes work items, walks their block lists, loads Q, K and V^T with TMA.
//
// Ring order is K0 K1 V0 K2 V1 ... as the consumers start QK of block j + 1 before PV of block j. Of a pair, CTA 0 loads
// the K blocks and CTA 1 the V blocks for both.
#pragma once

#include "common/device_check.h"
#include "common/sm90/tma.h"
#include "forward/sm90/arguments.h"
#include "forward/sm90/storage.h"

namespace fpsattn::sm90::forward {

template <class C>
struct Producer {
  static constexpr uint32_t kKeyRank = 0, kValueRank = 1;
  static constexpr uint16_t kBoth = 0b11;  // CTAs of a cluster

  const Arguments& args;
  Storage<C>& shared;
  const uint32_t lane = threadIdx.x % 32;
  const uint32_t rank = cute::block_rank_in_cluster();
  RingPosition<C::kItems> item_slot;
  RingPosition<C::kStages> k_slot, v_slot;
  RingPosition<1> mail_slot;

  // Items go to whoever is free: first the pairs, to clusters, then the query blocks without a partner, to CTAs. In both
  // the longest lists of a head come first, so that the last items to finish are short ones.
  __device__ void run() {
    const int32_t pairs = *args.num_pairs;
    if (pairs > 0) {
      const int32_t end = args.batch_heads * pairs;
      for (int32_t i = next_pair(end); i >= 0; i = next_pair(end)) load_item(i / pairs, 2 * (i % pairs) + rank, true);
    }
    const int32_t singles = args.num_blocks - 2 * pairs;
    const int32_t end = args.batch_heads * singles;
    for (int32_t i = next_single(); i < end; i = next_single()) load_item(i / singles, 2 * pairs + i % singles, false);
    if (lane == 0) {
      shared.item_empty[item_slot.stage].wait(item_slot.parity ^ 1);
      shared.item[item_slot.stage].count = -1;
      shared.item_full[item_slot.stage].arrive();
    }
    __syncwarp();
  }

 private:
  __device__ int32_t next_single() const {
    int32_t item = 0;
    if (lane == 0) item = atomicAdd(args.next_single, 1);
    return __shfl_sync(~0u, item, 0);
  }

  // CTA 0 draws for both. -1: none is left.
  __device__ int32_t next_pair(int32_t end) {
    int32_t pair = 0;
    if (lane == 0 && rank == 0) {
      pair = atomicAdd(args.next_pair, 1);
      if (pair >= end) pair = -1;
      shared.mail_empty.wait(mail_slot.parity ^ 1);
      shared.mail_full.arrive_and_expect_tx_at(1, sizeof(shared.mail));
      store_async_at(1, shared.mail, pair, shared.mail_full);
    } else if (lane == 0) {
      shared.mail_full.wait(mail_slot.parity);
      pair = shared.mail;
      shared.mail_empty.arrive_at(0);
    }
    mail_slot.advance();
    return __shfl_sync(~0u, pair, 0);
  }

  // The query block at `position` of the `head`-th (batch, head) in the order of work.
  __device__ void load_item(int32_t head, int32_t position, bool pair) {
    const int32_t batch_head = args.head_order[head];
    const int64_t lists = list_head(args.kv, batch_head / args.heads, batch_head % args.heads);
    const QueryBlock query = args.block_order[lists * args.num_blocks + position];
    const int32_t* const list = args.kv.indices + (lists * args.kv.rows + query.tile) * args.kv.max_blocks;
    const int32_t count = query.length;
    const int32_t kv_head = batch_head / args.group, first_block = kv_head * args.num_kv_blocks;

    if (lane == 0) load_q(kv_head, WorkItem{batch_head, query.block, count, pair});
    item_slot.advance();

    int32_t previous = 0;
    for (int32_t start = 0; start < count; start += 32) {
      // Lane i fetches entry start + i, and its scale, for the whole warp.
      int32_t my_block = 0;
      float my_scale = 0.0f;
      if (start + static_cast<int32_t>(lane) < count) {
        my_block = list[start + lane];
        trap_if(my_block < 0 || my_block >= args.num_kv_blocks);
        if constexpr (!C::kKScalePerToken) my_scale = args.k_scale[static_cast<int64_t>(first_block) + my_block];
      }
      for (int32_t i = 0; i < 32 && start + i < count; ++i) {
        const int32_t block = first_block + __shfl_sync(~0u, my_block, i);
        const float scale = __shfl_sync(~0u, my_scale, i);
        if (lane == 0) {
          load_k(block, scale, pair);
          if (start + i > 0) load_v(previous, pair);
        }
        previous = block;
      }
    }
    if (count > 0 && lane == 0) load_v(previous, pair);
    __syncwarp();
  }

  // From here on: one thread each.
  __device__ void load_q(int32_t kv_head, const WorkItem& item) {
    const uint32_t s = item_slot.stage;
    shared.item_empty[s].wait(item_slot.parity ^ 1);
    shared.item[s] = item;
    const uint32_t v_scale_bytes = args.head_dim * sizeof(float);
    const uint32_t operands = item.count > 0 ? C::QTile::kBytes + v_scale_bytes : 0;
    shared.item_full[s].arrive_and_expect_tx(sizeof(shared.tokens[s]) + operands);
    bulk_load(shared.tokens[s], slots_of(args.token_of_slot, item.batch_head) + item.q_block * kBlockSlots,
              sizeof(shared.tokens[s]), shared.item_full[s]);
    if (item.count == 0) return;
    load_tile<typename C::QTile>(shared.q[s], args.q_map, shared.item_full[s],
                                 (item.batch_head * args.num_blocks + item.q_block) * C::kRows, CacheHint::EVICT_FIRST);
    bulk_load(shared.v_scale[s], args.v_scale + static_cast<int64_t>(kv_head) * args.head_dim, v_scale_bytes,
              shared.item_full[s]);
  }

  __device__ void load_k(int32_t block, float scale, bool pair) {
    const uint32_t s = k_slot.stage;
    Mbarrier& full = shared.k_full[s];
    const uint32_t bytes = C::KTile::kBytes + (C::kKScalePerToken ? sizeof(shared.k_scale[s])
                                               : pair             ? sizeof(float)
                                                                  : 0);
    const float* const scales = args.k_scale + static_cast<int64_t>(block) * kBlockSlots;  // one per token
    if (!pair) {
      shared.k_empty[s].wait(k_slot.parity ^ 1);
      if constexpr (!C::kKScalePerToken) shared.k_scale[s][0] = scale;
      full.arrive_and_expect_tx(bytes);
      if constexpr (C::kKScalePerToken) bulk_load(shared.k_scale[s], scales, sizeof(shared.k_scale[s]), full);
      load_tile<typename C::KTile>(shared.k[s], args.k_map, full, block * C::KTile::kRows, CacheHint::EVICT_LAST);
    } else if (rank == kKeyRank) {
      shared.k_empty[s].wait(k_slot.parity ^ 1);
      for (uint32_t cta = 0; cta < 2; ++cta) {
        full.arrive_and_expect_tx_at(cta, bytes);
        if constexpr (!C::kKScalePerToken) store_async_at(cta, shared.k_scale[s][0], scale, full);
      }
      if constexpr (C::kKScalePerToken)
        bulk_load_multicast(shared.k_scale[s], scales, sizeof(shared.k_scale[s]), full, kBoth);
      load_tile_multicast<typename C::KTile>(shared.k[s], args.k_map, full, kBoth, block * C::KTile::kRows,
                                             CacheHint::EVICT_LAST);
    }
    k_slot.advance();
  }

  __device__ void load_v(int32_t block, bool pair) {
    const uint32_t s = v_slot.stage;
    Mbarrier& full = shared.v_full[s];
    if (!pair) {
      shared.v_empty[s].wait(v_slot.parity ^ 1);
      full.arrive_and_expect_tx(C::VTile::kBytes);
      load_tile<typename C::VTile>(shared.v[s], args.v_map, full, block * C::VTile::kRows, CacheHint::EVICT_LAST);
    } else if (rank == kValueRank) {
      shared.v_empty[s].wait(v_slot.parity ^ 1);
      for (uint32_t cta = 0; cta < 2; ++cta) full.arrive_and_expect_tx_at(cta, C::VTile::kBytes);
      load_tile_multicast<typename C::VTile>(shared.v[s], args.v_map, full, kBoth, block * C::VTile::kRows,
                                             CacheHint::EVICT_LAST);
    }
    v_slot.advance();
  }
};

}  // namespace fpsattn::sm90::forward
