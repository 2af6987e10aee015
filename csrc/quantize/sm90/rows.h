// Roles Q and K: a slot of the block becomes a row of C e4m3 bytes (C = D, or 128 for D = 96).
//
// Thread t holds slots 16 g .. 16 g + 15, channels 8 c .. 8 c + 7, with g = t / (C/8), c = t % (C/8): the lanes that
// share a row are neighbours, a row is read by one instruction of C/8 lanes. 8 channels make 8 bytes, so two
// neighbouring lanes swap halves of two rows and each stores 16 bytes: the even lane of row i, the odd lane of row i
// + 1.
#pragma once

#include "common/fp8.h"
#include "quantize/sm90/patch.h"
#include "quantize/sm90/reduce.h"
#include "quantize/sm90/work.h"

namespace fpsattn::sm90::quantize {

// The values of a patch as they were read. Another source: PreparedRows (norm_rope.h).
template <class Config>
class RawRows {
 public:
  __device__ __forceinline__ RawRows(const QuantizeParams& params, const WorkItem&, const TokenRows& rows, int lane,
                                     int first_row)
      : params_(params), rows_(rows), lane_(lane), first_row_(first_row) {}

  // `slots`: the tokens of the block.
  __device__ __forceinline__ void load(const int32_t* slots) {
    int tokens[kPatchSlots];
    load_tokens(tokens, slots + first_row_);
    load_patch<Config>(patch_, rows_, lane_, tokens, __ldg(slots), params_.size.num_tokens);
  }

  __device__ __forceinline__ float value(int row, int channel) const {
    return patch_.template value<typename Config::Element>(row, channel);
  }

  __device__ __forceinline__ void forget() { patch_.forget_conversions(); }

 private:
  const QuantizeParams& params_;
  const TokenRows rows_;
  const int lane_, first_row_;
  Patch patch_;
};

// `is_query`: a constant where the values stay in registers, so that each role has its own code.
template <class Config, class Source>
class RowQuantizer {
 public:
  template <class... MoreOfSource>
  __device__ __forceinline__ RowQuantizer(const QuantizeParams& params, const WorkItem& work, bool is_query,
                                          MoreOfSource... more)
      : params_(params),
        is_query_(is_query),
        batch_head_(work.batch_head(params)),
        lane_(threadIdx.x % Config::kChunks),
        first_row_(threadIdx.x / Config::kChunks * kPatchSlots),
        source_(params, work, token_rows(is_query ? params.q : params.k, work.batch, work.head, lane_), lane_,
                first_row_, more...) {
    float4 low = make_float4(0.0f, 0.0f, 0.0f, 0.0f), high = low;
    if (Config::has_chunk(lane_)) {
      const int64_t head = is_query ? batch_head_ / params.size.group : batch_head_;
      const float4* mean =
          reinterpret_cast<const float4*>(params.k_mean + head * Config::kHeadDim + lane_ * kPatchChannels);
      low = mean[0], high = mean[1];
    }
    mean_[0] = low.x, mean_[1] = low.y, mean_[2] = low.z, mean_[3] = low.w;
    mean_[4] = high.x, mean_[5] = high.y, mean_[6] = high.z, mean_[7] = high.w;
#pragma unroll
    for (int c = 0; c < kPatchChannels; ++c) {
      subtracted_[c] = is_query ? 0.0f : mean_[c];
    }
  }

  __device__ __forceinline__ void load(int block) { source_.load(slots(block)); }

  // Where wanted, the sum of the block's tokens per channel: 16 slots in order, then the 8 partial sums in order.
  // `scratch` holds kPatchRowsPerBlock * kCodeDim floats.
  __device__ __forceinline__ void store_block_sum(int block, float* scratch) {
    float* out = is_query_ ? params_.q_block_sum : params_.k_block_sum;
    if (out == nullptr) {
      return;
    }
    int tokens[kPatchSlots];
    load_tokens(tokens, slots(block) + first_row_);
    float sum[kPatchChannels] = {};
#pragma unroll
    for (int i = 0; i < kPatchSlots; ++i) {
#pragma unroll
      for (int c = 0; c < kPatchChannels; ++c) {
        sum[c] += tokens[i] >= 0 ? source_.value(i, c) : 0.0f;
      }
    }
    source_.forget();
#pragma unroll
    for (int c = 0; c < kPatchChannels; ++c) {
      scratch[first_row_ / kPatchSlots * Config::kCodeDim + lane_ * kPatchChannels + c] = sum[c];
    }
    __syncthreads();
    if (threadIdx.x < Config::kHeadDim) {
      float total = scratch[threadIdx.x];
#pragma unroll
      for (int g = 1; g < kPatchRowsPerBlock; ++g) {
        total += scratch[g * Config::kCodeDim + threadIdx.x];
      }
      out[(batch_head_ * params_.size.num_blocks + block) * Config::kHeadDim + threadIdx.x] = total;
    }
    __syncthreads();  // scratch may be overwritten
  }

  // Largest |x| of the patch and of `so_far`, in independent chains: one of 128 steps would wait for its own latency.
  __device__ __forceinline__ float absmax(float so_far) const {
    constexpr int kChains = 4;
    float chain[kChains] = {so_far};
#pragma unroll
    for (int i = 0; i < kPatchSlots; ++i) {
      chain[i % kChains] = row_absmax(i, chain[i % kChains]);
    }
    return absmax_nan(absmax_nan(chain[0], chain[1]), absmax_nan(chain[2], chain[3]));
  }

