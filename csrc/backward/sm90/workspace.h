// The caller's workspace, cut into pieces. All in slot order; rows = B * H * num_blocks * 128,
// D = code_dim of the head dimension. Host only.
#pragma once

#include <cstddef>
#include <cstdint>

#include "fpsattn/params.h"

namespace fpsattn::sm90::backward {

inline constexpr int kQueryRows = 64;                     // queries of a step of the KV-major kernel
inline constexpr int kHalves = kBlockSlots / kQueryRows;  // steps of a query block

// What a query row brings to the elementwise part, an array of 64 floats each: [half block][kNumRowFacts][64].
enum RowFact { kQueryScale, kExponentShift, kInverseSum, kDelta, kNumRowFacts };
// kQueryScale s_q   kExponentShift 8 - m   kInverseSum 1 / l (0: empty row or padding)   kDelta rowsum(dO * O)

struct Workspace {
  uint16_t *q, *k;      // BF16 [rows, D]: raw e4m3 values of Q and K, 0 in padding
  uint16_t *v, *d_out;  // BF16 [rows, D]: V~ = v8 * v_scale; dO, 0 in padding
  float* row_facts;     // [rows / 64, kNumRowFacts, 64]
  float* k_scale;       // [rows]
  float* dq_sum;        // [rows / 64, 64 * D] in accumulator order; fast mode only
  size_t bytes;

  static Workspace at(void* base, const BackwardParams& params) {
    const size_t rows = size_t(params.size.batch) * params.size.heads * params.size.num_blocks * kBlockSlots;
    const size_t elements = rows * code_dim(params.size.head_dim);
    Workspace pieces;
    pieces.q = static_cast<uint16_t*>(base);
    pieces.k = pieces.q + elements;
    pieces.v = pieces.k + elements;
    pieces.d_out = pieces.v + elements;
    pieces.row_facts = reinterpret_cast<float*>(pieces.d_out + elements);
    pieces.k_scale = pieces.row_facts + rows * kNumRowFacts;
    pieces.dq_sum = pieces.k_scale + rows;
    pieces.bytes = 8 * elements + 4 * (rows * (kNumRowFacts + 1) + (params.deterministic ? 0 : elements));
    return pieces;
  }
};

}  // namespace fpsattn::sm90::backward
