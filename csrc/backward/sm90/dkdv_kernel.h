// Straight-through backward, KV-major: dK and dV of one block of 128 keys; in fast mode dQ on the side. sm_90a.
//
//   S^T = K8 Q8^T (e4m3, the forward's product)      P = e4m3(2^(S s_q s_k scale log2e - m + 8)), p = P / l
//   dV += p^T dO        dP^T = V~ dO^T               dS = P (dP / l - delta / l)
//   dK += (dS s_q)^T Q8, times scale at the end      dQ += (dS s_k) K8, times scale at the end (fast mode)
//
// Shapes     q8, k8 e4m3 [B, H, num_blocks, 128, D]; workspace (workspace.h): Q8, K8, V~, dO as BF16 [slots, D], facts
//            A head of K and V serves `group` query heads: their lists follow one another, dK and dV sum over all
// Tiles      128 keys x 64 queries x D; consumer warpgroup w owns keys 64w..64w+63: its P^T, dS^T are A operands in
//            registers
// Layouts    tiles of common/sm90/tile.h; BF16 ones are read K-major (dP) and MN-major (dV, dK) alike. The scales are
//            folded into dS before it is rounded to BF16: the e4m3 values stay exact.
//
// Pipeline   producer  K8 V~ | Q8 dO Q16 facts of half block 0, 1, 2, ... of the transposed list, kStages ahead
//   D = 64   WG1, WG2  S dK' dP | P | dV | dS |                 dK' is of the step before: something of a warpgroup is
//                                                               in flight under all of its elementwise part
//   D = 128            S dP | P | dV | dS | dK |                the warpgroups drift apart and fill each other's gaps
//   fast               S dP | P | dV | dS | dK dQ | reduce       dS goes through shared memory: dQ sums over both
//
// Barriers   name          kind       arrives                 waits       phase flips
//            keys_loaded   mbarrier   producer + bytes        consumers   never (one work item per CTA)
//            full[s]       mbarrier   producer + bytes        consumers   per lap of the ring
//            empty[s]      mbarrier   lane 0 of 8 warps       producer    per lap of the ring
//            ds_written    named 1    256 consumer threads    the same    per step (fast mode)
//            sum_staged    named 2,3  128 threads of a WG     the same    twice per step (fast mode)
//
// Budget     registers  D = 128: dK 64 + dV 64 + S 32 + dP 32 + packed P or dS 16 = 208; with both packed operands in
//                       flight it would be 224, too many. D = 64: 160. 232 allowed, 40 for the producer. No spills.
//            shared     D = 128: K8 16K + V~ 32K + 4 stages x 41.5K = 214K
//                       fast: 2 stages x 41K + K16 32K + dS 2 x 16K + dQ 32K = 226K
//            clocks of an SM: docs/kernels/backward.md
//
// Invariants list entries are query blocks (trapped on otherwise); a padding query has 1/l = 0 and dO = 0, so
//            p = dS = 0; rows of padding keys are computed and never stored; K16 is 0 there: they add nothing to dQ.
//            An empty list stores dK = dV = 0.
#pragma once

#include "backward/sm90/config.h"
#include "backward/sm90/elementwise.h"
#include "backward/sm90/products.h"
#include "common/device_check.h"
#include "common/indexing.h"
#include "common/sm90/fragments.h"
#include "common/sm90/tma.h"

