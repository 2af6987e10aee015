// Quantization of raw projections: norm and rotary embedding of q and k first, in FP32 (docs/numerics.md, "Norm and RoPE
// of raw projections"). All else as quantize.
#pragma once

#include <cuda_runtime_api.h>

#include "fpsattn/params.h"

namespace fpsattn {

enum class Norm : int { kNone = 0, kRms = 1, kRmsAcrossHeads = 2, kLayer = 3 };

// [D], or [H, D] for kRmsAcrossHeads, of tokens weights_begin .. weights_end - 1; that of the others lies `others` elements
// further on (0: the same). Null: ones, or zeros for a bias.
struct ChannelVector {
  const float* data = nullptr;
  int64_t others = 0;
};

struct PrepareParams {
  QuantizeParams quantize;  // q and k are the raw projections; k_mean is the mean of the prepared k

  Norm norm = Norm::kNone;
  float eps = 0.0f;
  ChannelVector q_weight, k_weight, q_bias, k_bias;
  int weights_begin = 0;
  int weights_end = -1;  // -1, with weights_begin = 0: the rotated tokens

  // Tokens first_rotated .. first_rotated + num_rotated - 1 are rotated, by angle i of the D / 2 of their row.
  const float* cos = nullptr;  // rows of D / 2, contiguous, 16-byte aligned
  const float* sin = nullptr;
  int64_t table_stride_batch = 0, table_stride_head = 0;  // elements; 0: shared
  int first_rotated = 0;
  int num_rotated = 0;       // 0: no rotation
  bool rope_halves = false;  // channels i and i + D / 2 are a pair, not 2i and 2i + 1
};

size_t prepare_workspace_bytes(const PrepareParams& params);
void prepare(const PrepareParams& params, cudaStream_t stream);

}  // namespace fpsattn
