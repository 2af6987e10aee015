// The forward on the host, from its definition (docs/numerics.md): FP8-simulated, with a rigorous allowance for what
// FP32 rounding and the bits that FP8 tensor cores drop (support/fp8_accumulator.h) may change, and exact attention of
// the unquantized inputs. Plain loops.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <vector>

#include "common/numeric.h"
#include "fpsattn/params.h"
#include "host_reference_quantize.h"
#include "support/fp8_accumulator.h"

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
  // Outlined: GCC 12 warns of a vector that it has inlined wrongly (-Wfree-nonheap-object).
  [[gnu::noinline]] std::vector<int32_t> list(int b, int h, int tile) const {
    const size_t row =
        (static_cast<size_t>(mask_batch == 1 ? 0 : b) * mask_heads + (mask_heads == 1 ? 0 : h)) * size.num_tiles + tile;
    const auto first = indices.begin() + row * max_blocks;
    return {first, first + num_blocks[row]};
  }
};

struct ForwardReference {
  std::vector<double> out,
      out_allowance;        // [B, H, S, D]; allowance: P values next to a rounding boundary, lost accumulator bits
  std::vector<double> lse;  // [B, H, S]
  std::vector<double> row_max, row_sum, sum_allowance;  // [B, H, slots]; sums relative to row_max
  std::vector<char> max_uncertain;  // [B, H, slots]: the row maximum lies on an integer, give or take a rounding
};

// `slot`: of the key, in its block.
inline double quantized_probability(double exponent, int slot, int dim) {
  if (slot < code_slots(dim)) return e4m3_to_float(exponent_code(exponent));
  return e4m3_to_float(to_e4m3(static_cast<float>(std::exp2(std::min(exponent, 8.75)))));
}

inline constexpr int kPromoteBlocks = 2;  // blocks whose PV products share an accumulator (docs/numerics.md: 256 keys)

inline ForwardReference reference_forward(const ForwardInputs& in, Fp8Sum mode) {
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
  const float scale_log2 = scale_in_log2_units(in.softmax_scale);
  // The kernels' order of k steps (Config::pv_step), which matters where sums drop bits.
  constexpr int kSteps = kBlockSlots / Fp8Accumulator::kProducts;
  const int first_step = dim == 64 || in.scale_per_token ? kSteps - 1 : 0;

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
      std::array<double, kBlockSlots> low, x, high, p, doubt, products, product_doubt;
      std::vector<Fp8Accumulator> pv(dim + 1, Fp8Accumulator(mode));  // channels, then the row sum
      const auto promote = [&] {
        for (int d = 0; d < dim; ++d) o[d] += pv[d].value, slack[d] += std::max(pv[d].below, pv[d].above);
        sum += pv[dim].value, sum_slack += std::max(pv[dim].below, pv[dim].above);
        std::fill(pv.begin(), pv.end(), Fp8Accumulator(mode));
      };
      int visited = 0;
      for (const int32_t block : list) {
        double top = -INFINITY, top_low = -INFINITY, top_high = -INFINITY;
        for (int j = 0; j < kBlockSlots; ++j) {
          const int key = block * kBlockSlots + j;
          Fp8Accumulator dot(mode);
          double magnitude = 0.0;
          for (int first = 0; first < dim; first += Fp8Accumulator::kProducts) {
            for (int d = 0; d < Fp8Accumulator::kProducts; ++d) {
              products[d] = static_cast<double>(q[static_cast<size_t>(slot) * dim + first + d]) *
                            k[static_cast<size_t>(key) * dim + first + d];
              magnitude += std::fabs(products[d]);
            }
            dot.add(products.data());
          }
          const float factor = (scale_of(in.data.q_scale, slot) * scale_of(in.data.k_scale, key)) * scale_log2;
          x[j] = dot.value * factor;
          const double error =
              0x1p-22 * (std::fabs(x[j]) + magnitude * factor + 1.0);  // a few FP32 roundings, and exp2's own
          low[j] = x[j] - dot.below * factor - error;
          high[j] = x[j] + dot.above * factor + error;
          if (std::isnan(x[j]) || x[j] > top) top = x[j];
          top_low = std::max(top_low, low[j]), top_high = std::max(top_high, high[j]);
          if (std::isnan(top)) break;
        }
        if (std::isnan(top)) {
          m = sum = NAN;
          std::fill(o.begin(), o.end(), NAN);
          break;
        }
        uncertain |= std::ceil(top_low) != std::ceil(top_high) && std::ceil(top_high) > m;
        const double m_new = std::max(m, std::ceil(top));
        const double alpha = m_new == m ? 1.0 : std::exp2(m - m_new);
        m = m_new;
        sum *= alpha, sum_slack *= alpha;
        for (int d = 0; d < dim; ++d) o[d] *= alpha, slack[d] *= alpha;
        for (Fp8Accumulator& channel : pv) channel.scale(alpha);
        for (int j = 0; j < kBlockSlots; ++j) {
          p[j] = quantized_probability(x[j] - m + kProbabilityShift, j, dim);
          doubt[j] = quantized_probability(high[j] - m + kProbabilityShift, j, dim) -
                     quantized_probability(low[j] - m + kProbabilityShift, j, dim);
        }
        for (int d = 0; d <= dim; ++d) {
          for (int j = 0; j < kBlockSlots; ++j) {
            const int key = block * kBlockSlots + j;
            const double term = d == dim ? ones[key] : v[static_cast<size_t>(key) * dim + d];
            products[j] = p[j] * term;
            product_doubt[j] = doubt[j] == 0.0 ? 0.0 : doubt[j] * std::fabs(term);
            (d == dim ? sum_slack : slack[d]) += product_doubt[j];
          }
          for (int i = 0; i < kSteps; ++i) {
            const int j = (i + first_step) % kSteps * Fp8Accumulator::kProducts;
            pv[d].add(&products[j], &product_doubt[j]);
          }
        }
        if (++visited % kPromoteBlocks == 0) promote();
      }
      promote();
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
