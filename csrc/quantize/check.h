// Checks that quantize and prepare share.
#pragma once

#include <cstdlib>

#include "common/check_params.h"

namespace fpsattn {

// What the workspace size hangs on, and what is divided by.
inline void check_quantize_sizes(const char* op, const QuantizeParams& params) {
  check_size(op, params.size);
  FPSATTN_CHECK(params.k_mean_stride >= 1, op, ": k_mean_stride is ", params.k_mean_stride, ", expected at least 1");
}

inline void check_rows(const char* op, const char* name, const TokenTensor& tensor) {
  check_tensor(op, name, tensor, true);
  FPSATTN_CHECK(std::abs(tensor.stride_token) <= kMaxTokenStride, op, ": ", name, " has a token stride of ",
                tensor.stride_token, " elements, expected at most ", kMaxTokenStride, ": make it contiguous");
}

inline void check_quantize(const char* op, const QuantizeParams& params, size_t workspace_bytes) {
  check_quantize_sizes(op, params);
  check_dtype(op, "dtype", params.dtype);
  FPSATTN_CHECK(params.granularity == Granularity::kTile || params.granularity == Granularity::kBlock ||
                    params.granularity == Granularity::kToken,
                op, ": granularity is ", static_cast<int>(params.granularity),
                ", expected 0 (tile), 1 (block) or 2 (token)");
  check_rows(op, "q", params.q);
  check_rows(op, "k", params.k);
  check_rows(op, "v", params.v);
  check_pointers(op, kPointerAlignment, {{"k_mean", params.k_mean}});
  check_pointers(op, kPointerAlignment, {{"q8", params.q8}, {"k8", params.k8}, {"v8t", params.v8t}});
  check_pointers(op, 4, {{"tile_block_offsets", params.tile_block_offsets}, {"q_k_mean", params.q_k_mean}});
  check_pointers(op, 4, {{"q_scale", params.q_scale}, {"k_scale", params.k_scale}, {"v_scale", params.v_scale}});
  check_slot_tables(op, params, kPointerAlignment);
  FPSATTN_CHECK((params.size.kv_tiles > 0) == (params.size.kv_blocks > 0), op, ": kv_tiles is ", params.size.kv_tiles,
                " and kv_blocks ", params.size.kv_blocks, ", expected both or none");
  if (params.size.kv_tiles > 0) check_pointer(op, "kv_tile_block_offsets", params.kv_tile_block_offsets, 4);
  if (params.q_block_sum != nullptr) check_pointer(op, "q_block_sum", params.q_block_sum, 4);
  if (params.k_block_sum != nullptr) check_pointer(op, "k_block_sum", params.k_block_sum, 4);
  check_workspace(op, params.workspace, params.workspace_bytes, workspace_bytes);
}

}  // namespace fpsattn
