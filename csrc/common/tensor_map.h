// TMA tensor maps on the host. cuTensorMapEncodeTiled is looked up in the driver at run time: no link to libcuda.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>

#include "fpsattn/status.h"

namespace fpsattn::sm90 {

// The driver's cuTensorMapEncodeTiled, found once per process; throws where the driver has none.
inline decltype(&cuTensorMapEncodeTiled) tensor_map_encoder() {
  static const auto encoder = [] {
    void* address = nullptr;
    cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
    const cudaError_t status =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &address, 12000, cudaEnableDefault, &found);
#else
    const cudaError_t status = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &address, cudaEnableDefault, &found);
#endif
    if (status != cudaSuccess || found != cudaDriverEntryPointSuccess) address = nullptr;
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(address);
  }();
  FPSATTN_CHECK(encoder != nullptr,
                "tensor_map: the CUDA driver has no cuTensorMapEncodeTiled, wanted a driver for CUDA 12 or newer");
  return encoder;
}

// A row-major matrix of `rows` rows of `columns` elements, `row_stride` elements apart; loads fetch boxes of box_rows x
// box_columns.
struct MatrixMap {
  CUtensorMapDataType type = CU_TENSOR_MAP_DATA_TYPE_UINT8;
  uint32_t element_bytes = 1;
  const void* data = nullptr;  // 16-byte aligned
  uint64_t rows = 0, columns = 0;
  uint64_t row_stride = 0;  // row_stride * element_bytes is a multiple of 16
  uint32_t box_rows = 0, box_columns = 0;
  CUtensorMapSwizzle swizzle = CU_TENSOR_MAP_SWIZZLE_128B;
};

// `what` names the operation and the argument in errors, e.g. "forward: q8".
inline CUtensorMap encode_matrix_map(const char* what, const MatrixMap& matrix) {
  const cuuint64_t sizes[2] = {matrix.columns, matrix.rows};
  const cuuint64_t strides[1] = {matrix.row_stride * matrix.element_bytes};
  const cuuint32_t box[2] = {matrix.box_columns, matrix.box_rows};
  const cuuint32_t steps[2] = {1, 1};
  CUtensorMap map;
  const CUresult status = tensor_map_encoder()(&map, matrix.type, 2, const_cast<void*>(matrix.data), sizes, strides,
                                               box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, matrix.swizzle,
                                               CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  FPSATTN_CHECK(status == CUDA_SUCCESS, what, ": no TMA tensor map for a ", matrix.rows, " x ", matrix.columns,
                " matrix at ", matrix.data, ", row stride ", matrix.row_stride, " elements (CUresult ",
                static_cast<int>(status), "): addresses and row strides must be multiples of 16 bytes");
  return map;
}

}  // namespace fpsattn::sm90
