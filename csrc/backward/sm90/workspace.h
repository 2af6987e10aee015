// The caller's workspace, cut into pieces. All in slot order. It holds some (batch, head) pairs of K and V at a time,
// "heads" here, with the query heads of each: as many as fit, and the kernels run once per round of them.
// rows = heads * group * num_blocks * 128, kv_rows = heads * KB * 128, D = code_dim of the head dimension.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "fpsattn/params.h"

namespace fpsattn::sm90::backward {

inline constexpr int kQueryRows = 64;                     // queries of a step of the KV-major kernel
inline constexpr int kHalves = kBlockSlots / kQueryRows;  // steps of a query block

// What a query row brings to the elementwise part, an array of 64 floats each: [half block][kNumRowFacts][64].
//   kQueryScale s_q   kExponentShift 8 - m   kInverseSum 1 / l (0: empty row or padding)   kDelta -rowsum(dO * O) / l
//   kScaledInverseSum, kScaledDelta: the last two, times s_q
// With them dS = P (dP - rowsum(dO * O)) / l is one FFMA and one FMUL, and so is dS s_q.
enum RowFact {
  kQueryScale,
  kExponentShift,
  kInverseSum,
  kDelta,
  kScaledInverseSum,
  kScaledDelta,
  kNumRowFacts,
};

// Not more is asked for, and not more is used, unless one head needs it. A round of Wan 14B at 720p (8 heads of 600 blocks
// and more) then is 36 waves of an H100's 132 SMs: ending each costs one or two percent (computed).
inline constexpr size_t kWorkspaceLimit = size_t{1} << 30;
inline constexpr size_t kMaxHeads = 65535;  // of a grid

struct Workspace {
  uint16_t *q, *k;      // BF16 [rows, D], [kv_rows, D]: raw e4m3 values of Q and K, 0 in padding
  uint16_t *v, *d_out;  // BF16 [kv_rows, D], [rows, D]: V~ = v8 * v_scale; dO, 0 in padding
  float* row_facts;     // [rows / 64, kNumRowFacts, 64]
  float* k_scale;       // [kv_rows]
  float* dq_sum;        // [rows / 64, 64 * D] in accumulator order; fast mode only
  size_t bytes;

  static Workspace at(void* base, const BackwardParams& params, size_t heads) {
    const size_t rows = heads * params.size.group * params.size.num_blocks * kBlockSlots;
    const size_t kv_rows = heads * params.size.key_blocks() * kBlockSlots;
    const size_t columns = code_dim(params.size.head_dim);
    const size_t elements = rows * columns, kv_elements = kv_rows * columns;
    Workspace pieces;
    pieces.q = static_cast<uint16_t*>(base);
    pieces.k = pieces.q + elements;
    pieces.v = pieces.k + kv_elements;
    pieces.d_out = pieces.v + kv_elements;
    pieces.row_facts = reinterpret_cast<float*>(pieces.d_out + elements);
    pieces.k_scale = pieces.row_facts + rows * kNumRowFacts;
    pieces.dq_sum = pieces.k_scale + kv_rows;
    pieces.bytes = 4 * (elements + kv_elements + rows * kNumRowFacts + kv_rows + (params.deterministic ? 0 : elements));
    return pieces;
  }

  static size_t bytes_of(const BackwardParams& params, size_t heads) { return at(nullptr, params, heads).bytes; }

  // How many heads fit in `bytes`, at least one; in rounds of equal size, nearly.
  static size_t heads_of(const BackwardParams& params, size_t bytes) {
    const size_t all = size_t(params.size.batch) * params.size.key_heads();
    const size_t fit = std::min(bytes, kWorkspaceLimit) / bytes_of(params, 1);
    const size_t most = std::clamp(fit, size_t{1}, std::min(all, kMaxHeads / params.size.group));
    const size_t rounds = (all + most - 1) / most;
    return (all + rounds - 1) / rounds;
  }
};

// The queries of a round, or its keys: K and V.
struct Side {
  SlotTable token_of_slot;
  int heads, num_tokens, num_blocks;  // of a sample
  int first_head;                     // of the round, counted over batch and heads
};

// What every kernel of a round is told.
struct Round {
  BackwardParams params;
  Workspace space;
  Side queries, keys;  // query head i of the workspace attends head i / group of K and V there
  float scale_log2;    // softmax_scale in log2 units
};

}  // namespace fpsattn::sm90::backward
