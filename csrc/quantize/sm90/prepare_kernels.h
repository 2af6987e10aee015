// Quantization of raw projections: what quantize does (kernel.h, statistics.h), of q and k after norm and RoPE.
//
// factor_kernel         norm across heads only: reads q and k once. CTA = 8 tokens, a warp each; grid (tokens, q or k, batch)
// prepared_mean_kernel  partial sums of the prepared K, every stride-th token; as statistics_kernel otherwise
// prepare_kernel        as quantize_kernel; a patch of q or k is prepared on its way from registers to shared memory, and
//                       maximum, sums, dots and codes are taken from there. V goes as in quantize.
// The partial maxima of V and the finish kernel are quantize's.
//
// Bytes    ideal: q and k once (norm across heads: twice), K's subsample, V twice, codes once
// Budget   prepare_kernel, D = 128: 64 KiB of shared memory, so 3 CTAs an SM, 168 registers a thread, no spills; in flight
//          16 loads of 16 bytes a thread, 96 KiB an SM. The tables and weights come from L1 and L2: 64 bytes a row and lane
//          more than quantize loads, once a row
// Invariants those of kernel.h; weights and tables are 16-byte aligned
#pragma once

#include "quantize/sm90/kernel.h"
#include "quantize/sm90/norm_rope.h"
#include "quantize/sm90/statistics.h"

namespace fpsattn::sm90::quantize {

inline constexpr int kFactorWarps = 8;

// Sum over the kLanes lanes that share a row; every one returns it.
template <int kLanes>
__device__ __forceinline__ float row_sum(float x) {
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) x = __fadd_rn(x, __shfl_xor_sync(0xffffffffu, x, offset));
  return x;
}

template <class Config>
__global__ void __launch_bounds__(32 * kFactorWarps)
    factor_kernel(const __grid_constant__ QuantizeParams params, float* q_factor, float* k_factor, float eps) {
  constexpr int kHeads = 32 / Config::kChunks;  // that a warp reads at a time
  constexpr int kUnroll = 4;
  const int lane = threadIdx.x % 32, chunk = lane % Config::kChunks, lane_head = lane / Config::kChunks;
  const int token = blockIdx.x * kFactorWarps + threadIdx.x / 32, batch = blockIdx.z;
  if (token >= params.size.num_tokens) return;
  const TokenTensor& tensor = blockIdx.y == 0 ? params.k : params.q;
  const char* row = static_cast<const char*>(tensor.data) +
                    2 * (token_offset(tensor, batch, lane_head, token) + chunk * kPatchChannels);
  float across = 0.0f;
  const auto add = [&](const uint4& loaded) {
    float x[kPatchChannels];
    unpack<Config>(x, loaded);
    const float squares = row_sum<Config::kChunks>(sum_of_squares(x));
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {  // heads one after another; those that are not there add 0
      across = __fadd_rn(across, __shfl_sync(0xffffffffu, squares, h * Config::kChunks));
    }
  };
  int head = 0;
#pragma unroll 1
  for (; head + kHeads * kUnroll <= params.size.heads; head += kHeads * kUnroll) {
    uint4 loaded[kUnroll] = {};
    if (Config::has_chunk(chunk)) {
#pragma unroll
      for (int i = 0; i < kUnroll; ++i) loaded[i] = load_uncached(row + 2 * (head + i * kHeads) * tensor.stride_head);
    }
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) add(loaded[i]);
  }
#pragma unroll 1
  for (; head < params.size.heads; head += kHeads) {
    const bool there = Config::has_chunk(chunk) && head + lane_head < params.size.heads;
    add(there ? load_uncached(row + 2 * head * tensor.stride_head) : make_uint4(0, 0, 0, 0));
  }
  if (lane == 0) {
    float* factor = blockIdx.y == 0 ? k_factor : q_factor;
    factor[static_cast<int64_t>(batch) * params.size.num_tokens + token] =
        norm_factor(across, static_cast<float>(params.size.heads) * Config::kHeadDim, eps);
  }
}

