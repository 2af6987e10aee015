// Straight-through backward, query-major: dQ of one block of 128 queries (deterministic mode). sm_90a.
//
//   S = Q8 K8^T (e4m3, the forward's product)   P = e4m3(2^(S s_q s_k scale log2e - m + 8))
//   dP = dO V~^T    dS = P (dP / l - delta / l)   dQ += (dS s_k) K8, times scale at the end
//
// It recomputes S and dP, 7 products in place of 5 over both kernels, and needs no sum across CTAs: the same bits.
//
// Shapes     q8, k8 e4m3 [B, H, num_blocks, 128, D]; workspace (workspace.h): K8, V~, dO as BF16 [slots, D], facts, s_k
// Tiles      128 queries x 128 keys (64 at D = 128) x D; consumer warpgroup w owns queries 64w..64w+63; dS: A operand in
//            registers
// Layouts    as in dkdv_kernel.h; K16 is read MN-major
//
// Pipeline   producer  Q8 dO | K8 V~ s_k, K16 of key block 0, 1, 2, ... of the tile's list, 2 stages (3 at D = 64)
//            WG1, WG2  tensor cores  S dQ' dP | S dQ ...           dQ' is of the step before: it and dP run under P,
//                      the rest         P | dS | P               at whose end the next K8 is waited for
//
// Barriers   name            kind       arrives              waits       phase flips
//            queries_loaded  mbarrier   producer + bytes     consumers   never (one work item per CTA)
//            full[s]         mbarrier   producer + bytes     consumers   per lap of the ring of K8, V~, s_k
//            empty[s]        mbarrier   lane 0 of 8 warps    producer    per lap of it
//            k_full[s]       mbarrier   producer + bytes     consumers   per lap of the ring of K16
//            k_empty[s]      mbarrier   lane 0 of 8 warps    producer    per lap of it
//
// Budget     registers  D = 128: dQ 64 + S 32 + dP 32 + packed dS 16 = 144; D = 64: 32 + 64 + 64 + 32 = 192.
//                       232 allowed, 40 for the producer. No spill.
//            shared     D = 128: Q8 16K + dO 32K + 2 x (K8 16K + V~ 32K + K16 32K + s_k 0.5K) = 209K
//            clocks of an SM: docs/kernels/backward.md
//
// Invariants list entries are KV blocks, tiles are rows of the lists (trapped on otherwise); K16 is 0 in padding
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

struct DqArgs : Round {
  CUtensorMap q8, k8, d_out, k, v;  // of Fp8Block, Block
};

// Two rings of KV blocks: K16 is read a step later than the rest, and loaded when its stage is free.
template <int D>
struct DqStorage {
  static constexpr int kStages = D == 64 ? 3 : 2;
  alignas(kSharedAlignment) E4m3 q8[Fp8Block<D>::kElements];
  alignas(kSharedAlignment) Bf16 d_out[Block<D>::kElements];
  alignas(kSharedAlignment) E4m3 k8[kStages][Fp8Block<D>::kElements];
  alignas(kSharedAlignment) Bf16 v[kStages][Block<D>::kElements];
  alignas(kSharedAlignment) Bf16 k[kStages][Block<D>::kElements];
  alignas(128) float k_scale[kStages][kBlockSlots];
  Mbarrier queries_loaded;
  Mbarrier full[kStages], empty[kStages];      // of k8, v, k_scale
  Mbarrier k_full[kStages], k_empty[kStages];  // of k
};