namespace fpsattn::sm90::backward {

struct DkdvArgs : Round {
  CUtensorMap k8, v;         // of Fp8Block, Block
  CUtensorMap q8, q, d_out;  // of Fp8Half, Half, Half
  CUtensorMap k;             // of KeyPanels; fast mode
};

template <int D, int kStages, int kFacts>
struct DkdvRing {
  alignas(kSharedAlignment) E4m3 q8[kStages][Fp8Half<D>::kElements];
  alignas(kSharedAlignment) Bf16 q[kStages][Half<D>::kElements];
  alignas(kSharedAlignment) Bf16 d_out[kStages][Half<D>::kElements];
  alignas(128) float facts[kStages][kFacts * kQueryRows];  // the first kFacts of RowFact
  static constexpr uint32_t kFactsBytes = kFacts * kQueryRows * sizeof(float);
  static constexpr uint32_t kStageBytes = Fp8Half<D>::kBytes + 2 * Half<D>::kBytes + kFactsBytes;
};

// Policy: dQ is left to its own kernel (dq_kernel.h), nothing is reduced across CTAs: same bits on every run.
template <int D>
struct SeparateDq {
  static constexpr bool kRunsAhead = D == 64;
  static constexpr int kStages = 4;  // one or two for the products in flight, the others to load
  static constexpr int kFacts = kNumRowFacts;
  static constexpr bool kReducesDq = false;
  struct Storage {};
};

// Policy: dQ is summed in FP32 by the copy engine. The order of the sums, and so the last bits, varies from run to run.
template <int D>
struct ReducedDq {
  static constexpr bool kRunsAhead = false;
  static constexpr int kStages = 2;
  static constexpr int kFacts = kDelta + 1;
  static constexpr bool kReducesDq = true;
  using KeyPanels = Tile<Bf16, kBlockSlots, D, D / 2>;  // panel w: the columns of warpgroup w
  using Ds = Tile<Bf16, kBlockSlots, kQueryRows>;       // [key][query]
  struct Storage {
    alignas(kSharedAlignment) Bf16 k[KeyPanels::kElements];
    alignas(kSharedAlignment) Bf16 ds[2][Ds::kElements];  // by parity of the step: the other warpgroup may lag by one
    alignas(128) float sum[kConsumerWarpgroups][kQueryRows * D / 2];  // accumulators on their way out
  };
};

template <int D, template <int> class DqPolicy>
struct DkdvStorage {
  alignas(kSharedAlignment) E4m3 k8[Fp8Block<D>::kElements];
  alignas(kSharedAlignment) Bf16 v[Block<D>::kElements];
  DkdvRing<D, DqPolicy<D>::kStages, DqPolicy<D>::kFacts> ring;
  typename DqPolicy<D>::Storage dq;
  int query_half[DqPolicy<D>::kStages];  // whose queries are in the ring: index of the half block among all
  Mbarrier keys_loaded;
  Mbarrier full[DqPolicy<D>::kStages];
  Mbarrier empty[DqPolicy<D>::kStages];
};

// The query blocks that visit a CTA's block of keys, of one of the query heads that share its head of K and V.
struct QueryList {
  const int32_t* blocks;
  int count;