  // One scale for the whole block (it may belong to a tile of several).
  __device__ __forceinline__ void store(int block, float scale) {
    source_.forget();
    const Divisor divisor = Divisor::of(scale);
    store_rows(block, [&](int) { return divisor; });
    if (threadIdx.x == 0) {
      scales()[batch_head_ * params_.size.num_blocks + block] = scale;
    }
  }

  // One scale per slot.
  __device__ __forceinline__ void store_per_token(int block) {
    float row_scale[kPatchSlots];
#pragma unroll
    for (int i = 0; i < kPatchSlots; ++i) {
      row_scale[i] = row_absmax(i, 0.0f);
    }
    transpose_reduce<Config::kChunks>(row_scale, lane_, [](float a, float b) { return absmax_nan(a, b); });
    float* out = scales() + (batch_head_ * params_.size.num_blocks + block) * kBlockSlots + first_row_;
#pragma unroll
    for (int j = 0; j < Config::kRowsPerLane; ++j) {
      row_scale[j] = scale_of_absmax(row_scale[j], params_.pow2_scales);
      out[lane_ * Config::kRowsPerLane + j] = row_scale[j];
    }
    source_.forget();
    store_rows(block, [&](int i) {
      const float scale =
          __shfl_sync(0xffffffffu, row_scale[i % Config::kRowsPerLane], i / Config::kRowsPerLane, Config::kChunks);
      return Divisor::of(scale);
    });
  }

 private:
  __device__ __forceinline__ const int32_t* slots(int block) const {
    return slots_of(params_.token_of_slot, batch_head_) + static_cast<int64_t>(block) * kBlockSlots;
  }

  __device__ __forceinline__ float row_absmax(int row, float so_far) const {
#pragma unroll
    for (int c = 0; c < kPatchChannels; ++c) {
      so_far = absmax_nan(so_far, x(row, c));
    }
    return so_far;
  }

  __device__ __forceinline__ float x(int row, int channel) const {
    return source_.value(row, channel) - subtracted_[channel];  // not __fsub_rn, which keeps a constant 0
  }

  // The 8 bytes of a row, and its part of q . k_mean while the values are there.
  __device__ __forceinline__ uint2 quantized_row(int row, const Divisor& by, float& dot) const {
    float quotient[kPatchChannels];
    dot = 0.0f;
#pragma unroll
    for (int c = 0; c < kPatchChannels; ++c) {
      const float value = x(row, c);
      quotient[c] = by.divide(value);
      dot = __fmaf_rn(value, mean_[c], dot);  // of a key: not used
    }
    return make_uint2(to_e4m3x4(quotient[0], quotient[1], quotient[2], quotient[3]),
                      to_e4m3x4(quotient[4], quotient[5], quotient[6], quotient[7]));
  }

  template <class DivisorOfRow>
  __device__ __forceinline__ void store_rows(int block, DivisorOfRow divisor_of_row) const {
    const bool odd = lane_ & 1;
    const int64_t first_slot = (batch_head_ * params_.size.num_blocks + block) * kBlockSlots + first_row_;
    uint8_t* out = (is_query_ ? params_.q8 : params_.k8) + (first_slot + odd) * Config::kCodeDim + lane_ / 2 * 16;
    float dot[kPatchSlots];
#pragma unroll
    for (int i = 0; i < kPatchSlots; i += 2) {
      const uint2 upper = quantized_row(i, divisor_of_row(i), dot[i]);
      const uint2 lower = quantized_row(i + 1, divisor_of_row(i + 1), dot[i + 1]);
      const uint2 kept = odd ? lower : upper;
      const uint2 sent = odd ? upper : lower;
      const uint2 received =
          make_uint2(__shfl_xor_sync(0xffffffffu, sent.x, 1), __shfl_xor_sync(0xffffffffu, sent.y, 1));
      const uint4 stored =
          odd ? make_uint4(received.x, received.y, kept.x, kept.y) : make_uint4(kept.x, kept.y, received.x, received.y);
      *reinterpret_cast<uint4*>(out + i * Config::kCodeDim) = stored;
    }
    if (is_query_) {
      store_dots(block, dot);
    }
  }

  // q . k_mean of every valid slot's token: what smoothing took from the scores, for the LSE.
  __device__ __forceinline__ void store_dots(int block, float (&dot)[kPatchSlots]) const {
    transpose_reduce<Config::kChunks>(dot, lane_, [](float a, float b) { return a + b; });
    const int32_t* rows = slots(block) + first_row_;
#pragma unroll
    for (int j = 0; j < Config::kRowsPerLane; ++j) {
      const int token = __ldg(rows + lane_ * Config::kRowsPerLane + j);
      if (token >= 0) {
        params_.q_k_mean[batch_head_ * params_.size.num_tokens + token] = dot[j];
      }
    }
  }

  __device__ __forceinline__ float* scales() const { return is_query_ ? params_.q_scale : params_.k_scale; }

  const QuantizeParams& params_;
  const bool is_query_;
  const int64_t batch_head_;
  const int lane_;       // chunk of 8 channels
  const int first_row_;  // of the patch, in the block
  float mean_[kPatchChannels], subtracted_[kPatchChannels];
  Source source_;
};

}  // namespace fpsattn::sm90::quantize
