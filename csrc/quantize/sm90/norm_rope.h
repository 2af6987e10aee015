// Norm and RoPE of a patch of q or k: FP32, each operation rounded once. Bit for bit python/fpsattention/ops/norm_rope.py.
//
// The lanes that share a row hold 8 channels each, so a sum over D is: 8 additions in a lane, then xor shuffles. 16 rows
// are reduced together (transpose_reduce); a lane owns the facts of kRowsPerLane rows (token, mean, factor), and hands
// them to the others by shuffles.
#pragma once

#include "fpsattn/prepare.h"
#include "quantize/sm90/patch.h"
#include "quantize/sm90/reduce.h"
#include "quantize/sm90/work.h"

namespace fpsattn::sm90::quantize {

// What the kernels are told of norm and RoPE, of q or of k.
struct NormRope {
  Norm norm;
  float eps;
  ChannelVector weight, bias;
  const float* factor;  // [B, S], workspace: of kRmsAcrossHeads
  const float *cos, *sin;
  int64_t table_stride_batch, table_stride_head;
  int first_rotated, num_rotated;
  int weights_begin, num_weighted;  // the tokens of the first row of weight and bias
  bool halves;
};

__device__ __forceinline__ float norm_factor(float squares, float count, float eps) {
  return __frcp_rn(__fsqrt_rn(__fadd_rn(__fdiv_rn(squares, count), eps)));
}

__device__ __forceinline__ float sum_of_squares(const float (&x)[kPatchChannels]) {
  float sum = __fmul_rn(x[0], x[0]);
#pragma unroll
  for (int c = 1; c < kPatchChannels; ++c) sum = __fadd_rn(sum, __fmul_rn(x[c], x[c]));
  return sum;
}

__device__ __forceinline__ float sum_of(const float (&x)[kPatchChannels]) {
  float sum = x[0];
#pragma unroll
  for (int c = 1; c < kPatchChannels; ++c) sum = __fadd_rn(sum, x[c]);
  return sum;
}

// The chunk of one lane of one row of one head.
template <class Config>
class RowPreparer {
 public:
  __device__ __forceinline__ RowPreparer(const NormRope& how, int batch, int head, int chunk)
      : how_(how),
        chunk_(chunk),
        channel_((how.norm == Norm::kRmsAcrossHeads ? head * Config::kHeadDim : 0) + chunk * kPatchChannels) {
    const int64_t table = batch * how.table_stride_batch + head * how.table_stride_head;
    const int angle = how.halves ? chunk * kPatchChannels % (Config::kHeadDim / 2) : chunk * (kPatchChannels / 2);
    cos_ = how.cos + table + angle;
    sin_ = how.sin + table + angle;
  }

  // x: raw less `mean`. All lanes of the warp call it together; the result of a chunk beyond the row is zeros.
  __device__ __forceinline__ void prepare(float (&x)[kPatchChannels], int token, float factor) const {
    const bool there = Config::has_chunk(chunk_);
    const unsigned row = static_cast<unsigned>(token - how_.first_rotated);
    const bool rotated = row < static_cast<unsigned>(how_.num_rotated);
    const bool first_row = static_cast<unsigned>(token - how_.weights_begin) < static_cast<unsigned>(how_.num_weighted);
    if (how_.norm != Norm::kNone) {
#pragma unroll
      for (int c = 0; c < kPatchChannels; ++c) x[c] = __fmul_rn(x[c], factor);
    }
    if (how_.weight.data != nullptr && there) {
      float w[kPatchChannels];
      load_floats(w, how_.weight.data + (first_row ? 0 : how_.weight.others) + channel_);
#pragma unroll
      for (int c = 0; c < kPatchChannels; ++c) x[c] = __fmul_rn(x[c], w[c]);
    }
    if (how_.bias.data != nullptr && there) {
      float b[kPatchChannels];
      load_floats(b, how_.bias.data + (first_row ? 0 : how_.bias.others) + channel_);
#pragma unroll
      for (int c = 0; c < kPatchChannels; ++c) x[c] = __fadd_rn(x[c], b[c]);
    }
    if (how_.num_rotated > 0) {
      const int64_t offset = static_cast<int64_t>(row) * (Config::kHeadDim / 2);
      how_.halves ? rotate_halves(x, offset, rotated && there) : rotate_pairs(x, offset, rotated && there);
    }
    if (!there) {
#pragma unroll
      for (int c = 0; c < kPatchChannels; ++c) x[c] = 0.0f;
    }
  }

