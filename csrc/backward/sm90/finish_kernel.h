// Backward, fast mode, after the main kernel: dQ from FP32 sums to token order and the gradients' dtype. Memory-bound.
//
// dq_sum holds, per half block (64 queries) and warpgroup w of the main kernel (columns w D/2 ..), float4
// [D / 16][128 threads] in accumulator order (common/sm90/mma.h): entry j of thread 32w + 4g + q is row 16w + g,
// columns 8j + 2q, +1, then row 16w + g + 8, same columns.
// One CTA of 256 threads per half block; a thread stores 8 columns of a row.
#pragma once

#include "backward/sm90/config.h"
#include "backward/sm90/elementwise.h"

namespace fpsattn::sm90::backward {

inline constexpr int kFinishThreads = 256;

// Grid: x = half block, y = query head of the workspace.
template <int D>
__global__ void __launch_bounds__(kFinishThreads) finish_kernel(const __grid_constant__ Round round) {
  const BackwardParams& params = round.params;
  const Side& queries = round.queries;
  const int all_heads = queries.first_head + blockIdx.y, b = all_heads / queries.heads, h = all_heads % queries.heads;
  const int64_t half_block = int64_t(blockIdx.y) * queries.num_blocks * kHalves + blockIdx.x;
  const float* sums = round.space.dq_sum + half_block * kQueryRows * D;
  constexpr int kRowThreads = D / 8;
  for (int i = threadIdx.x; i < kQueryRows * kRowThreads; i += kFinishThreads) {
    const int row = i / kRowThreads, group = i % kRowThreads;  // group of 8 columns
    const int token = slots_of(queries.token_of_slot, all_heads)[blockIdx.x * kQueryRows + row];
    if (token < 0 || 8 * group >= params.size.head_dim) {
      continue;
    }
    const int warpgroup = group / (kRowThreads / 2), j = group % (kRowThreads / 2);
    const int first_thread = row / 16 * 32 + row % 8 * 4;
    const float* quad = sums + ((warpgroup * (D / 16) + j) * kWarpgroupThreads + first_thread) * 4 + row % 16 / 8 * 2;
    uint32_t w[4];
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      w[q] = pack_16bit(params.softmax_scale * quad[4 * q], params.softmax_scale * quad[4 * q + 1],
                        params.dtype == DType::kFloat16);
    }
    store_8(params.dq, token_offset(params.dq, b, h, token), group * 8, w);
  }
}

}  // namespace fpsattn::sm90::backward
