// Statistics of K and V, before anything can be quantized: mean of K and absmax of V per channel.
//
// statistics_kernel  reads every stride-th token of K and every token of V once, in token order.
//                    CTA = (head, 512 rows of K or of V, batch); 256 threads = 256 * 8 / C rows at a time x C/8 chunks
//                    of 8 channels (C = D, or 128 for D = 96: the last 4 idle); writes partial sums [B, H, k_parts, D] and partial maxima [B, H, v_parts, D] to the
//                    workspace
// finish_kernel      CTA = (head, batch); D x 8 threads add the partials up in a fixed order
//                    writes k_mean = sum / count (or the given one, or zeros) and v_scale = rule(absmax)
//
// No atomics: the same bits on every call. Sums are FP32; each thread adds at most 64 rows before a partial is formed.
// Budget: 8 x 16 bytes in flight per thread, 64 registers, 4 CTAs per SM: 128 KiB in flight per SM. Bytes: one read of
// what is used.
#pragma once

#include "common/fp8.h"
#include "quantize/sm90/patch.h"

namespace fpsattn::sm90::quantize {

struct SumOp {
  __device__ __forceinline__ float operator()(float a, float x) const { return a + x; }
};
struct AbsMaxOp {
  __device__ __forceinline__ float operator()(float a, float x) const { return absmax_nan(a, x); }
};

// Of a thread's totals of 8 channels those of the CTA: D floats.
template <class Config, class Op>
__device__ __forceinline__ void reduce_cta(const float (&total)[kPatchChannels], float* partial, float* scratch,
                                           Op op) {
  const int chunk = threadIdx.x % Config::kChunks, row_lane = threadIdx.x / Config::kChunks;
#pragma unroll
  for (int c = 0; c < kPatchChannels; ++c) scratch[row_lane * Config::kCodeDim + chunk * kPatchChannels + c] = total[c];
  __syncthreads();
  if (threadIdx.x < Config::kHeadDim) {
    float value = scratch[threadIdx.x];
    for (int r = 1; r < kStatisticsThreads / Config::kChunks; ++r) {
      value = op(value, scratch[r * Config::kCodeDim + threadIdx.x]);
    }
    partial[threadIdx.x] = value;
  }
}

// Reduces rows first..last-1 (tokens row * step) of 8 channels and then over the CTA; writes D floats.
template <class Config, class Op>
__device__ __forceinline__ void reduce_rows(const TokenRows& rows, int64_t first, int64_t last, int step,
                                            float* partial, float* scratch, Op op) {
  constexpr int kRowsAtATime = kStatisticsThreads / Config::kChunks;
  constexpr int kUnroll = 8;
  const int chunk = threadIdx.x % Config::kChunks, row_lane = threadIdx.x / Config::kChunks;
  float total[kPatchChannels] = {};
  const auto reduce_unrolled = [&](int64_t row, auto load) {
    uint4 loaded[kUnroll];
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) loaded[i] = load(row + i * kRowsAtATime);
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      float x[kPatchChannels];
      unpack<Config>(x, loaded[i]);
#pragma unroll
      for (int c = 0; c < kPatchChannels; ++c) total[c] = op(total[c], x[c]);
    }
  };
  constexpr int kStep = kUnroll * kRowsAtATime;
  int64_t row = Config::has_chunk(chunk) ? first + row_lane : last + kStep;
  for (; row - row_lane + kStep <= last; row += kStep) {
    reduce_unrolled(row, [&](int64_t r) { return rows.load(static_cast<int>(r * step)); });
  }
  if (row < last) {  // a loaded row that is not there counts as zeros, which change neither result
    reduce_unrolled(row, [&](int64_t r) {
      const uint4 x = rows.load(static_cast<int>(min(r, last - 1) * step));
      return r < last ? x : make_uint4(0, 0, 0, 0);
    });
  }
  reduce_cta<Config>(total, partial, scratch, op);
}

template <class Config>
__global__ void __launch_bounds__(kStatisticsThreads, 4)
    statistics_kernel(const __grid_constant__ QuantizeParams params, const __grid_constant__ Plan plan) {
  __shared__ float scratch[kStatisticsThreads * kPatchChannels];
  const int head = blockIdx.x, batch = blockIdx.z;
  const int64_t batch_head = static_cast<int64_t>(batch) * params.size.heads + head;
  const int chunk = threadIdx.x % Config::kChunks;
  const bool is_k = blockIdx.y < plan.k_parts;  // V comes last: the main kernel begins with it
  const int part = is_k ? blockIdx.y : blockIdx.y - plan.k_parts;
  const int64_t first = static_cast<int64_t>(part) * kStatisticsRows;
  if (is_k) {
    const TokenRows rows = token_rows(params.k, batch, head, chunk);
    reduce_rows<Config>(rows, first, min(first + kStatisticsRows, plan.k_rows), params.k_mean_stride,
                        plan.k_partial + (batch_head * plan.k_parts + part) * Config::kHeadDim, scratch, SumOp{});
  } else {
    const TokenRows rows = token_rows(params.v, batch, head, chunk);
    reduce_rows<Config>(rows, first, min(first + kStatisticsRows, static_cast<int64_t>(params.size.num_tokens)), 1,
                        plan.v_partial + (batch_head * plan.v_parts + part) * Config::kHeadDim, scratch, AbsMaxOp{});
  }
}

// All partials of one channel; every thread of group 0 returns the total.
template <class Config, class Op>
__device__ __forceinline__ float reduce_partials(const float* partial, int parts, float* scratch, Op op) {
  const int channel = threadIdx.x % Config::kHeadDim;
  const int group = threadIdx.x / Config::kHeadDim;
  float value = 0.0f;
  for (int part = group; part < parts; part += kFinishGroups) {
    value = op(value, partial[static_cast<int64_t>(part) * Config::kHeadDim + channel]);
  }
  __syncthreads();
  scratch[threadIdx.x] = value;
  __syncthreads();
  for (int g = 1; g < kFinishGroups && group == 0; ++g) value = op(value, scratch[g * Config::kHeadDim + channel]);
  return value;
}

template <class Config>
__global__ void __launch_bounds__(Config::kHeadDim* kFinishGroups)
    finish_kernel(const __grid_constant__ QuantizeParams params, const __grid_constant__ Plan plan) {
  __shared__ float scratch[Config::kHeadDim * kFinishGroups];
  const int64_t batch_head = static_cast<int64_t>(blockIdx.y) * params.size.heads + blockIdx.x;
  const int64_t channel = batch_head * Config::kHeadDim + threadIdx.x % Config::kHeadDim;
  const bool writes = threadIdx.x < Config::kHeadDim;

  float mean = 0.0f;
  if (plan.k_parts > 0) {
    const float* partial = plan.k_partial + batch_head * plan.k_parts * Config::kHeadDim;
    mean = __fdiv_rn(reduce_partials<Config>(partial, plan.k_parts, scratch, SumOp{}), static_cast<float>(plan.k_rows));
  } else if (params.smooth_k) {
    mean = params.given_k_mean[channel];
  }
  float absmax;
  if (plan.v_parts > 0) {
    const float* partial = plan.v_partial + batch_head * plan.v_parts * Config::kHeadDim;
    absmax = reduce_partials<Config>(partial, plan.v_parts, scratch, AbsMaxOp{});
  } else {
    absmax = params.given_v_absmax[channel];
  }
  if (writes) {
    params.k_mean[channel] = mean;
    params.v_scale[channel] = scale_of_absmax(absmax, params.pow2_scales);
  }
}

}  // namespace fpsattn::sm90::quantize
