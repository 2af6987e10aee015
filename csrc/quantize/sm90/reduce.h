// Reductions: over the lanes that share a row, over a CTA, over the cluster that shares a tile.
#pragma once

#include <cooperative_groups.h>

#include "common/fp8.h"
#include "quantize/sm90/config.h"

namespace fpsattn::sm90::quantization {

// Reduces 16 values at once over the kChunks lanes that share 16 rows: `values[i]` is this lane's part of row i; afterwards
// lane l of the group owns the totals of rows l * kRowsPerLane + j in values[j]. A step exchanges half of what is left, so that 16
// totals take 15 shuffles (14 for 8 lanes) instead of 64. Same order of operations on every call.
template <class Config, class Op>
__device__ __forceinline__ void transpose_reduce(float (&values)[kPatchSlots], int lane, Op op) {
#pragma unroll
  for (int half = kPatchSlots / 2, offset = Config::kChunks / 2; offset > 0; half /= 2, offset /= 2) {
    const bool upper = lane & offset;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const float kept = upper ? values[i + half] : values[i];
      const float sent = upper ? values[i] : values[i + half];
      values[i] = op(kept, __shfl_xor_sync(0xffffffffu, sent, offset));
    }
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

// The same over the first `ctas` CTAs of the cluster; the others have exited. Two cluster barriers: `maximum_written` here;
// `maximum_read` is arrived at here and waited for by leave_cluster(), so that no CTA exits while another reads its memory.
__device__ __forceinline__ float cluster_absmax(float value, float* shared_maximum, int ctas) {
  namespace cg = cooperative_groups;
  cg::cluster_group cluster = cg::this_cluster();
  if (threadIdx.x == 0) {
    *shared_maximum = value;
  }
  cluster.sync();  // maximum_written
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
