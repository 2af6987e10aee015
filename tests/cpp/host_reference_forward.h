// The forward on the host, from its definition (docs/numerics.md): FP8-simulated, with a rigorous allowance for what
// FP32 rounding may change, and exact attention of the unquantized inputs. Plain loops.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "fpsattn/params.h"
#include "host_reference_quantize.h"

namespace fpsattn::test {

// Everything a forward needs. Lists: rows of `indices` are max_blocks long.
struct ForwardInputs {
  ProblemSize size;
  SlotTable table;
  HostQuantized data;
  bool scale_per_token = false;
  float softmax_scale = 1.0f;
  bool with_q_k_mean = true;
  int mask_batch = 1, mask_heads = 1, max_blocks = 0;
  std::vector<int32_t> num_blocks, indices;
  std::vector<float> q, k, v;  // [B, H, S, D], unquantized

  size_t token_row(int b, int h, int s) const {
    return (static_cast<size_t>(b) * size.heads + h) * size.num_tokens + s;
  }
  std::vector<int32_t> list(int b, int h, int tile) const {
    const size_t row =
        (static_cast<size_t>(mask_batch == 1 ? 0 : b) * mask_heads + (mask_heads == 1 ? 0 : h)) * size.num_tiles + tile;
    const auto first = indices.begin() + row * max_blocks;
    return {first, first + num_blocks[row]};
  }
};

struct ForwardReference {
  std::vector<double> out,
      out_allowance;        // [B, H, S, D]; allowance: what P values next to a rounding boundary can change
  std::vector<double> lse;  // [B, H, S]
  std::vector<double> row_max, row_sum, sum_allowance;  // [B, H, slots]; sums relative to row_max
  std::vector<char> max_uncertain;  // [B, H, slots]: the row maximum lies on an integer, give or take a rounding
};

inline double quantized_probability(double exponent) {
  return e4m3_to_float(to_e4m3(static_cast<float>(std::exp2(std::min(exponent, 8.75)))));
}

inline ForwardReference reference_forward(const ForwardInputs& in) {
  const ProblemSize& size = in.size;
  const int dim = size.head_dim, slots = size.num_blocks * kBlockSlots, rows_v = dim + kVExtraRows;
  const size_t groups = static_cast<size_t>(size.batch) * size.heads;
  ForwardReference ref;
  ref.out.assign(groups * size.num_tokens * dim, 0.0);
  ref.out_allowance.assign(ref.out.size(), 0.0);
  ref.lse.assign(groups * size.num_tokens, -INFINITY);
  ref.row_max.assign(groups * slots, 0.0);
  ref.row_sum.assign(groups * slots, 0.0);
  ref.sum_allowance.assign(groups * slots, 0.0);
  ref.max_uncertain.assign(groups * slots, 0);
  float value[256];
  for (int i = 0; i < 256; ++i) value[i] = e4m3_to_float(static_cast<uint8_t>(i));
  const float scale_log2 = static_cast<float>(in.softmax_scale * 1.4426950408889634);

  for (size_t g = 0; g < groups; ++g) {
    const int b = static_cast<int>(g) / size.heads, h = static_cast<int>(g) % size.heads;
    std::vector<float> q(static_cast<size_t>(slots) * dim), k(q.size()), v(q.size()),
        ones(slots);  // decoded, slot order
    for (size_t i = 0; i < q.size(); ++i) {
      q[i] = value[in.data.q8[g * q.size() + i]];
      k[i] = value[in.data.k8[g * k.size() + i]];
    }
    for (int slot = 0; slot < slots; ++slot) {
      int position = 0;
      while (kVSlotOrder[position] != slot % 16) ++position;
      const size_t column = slot % kBlockSlots / 16 * 16 + position;
      const uint8_t* block = &in.data.v8t[(g * size.num_blocks + slot / kBlockSlots) * rows_v * kBlockSlots];
      for (int d = 0; d < dim; ++d) v[static_cast<size_t>(slot) * dim + d] = value[block[d * kBlockSlots + column]];
      ones[slot] = value[block[dim * kBlockSlots + column]];
    }
    const auto scale_of = [&](const std::vector<float>& scales, int slot) {
      return in.scale_per_token ? scales[g * slots + slot] : scales[g * size.num_blocks + slot / kBlockSlots];
    };
    for (int slot = 0; slot < slots; ++slot) {
      const int token = in.table.token_of_slot[slot];
      if (token < 0) continue;
      const std::vector<int32_t> list = in.list(b, h, in.table.tile_of_block[slot / kBlockSlots]);
      if (list.empty()) continue;
      double m = -INFINITY, sum = 0.0, sum_slack = 0.0;
      bool uncertain = false;
      std::vector<double> o(dim, 0.0), slack(dim, 0.0);
      std::vector<double> x(kBlockSlots), error(kBlockSlots);
      for (const int32_t block : list) {
        double top = -INFINITY, top_error = 0.0;
        for (int j = 0; j < kBlockSlots; ++j) {
          const int key = block * kBlockSlots + j;
          double dot = 0.0, magnitude = 0.0;
          for (int d = 0; d < dim; ++d) {
            const double term =
                static_cast<double>(q[static_cast<size_t>(slot) * dim + d]) * k[static_cast<size_t>(key) * dim + d];
            dot += term;
            magnitude += std::fabs(term);
          }
          const float factor = (scale_of(in.data.q_scale, slot) * scale_of(in.data.k_scale, key)) * scale_log2;
          x[j] = dot * factor;
          error[j] = 0x1p-22 * (std::fabs(x[j]) + magnitude * factor + 1.0);  // a few FP32 roundings, and exp2's own
          if (std::isnan(x[j]) || x[j] > top) top = x[j], top_error = error[j];
          if (std::isnan(top)) break;
        }
        if (std::isnan(top)) {
          m = sum = NAN;
          std::fill(o.begin(), o.end(), NAN);
          break;
        }
        uncertain |= std::ceil(top - top_error) != std::ceil(top + top_error) && std::ceil(top + top_error) > m;
        const double m_new = std::max(m, std::ceil(top));
        const double alpha = m_new == m ? 1.0 : std::exp2(m - m_new);
        m = m_new;
        sum *= alpha, sum_slack *= alpha;
        for (int d = 0; d < dim; ++d) o[d] *= alpha, slack[d] *= alpha;
        for (int j = 0; j < kBlockSlots; ++j) {
          const int key = block * kBlockSlots + j;
          if (ones[key] == 0.0f) continue;
          const double p = quantized_probability(x[j] - m + kProbabilityShift);
          const double low = quantized_probability(x[j] - error[j] - m + kProbabilityShift);
          const double high = quantized_probability(x[j] + error[j] - m + kProbabilityShift);
          sum += p, sum_slack += high - low;
          for (int d = 0; d < dim; ++d) {
            const double term = v[static_cast<size_t>(key) * dim + d];
            if (p != 0.0 || std::isnan(term)) o[d] += p * term;
            if (high != low) slack[d] += (high - low) * std::fabs(term);
          }
        }
      }
      ref.row_max[g * slots + slot] = m;
      ref.row_sum[g * slots + slot] = sum;
      ref.sum_allowance[g * slots + slot] = sum_slack;
      ref.max_uncertain[g * slots + slot] = uncertain;
      const size_t row = in.token_row(b, h, token);
      ref.lse[row] = (m - kProbabilityShift + std::log2(sum)) * 0.6931471805599453;
      if (in.with_q_k_mean) ref.lse[row] += in.softmax_scale * in.data.q_k_mean[row];
      for (int d = 0; d < dim; ++d) {
        const double scale = in.data.v_scale[g * dim + d];
        ref.out[row * dim + d] = o[d] * scale / sum;
        ref.out_allowance[row * dim + d] = (slack[d] * scale + sum_slack * std::fabs(ref.out[row * dim + d])) / sum;
      }
    }
  }
  return ref;
}

// Exact attention of the unquantized inputs under the same lists: [B, H, S, D].
inline std::vector<double> exact_attention(const ForwardInputs& in) {
  const int dim = in.size.head_dim;
  std::vector<double> out(in.q.size(), 0.0);
  for (int b = 0; b < in.size.batch; ++b) {
    for (int h = 0; h < in.size.heads; ++h) {
      for (size_t slot = 0; slot < in.table.token_of_slot.size(); ++slot) {
        if (in.table.token_of_slot[slot] < 0) continue;
        const size_t query = in.token_row(b, h, in.table.token_of_slot[slot]);
        double m = -INFINITY, sum = 0.0;
        std::vector<std::pair<size_t, double>> scores;
        for (const int32_t block : in.list(b, h, in.table.tile_of_block[slot / kBlockSlots])) {
          for (int j = 0; j < kBlockSlots; ++j) {
            const int token = in.table.token_of_slot[block * kBlockSlots + j];
            if (token < 0) continue;
            const size_t key = in.token_row(b, h, token);
            double dot = 0.0;
            for (int d = 0; d < dim; ++d) dot += static_cast<double>(in.q[query * dim + d]) * in.k[key * dim + d];
            scores.emplace_back(key, dot * in.softmax_scale);
            m = std::max(m, scores.back().second);
          }
        }
        for (auto& [key, score] : scores) sum += score = std::exp(score - m);
        for (const auto& [key, p] : scores) {
          for (int d = 0; d < dim; ++d) out[query * dim + d] += p / sum * in.v[key * dim + d];
        }
      }
    }
  }
  return out;
}

}  // namespace fpsattn::test
