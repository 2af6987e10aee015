// Reductions: over the lanes that share a row, over a CTA, over the cluster that shares a tile.
#pragma once

#include <cute/arch/cluster_sm90.hpp>

#include "common/fp8.h"
#include "common/sm90/mbarrier.h"
#include "quantize/sm90/config.h"

namespace fpsattn::sm90::quantize {

// Reduces 16 values at once over the kLanes = D/8 lanes that share 16 rows: `values[i]` is this lane's part of row i;
// afterwards lane l of the group owns the totals of rows l * kRowsPerLane + j in values[j]. A step exchanges half of
// what is left, so that 16 totals take 15 shuffles (14 for 8 lanes) instead of 64. Same order of operations on every
// call.
template <int kLanes, int kCount = kPatchSlots, class Op>
__device__ __forceinline__ void transpose_reduce(float (&values)[kPatchSlots], int lane, Op op) {
  if constexpr (kLanes > 1) {
    constexpr int kHalf = kCount / 2, kOffset = kLanes / 2;
    const bool upper = lane & kOffset;
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      const float kept = upper ? values[i + kHalf] : values[i];
      const float sent = upper ? values[i] : values[i + kHalf];
      values[i] = op(kept, __shfl_xor_sync(0xffffffffu, sent, kOffset));
    }
    transpose_reduce<kOffset, kHalf>(
        values, lane, op);  // a template, not a loop: every index is a constant, values stay in registers
  }
}

// Largest value (NaN wins) over the CTA; every thread returns it. `scratch` holds one float per warp.
template <int kThreads>
__device__ __forceinline__ float cta_absmax(float value, float* scratch) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) value = absmax_nan(value, __shfl_xor_sync(0xffffffffu, value, offset));
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();
#pragma unroll
  for (int warp = 0; warp < kThreads / 32; ++warp) value = absmax_nan(value, scratch[warp]);
  return value;
}

// The maxima that the CTAs of a cluster send each other; a copy in the shared memory of each.
struct ClusterMaximum {
  Mbarrier received;  // `from` is complete
  float from[kMaxClusterSize];
};

// Before the first load, so that nobody waits later. cluster_absmax may send once every CTA has been here.
__device__ __forceinline__ void open_exchange(ClusterMaximum& exchange, int ctas) {
  if (threadIdx.x == 0) {
    exchange.received.init(1);
    fence_barrier_init();
    exchange.received.arrive_and_expect_tx(ctas * sizeof(float));
  }
  __syncwarp();
  cute::cluster_arrive_relaxed();  // exchange_open
}

// cta_absmax over the first `ctas` CTAs of the cluster; the others have exited. Thread i sends this CTA's maximum to
// CTA i. A CTA leaves when it has received: nothing is under way to it then, and nobody reads its memory.
__device__ __forceinline__ float cluster_absmax(float value, ClusterMaximum& exchange, int ctas) {
  cute::cluster_wait();  // exchange_open
  if (threadIdx.x < ctas) {
    cute::store_shared_remote(__float_as_uint(value), shared_address(&exchange.from[cute::block_rank_in_cluster()]),
                              shared_address(&exchange.received), threadIdx.x);
  }
  exchange.received.wait(0);
  const int rank = threadIdx.x % kMaxClusterSize;
  value = rank < ctas ? exchange.from[rank] : 0.0f;
#pragma unroll
  for (int offset = kMaxClusterSize / 2; offset > 0; offset /= 2) {
    value = absmax_nan(value, __shfl_xor_sync(0xffffffffu, value, offset));
  }
  return value;
}

}  // namespace fpsattn::sm90::quantize
