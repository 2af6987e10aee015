// Tensor maps of the backward kernels (host), on common/tensor_map.h.
#pragma once

#include <cstdint>

#include "common/tensor_map.h"

namespace fpsattn::sm90::bwd {

// e4m3 matrix [rows, D] in boxes of `box_rows` full rows, swizzled over D = 64 or 128 bytes.
inline CUtensorMap fp8_map(const char* what, const void* data, uint64_t rows, uint32_t head_dim, uint32_t box_rows) {
  MatrixMap matrix;
  matrix.data = data;
  matrix.rows = rows;
  matrix.columns = matrix.row_stride = matrix.box_columns = head_dim;
  matrix.box_rows = box_rows;
  matrix.swizzle = head_dim == 128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B;
  return encode_matrix_map(what, matrix);
}

// BF16 matrix [rows, D] seen as panels [D / panel_columns][rows][panel_columns], in boxes of all panels of `box_rows`
// rows, swizzled over a panel row (64 or 128 bytes): one load brings a tile in the layout that WGMMA reads.
inline CUtensorMap panel_map(const char* what, const void* data, uint64_t rows, uint32_t head_dim,
                             uint32_t panel_columns, uint32_t box_rows) {
  const uint32_t panels = head_dim / panel_columns;
  const cuuint64_t sizes[3] = {panel_columns, rows, panels};
  const cuuint64_t strides[2] = {uint64_t{head_dim} * 2, uint64_t{panel_columns} * 2};
  const cuuint32_t box[3] = {panel_columns, box_rows, panels};
  const cuuint32_t steps[3] = {1, 1, 1};
  CUtensorMap map;
  const CUresult status = tensor_map_encoder()(
      &map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3, const_cast<void*>(data), sizes, strides, box, steps,
      CU_TENSOR_MAP_INTERLEAVE_NONE, panel_columns == 64 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  FPSATTN_CHECK(status == CUDA_SUCCESS, what, ": no TMA tensor map for ", rows, " rows of ", head_dim, " BF16 at ",
                data, " (CUresult ", static_cast<int>(status), ")");
  return map;
}

}  // namespace fpsattn::sm90::bwd