  __device__ __forceinline__ static QueryList of(const DkdvArgs& args, const Work& keys, int member) {
    const BlockLists& lists = args.params.q;
    const int64_t row = list_row(lists, keys.b, keys.h * args.params.size.group + member, keys.block);
    const int count = lists.num_blocks[row];
    trap_if(count < 0 || count > lists.max_blocks);
    return {lists.indices + row * lists.max_blocks, count};
  }
};

// The producer: one thread.
template <int D, template <int> class DqPolicy>
__device__ __forceinline__ void produce_queries(const DkdvArgs& args, DkdvStorage<D, DqPolicy>& smem,
                                                const Work& work) {
  using Policy = DqPolicy<D>;
  using Ring = DkdvRing<D, Policy::kStages, Policy::kFacts>;
  const int key_row = (work.head * args.keys.num_blocks + work.block) * kBlockSlots;
  smem.keys_loaded.arrive_and_expect_tx(Fp8Block<D>::kBytes + (Policy::kReducesDq ? 2 : 1) * Block<D>::kBytes);
  load_tile<Fp8Block<D>>(smem.k8, args.k8, smem.keys_loaded, key_row);
  load_tile<Block<D>>(smem.v, args.v, smem.keys_loaded, key_row);
  if constexpr (Policy::kReducesDq) {
    load_tile<typename Policy::KeyPanels>(smem.dq.k, args.k, smem.keys_loaded, key_row);
  }
  RingPosition<Policy::kStages> at;
  for (int member = 0; member < args.params.size.group; ++member) {
    const QueryList list = QueryList::of(args, work, member);
    const int first_block = (work.head * args.params.size.group + member) * args.queries.num_blocks;
    for (int i = 0; i < list.count; ++i) {
      const int query_block = list.blocks[i];
      trap_if(static_cast<unsigned>(query_block) >= static_cast<unsigned>(args.queries.num_blocks));
      for (int half = 0; half < kHalves; ++half) {
        const int row = (first_block + query_block) * kBlockSlots + half * kQueryRows;
        smem.empty[at.stage].wait(at.parity ^ 1);
        if constexpr (Policy::kReducesDq) {
          smem.query_half[at.stage] = row / kQueryRows;
        }
        Mbarrier& full = smem.full[at.stage];
        full.arrive_and_expect_tx(Ring::kStageBytes);
        load_tile<Fp8Half<D>>(smem.ring.q8[at.stage], args.q8, full, row);
        const float* facts = args.space.row_facts + int64_t(row) * kNumRowFacts;
        bulk_load(smem.ring.facts[at.stage], facts, Ring::kFactsBytes, full);
        load_tile<Half<D>>(smem.ring.d_out[at.stage], args.d_out, full, row);
        load_tile<Half<D>>(smem.ring.q[at.stage], args.q, full, row);
        at.advance();
      }
    }
  }
}

// First of pair j of the queries (columns of S^T) that this thread has scores of.
__device__ __forceinline__ int query_pair(int j) { return accumulator_column(threadIdx.x % kWarpgroupThreads, 4 * j); }

// A fact of the queries of pair j.
__device__ __forceinline__ float2 fact_pair(const float* facts, RowFact fact, int j) {
  return *reinterpret_cast<const float2*>(facts + fact * kQueryRows + query_pair(j));
}

// kCodes: the keys are in code slots. kKeyScales: one K scale per token. s: S^T in, P out; packed: P / l in BF16, the A
// operand of dV; sk: scales of this thread's two keys.
template <bool kCodes, bool kKeyScales, class Scores, class Packed>
__device__ __forceinline__ void probabilities(Scores& s, Packed& packed, const float* facts, const float (&sk)[2],
                                              float scale_log2) {
  auto pairs = cute::recast<uint32_t>(packed);
#pragma unroll
  for (int j = 0; j < kQueryRows / 8; ++j) {
    const float2 sq = fact_pair(facts, kQueryScale, j), shift = fact_pair(facts, kExponentShift, j);
    const float2 inverse = fact_pair(facts, kInverseSum, j);
    // Rounded where the forward rounds (docs/numerics.md, step 3). Without kKeyScales both keys have the same scale.
    const ExponentLine y0{(kKeyScales ? sq.x : sq.x * sk[0]) * scale_log2, shift.x};
    const ExponentLine y1{(kKeyScales ? sq.y : sq.y * sk[0]) * scale_log2, shift.y};
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float &s0 = s(4 * j + 2 * r), &s1 = s(4 * j + 2 * r + 1);
      const float2 p =
          quantized_probabilities(kKeyScales ? s0 * sk[r] : s0, kKeyScales ? s1 * sk[r] : s1, y0, y1, kCodes);
      s0 = p.x;
      s1 = p.y;
      pairs(2 * j + r) = pack_bf16(p.x * inverse.x, p.y * inverse.y);
    }
  }
}

// The consumers: one warpgroup. Members are registers.
template <int D, template <int> class DqPolicy, bool kKeyScales>
struct DkdvConsumer {
  using Policy = DqPolicy<D>;
  using ScoreMma = SharedMma<E4m3, kQueryRows, SplitRows>;        // S^T = K8 Q8^T
  using DpMma = SharedMma<Bf16, kQueryRows, SplitRows>;           // dP^T = V~ dO^T
  using GradientMma = RegisterMma<D>;                             // dV += p^T dO, dK += dS^T Q16
  using DqMma = SharedMma<Bf16, D / 2, SplitColumns, Major::MN>;  // dQ = dS K16
  using Scores = Accumulator<ScoreMma, kBlockSlots, kQueryRows>;
  using Packed = RegisterOperand<GradientMma, kBlockSlots, kQueryRows>;

