// Straight-through backward, KV-major: dK and dV of one block of 128 keys; in fast mode dQ on the side. sm_90a.
//
//   S^T = K8 Q8^T (e4m3, the forward's product)      p = e4m3(2^(S s_q s_k scale log2e - m + 8)) / l
//   dV += p^T dO        dP^T = V~ dO^T               dS = p (dP - delta)
//   dK += (dS s_q)^T Q8, times scale at the end      dQ += (dS s_k) K8, times scale at the end (fast mode)
//
// Shapes     q8, k8 e4m3 [B, H, num_blocks, 128, D]; workspace (config.h): Q8, K8, V~, dO as BF16 [slots, D], row facts
// Tiles      128 keys x 64 queries x D; consumer warpgroup w owns keys 64w..64w+63: its P^T, dS^T are A operands in
//            registers
// Layouts    e4m3: one panel of D bytes. BF16: panels of 64 columns, 128-byte swizzle, read K-major (dP) and MN-major
//            (dV, dK) alike. The scales are folded into dS before it is rounded to BF16: the e4m3 values stay exact.
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
//                       (peak 215, fast 228); 232 allowed, 40 for the producer. No spill in the loop.
//            shared     D = 128: K8 16K + V~ 32K + 3 stages x 41K = 171K
//                       fast: 2 stages + K16 32K + dS 2 x 16K + dQ 32K = 226K
//            clocks of an SM per 128 x 64 tile, D = 128 (sassbudget): tensor 1792, shared memory 1920, issue 982,
//                       EX2 512. Fast: tensor 2304, shared memory 2816, issue 1290. Limit: shared memory.
//
// Invariants list entries are < num_blocks (trapped on otherwise); a padding query has 1/l = 0 and dO = 0, so
//            p = dS = 0; rows of padding keys are computed and never stored; K16 is 0 there: they add nothing to dQ.
//            An empty list stores dK = dV = 0.
#pragma once

#include "backward/sm90/config.h"
#include "backward/sm90/elementwise.h"
#include "backward/sm90/lists.h"
#include "backward/sm90/mma.h"
#include "common/device_check.h"
#include "common/tma.h"

