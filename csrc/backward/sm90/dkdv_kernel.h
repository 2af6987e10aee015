// Straight-through backward, KV-major: dK and dV of one block of 128 keys; in fast mode dQ on the side. sm_90a.
//
//   S^T = K8 Q8^T (e4m3, the forward's product)      p = e4m3(2^(S s_q s_k scale log2e - m + 8)) / l
//   dV += p^T dO        dP^T = V~ dO^T               dS = p (dP - delta)
//   dK += (dS s_q)^T Q8, times scale at the end      dQ += (dS s_k) K8, times scale at the end (fast mode)
//
// Shapes     q8, k8 e4m3 [B, H, num_blocks, 128, D]; workspace (config.h): Q8, K8, V~, dO as BF16 [slots, D], row facts
// Tiles      128 keys x 64 queries x D; consumer warpgroup w owns keys 64w..64w+63: its P^T, dS^T are A operands in
//            registers
// Layouts    tiles of common/sm90/tile.h; BF16 ones are read K-major (dP) and MN-major (dV, dK) alike. The scales are
//            folded into dS before it is rounded to BF16: the e4m3 values stay exact.
//
// Pipeline   producer  K8 V~ | Q8 dO Q16 facts of half block 0, 1, 2, ... of the transposed list, kStages ahead
//            WG1, WG2  S dP | exp2, e4m3 | dV | dS | dK |           they drift apart and fill each other's gaps
//   fast               S dP | exp2, e4m3 | dV | dS | dK dQ | reduce  dS goes through shared memory: dQ sums over both
//
// Barriers   name          kind       arrives                 waits       phase flips
//            keys_loaded   mbarrier   producer + bytes        consumers   never (one work item per CTA)
//            full[s]       mbarrier   producer + bytes        consumers   per lap of the ring
//            empty[s]      mbarrier   lane 0 of 8 warps       producer    per lap of the ring
//            ds_written    named 1    256 consumer threads    the same    per step (fast mode)
//            sum_staged    named 2,3  128 threads of a WG     the same    twice per step (fast mode)
//
// Budget     registers  dK 64 + dV 64 + S 32 + dP 32 + packed P, dS 32 = 224 at D = 128, not all live at once
//                       232 allowed, 40 for the producer. No spills.
//            shared     D = 128: K8 16K + V~ 32K + 3 stages x 41K = 171K
//                       fast: 2 stages + K16 32K + dS 2 x 16K + dQ 32K = 226K
//            clocks of an SM per 128 x 64 tile, D = 128 (sassbudget): tensor 1792, shared memory 1920, issue 958,
//                       EX2 512. Fast: tensor 2304, shared memory 2816, issue 1230. Limit: shared memory.
//
// Invariants list entries are < num_blocks (trapped on otherwise); a padding query has 1/l = 0 and dO = 0, so
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

struct DkdvArgs {
  CUtensorMap k8, v;         // of Fp8Block, Block
  CUtensorMap q8, q, d_out;  // of Fp8Half, Half, Half
  CUtensorMap k;             // of KeyPanels; fast mode
  const float* row_facts;
  const float* k_scale;
  const int32_t* token_of_slot;
  BlockLists queries;  // rows = KV blocks, entries = query blocks
  int head_dim;        // columns of dk and dv: fewer than D for 96
  int heads, num_blocks;
  float softmax_scale, scale_log2;
  TokenTensor dk, dv;
  bool fp16;
  float* dq_sum;  // fast mode
};

template <int D, int kStages>
struct DkdvRing {
  alignas(kSharedAlignment) E4m3 q8[kStages][Fp8Half<D>::kElements];
  alignas(kSharedAlignment) Bf16 q[kStages][Half<D>::kElements];
  alignas(kSharedAlignment) Bf16 d_out[kStages][Half<D>::kElements];
  alignas(128) float facts[kStages][kNumRowFacts * kQueryRows];
  static constexpr uint32_t kStageBytes = Fp8Half<D>::kBytes + 2 * Half<D>::kBytes + kRowFactsBytes;
};

// Policy: dQ is left to its own kernel (dq_kernel.h), nothing is reduced across CTAs: same bits on every run.
template <int D>
struct SeparateDq {
  static constexpr int kStages = 3;
  static constexpr bool kReducesDq = false;
  struct Storage {};
};

