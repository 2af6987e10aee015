// Forward and straight-through backward on the host, from their definition (docs/numerics.md,
// docs/kernels/backward.md): plain loops in FP64 over the quantized operands.
//
// Besides the gradients themselves two yardsticks come out of the same loops:
//   low    the same maths with what a BF16 kernel must round: p, dS, V~, dO (FP16 inputs), each to BF16
//   slack  P is a step function: where 2^y lies so close to the boundary of two e4m3 values that FP32 arithmetic may
//          fall on either side, the difference that the other value would make to each gradient element, summed; and
//          what dP - delta, a difference of FP32 sums, may be off by: it matters where the gradient all but cancels
#pragma once

#include <cmath>
#include <functional>
#include <vector>

#include "common/numeric.h"
#include "fpsattn/params.h"
#include "support/numbers.h"
#include "support/slot_table.h"

namespace fpsattn::test {

using Lists = std::vector<std::vector<int32_t>>;  // a list of blocks per row

// The bytes and scales that the quantizer would hand over, and dO in slot order; one (batch, head).
struct HostHead {
  int dim = 0;
  const SlotTable* table = nullptr;
  const Lists* kv = nullptr;            // row per tile
  std::vector<float> q, k, v;           // raw e4m3 values [slots, D]; v is 0 in padding
  std::vector<float> q_scale, k_scale;  // [slots]
  std::vector<float> v_scale;           // [D]
  std::vector<float> grad_out;          // [slots, D], 0 in padding
  float softmax_scale = 0.0f;
  bool k_scale_per_token = false;
};

struct HostForward {
  std::vector<float> out;               // [slots, D], rounded to the dtype
  std::vector<float> row_max, row_sum;  // [slots]
};

struct HostGradients {
  std::vector<double> dq, dk, dv;  // [slots, D]
};

struct HostBackward {
  HostGradients exact, low, slack;
};

inline float to_bf16(float x) { return from_bits16(to_bits16(x, DType::kBFloat16), DType::kBFloat16); }

// Exponent of P, in FP32 as the kernels have it (docs/numerics.md, step 3), from the exact product.
inline float exponent(const HostHead& in, int qs, int ks, float m) {
  double dot = 0.0;
  for (int d = 0; d < in.dim; ++d) {
    dot += double(in.q[size_t(qs) * in.dim + d]) * in.k[size_t(ks) * in.dim + d];
  }
  const float scale_log2 = scale_in_log2_units(in.softmax_scale), product = static_cast<float>(dot);
  return in.k_scale_per_token ? std::fma(product * in.k_scale[ks], in.q_scale[qs] * scale_log2, kProbabilityShift - m)
                              : std::fma(product, in.q_scale[qs] * in.k_scale[ks] * scale_log2, kProbabilityShift - m);
}

// P of a key's slot.
inline uint8_t probability_byte(double y, int slot, int dim) {
  return slot % kBlockSlots < code_slots(dim) ? exponent_code(y) : to_e4m3(static_cast<float>(std::exp2(y)));
}

inline HostForward host_forward(const HostHead& in, DType dtype) {
  const int slots = static_cast<int>(in.table->token_of_slot.size());
  HostForward f{std::vector<float>(size_t(slots) * in.dim), std::vector<float>(slots), std::vector<float>(slots)};
  std::vector<double> sum(in.dim);
  for (int qs = 0; qs < slots; ++qs) {
    const auto& list = (*in.kv)[in.table->tile_of_block[qs / kBlockSlots]];
    if (in.table->token_of_slot[qs] < 0 || list.empty()) {
      continue;
    }
    float m = -INFINITY;
    for (int block : list) {
      for (int i = 0; i < kBlockSlots; ++i) {
        const float x = exponent(in, qs, block * kBlockSlots + i, kProbabilityShift);
        m = std::isnan(x) || std::isnan(m) ? NAN : std::max(m, std::ceil(x));
      }
    }
    double l = 0.0;
    std::fill(sum.begin(), sum.end(), 0.0);
    for (int block : list) {
      for (int i = 0; i < kBlockSlots; ++i) {
        const int ks = block * kBlockSlots + i;
        if (in.table->token_of_slot[ks] >= 0) {
          const double p = e4m3_to_float(probability_byte(exponent(in, qs, ks, m), ks, in.dim));
          l += p;
          for (int d = 0; d < in.dim; ++d) {
            sum[d] += p * in.v[size_t(ks) * in.dim + d];
          }
        }
      }
    }
    f.row_max[qs] = m;
    f.row_sum[qs] = static_cast<float>(l);
    for (int d = 0; d < in.dim; ++d) {
      const float o = static_cast<float>(sum[d] * in.v_scale[d] / l);
      f.out[size_t(qs) * in.dim + d] = from_bits16(to_bits16(o, dtype), dtype);
    }
  }
  return f;
}

// `accumulator_error`: relative error of the product's accumulator, in units of sqrt(|q|^2 |k|^2).
inline HostBackward host_backward(const HostHead& in, const HostForward& f, double accumulator_error) {
  const int slots = static_cast<int>(in.table->token_of_slot.size());
  const int dim = in.dim;
  const size_t elements = size_t(slots) * dim;
  HostBackward out;
  for (HostGradients* g : {&out.exact, &out.low, &out.slack}) {
    g->dq.resize(elements), g->dk.resize(elements), g->dv.resize(elements);
  }
  std::vector<float> v(elements), v_low(elements), do_low(elements);
  std::vector<double> q_norm(slots), k_norm(slots);
  for (size_t i = 0; i < elements; ++i) {
    v[i] = in.v[i] * in.v_scale[i % dim];
    v_low[i] = to_bf16(v[i]);
    do_low[i] = to_bf16(in.grad_out[i]);
    q_norm[i / dim] += double(in.q[i]) * in.q[i];
    k_norm[i / dim] += double(in.k[i]) * in.k[i];
  }
  for (int qs = 0; qs < slots; ++qs) {
    const float l = f.row_sum[qs], m = f.row_max[qs];
    if (in.table->token_of_slot[qs] < 0 || l == 0.0f) {
      continue;
    }
    const float* g = &in.grad_out[size_t(qs) * dim];
    const float* g_low = &do_low[size_t(qs) * dim];
    double delta = 0.0, delta_low = 0.0, delta_magnitude = 0.0;
    for (int d = 0; d < dim; ++d) {
      delta += double(g[d]) * f.out[size_t(qs) * dim + d];
      delta_low += double(g_low[d]) * f.out[size_t(qs) * dim + d];
      delta_magnitude += std::fabs(double(g[d]) * f.out[size_t(qs) * dim + d]);
    }
    for (int block : (*in.kv)[in.table->tile_of_block[qs / kBlockSlots]]) {
      for (int ks = block * kBlockSlots; ks < (block + 1) * kBlockSlots; ++ks) {
        if (in.table->token_of_slot[ks] < 0) {
          continue;
        }
        const size_t key = size_t(ks) * dim, query = size_t(qs) * dim;
        const float y = exponent(in, qs, ks, m);
        const uint8_t byte = probability_byte(y, ks, dim);
        const double p = double(e4m3_to_float(byte)) / l, p_low = to_bf16(static_cast<float>(p));
        double dp = 0.0, dp_low = 0.0, dp_magnitude = 0.0;
        for (int d = 0; d < dim; ++d) {
          dp += double(g[d]) * v[key + d];
          dp_low += double(g_low[d]) * v_low[key + d];
          dp_magnitude += std::fabs(double(g[d]) * v[key + d]);
        }
        const double ds = p * (dp - delta) * in.softmax_scale, sq = in.q_scale[qs], sk = in.k_scale[ks];
        const double ds_q = to_bf16(static_cast<float>(p * (dp_low - delta_low) * sq)) * in.softmax_scale;
        const double ds_k = to_bf16(static_cast<float>(p * (dp_low - delta_low) * sk)) * in.softmax_scale;
        const double ds_error = 0x1p-22 * p * (dp_magnitude + delta_magnitude) * in.softmax_scale;
        for (int d = 0; d < dim; ++d) {
          out.slack.dk[key + d] += ds_error * sq * std::fabs(in.q[query + d]);
          out.slack.dq[query + d] += ds_error * sk * std::fabs(in.k[key + d]);
          out.exact.dv[key + d] += p * g[d];
          out.exact.dk[key + d] += ds * sq * in.q[query + d];
          out.exact.dq[query + d] += ds * sk * in.k[key + d];
          out.low.dv[key + d] += p_low * g_low[d];
          out.low.dk[key + d] += ds_q * in.q[query + d];
          out.low.dq[query + d] += ds_k * in.k[key + d];
        }
        // Would an exponent that is off by the rounding of FP32 give another byte?
        const double error =
            accumulator_error * std::sqrt(q_norm[qs] * k_norm[ks]) * sq * sk * in.softmax_scale * 1.4427 +
            0x1p-22 * (std::fabs(y) + 1.0);
        const float below = e4m3_to_float(probability_byte(y - error, ks, dim));
        const float above = e4m3_to_float(probability_byte(y + error, ks, dim));
        if (below != above) {
          const double jump = double(above - below) / l, ds_jump = jump * std::fabs(dp - delta) * in.softmax_scale;
          for (int d = 0; d < dim; ++d) {
            out.slack.dv[key + d] += jump * std::fabs(g[d]);
            out.slack.dk[key + d] += ds_jump * sq * std::fabs(in.q[query + d]);
            out.slack.dq[query + d] += ds_jump * sk * std::fabs(in.k[key + d]);
          }
        }
      }
    }
  }
  return out;
}

}  // namespace fpsattn::test
