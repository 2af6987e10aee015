// Reductions: over the lanes that share a row, over a CTA, over the cluster that shares a tile.
#pragma once

#include <cooperative_groups.h>

#include "common/fp8.h"
#include "quantize/sm90/config.h"

namespace fpsattn::sm90::quantization {

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
  for (int offset = 16; offset > 0; offset /= 2) {
    value = absmax_nan(value, __shfl_xor_sync(0xffffffffu, value, offset));
  }
  if (threadIdx.x % 32 == 0) {
    scratch[threadIdx.x / 32] = value;
  }
  __syncthreads();
#pragma unroll
  for (int warp = 0; warp < kThreads / 32; ++warp) {
    value = absmax_nan(value, scratch[warp]);
  }
  return value;
}

// The same over the first `ctas` CTAs of the cluster; the others have exited. Two cluster barriers: `maximum_written`
// here; `maximum_read` is arrived at here and waited for by leave_cluster(), so that no CTA exits while another reads
// its memory.
__device__ __forceinline__ float cluster_absmax(float value, float* shared_maximum, int ctas) {
  namespace cg = cooperative_groups;
  cg::cluster_group cluster = cg::this_cluster();
  if (threadIdx.x == 0) {
    *shared_maximum = value;
  }
  cluster.sync();  // maximum_written
#pragma unroll 1   // the patch leaves no registers for more
  for (int rank = 0; rank < ctas; ++rank) {
    value = absmax_nan(value, *cluster.map_shared_rank(shared_maximum, rank));
  }
  cluster.barrier_arrive();  // maximum_read
  return value;
}

__device__ __forceinline__ void leave_cluster() {
  cooperative_groups::this_cluster().barrier_wait();  // maximum_read
}

}  // namespace fpsattn::sm90::quantization