namespace fpsattn::sm90::bwd {

struct DkdvArgs {
  CUtensorMap k8, v;         // boxes of 128 rows
  CUtensorMap q8, q, d_out;  // boxes of 64 rows
  CUtensorMap k;             // fast mode: boxes of 128 rows, panels of D / 2 columns
  const float* row_facts;
  const float* k_scale;
  const int32_t* token_of_slot;
  DeviceLists queries;  // rows = KV blocks, entries = query blocks
  int heads, num_blocks;
  float softmax_scale, scale_log2e;
  GradientTensor dk, dv;
  float* dq_sum;  // fast mode
};

template <int D, int kStages>
struct DkdvRing {
  alignas(1024) uint8_t q8[kStages][kQueryRows * D];
  alignas(1024) uint16_t q[kStages][kQueryRows * D];
  alignas(1024) uint16_t d_out[kStages][kQueryRows * D];
  alignas(128) float facts[kStages][kNumRowFacts * kQueryRows];
  static constexpr int kStageBytes = kQueryRows * D * 5 + kRowFactsBytes;
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
  struct Storage {
    alignas(1024) uint16_t k[kBlockSlots * D];  // panel w: columns of warpgroup w
    // [key][query], 128-byte swizzle, one per parity of the step: a warpgroup may be a step ahead of the other's reads.
    alignas(1024) uint16_t ds[2][kBlockSlots * kQueryRows];
    alignas(128) float sum[kConsumerWarpgroups][kQueryRows * D / 2];  // accumulators on their way out
  };
};

template <int D, template <int> class DqPolicy>
struct DkdvStorage {
  alignas(1024) uint8_t k8[kBlockSlots * D];
  alignas(1024) uint16_t v[kBlockSlots * D];
  DkdvRing<D, DqPolicy<D>::kStages> ring;
  typename DqPolicy<D>::Storage dq;
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
  smem.keys_loaded.arrive_expect_bytes(kBlockSlots * D * (Policy::kReducesDq ? 5 : 3));
  tma_load_2d(smem.k8, &args.k8, &smem.keys_loaded, 0, key_row);
  tma_load_3d(smem.v, &args.v, &smem.keys_loaded, 0, key_row, 0);
  if constexpr (Policy::kReducesDq) {
    tma_load_3d(smem.dq.k, &args.k, &smem.keys_loaded, 0, key_row, 0);
  }
  RingPosition<Policy::kStages> at;
  for (int i = 0; i < count; ++i) {
    const int query_block = list[i];
    trap_if(static_cast<unsigned>(query_block) >= static_cast<unsigned>(args.num_blocks));
    for (int half = 0; half < kHalves; ++half) {
      const int row = (head * args.num_blocks + query_block) * kBlockSlots + half * kQueryRows;
      smem.empty[at.stage].wait(at.parity ^ 1);
      Mbarrier* full = &smem.full[at.stage];
      full->arrive_expect_bytes(Ring::kStageBytes);
      tma_load_2d(smem.ring.q8[at.stage], &args.q8, full, 0, row);
      bulk_load(smem.ring.facts[at.stage], args.row_facts + int64_t(row) * kNumRowFacts, kRowFactsBytes, full);
      tma_load_3d(smem.ring.d_out[at.stage], &args.d_out, full, 0, row, 0);
      tma_load_3d(smem.ring.q[at.stage], &args.q, full, 0, row, 0);
      at.advance();
    }
  }
}

// s: S^T in, p out (FP32); packed: p as the A operand of dV. sk: scales of this thread's two keys.
__device__ __forceinline__ void probabilities(float (&s)[32], uint32_t (&packed)[16], const float* facts,
                                              const float (&sk)[2], float scale_log2e) {
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
      const float2 p = quantized_probabilities(fmaf(pair[0], sq.x * sk[r] * scale_log2e, shift.x),
                                               fmaf(pair[1], sq.y * sk[r] * scale_log2e, shift.y));
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

  // dS^T * s_k of this thread to shared memory, for dQ: pairs of queries in row `key`.
  __device__ __forceinline__ void write_ds(int buffer, int key, int group, uint32_t pair) const {
    char* row = reinterpret_cast<char*>(smem.dq.ds[buffer]) + key * 128;
    *reinterpret_cast<uint32_t*>(row + ((group ^ (key & 7)) << 4) + threadIdx.x % 4 * 4) = pair;
  }

  __device__ __forceinline__ void step(int stage, int buffer, int first_key, int64_t query_half) {
    float s[32], dp[32];
    const float* facts = smem.ring.facts[stage];
    const uint64_t d_out = tile_descriptor<128>(smem.ring.d_out[stage], kQueryRows * 128);
    const uint64_t q_columns = tile_descriptor<128>(smem.ring.q[stage], kQueryRows * 128);

    keep_registers(s);
    keep_registers(dp);
    wgmma_fence();
    multiply_fp8<D>(s, tile_descriptor<D>(smem.k8 + warpgroup * 64 * D), tile_descriptor<D>(smem.ring.q8[stage]));
    wgmma_commit();
    multiply_rows<D>(dp, tile_descriptor<128>(smem.v + warpgroup * 64 * kPanelColumns), kBlockSlots * 128, d_out,
                     kQueryRows * 128);
    wgmma_commit();
    wgmma_wait<1>();  // S
    keep_registers(s);

    uint32_t p_packed[16];
    probabilities(s, p_packed, facts, sk, args.scale_log2e);
    keep_registers(p_packed);
    keep_registers(dv);
    wgmma_fence();
    accumulate_registers<kQueryRows>(dv, p_packed, d_out);
    wgmma_commit();
    wgmma_wait<1>();  // dP
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
          write_ds(buffer, first_key + 8 * r, j, pack_bf16(ds0 * sk[r], ds1 * sk[r]));
        }
      }
    }
    keep_registers(ds_packed);
    keep_registers(dk);
    wgmma_fence();
    accumulate_registers<kQueryRows>(dk, ds_packed, q_columns);
    wgmma_commit();
    if constexpr (Policy::kReducesDq) {
      add_to_dq(buffer, stage, query_half);
    } else {
      wgmma_wait<0>();
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
  __device__ __forceinline__ void add_to_dq(int buffer, int stage, int64_t query_half) {
    fence_async_shared();
    named_barrier_sync(kDsWritten, kConsumerWarpgroups * kWarpgroupThreads);
    float dq[D / 4];
    keep_registers(dq);
    wgmma_fence();
    multiply_columns<kBlockSlots, D>(dq, tile_descriptor<128>(smem.dq.ds[buffer]),
                                     tile_descriptor<D>(smem.dq.k + warpgroup * kBlockSlots * D / 2));
    wgmma_commit();
    wgmma_wait<0>();
    keep_registers(dv);
    keep_registers(dk);
    keep_registers(dq);
    release(stage);

    const int thread = threadIdx.x % kWarpgroupThreads;
    float* sum = smem.dq.sum[warpgroup];
    if (thread == 0) {
      bulk_wait_read<0>();  // of the previous step
    }
    named_barrier_sync(kSumStaged + warpgroup, kWarpgroupThreads);
#pragma unroll
    for (int j = 0; j < D / 16; ++j) {
      reinterpret_cast<float4*>(sum)[j * kWarpgroupThreads + thread] =
          make_float4(dq[4 * j], dq[4 * j + 1], dq[4 * j + 2], dq[4 * j + 3]);
    }
    fence_async_shared();
    named_barrier_sync(kSumStaged + warpgroup, kWarpgroupThreads);
    if (thread == 0) {
      constexpr int kFloats = kQueryRows * D / 2;
      bulk_reduce_add(args.dq_sum + (query_half * kConsumerWarpgroups + warpgroup) * kFloats, sum,
                      kFloats * int(sizeof(float)));
      bulk_commit();
    }
  }

  enum NamedBarrier { kDsWritten = 1, kSumStaged = 2 };
};