template <class Config>
__global__ void __launch_bounds__(kStatisticsThreads, 3)
    prepared_mean_kernel(const __grid_constant__ QuantizeParams params, const __grid_constant__ Plan plan,
                         const __grid_constant__ NormRope how) {
  __shared__ float scratch[kStatisticsThreads * kPatchChannels];
  constexpr int kRowsAtATime = kStatisticsThreads / Config::kChunks;
  constexpr int kUnroll = 4;
  const int head = blockIdx.x, part = blockIdx.y, batch = blockIdx.z;
  const int chunk = threadIdx.x % Config::kChunks, row_lane = threadIdx.x / Config::kChunks;
  const int64_t first = static_cast<int64_t>(part) * kStatisticsRows;
  const int64_t last = min(first + kStatisticsRows, plan.k_rows);
  const TokenRows rows = token_rows(params.k, batch, head, chunk);
  const RowPreparer<Config> preparer(how, batch, head, chunk);
  float total[kPatchChannels] = {};
  const auto add = [&](const uint4& loaded, int token, bool there) {
    float x[kPatchChannels];
    unpack<Config>(x, loaded);
    float factor = 1.0f;
    if (how.norm == Norm::kRmsAcrossHeads) {
      factor = __ldg(how.factor + static_cast<int64_t>(batch) * params.size.num_tokens + token);
    } else if (how.norm != Norm::kNone) {
      if (how.norm == Norm::kLayer) {
        const float mean = __fdiv_rn(row_sum<Config::kChunks>(sum_of(x)), Config::kHeadDim);
#pragma unroll
        for (int c = 0; c < kPatchChannels; ++c) x[c] = Config::has_chunk(chunk) ? __fsub_rn(x[c], mean) : 0.0f;
      }
      factor = norm_factor(row_sum<Config::kChunks>(sum_of_squares(x)), Config::kHeadDim, how.eps);
    }
    preparer.prepare(x, token, factor);
#pragma unroll
    for (int c = 0; c < kPatchChannels; ++c) total[c] += there ? x[c] : 0.0f;
  };
#pragma unroll 1
  for (int64_t step = first; step < last; step += kRowsAtATime * kUnroll) {
    uint4 loaded[kUnroll] = {};
    // Beyond the last: the last, dropped
    const auto row_of = [&](int i) { return step + i * kRowsAtATime + row_lane; };
    const auto token_of = [&](int i) { return static_cast<int>(min(row_of(i), last - 1) * params.k_mean_stride); };
    if (Config::has_chunk(chunk)) {
#pragma unroll
      for (int i = 0; i < kUnroll; ++i) loaded[i] = rows.load(token_of(i));
    }
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) add(loaded[i], token_of(i), row_of(i) < last);
  }
  const int64_t batch_head = static_cast<int64_t>(batch) * params.size.heads + head;
  reduce_cta<Config>(total, plan.k_partial + (batch_head * plan.k_parts + part) * Config::kHeadDim, scratch, SumOp{});
}

// Q and K share their code, which is long: norm and RoPE of 16 rows, unrolled.
template <class Config>
__global__ void __launch_bounds__(Config::kThreads, 384 / Config::kThreads)
    prepare_kernel(const __grid_constant__ QuantizeParams params, const __grid_constant__ Plan plan,
                   const __grid_constant__ NormRope q, const __grid_constant__ NormRope k) {
  extern __shared__ float4 memory[];
  const WorkItem work = work_item(params, plan);
  if (work.first_block >= work.end_block) return;
  const Role role = static_cast<Role>(blockIdx.y);
  if (role == Role::kV) {
    quantize_columns_of<Config>(params, work);
  } else {
    quantize_rows<Config, PreparedRows<Config>>(params, work, role == Role::kQ, role == Role::kQ ? &q : &k, memory);
  }
}

}  // namespace fpsattn::sm90::quantize