// The producer: one thread.
template <int D>
__device__ __forceinline__ void produce_keys(const DqArgs& args, DqStorage<D>& smem, int head, int block,
                                             const int32_t* list, int count) {
  const int query_row = (head * args.queries.num_blocks + block) * kBlockSlots;
  const int first_block = head / args.params.size.group * args.keys.num_blocks;
  smem.queries_loaded.arrive_and_expect_tx(Fp8Block<D>::kBytes + Block<D>::kBytes);
  load_tile<Fp8Block<D>>(smem.q8, args.q8, smem.queries_loaded, query_row);
  load_tile<Block<D>>(smem.d_out, args.d_out, smem.queries_loaded, query_row);
  RingPosition<DqStorage<D>::kStages> at;
  for (int i = 0; i < count; ++i) {
    const int key_block = list[i];
    trap_if(static_cast<unsigned>(key_block) >= static_cast<unsigned>(args.keys.num_blocks));
    const int row = (first_block + key_block) * kBlockSlots;
    smem.empty[at.stage].wait(at.parity ^ 1);
    Mbarrier& full = smem.full[at.stage];
    full.arrive_and_expect_tx(Fp8Block<D>::kBytes + Block<D>::kBytes + sizeof(smem.k_scale[0]));
    load_tile<Fp8Block<D>>(smem.k8[at.stage], args.k8, full, row);
    bulk_load(smem.k_scale[at.stage], args.space.k_scale + row, sizeof(smem.k_scale[0]), full);
    load_tile<Block<D>>(smem.v[at.stage], args.v, full, row);
    smem.k_empty[at.stage].wait(at.parity ^ 1);
    smem.k_full[at.stage].arrive_and_expect_tx(Block<D>::kBytes);
    load_tile<Block<D>>(smem.k[at.stage], args.k, smem.k_full[at.stage], row);
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

// The consumers: one warpgroup. Members are registers. kKeyScales: one K scale per token.
template <int D, bool kKeyScales>
struct DqConsumer {
  static constexpr int kStages = DqStorage<D>::kStages;
  static constexpr int kKeys = D == 64 ? 128 : 64;     // of a step: as many as registers allow
  static constexpr int kSteps = kBlockSlots / kKeys;   // of a block
  using ScoreMma = SharedMma<E4m3, kKeys, SplitRows>;  // S = Q8 K8^T
  using DpMma = SharedMma<Bf16, kKeys, SplitRows>;     // dP = dO V~^T
  using DqMma = RegisterMma<D>;                        // dQ += dS K16
  using Scores = Accumulator<ScoreMma, kBlockSlots, kKeys>;
  using Packed = RegisterOperand<DqMma, kBlockSlots, kKeys>;

  const DqArgs& args;
  DqStorage<D>& smem;
  int warpgroup;
  QueryRows q;
  Accumulator<DqMma, kBlockSlots, D> dq;

  __device__ __forceinline__ DqConsumer(const DqArgs& args, DqStorage<D>& smem, int warpgroup, const QueryRows& q)
      : args(args), smem(smem), warpgroup(warpgroup), q(q) {
    cute::clear(dq);
  }

  // Keys part * kKeys .. of a block, as columns of S and dP, and as what dQ sums over.
  template <class Tile>
  __device__ __forceinline__ static auto keys(const typename Tile::Element* block, int part) {
    return cute::local_tile(operand<Tile>(block), cute::Shape<cute::Int<kKeys>, cute::Int<D>>{},
                            cute::make_coord(part, cute::_0{}));
  }
  __device__ __forceinline__ static auto summed_keys(const Bf16* block, int part) {
    return cute::local_tile(transposed_operand<Block<D>>(block), cute::Shape<cute::Int<D>, cute::Int<kKeys>>{},
                            cute::make_coord(cute::_0{}, part));
  }

  __device__ __forceinline__ void issue_scores(int stage, int part, Scores& s) const {
    multiply<ScoreMma, false>(fragment_a<ScoreMma>(warpgroup, operand<Fp8Block<D>>(smem.q8)),
                              fragment_b<ScoreMma>(warpgroup, keys<Fp8Block<D>>(smem.k8[stage], part)), s);
    warpgroup_commit_batch();
  }

  __device__ __forceinline__ void issue_dp(int stage, int part, Scores& dp) const {
    multiply<DpMma, false>(fragment_a<DpMma>(warpgroup, operand<Block<D>>(smem.d_out)),
                           fragment_b<DpMma>(warpgroup, keys<Block<D>>(smem.v[stage], part)), dp);
    warpgroup_commit_batch();
  }

  __device__ __forceinline__ void issue_dq(int stage, int part, const Packed& ds_packed) {
    multiply<DqMma, true>(ds_packed, fragment_b<DqMma>(warpgroup, summed_keys(smem.k[stage], part)), dq);
    warpgroup_commit_batch();
  }

  // Scales of the keys of pair j of this thread's columns.
  __device__ __forceinline__ static float2 key_scales(const float* k_scale, int j) {
    return *reinterpret_cast<const float2*>(k_scale + accumulator_column(threadIdx.x % kWarpgroupThreads, 4 * j));
  }

  // P from S, in its registers. Rounded where the forward rounds (docs/numerics.md, step 3).
  template <int kPart>
  __device__ __forceinline__ void probabilities(const float* k_scale, Scores& s) const {
    float factor[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      factor[r] = (kKeyScales ? q.scale[r] : q.scale[r] * k_scale[0]) * args.scale_log2;
    }
#pragma unroll
    for (int j = 0; j < kKeys / 8; ++j) {
      const float2 sk = kKeyScales ? key_scales(k_scale, j) : make_float2(1.0f, 1.0f);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float &s0 = s(4 * j + 2 * r), &s1 = s(4 * j + 2 * r + 1);
        const ExponentLine y{factor[r], q.shift[r]};
        const float2 p = quantized_probabilities(kKeyScales ? s0 * sk.x : s0, kKeyScales ? s1 * sk.y : s1, y, y,
                                                 is_code_slot<D>(kPart * kKeys + 8 * j));
        s0 = p.x;
        s1 = p.y;
      }
    }
  }

  __device__ __forceinline__ void probabilities(const float* k_scale, int part, Scores& s) const {
    if (part == 0) {
      probabilities<0>(k_scale, s);
    } else {
      probabilities<kSteps - 1>(k_scale, s);
    }
  }

  // ds_packed, dS s_k = P (dP - rowsum(dO * O)) / l s_k.
  __device__ __forceinline__ void ds(const float* k_scale, const Scores& s, const Scores& dp, Packed& ds_packed) const {
    auto pairs = cute::recast<uint32_t>(ds_packed);
    float factor[2], offset[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float scale = kKeyScales ? 1.0f : k_scale[0];
      factor[r] = q.inverse_sum[r] * scale;
      offset[r] = q.delta[r] * scale;
    }
#pragma unroll
    for (int j = 0; j < kKeys / 8; ++j) {
      const float2 sk = kKeyScales ? key_scales(k_scale, j) : make_float2(1.0f, 1.0f);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int i = 4 * j + 2 * r;
        const float ds0 = s(i) * fmaf(dp(i), factor[r], offset[r]);
        const float ds1 = s(i + 1) * fmaf(dp(i + 1), factor[r], offset[r]);
        pairs(2 * j + r) = pack_bf16(kKeyScales ? ds0 * sk.x : ds0, kKeyScales ? ds1 * sk.y : ds1);
      }
    }
  }

  __device__ __forceinline__ void release(Mbarrier& empty, bool used) const {
    empty.arrive_if(used && threadIdx.x % 32 == 0);
  }

  // The products of dQ are issued a step late, so that they run under the elementwise part.
  __device__ __forceinline__ void run(int steps) {
    if (steps == 0) return;
    RingPosition<kStages> at, last;
    int part = 0, last_part = 0;
    Packed ds_packed;
    cute::clear(ds_packed);  // the first step adds 0 K16 to dQ
    smem.full[at.stage].wait(at.parity);
#pragma unroll 1
    for (int i = 0; i < steps; ++i) {
      const float* k_scale = smem.k_scale[at.stage] + part * kKeys;
      RingPosition<kStages> next = at;
      if (part == kSteps - 1) next.advance();
      smem.k_full[last.stage].wait(last.parity);
      Scores s, dp;  // of one step: nothing of them is live from one to the next
      keep_registers(s);
      keep_registers(dp);
      keep_registers(dq);
      keep_registers(ds_packed);
      warpgroup_arrive();
      issue_scores(at.stage, part, s);
      issue_dq(last.stage, last_part, ds_packed);
      issue_dp(at.stage, part, dp);
      warpgroup_wait<2>();  // S
      keep_registers(s);
      probabilities(k_scale, part, s);
      // The next step needs this wait anyway. Here it ends a basic block: without one ptxas hoists the wgmma wait below
      // above P, and nothing runs under it.
      if (i + 1 < steps) smem.full[next.stage].wait(next.parity);
      warpgroup_wait<0>();  // dP, and dQ of the last step
      keep_registers(dp);
      release(smem.k_empty[last.stage], i > 0 && last_part == kSteps - 1);
      ds(k_scale, s, dp, ds_packed);
      release(smem.empty[at.stage], part == kSteps - 1);
      last = at;
      last_part = part;
      part = part == kSteps - 1 ? 0 : part + 1;
      at = next;
    }
    smem.k_full[last.stage].wait(last.parity);
    keep_registers(dq);
    keep_registers(ds_packed);
    warpgroup_arrive();
    issue_dq(last.stage, last_part, ds_packed);
    warpgroup_wait<0>();
    keep_registers(dq);
  }
};