// Grid: x = KV block, last first (text tiles have the longest lists and come last in slot order), y = head, z = batch.
template <int D, template <int> class DqPolicy>
__global__ void __launch_bounds__(kThreads, 1) dkdv_kernel(const __grid_constant__ DkdvArgs args) {
  using Policy = DqPolicy<D>;
  extern __shared__ __align__(1024) uint8_t shared_bytes[];
  auto& smem = *reinterpret_cast<DkdvStorage<D, DqPolicy>*>(shared_bytes);
  const int block = args.num_blocks - 1 - static_cast<int>(blockIdx.x);
  const int h = blockIdx.y, b = blockIdx.z;
  const int head = b * args.heads + h;

  if (threadIdx.x == 0) {
    smem.keys_loaded.init(1);
    for (int stage = 0; stage < Policy::kStages; ++stage) {
      smem.full[stage].init(1);
      smem.empty[stage].init(kConsumerWarps);
    }
    fence_mbarrier_init();
  }
  __syncthreads();

  const int64_t list_row = args.queries.row(b, h, block);
  const int count = args.queries.num_blocks[list_row];
  const int32_t* list = args.queries.indices + list_row * args.queries.max_blocks;
  trap_if(count < 0 || count > args.queries.max_blocks);

  if (threadIdx.x < kWarpgroupThreads) {
    release_registers<kProducerRegisters>();
    if (threadIdx.x == 0) {
      produce_queries<D, DqPolicy>(args, smem, head, block, list, count);
    }
    return;
  }

  acquire_registers<kConsumerRegisters>();
  const int thread = threadIdx.x % kWarpgroupThreads;
  const int warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / kWarpgroupThreads - 1, 0);
  const int first_key = warpgroup * 64 + thread / 32 * 16 + thread % 32 / 4;  // and first_key + 8
  const int slot = block * kBlockSlots + first_key;
  const float* k_scale = args.k_scale + int64_t(head) * args.num_blocks * kBlockSlots + slot;
  DkdvConsumer<D, DqPolicy> consumer{args, smem, warpgroup, {k_scale[0], k_scale[8]}, {}, {}};

  smem.keys_loaded.wait(0);
  RingPosition<Policy::kStages> at;
  for (int i = 0; i < count * kHalves; ++i) {
    int64_t query_half = 0;
    if constexpr (Policy::kReducesDq) {
      query_half = (int64_t(head) * args.num_blocks + list[i / kHalves]) * kHalves + i % kHalves;
    }
    smem.full[at.stage].wait(at.parity);
    consumer.step(at.stage, i & 1, first_key, query_half);
    at.advance();
  }

  if constexpr (Policy::kReducesDq) {
    if (thread == 0) {
      bulk_wait<0>();
    }
  }
  const int tokens[2] = {args.token_of_slot[slot], args.token_of_slot[slot + 8]};
  store_rows<D>(consumer.dv, 1.0f, args.dv, b, h, tokens);
  store_rows<D>(consumer.dk, args.softmax_scale, args.dk, b, h, tokens);
}

}  // namespace fpsattn::sm90::bwd
