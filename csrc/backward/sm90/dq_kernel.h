// Straight-through backward, query-major: dQ of one block of 128 queries (deterministic mode). sm_90a.
//
//   S = Q8 K8^T (e4m3, the forward's product)   p = e4m3(2^(S s_q s_k scale log2e - m + 8)) / l
//   dP = dO V~^T    dS = p (dP - delta)         dQ += (dS s_k) K8, times scale at the end
//
// It recomputes S and dP, 7 products in place of 5 over both kernels, and needs no sum across CTAs: the same bits.
//
// Shapes     q8, k8 e4m3 [B, H, num_blocks, 128, D]; workspace (config.h): K8, V~, dO as BF16 [slots, D], facts, s_k
// Tiles      128 queries x 128 keys x D; consumer warpgroup w owns queries 64w..64w+63; dS: A operand in registers
// Layouts    as in dkdv_kernel.h; K16 is read MN-major
//
// Pipeline   producer  Q8 dO | K8 V~ K16 s_k of key block 0, 1, 2, ... of the tile's list, 2 stages
//            WG1, WG2  S dP | exp2, e4m3 | dS | dQ |               they drift apart and fill each other's gaps
//
// Barriers   name            kind       arrives              waits       phase flips
//            queries_loaded  mbarrier   producer + bytes     consumers   never (one work item per CTA)
//            full[s]         mbarrier   producer + bytes     consumers   per lap of the ring
//            empty[s]        mbarrier   lane 0 of 8 warps    producer    per lap of the ring
//
// Budget     registers  dQ 64 + S 64 + dP 64 (packed dS 32 takes their place as they die) = 192 at D = 128 (peak 213);
//                       232 allowed, 40 for the producer. No spill.
//            shared     D = 128: Q8 16K + dO 32K + 2 x (K8 16K + V~ 32K + K16 32K + s_k 0.5K) = 209K
//            clocks of an SM per 128 x 128 tile at D = 128 (sassbudget): tensor 2560, shared memory 2176, issue 1578,
//                       EX2 1024. Limit: tensor.
//
// Invariants list entries are < num_blocks, tiles are rows of the lists (trapped on otherwise); K16 is 0 in padding
//            keys: their dS does not matter;
//            an empty list stores dQ = 0.
#pragma once

#include "backward/sm90/config.h"
#include "backward/sm90/elementwise.h"
#include "backward/sm90/products.h"
#include "common/device_check.h"
#include "common/indexing.h"
#include "common/sm90/fragments.h"
#include "common/sm90/tma.h"

namespace fpsattn::sm90::backward {

struct DqArgs {
  CUtensorMap q8, k8, d_out, k, v;  // of Fp8Block, Block
  const float* row_facts;
  const float* k_scale;
  const int32_t* token_of_slot;
  const int32_t* tile_of_block;
  BlockLists keys;  // rows = query tiles, entries = KV blocks
  int head_dim;     // columns of dq: fewer than D for 96
  int heads, num_blocks;
  float softmax_scale, scale_log2;
  TokenTensor dq;
  bool fp16;
};

inline constexpr int kDqStages = 2;

template <int D>
struct DqStorage {
  alignas(kSharedAlignment) E4m3 q8[Fp8Block<D>::kElements];
  alignas(kSharedAlignment) Bf16 d_out[Block<D>::kElements];
  alignas(kSharedAlignment) E4m3 k8[kDqStages][Fp8Block<D>::kElements];
  alignas(kSharedAlignment) Bf16 v[kDqStages][Block<D>::kElements];
  alignas(kSharedAlignment) Bf16 k[kDqStages][Block<D>::kElements];
  alignas(128) float k_scale[kDqStages][kBlockSlots];
  Mbarrier queries_loaded;
  Mbarrier full[kDqStages];
  Mbarrier empty[kDqStages];
};

// The producer: one thread.
template <int D>
__device__ __forceinline__ void produce_keys(const DqArgs& args, DqStorage<D>& smem, int head, int block,
                                             const int32_t* list, int count) {
  const int query_row = (head * args.num_blocks + block) * kBlockSlots;
  smem.queries_loaded.arrive_and_expect_tx(Fp8Block<D>::kBytes + Block<D>::kBytes);
  load_tile<Fp8Block<D>>(smem.q8, args.q8, smem.queries_loaded, query_row);
  load_tile<Block<D>>(smem.d_out, args.d_out, smem.queries_loaded, query_row);
  RingPosition<kDqStages> at;
  for (int i = 0; i < count; ++i) {
    const int key_block = list[i];
    trap_if(static_cast<unsigned>(key_block) >= static_cast<unsigned>(args.num_blocks));
    const int row = (head * args.num_blocks + key_block) * kBlockSlots;
    smem.empty[at.stage].wait(at.parity ^ 1);
    Mbarrier& full = smem.full[at.stage];
    full.arrive_and_expect_tx(Fp8Block<D>::kBytes + 2 * Block<D>::kBytes + sizeof(smem.k_scale[0]));
    load_tile<Fp8Block<D>>(smem.k8[at.stage], args.k8, full, row);
    bulk_load(smem.k_scale[at.stage], args.k_scale + row, sizeof(smem.k_scale[0]), full);
    load_tile<Block<D>>(smem.v[at.stage], args.v, full, row);
    load_tile<Block<D>>(smem.k[at.stage], args.k, full, row);
    at.advance();
  }
}

// Facts of this thread's two queries, rows g and g + 8.
struct QueryRows {
  float scale[2], shift[2], inverse_sum[2], delta[2];

