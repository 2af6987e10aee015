// Sizes that the backward kernels share, the workspace, the rows they store.
#pragma once

#include <cuda.h>

#include <cstddef>
#include <cstdint>

#include "fpsattn/params.h"

namespace fpsattn::sm90::bwd {

inline constexpr int kQueryRows = 64;                     // queries of a step of the KV-major kernel
inline constexpr int kHalves = kBlockSlots / kQueryRows;  // steps of a query block
inline constexpr int kWarpgroupThreads = 128;
inline constexpr int kConsumerWarpgroups = 2;  // 64 rows each
inline constexpr int kConsumerWarps = 4 * kConsumerWarpgroups;
inline constexpr int kThreads = kWarpgroupThreads * (1 + kConsumerWarpgroups);  // warpgroup 0 holds the producer
inline constexpr int kProducerRegisters = 40;
inline constexpr int kConsumerRegisters = 232;
static_assert(kWarpgroupThreads * (kProducerRegisters + kConsumerWarpgroups * kConsumerRegisters) <= kThreads * 168,
              "registers that the launch of kThreads threads reserves");
inline constexpr int kPanelColumns = 64;  // BF16 tiles lie in panels of 64 columns: 128-byte rows, 128-byte swizzle
inline constexpr int kSharedMemoryLimit = 227 * 1024;

// What a query row brings to the elementwise part, an array of 64 floats each: [half block][kNumRowFacts][64].
enum RowFact { kQueryScale, kExponentShift, kInverseSum, kDelta, kNumRowFacts };
// kQueryScale s_q   kExponentShift 8 - m   kInverseSum 1 / l (0: empty row or padding)   kDelta rowsum(dO * O)
inline constexpr int kRowFactsBytes = kNumRowFacts * kQueryRows * int(sizeof(float));

// Workspace, offsets in bytes. All in slot order, rows = B * H * num_blocks * 128.
struct Workspace {
  size_t q, k;       // BF16 [rows, D]: raw e4m3 values of Q and K, 0 in padding
  size_t v, d_out;   // BF16 [rows, D]: V~ = v8 * v_scale; dO, 0 in padding
  size_t row_facts;  // FP32 [rows / 64, kNumRowFacts, 64]
  size_t k_scale;    // FP32 [rows]
  size_t dq_sum;     // FP32 [rows / 64, 64 * D] in accumulator order; fast mode only
  size_t bytes;

  static Workspace of(const BackwardParams& params) {
    const size_t rows = size_t(params.size.batch) * params.size.heads * params.size.num_blocks * kBlockSlots;
    const size_t tile_bytes = rows * params.size.head_dim * 2;
    Workspace w{};
    w.q = 0;
    w.k = w.q + tile_bytes;
    w.v = w.k + tile_bytes;
    w.d_out = w.v + tile_bytes;
    w.row_facts = w.d_out + tile_bytes;
    w.k_scale = w.row_facts + rows * kNumRowFacts * sizeof(float);
    w.dq_sum = w.k_scale + rows * sizeof(float);
    w.bytes = w.dq_sum + (params.deterministic ? 0 : 2 * tile_bytes);
    return w;
  }
};

// A gradient in token order.
struct GradientTensor {
  char* data;
  int64_t stride_batch, stride_head, stride_token;  // elements
  bool aligned;                                     // 16-byte stores are legal
  bool half;                                        // FP16, else BF16
};

}  // namespace fpsattn::sm90::bwd