 private:
  __device__ __forceinline__ void rotate_pairs(float (&x)[kPatchChannels], int64_t offset, bool rotated) const {
    if (!rotated) return;
    float cos[kPatchChannels], sin[kPatchChannels];
    load_floats<kPatchChannels / 2>(cos, cos_ + offset);
    load_floats<kPatchChannels / 2>(sin, sin_ + offset);
#pragma unroll
    for (int i = 0; i < kPatchChannels / 2; ++i) {
      const float a = x[2 * i], b = x[2 * i + 1];
      x[2 * i] = __fsub_rn(__fmul_rn(a, cos[i]), __fmul_rn(b, sin[i]));
      x[2 * i + 1] = __fadd_rn(__fmul_rn(b, cos[i]), __fmul_rn(a, sin[i]));
    }
  }

  __device__ __forceinline__ void rotate_halves(float (&x)[kPatchChannels], int64_t offset, bool rotated) const {
    constexpr int kHalf = Config::kHeadDim / kPatchChannels / 2;
    const bool upper = chunk_ >= kHalf;
    float partner[kPatchChannels];
#pragma unroll
    for (int c = 0; c < kPatchChannels; ++c) {
      partner[c] = __shfl_sync(0xffffffffu, x[c], upper ? chunk_ - kHalf : chunk_ + kHalf, Config::kChunks);
    }
    if (!rotated) return;
    float cos[kPatchChannels], sin[kPatchChannels];
    load_floats(cos, cos_ + offset);
    load_floats(sin, sin_ + offset);
#pragma unroll
    for (int c = 0; c < kPatchChannels; ++c) {
      const float turned = __fmul_rn(partner[c], sin[c]);
      x[c] = __fadd_rn(__fmul_rn(x[c], cos[c]), upper ? turned : -turned);
    }
  }

  const NormRope& how_;
  const int chunk_;
  const int channel_;  // of weight and bias
  const float *cos_, *sin_;
};

// The 16 rows of a thread's patch, prepared, in shared memory: 128 FP32 values do not fit in registers. A thread reads
// back what it wrote, so nothing is waited for. 16 bytes of each thread side by side: no bank conflicts.
template <class Config>
class PreparedRows {
 public:
  static constexpr int kBytes = kPatchSlots * kPatchChannels * sizeof(float) * Config::kThreads;

  __device__ __forceinline__ PreparedRows(const QuantizeParams& params, const WorkItem& work, const TokenRows& rows,
                                          int lane, int first_row, const NormRope* how, float4* memory)
      : params_(params),
        rows_(rows),
        lane_(lane),
        first_row_(first_row),
        how_(*how),
        row_(*how, work.batch, work.head, lane),
        factors_(how->factor + static_cast<int64_t>(work.batch) * params.size.num_tokens),
        memory_(memory + threadIdx.x) {}