  __device__ __forceinline__ static QueryRows load(const float* facts, int row) {
    QueryRows q;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      q.scale[r] = facts[kQueryScale * kQueryRows + row + 8 * r];
      q.shift[r] = facts[kExponentShift * kQueryRows + row + 8 * r];
      q.inverse_sum[r] = facts[kInverseSum * kQueryRows + row + 8 * r];
      q.delta[r] = facts[kDelta * kQueryRows + row + 8 * r];
    }
    return q;
  }
};

// The consumers: one warpgroup, one KV block.
template <int D>
__device__ __forceinline__ void dq_step(float (&dq)[D / 2], const DqStorage<D>& smem, int stage, int warpgroup,
                                        const QueryRows& q, float scale_log2) {
  float s[64], dp[64];
  keep_registers(s);
  keep_registers(dp);
  using Fp8 = Fp8Block<D>;
  using Wide = Block<D>;
  warpgroup_arrive();
  multiply_rows<Fp8, Fp8>(s, Fp8::descriptor(smem.q8) + warpgroup * Fp8::step(64, 0), Fp8::descriptor(smem.k8[stage]));
  warpgroup_commit_batch();
  multiply_rows<Wide, Wide>(dp, Wide::descriptor(smem.d_out) + warpgroup * Wide::step(64, 0),
                            Wide::descriptor(smem.v[stage]));
  warpgroup_commit_batch();
  warpgroup_wait<1>();  // S
  keep_registers(s);

  const float* k_scale = smem.k_scale[stage];
  const int quad_lane = threadIdx.x % 4;
#pragma unroll
  for (int j = 0; j < kBlockSlots / 8; ++j) {
    const float2 sk = *reinterpret_cast<const float2*>(k_scale + 8 * j + 2 * quad_lane);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float* pair = s + 4 * j + 2 * r;
      const float2 p =
          quantized_probabilities(fmaf(pair[0], q.scale[r] * sk.x * scale_log2, q.shift[r]),
                                  fmaf(pair[1], q.scale[r] * sk.y * scale_log2, q.shift[r]), is_code_slot<D>(8 * j));
      pair[0] = p.x * q.inverse_sum[r];
      pair[1] = p.y * q.inverse_sum[r];
    }
  }
  warpgroup_wait<0>();  // dP
  keep_registers(dp);

  uint32_t ds_packed[32];
#pragma unroll
  for (int j = 0; j < kBlockSlots / 8; ++j) {
    const float2 sk = *reinterpret_cast<const float2*>(k_scale + 8 * j + 2 * quad_lane);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int i = 4 * j + 2 * r;
      ds_packed[2 * j + r] = pack_bf16(s[i] * (dp[i] - q.delta[r]) * sk.x, s[i + 1] * (dp[i + 1] - q.delta[r]) * sk.y);
    }
  }
  keep_registers(ds_packed);
  keep_registers(dq);
  warpgroup_arrive();
  accumulate_registers<Wide>(dq, ds_packed, Wide::template descriptor<Major::MN>(smem.k[stage]));
  warpgroup_commit_batch();
  warpgroup_wait<0>();
  keep_registers(dq);
}

// Grid: x = query block, last first (text tiles, the longest lists, come last in slot order), y = head, z = batch.
template <int D>
__global__ void __launch_bounds__(kThreads, 1) dq_kernel(const __grid_constant__ DqArgs args) {
  extern __shared__ __align__(kSharedAlignment) uint8_t dynamic_shared[];
  auto& smem = declared_storage<DqStorage<D>>(dynamic_shared);
  const int block = args.num_blocks - 1 - static_cast<int>(blockIdx.x);
  const int h = blockIdx.y, b = blockIdx.z;
  const int head = b * args.heads + h;

  if (threadIdx.x == 0) {
    smem.queries_loaded.init(1);
    for (int stage = 0; stage < kDqStages; ++stage) {
      smem.full[stage].init(1);
      smem.empty[stage].init(kConsumerWarps);
    }
    fence_barrier_init();
  }
  __syncthreads();

  const int tile = args.tile_of_block[block];
  trap_if(static_cast<unsigned>(tile) >= static_cast<unsigned>(args.keys.rows));
  const int64_t first = list_row(args.keys, b, h, tile);
  const int count = args.keys.num_blocks[first];
  const int32_t* list = args.keys.indices + first * args.keys.max_blocks;
  trap_if(count < 0 || count > args.keys.max_blocks);

  if (threadIdx.x < kWarpgroupThreads) {
    warpgroup_reg_dealloc<kProducerRegisters>();
    if (threadIdx.x == 0) {
      produce_keys<D>(args, smem, head, block, list, count);
    }
    return;
  }

  warpgroup_reg_alloc<kConsumerRegisters>();
  const int thread = threadIdx.x % kWarpgroupThreads;
  const int warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / kWarpgroupThreads - 1, 0);
  const int row = accumulator_row(thread, 0);  // of this warpgroup's half block, and row + 8
  const int64_t half_block = (int64_t(head) * args.num_blocks + block) * kHalves + warpgroup;
  const QueryRows queries = QueryRows::load(args.row_facts + half_block * kNumRowFacts * kQueryRows, row);
  float dq[D / 2] = {};

  smem.queries_loaded.wait(0);
  RingPosition<kDqStages> at;
  for (int i = 0; i < count; ++i) {
    smem.full[at.stage].wait(at.parity);
    dq_step<D>(dq, smem, at.stage, warpgroup, queries, args.scale_log2);
    if (thread % 32 == 0) {
      smem.empty[at.stage].arrive();
    }
    at.advance();
  }

  const int slot = block * kBlockSlots + warpgroup * 64 + row;
  const int tokens[2] = {args.token_of_slot[slot], args.token_of_slot[slot + 8]};
  store_rows<D>(dq, args.softmax_scale, args.dq, args.head_dim, args.fp16, b, h, tokens);
}

}  // namespace fpsattn::sm90::backward