template <int D, bool kKeyScales>
__global__ void __launch_bounds__(kThreads, 1) dq_kernel(const __grid_constant__ DqArgs args) {
  auto& smem = shared_storage<DqStorage<D>>();
  const auto [head, b, h, block] = Work::of_cta(args.queries);  // a block of queries

  if (threadIdx.x == 0) {
    smem.queries_loaded.init(1);
    for (int stage = 0; stage < DqStorage<D>::kStages; ++stage) {
      smem.full[stage].init(1);
      smem.k_full[stage].init(1);
      smem.empty[stage].init(kConsumerWarps);
      smem.k_empty[stage].init(kConsumerWarps);
    }
    fence_barrier_init();
  }
  __syncthreads();

  const BlockLists& keys = args.params.kv;
  const int tile = args.params.tile_of_block[block];
  trap_if(static_cast<unsigned>(tile) >= static_cast<unsigned>(keys.rows));
  const int64_t first = list_row(keys, b, h, tile);
  const int count = keys.num_blocks[first];
  const int32_t* list = keys.indices + first * keys.max_blocks;
  trap_if(count < 0 || count > keys.max_blocks);

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
  const int64_t half_block = (int64_t(head) * args.queries.num_blocks + block) * kHalves + warpgroup;
  const QueryRows queries = QueryRows::load(args.space.row_facts + half_block * kNumRowFacts * kQueryRows, row);
  DqConsumer<D, kKeyScales> consumer(args, smem, warpgroup, queries);

  smem.queries_loaded.wait(0);
  consumer.run(count * decltype(consumer)::kSteps);
  store_rows<D>(consumer.dq, args.params.softmax_scale, args, args.queries, args.params.dq, warpgroup * 64 + row);
}

}  // namespace fpsattn::sm90::backward
