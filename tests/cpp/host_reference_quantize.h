// Quantization on the host, from its definition (docs/numerics.md): plain loops, FP32, IEEE division.
#pragma once

#include <cmath>
#include <functional>
#include <vector>

#include "fpsattn/params.h"
#include "support/numbers.h"
#include "support/slot_table.h"

namespace fpsattn::test {

struct HostQuantizeInput {
  ProblemSize size;
  const SlotTable* table;
  Granularity granularity;
  bool pow2_scales;
  std::function<float(int b, int h, int s, int d)> q, k, v;
  std::vector<float> k_mean;    // [B, H, D], zeros without smoothing
  std::vector<float> v_absmax;  // [B, H, D]; empty: computed
};

struct HostQuantized {
  std::vector<uint8_t> q8, k8, v8t;
  std::vector<float> q_scale, k_scale, v_scale;
  std::vector<float> q_block_sum, k_block_sum;  // [B, H, num_blocks, D]
  std::vector<double> q_k_mean;                 // [B, H, S], exact
  std::vector<double> q_k_mean_magnitude;       // sum of |terms|: what the error of an FP32 dot is relative to
};

// NaN if any is NaN.
inline float max_keeping_nan(float a, float b) { return std::isnan(a) || std::isnan(b) ? NAN : std::max(a, b); }

inline float reference_scale(float absmax, bool pow2) {
  if (!std::isfinite(absmax)) {
    return NAN;
  }
  if (absmax == 0.0f) {
    return 1.0f;
  }
  const float scale = std::max(absmax / 448.0f, 0x1p-100f);
  return pow2 ? static_cast<float>(std::exp2(std::ceil(std::log2(static_cast<double>(scale))))) : scale;
}

// Q or K: bytes [num_blocks, 128, C] and scales of one (batch, head).
inline void reference_rows(const HostQuantizeInput& in, const std::function<float(int s, int d)>& x, uint8_t* bytes,
                           float* scales) {
  const int dim = in.size.head_dim, columns = code_dim(dim);
  const auto token = [&](int slot) {
    const int t = in.table->token_of_slot[slot];
    return t >= 0 ? t : in.table->token_of_slot[slot / kBlockSlots * kBlockSlots];
  };
  const auto slot_absmax = [&](int slot) {
    float absmax = 0.0f;
    for (int d = 0; d < dim; ++d) {
      absmax = max_keeping_nan(absmax, std::fabs(x(token(slot), d)));
    }
    return absmax;
  };
  const int slots = in.size.num_blocks * kBlockSlots;
  std::vector<float> scale_of_slot(slots);
  std::vector<float> absmax(slots);
  for (int slot = 0; slot < slots; ++slot) {
    absmax[slot] = slot_absmax(slot);
  }
  for (int slot = 0; slot < slots; ++slot) {
    int first = slot, last = slot + 1;
    if (in.granularity == Granularity::kBlock) {
      first = slot / kBlockSlots * kBlockSlots;
      last = first + kBlockSlots;
    } else if (in.granularity == Granularity::kTile) {
      const int tile = in.table->tile_of_block[slot / kBlockSlots];
      first = in.table->tile_block_offsets[tile] * kBlockSlots;
      last = in.table->tile_block_offsets[tile + 1] * kBlockSlots;
    }
    if (slot > first) {
      scale_of_slot[slot] = scale_of_slot[first];
    } else {
      float group = 0.0f;
      for (int i = first; i < last; ++i) {
        group = max_keeping_nan(group, absmax[i]);
      }
      scale_of_slot[slot] = reference_scale(group, in.pow2_scales);
    }
    for (int d = 0; d < columns; ++d) {
      const float value = d < dim ? x(token(slot), d) : 0.0f;
      bytes[static_cast<size_t>(slot) * columns + d] = to_e4m3(value / scale_of_slot[slot]);
    }
    if (in.granularity == Granularity::kToken) {
      scales[slot] = scale_of_slot[slot];
    } else if (slot % kBlockSlots == 0) {
      scales[slot / kBlockSlots] = scale_of_slot[slot];
    }
  }
}

// V: bytes [num_blocks, C + 8, 128] of one (batch, head), scales [D].
inline void reference_columns(const HostQuantizeInput& in, int b, int h, const float* given_absmax, uint8_t* bytes,
                              float* scales) {
  const int dim = in.size.head_dim, columns = code_dim(dim);
  for (int d = 0; d < dim; ++d) {
    float absmax = 0.0f;
    for (int s = 0; s < in.size.num_tokens; ++s) {
      absmax = max_keeping_nan(absmax, std::fabs(in.v(b, h, s, d)));
    }
    scales[d] = reference_scale(given_absmax ? given_absmax[d] : absmax, in.pow2_scales);
  }
  for (int block = 0; block < in.size.num_blocks; ++block) {
    for (int row = 0; row < columns + kVExtraRows; ++row) {
      for (int position = 0; position < kBlockSlots; ++position) {
        const int slot = block * kBlockSlots + position / 16 * 16 + kVSlotOrder[position % 16];
        const int token = in.table->token_of_slot[slot];
        uint8_t byte = 0;
        if (token >= 0 && row < dim) {
          const float x = in.v(b, h, token, row);
          byte = std::isinf(x) ? 0x7f : to_e4m3(x / scales[row]);  // an Inf never becomes finite
        } else if (token >= 0 && row == columns) {
          byte = 0x38;
        }
        bytes[(static_cast<size_t>(block) * (columns + kVExtraRows) + row) * kBlockSlots + position] = byte;
      }
    }
  }
}

// Sums of a block's tokens: 16 slots one after another, then the 8 sums one after another. [num_blocks, D] of one (b, h).
inline void reference_block_sums(const HostQuantizeInput& in, const std::function<float(int s, int d)>& x,
                                 std::vector<float>& sums) {
  for (int block = 0; block < in.size.num_blocks; ++block) {
    for (int d = 0; d < in.size.head_dim; ++d) {
      float total = 0.0f;
      for (int group = 0; group < kBlockSlots; group += 16) {
        float sum = 0.0f;
        for (int i = 0; i < 16; ++i) {
          const int token = in.table->token_of_slot[block * kBlockSlots + group + i];
          if (token >= 0) sum += x(token, d);
        }
        total = group == 0 ? sum : total + sum;
      }
      sums.push_back(total);
    }
  }
}

inline HostQuantized reference_quantize(const HostQuantizeInput& in) {
  const ProblemSize& size = in.size;
  const size_t groups = static_cast<size_t>(size.batch) * size.heads;
  const size_t rows = static_cast<size_t>(size.num_blocks) * kBlockSlots;
  const size_t columns = code_dim(size.head_dim);
  const size_t scales = in.granularity == Granularity::kToken ? rows : size.num_blocks;
  HostQuantized out;
  out.q8.resize(groups * rows * columns);
  out.k8.resize(groups * rows * columns);
  out.v8t.resize(groups * rows * (columns + kVExtraRows));
  out.q_scale.resize(groups * scales);
  out.k_scale.resize(groups * scales);
  out.v_scale.resize(groups * size.head_dim);
  for (int b = 0; b < size.batch; ++b) {
    for (int h = 0; h < size.heads; ++h) {
      const size_t group = static_cast<size_t>(b) * size.heads + h;
      const float* mean = in.k_mean.data() + group * size.head_dim;
      const auto q = [&](int s, int d) { return in.q(b, h, s, d); };
      const auto k = [&](int s, int d) { return in.k(b, h, s, d) - mean[d]; };
      reference_rows(in, q, &out.q8[group * rows * columns], &out.q_scale[group * scales]);
      reference_rows(in, k, &out.k8[group * rows * columns], &out.k_scale[group * scales]);
      reference_columns(in, b, h, in.v_absmax.empty() ? nullptr : in.v_absmax.data() + group * size.head_dim,
                        &out.v8t[group * rows * (columns + kVExtraRows)], &out.v_scale[group * size.head_dim]);
      reference_block_sums(in, q, out.q_block_sum);
      reference_block_sums(in, [&](int s, int d) { return in.k(b, h, s, d); }, out.k_block_sum);
      for (int s = 0; s < size.num_tokens; ++s) {
        double dot = 0.0, magnitude = 0.0;
        for (int d = 0; d < size.head_dim; ++d) {
          const double term = static_cast<double>(in.q(b, h, s, d)) * mean[d];
          dot += term;
          magnitude += std::fabs(term);
        }
        out.q_k_mean.push_back(dot);
        out.q_k_mean_magnitude.push_back(magnitude);
      }
    }
  }
  return out;
}

}  // namespace fpsattn::test