  const DkdvArgs& args;
  DkdvStorage<D, DqPolicy>& smem;
  int warpgroup;
  int first_key;  // of the block: this thread has it, and first_key + 8
  float sk[2];    // their scales
  Accumulator<GradientMma, kBlockSlots, D> dk, dv;

  __device__ __forceinline__ DkdvConsumer(const DkdvArgs& args, DkdvStorage<D, DqPolicy>& smem, int warpgroup,
                                          int first_key, const float* k_scale)
      : args(args), smem(smem), warpgroup(warpgroup), first_key(first_key), sk{k_scale[0], k_scale[8]} {
    cute::clear(dk);
    cute::clear(dv);
  }

  __device__ __forceinline__ void issue_scores(int stage, Scores& s) const {
    multiply<ScoreMma, false>(fragment_a<ScoreMma>(warpgroup, operand<Fp8Block<D>>(smem.k8)),
                              fragment_b<ScoreMma>(warpgroup, operand<Fp8Half<D>>(smem.ring.q8[stage])), s);
    warpgroup_commit_batch();
  }

  __device__ __forceinline__ void issue_dp(int stage, Scores& dp) const {
    multiply<DpMma, false>(fragment_a<DpMma>(warpgroup, operand<Block<D>>(smem.v)),
                           fragment_b<DpMma>(warpgroup, operand<Half<D>>(smem.ring.d_out[stage])), dp);
    warpgroup_commit_batch();
  }

  // dV += p^T dO or dK += dS^T Q16: `queries` is the tile in question.
  __device__ __forceinline__ void issue_gradient(const Packed& packed, const Bf16* queries,
                                                 decltype(dv)& gradient) const {
    multiply<GradientMma, true>(packed, fragment_b<GradientMma>(warpgroup, transposed_operand<Half<D>>(queries)),
                                gradient);
    warpgroup_commit_batch();
  }

  // P from S, in its registers, and p_packed, p. The branch is taken by whole warps.
  __device__ __forceinline__ void make_probabilities(int stage, Scores& s, Packed& p_packed) const {
    const float* facts = smem.ring.facts[stage];
    if (is_code_slot<D>(first_key)) {
      probabilities<true, kKeyScales>(s, p_packed, facts, sk, args.scale_log2);
    } else {
      probabilities<false, kKeyScales>(s, p_packed, facts, sk, args.scale_log2);
    }
    keep_registers(p_packed);
  }