// Policy: dQ is summed in FP32 by the copy engine. The order of the sums, and so the last bits, varies from run to run.
template <int D>
struct ReducedDq {
  static constexpr int kStages = 2;
  static constexpr bool kReducesDq = true;
  using KeyPanels = Tile<Bf16, kBlockSlots, D, D / 2>;  // panel w: the columns of warpgroup w
  using KeyPanel = Tile<Bf16, kBlockSlots, D / 2>;
  using Ds = Tile<Bf16, kBlockSlots, kQueryRows>;  // [key][query]
  struct Storage {
    alignas(kSharedAlignment) Bf16 k[kConsumerWarpgroups][KeyPanel::kElements];
    alignas(kSharedAlignment) Bf16 ds[2][Ds::kElements];  // by parity of the step: the other warpgroup may lag by one
    alignas(128) float sum[kConsumerWarpgroups][kQueryRows * D / 2];  // accumulators on their way out
  };
};

template <int D, template <int> class DqPolicy>
struct DkdvStorage {
  alignas(kSharedAlignment) E4m3 k8[Fp8Block<D>::kElements];
  alignas(kSharedAlignment) Bf16 v[Block<D>::kElements];
  DkdvRing<D, DqPolicy<D>::kStages> ring;
  typename DqPolicy<D>::Storage dq;
  int query_half[DqPolicy<D>::kStages];  // whose queries are in the ring: index of the half block among all
  Mbarrier keys_loaded;
  Mbarrier full[DqPolicy<D>::kStages];
  Mbarrier empty[DqPolicy<D>::kStages];
};

// The producer: one thread.
template <int D, template <int> class DqPolicy>
__device__ __forceinline__ void produce_queries(const DkdvArgs& args, DkdvStorage<D, DqPolicy>& smem, int head,
                                                int block, const int32_t* list, int count) {
  using Policy = DqPolicy<D>;
  using Ring = DkdvRing<D, Policy::kStages>;
  const int key_row = (head * args.num_blocks + block) * kBlockSlots;
  smem.keys_loaded.arrive_and_expect_tx(Fp8Block<D>::kBytes + (Policy::kReducesDq ? 2 : 1) * Block<D>::kBytes);
  load_tile<Fp8Block<D>>(smem.k8, args.k8, smem.keys_loaded, key_row);
  load_tile<Block<D>>(smem.v, args.v, smem.keys_loaded, key_row);
  if constexpr (Policy::kReducesDq) {
    load_tile<typename Policy::KeyPanels>(smem.dq.k[0], args.k, smem.keys_loaded, key_row);
  }
  RingPosition<Policy::kStages> at;
  for (int i = 0; i < count; ++i) {
    const int query_block = list[i];
    trap_if(static_cast<unsigned>(query_block) >= static_cast<unsigned>(args.num_blocks));
    for (int half = 0; half < kHalves; ++half) {
      const int row = (head * args.num_blocks + query_block) * kBlockSlots + half * kQueryRows;
      smem.empty[at.stage].wait(at.parity ^ 1);
      if constexpr (Policy::kReducesDq) {
        smem.query_half[at.stage] = row / kQueryRows;
      }
      Mbarrier& full = smem.full[at.stage];
      full.arrive_and_expect_tx(Ring::kStageBytes);
      load_tile<Fp8Half<D>>(smem.ring.q8[at.stage], args.q8, full, row);
      bulk_load(smem.ring.facts[at.stage], args.row_facts + int64_t(row) * kNumRowFacts, kRowFactsBytes, full);
      load_tile<Half<D>>(smem.ring.d_out[at.stage], args.d_out, full, row);
      load_tile<Half<D>>(smem.ring.q[at.stage], args.q, full, row);
      at.advance();
    }
  }
}

// kCodes: the keys are in code slots. s: S^T in, p out (FP32); packed: p as the A operand of dV. sk: scales of this thread's two keys.
template <bool kCodes>
__device__ __forceinline__ void probabilities(float (&s)[32], uint32_t (&packed)[16], const float* facts,
                                              const float (&sk)[2], float scale_log2) {
  const int quad_lane = threadIdx.x % 4;
#pragma unroll
  for (int j = 0; j < kQueryRows / 8; ++j) {
    const int column = 8 * j + 2 * quad_lane;
    const float2 sq = *reinterpret_cast<const float2*>(facts + kQueryScale * kQueryRows + column);
    const float2 shift = *reinterpret_cast<const float2*>(facts + kExponentShift * kQueryRows + column);
    const float2 inverse = *reinterpret_cast<const float2*>(facts + kInverseSum * kQueryRows + column);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float* pair = s + 4 * j + 2 * r;
      const float2 p = quantized_probabilities(fmaf(pair[0], sq.x * sk[r] * scale_log2, shift.x),
                                               fmaf(pair[1], sq.y * sk[r] * scale_log2, shift.y), kCodes);
      pair[0] = p.x * inverse.x;
      pair[1] = p.y * inverse.y;
      packed[2 * j + r] = pack_bf16(pair[0], pair[1]);
    }
  }
}