  __device__ __forceinline__ void load(const int32_t* slots) {
    Patch patch;
    const int first = __ldg(slots);
    {
      int tokens[kPatchSlots];
      load_tokens(tokens, slots + first_row_);
      load_patch<Config>(patch, rows_, lane_, tokens, first, params_.size.num_tokens);
    }
    int token[Config::kRowsPerLane];
#pragma unroll
    for (int j = 0; j < Config::kRowsPerLane; ++j) {
      token[j] = __ldg(slots + first_row_ + lane_ * Config::kRowsPerLane + j);
      token[j] = token[j] < 0 ? first : token[j];
    }
    float mean[kPatchSlots] = {}, factor[kPatchSlots] = {};  // of the rows that the lane owns, in [0 .. kRowsPerLane)
    statistics(patch, token, mean, factor);
#pragma unroll
    for (int i = 0; i < kPatchSlots; ++i) {
      float x[kPatchChannels];
      values(patch, i, x);
      if (how_.norm == Norm::kLayer) subtract(x, of_row(mean, i));
      row_.prepare(x,
                   __shfl_sync(0xffffffffu, token[i % Config::kRowsPerLane], i / Config::kRowsPerLane, Config::kChunks),
                   of_row(factor, i));
      memory_[2 * i * Config::kThreads] = make_float4(x[0], x[1], x[2], x[3]);
      memory_[(2 * i + 1) * Config::kThreads] = make_float4(x[4], x[5], x[6], x[7]);
    }
  }

  __device__ __forceinline__ float value(int row, int channel) const {
    return reinterpret_cast<const float*>(memory_ + (2 * row + channel / 4) * Config::kThreads)[channel % 4];
  }

  __device__ __forceinline__ void forget() {}

 private:
  __device__ __forceinline__ static void values(const Patch& patch, int row, float (&x)[kPatchChannels]) {
#pragma unroll
    for (int c = 0; c < kPatchChannels; ++c) x[c] = patch.template value<typename Config::Element>(row, c);
  }

  // What is not there stays 0.
  __device__ __forceinline__ void subtract(float (&x)[kPatchChannels], float mean) const {
#pragma unroll
    for (int c = 0; c < kPatchChannels; ++c) x[c] = Config::has_chunk(lane_) ? __fsub_rn(x[c], mean) : 0.0f;
  }

  __device__ __forceinline__ static float of_row(const float (&facts)[kPatchSlots], int row) {
    return __shfl_sync(0xffffffffu, facts[row % Config::kRowsPerLane], row / Config::kRowsPerLane, Config::kChunks);
  }

  __device__ __forceinline__ void statistics(const Patch& patch, const int (&token)[Config::kRowsPerLane],
                                             float (&mean)[kPatchSlots], float (&factor)[kPatchSlots]) const {
    constexpr float kCount = Config::kHeadDim;
    const auto add = [](float a, float b) { return __fadd_rn(a, b); };
    switch (how_.norm) {
      case Norm::kNone:
        return;
      case Norm::kRmsAcrossHeads:
#pragma unroll
        for (int j = 0; j < Config::kRowsPerLane; ++j) factor[j] = __ldg(factors_ + token[j]);
        return;
      case Norm::kLayer:
#pragma unroll
        for (int i = 0; i < kPatchSlots; ++i) {
          float x[kPatchChannels];
          values(patch, i, x);
          mean[i] = sum_of(x);
        }
        transpose_reduce<Config::kChunks>(mean, lane_, add);
#pragma unroll
        for (int j = 0; j < Config::kRowsPerLane; ++j) mean[j] = __fdiv_rn(mean[j], kCount);
        break;
      case Norm::kRms:
        break;
    }
#pragma unroll
    for (int i = 0; i < kPatchSlots; ++i) {
      float x[kPatchChannels];
      values(patch, i, x);
      if (how_.norm == Norm::kLayer) subtract(x, of_row(mean, i));
      factor[i] = sum_of_squares(x);
    }
    transpose_reduce<Config::kChunks>(factor, lane_, add);
#pragma unroll
    for (int j = 0; j < Config::kRowsPerLane; ++j) factor[j] = norm_factor(factor[j], kCount, how_.eps);
  }

  const QuantizeParams& params_;
  const TokenRows rows_;
  const int lane_, first_row_;
  const NormRope& how_;
  const RowPreparer<Config> row_;
  const float* factors_;  // of the batch
  float4* memory_;
};

}  // namespace fpsattn::sm90::quantize