  // ds_packed, dS^T s_q; in fast mode dS^T s_k to shared memory, too.
  __device__ __forceinline__ void make_ds(int stage, int buffer, const Scores& s, const Scores& dp,
                                          Packed& ds_packed) const {
    constexpr RowFact kFactor = Policy::kReducesDq ? kInverseSum : kScaledInverseSum;
    constexpr RowFact kOffset = Policy::kReducesDq ? kDelta : kScaledDelta;
    const float* facts = smem.ring.facts[stage];
    auto pairs = cute::recast<uint32_t>(ds_packed);
#pragma unroll
    for (int j = 0; j < kQueryRows / 8; ++j) {
      const float2 factor = fact_pair(facts, kFactor, j), offset = fact_pair(facts, kOffset, j);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int i = 4 * j + 2 * r;
        const float ds0 = s(i) * fmaf(dp(i), factor.x, offset.x);
        const float ds1 = s(i + 1) * fmaf(dp(i + 1), factor.y, offset.y);
        if constexpr (Policy::kReducesDq) {
          const float2 sq = fact_pair(facts, kQueryScale, j);
          pairs(2 * j + r) = pack_bf16(ds0 * sq.x, ds1 * sq.y);
          write_ds(buffer, j, r, pack_bf16(ds0 * sk[r], ds1 * sk[r]));
        } else {
          pairs(2 * j + r) = pack_bf16(ds0, ds1);
        }
      }
    }
    keep_registers(ds_packed);
  }

  // Columns 8 group + 2 q, + 1 of dS^T * s_k, key first_key + 8 * half.
  __device__ __forceinline__ void write_ds(int buffer, int group, int half, uint32_t pair) const {
    using Ds = typename Policy::Ds;  // a swizzle is linear in the bits of an index, and these have none in common
    const int own_index = Ds::index(first_key, threadIdx.x % 4 * 2);
    const int index = (own_index ^ Ds::index(0, 8 * group)) + Ds::index(8 * half, 0);
    *reinterpret_cast<uint32_t*>(smem.dq.ds[buffer] + index) = pair;
  }

  __device__ __forceinline__ void release(int stage, bool used = true) const {
    smem.empty[stage].arrive_if(used && threadIdx.x % 32 == 0);
  }

  // Products run under all of the elementwise part, those of dK a step late. What is in flight from one step to the next
  // is dV alone: ptxas serializes what it cannot see the wait of in the same step.
  __device__ __forceinline__ void run_ahead(int steps) {
    if (steps == 0) return;
    RingPosition<Policy::kStages> at, last;
    Packed ds_packed;
    cute::clear(ds_packed);  // the first step adds 0^T Q16 to dK
#pragma unroll 1
    for (int i = 0; i < steps; ++i) {
      smem.full[at.stage].wait(at.parity);
      Scores s, dp;  // of one step: nothing of them is live from one to the next
      keep_registers(s);
      keep_registers(dp);
      keep_registers(dk);
      keep_registers(ds_packed);
      warpgroup_arrive();
      issue_scores(at.stage, s);
      issue_gradient(ds_packed, smem.ring.q[last.stage], dk);
      issue_dp(at.stage, dp);
      warpgroup_wait<2>();  // S, and dV of the last step
      keep_registers(s);
      Packed p_packed;
      make_probabilities(at.stage, s, p_packed);
      keep_registers(dv);
      warpgroup_arrive();
      issue_gradient(p_packed, smem.ring.d_out[at.stage], dv);
      warpgroup_wait<1>();  // dP, and dK of the last step
      keep_registers(dp);
      release(last.stage, i > 0);
      make_ds(at.stage, 0, s, dp, ds_packed);
      last = at;
      at.advance();
    }
    keep_registers(dk);
    warpgroup_arrive();
    issue_gradient(ds_packed, smem.ring.q[last.stage], dk);
    warpgroup_wait<0>();
    keep_registers(dv);
    keep_registers(dk);
  }

  // The same without registers for a second packed operand in flight, or a stage for it.
  __device__ __forceinline__ void run(int steps) {
    RingPosition<Policy::kStages> at;
#pragma unroll 1
    for (int i = 0; i < steps; ++i) {
      smem.full[at.stage].wait(at.parity);
      Scores s, dp;
      keep_registers(s);
      keep_registers(dp);
      warpgroup_arrive();
      issue_scores(at.stage, s);
      issue_dp(at.stage, dp);
      warpgroup_wait<1>();  // S
      keep_registers(s);
      Packed p_packed;
      make_probabilities(at.stage, s, p_packed);
      keep_registers(dv);
      warpgroup_arrive();
      issue_gradient(p_packed, smem.ring.d_out[at.stage], dv);
      warpgroup_wait<1>();  // dP
      keep_registers(dp);
      Packed ds_packed;
      make_ds(at.stage, i & 1, s, dp, ds_packed);
      keep_registers(dk);
      warpgroup_arrive();
      issue_gradient(ds_packed, smem.ring.q[at.stage], dk);
      if constexpr (Policy::kReducesDq) {
        add_to_dq(i & 1, at.stage);
      } else {
        warpgroup_wait<0>();
        keep_registers(dv);
        keep_registers(dk);
        release(at.stage);
      }
      at.advance();
    }
  }

  // dQ[64 queries, columns of this warpgroup] += (dS s_k) K8 over all 128 keys.
  __device__ __forceinline__ void add_to_dq(int buffer, int stage) {
    fence_async_shared();
    NamedBarrier::sync(kConsumerWarpgroups * kWarpgroupThreads, kDsWritten);
    const int query_half = smem.query_half[stage];
    Accumulator<DqMma, kQueryRows, D> dq;
    keep_registers(dq);
    warpgroup_arrive();
    multiply<DqMma, false>(fragment_a<DqMma>(warpgroup, transposed_operand<typename Policy::Ds>(smem.dq.ds[buffer])),
                           fragment_b<DqMma>(warpgroup, transposed_operand<typename Policy::KeyPanels>(smem.dq.k)), dq);
    warpgroup_commit_batch();
    warpgroup_wait<0>();
    keep_registers(dv);
    keep_registers(dk);
    keep_registers(dq);
    release(stage);

    const int thread = threadIdx.x % kWarpgroupThreads;
    float* sum = smem.dq.sum[warpgroup];
    if (thread == 0) {
      bulk_wait_read<0>();  // of the previous step
    }
    NamedBarrier::sync(kWarpgroupThreads, kSumStaged + warpgroup);
#pragma unroll
    for (int j = 0; j < D / 16; ++j) {
      reinterpret_cast<float4*>(sum)[j * kWarpgroupThreads + thread] =
          make_float4(dq(4 * j), dq(4 * j + 1), dq(4 * j + 2), dq(4 * j + 3));
    }
    fence_async_shared();
    NamedBarrier::sync(kWarpgroupThreads, kSumStaged + warpgroup);
    if (thread == 0) {
      constexpr int kFloats = kQueryRows * D / 2;
      bulk_reduce_add(args.space.dq_sum + (int64_t{query_half} * kConsumerWarpgroups + warpgroup) * kFloats, sum,
                      kFloats * int(sizeof(float)));
      bulk_commit();
    }
  }

  enum BarrierId : uint32_t { kDsWritten = 1, kSumStaged = 2 };  // and 3
};