// The consumers: one warpgroup.
template <int D, template <int> class DqPolicy>
struct DkdvConsumer {
  using Policy = DqPolicy<D>;
  const DkdvArgs& args;
  DkdvStorage<D, DqPolicy>& smem;
  int warpgroup;
  float sk[2];
  float dk[D / 2];
  float dv[D / 2];

  // Columns 8 group + 2 q, + 1 of dS^T * s_k, key first_key + 8 * half, to shared memory, for dQ.
  __device__ __forceinline__ void write_ds(int buffer, int first_key, int group, int half, uint32_t pair) const {
    using Ds = typename Policy::Ds;  // a swizzle is linear in the bits of an index, and these have none in common
    const int own_index = Ds::index(first_key, threadIdx.x % 4 * 2);
    const int index = (own_index ^ Ds::index(0, 8 * group)) + Ds::index(8 * half, 0);
    *reinterpret_cast<uint32_t*>(smem.dq.ds[buffer] + index) = pair;
  }

  __device__ __forceinline__ void step(int stage, int buffer, int first_key) {
    float s[32], dp[32];
    const float* facts = smem.ring.facts[stage];

    keep_registers(s);
    keep_registers(dp);
    warpgroup_arrive();
    multiply_rows<Fp8Block<D>, Fp8Half<D>>(s, Fp8Block<D>::descriptor(smem.k8) + warpgroup * Fp8Block<D>::step(64, 0),
                                           Fp8Half<D>::descriptor(smem.ring.q8[stage]));
    warpgroup_commit_batch();
    multiply_rows<Block<D>, Half<D>>(dp, Block<D>::descriptor(smem.v) + warpgroup * Block<D>::step(64, 0),
                                     Half<D>::descriptor(smem.ring.d_out[stage]));
    warpgroup_commit_batch();
    warpgroup_wait<1>();  // S
    keep_registers(s);

    uint32_t p_packed[16];
    if (is_code_slot<D>(first_key)) {  // a whole warp's keys, or none
      probabilities<true>(s, p_packed, facts, sk, args.scale_log2);
    } else {
      probabilities<false>(s, p_packed, facts, sk, args.scale_log2);
    }
    keep_registers(p_packed);
    keep_registers(dv);
    warpgroup_arrive();
    accumulate_registers<Half<D>>(dv, p_packed, Half<D>::template descriptor<Major::MN>(smem.ring.d_out[stage]));
    warpgroup_commit_batch();
    warpgroup_wait<1>();  // dP
    keep_registers(dp);

    uint32_t ds_packed[16];
    const int quad_lane = threadIdx.x % 4;
#pragma unroll
    for (int j = 0; j < kQueryRows / 8; ++j) {
      const int column = 8 * j + 2 * quad_lane;
      const float2 sq = *reinterpret_cast<const float2*>(facts + kQueryScale * kQueryRows + column);
      const float2 delta = *reinterpret_cast<const float2*>(facts + kDelta * kQueryRows + column);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int i = 4 * j + 2 * r;
        const float ds0 = s[i] * (dp[i] - delta.x);
        const float ds1 = s[i + 1] * (dp[i + 1] - delta.y);
        ds_packed[2 * j + r] = pack_bf16(ds0 * sq.x, ds1 * sq.y);
        if constexpr (Policy::kReducesDq) {
          write_ds(buffer, first_key, j, r, pack_bf16(ds0 * sk[r], ds1 * sk[r]));
        }
      }
    }
    keep_registers(ds_packed);
    keep_registers(dk);
    warpgroup_arrive();
    accumulate_registers<Half<D>>(dk, ds_packed, Half<D>::template descriptor<Major::MN>(smem.ring.q[stage]));
    warpgroup_commit_batch();
    if constexpr (Policy::kReducesDq) {
      add_to_dq(buffer, stage);
    } else {
      warpgroup_wait<0>();
      keep_registers(dv);
      keep_registers(dk);
      release(stage);
    }
  }

  __device__ __forceinline__ void release(int stage) const {
    if (threadIdx.x % 32 == 0) {
      smem.empty[stage].arrive();
    }
  }

  // dQ[64 queries, columns of this warpgroup] += (dS s_k) K8 over all 128 keys.
  __device__ __forceinline__ void add_to_dq(int buffer, int stage) {
    fence_async_shared();
    NamedBarrier::sync(kConsumerWarpgroups * kWarpgroupThreads, kDsWritten);
    using Ds = typename Policy::Ds;
    using KeyPanel = typename Policy::KeyPanel;
    const int query_half = smem.query_half[stage];
    float dq[D / 4];
    keep_registers(dq);
    warpgroup_arrive();
    multiply_columns<Ds, KeyPanel>(dq, Ds::template descriptor<Major::MN>(smem.dq.ds[buffer]),
                                   KeyPanel::template descriptor<Major::MN>(smem.dq.k[warpgroup]));
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
          make_float4(dq[4 * j], dq[4 * j + 1], dq[4 * j + 2], dq[4 * j + 3]);
    }
    fence_async_shared();
    NamedBarrier::sync(kWarpgroupThreads, kSumStaged + warpgroup);
    if (thread == 0) {
      constexpr int kFloats = kQueryRows * D / 2;
      bulk_reduce_add(args.dq_sum + (int64_t{query_half} * kConsumerWarpgroups + warpgroup) * kFloats, sum,
                      kFloats * int(sizeof(float)));
      bulk_commit();
    }
  }

  enum BarrierId : uint32_t { kDsWritten = 1, kSumStaged = 2 };  // and 3
};