// kKeyScales: one K scale per token, an instance of its own: the loop has no branch for it.
template <int D, template <int> class DqPolicy, bool kKeyScales>
__global__ void __launch_bounds__(kThreads, 1) dkdv_kernel(const __grid_constant__ DkdvArgs args) {
  using Policy = DqPolicy<D>;
  auto& smem = shared_storage<DkdvStorage<D, DqPolicy>>();
  if (threadIdx.x == 0) {
    smem.keys_loaded.init(1);
    for (int stage = 0; stage < Policy::kStages; ++stage) {
      smem.full[stage].init(1);
      smem.empty[stage].init(kConsumerWarps);
    }
    fence_barrier_init();
  }
  __syncthreads();

  const Work keys = Work::of_cta(args.keys);
  if (threadIdx.x < kWarpgroupThreads) {
    warpgroup_reg_dealloc<kProducerRegisters>();
    if (threadIdx.x == 0) {
      produce_queries<D, DqPolicy>(args, smem, keys);
    }
    return;
  }

  warpgroup_reg_alloc<kConsumerRegisters>();
  const int thread = threadIdx.x % kWarpgroupThreads;
  const int warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / kWarpgroupThreads - 1, 0);
  const int first_key = warpgroup * 64 + accumulator_row(thread, 0);  // and first_key + 8
  const float* k_scale =
      args.space.k_scale + (int64_t(keys.head) * args.keys.num_blocks + keys.block) * kBlockSlots + first_key;
  DkdvConsumer<D, DqPolicy, kKeyScales> consumer(args, smem, warpgroup, first_key, k_scale);

  int steps = 0;
  for (int member = 0; member < args.params.size.group; ++member) {
    steps += QueryList::of(args, keys, member).count * kHalves;
  }
  smem.keys_loaded.wait(0);
  if constexpr (Policy::kRunsAhead) {
    consumer.run_ahead(steps);
  } else {
    consumer.run(steps);
  }
  if constexpr (Policy::kReducesDq) {
    if (thread == 0) {
      bulk_wait<0>();
    }
  }
  store_rows<D>(consumer.dv, 1.0f, args, args.keys, args.params.dv, first_key);
  store_rows<D>(consumer.dk, args.params.softmax_scale, args, args.keys, args.params.dk, first_key);
}

}  // namespace fpsattn::sm90::backward