// Grid: x = KV block, last first (text tiles have the longest lists and come last in slot order), y = head, z = batch.
template <int D, template <int> class DqPolicy>
__global__ void __launch_bounds__(kThreads, 1) dkdv_kernel(const __grid_constant__ DkdvArgs args) {
  using Policy = DqPolicy<D>;
  extern __shared__ __align__(kSharedAlignment) uint8_t dynamic_shared[];
  auto& smem = declared_storage<DkdvStorage<D, DqPolicy>>(dynamic_shared);
  const int block = args.num_blocks - 1 - static_cast<int>(blockIdx.x);
  const int h = blockIdx.y, b = blockIdx.z;
  const int head = b * args.heads + h;

  if (threadIdx.x == 0) {
    smem.keys_loaded.init(1);
    for (int stage = 0; stage < Policy::kStages; ++stage) {
      smem.full[stage].init(1);
      smem.empty[stage].init(kConsumerWarps);
    }
    fence_barrier_init();
  }
  __syncthreads();

  const int64_t row = list_row(args.queries, b, h, block);
  const int count = args.queries.num_blocks[row];
  const int32_t* list = args.queries.indices + row * args.queries.max_blocks;
  trap_if(count < 0 || count > args.queries.max_blocks);

  if (threadIdx.x < kWarpgroupThreads) {
    warpgroup_reg_dealloc<kProducerRegisters>();
    if (threadIdx.x == 0) {
      produce_queries<D, DqPolicy>(args, smem, head, block, list, count);
    }
    return;
  }

  warpgroup_reg_alloc<kConsumerRegisters>();
  const int thread = threadIdx.x % kWarpgroupThreads;
  const int warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / kWarpgroupThreads - 1, 0);
  const int first_key = warpgroup * 64 + accumulator_row(thread, 0);  // and first_key + 8
  const int slot = block * kBlockSlots + first_key;
  const float* k_scale = args.k_scale + int64_t(head) * args.num_blocks * kBlockSlots + slot;
  DkdvConsumer<D, DqPolicy> consumer{args, smem, warpgroup, {k_scale[0], k_scale[8]}, {}, {}};

  smem.keys_loaded.wait(0);
  RingPosition<Policy::kStages> at;
  for (int i = 0; i < count * kHalves; ++i) {
    smem.full[at.stage].wait(at.parity);
    consumer.step(at.stage, i & 1, first_key);
    at.advance();
  }

  if constexpr (Policy::kReducesDq) {
    if (thread == 0) {
      bulk_wait<0>();
    }
  }
  const int tokens[2] = {args.token_of_slot[slot], args.token_of_slot[slot + 8]};
  store_rows<D>(consumer.dv, 1.0f, args.dv, args.head_dim, args.fp16, b, h, tokens);
  store_rows<D>(consumer.dk, args.softmax_scale, args.dk, args.head_dim, args.fp16, b, h, tokens);
}

}  // namespace fpsattn::sm90::backward
