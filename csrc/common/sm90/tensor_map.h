// TMA tensor maps on the host. cuTensorMapEncodeTiled is looked up in the driver at run time: no link to libcuda.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>
#include <cute/arch/copy_sm90_desc.hpp>
#include <cute/atom/copy_traits_sm90_tma_swizzle.hpp>

#include "common/sm90/tile.h"
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
                "tensor_map: the CUDA driver has no cuTensorMapEncodeTiled, expected a driver for CUDA 12 or newer");
  return encoder;
}

// A contiguous matrix of `rows` rows of Tile::kColumns elements, in boxes that are Tiles: swizzle, box and panels are
// those of its layout, so that one load brings a tile as WGMMA reads it. With several panels the map has three
// dimensions, [panel][row][column in panel]. `what` names the operation and the argument in errors, e.g. "forward:
// q8".
template <class Tile>
CUtensorMap tile_map(const char* what, const void* data, int64_t rows) {
  using Element = typename Tile::Element;
  constexpr cuuint32_t kRank = Tile::kPanels == 1 ? 2 : 3;
  const cuuint64_t sizes[3] = {Tile::kPanelColumns, static_cast<cuuint64_t>(rows), Tile::kPanels};
  const cuuint64_t strides[2] = {Tile::kColumns * sizeof(Element), Tile::kPanelColumns * sizeof(Element)};  // bytes
  const cuuint32_t box[3] = {Tile::kPanelColumns, Tile::kRows, Tile::kPanels};
  const cuuint32_t steps[3] = {1, 1, 1};
  const CUtensorMapSwizzle swizzle =
      cute::TMA::to_CUtensorMapSwizzle(cute::detail::get_tma_swizzle_bits(typename Tile::Swizzle{}),
                                       cute::detail::get_tma_swizzle_base(typename Tile::Swizzle{}));
  // Not the returned object itself: the driver wants 64-byte alignment, and GCC 12 does not align the temporary that a
  // caller receives it in.
  struct {
    CUtensorMap map;
  } local;
  const CUresult status =
      tensor_map_encoder()(&local.map, cute::TMA::to_CUtensorMapDataType<Element>(), kRank, const_cast<void*>(data),
                           sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
                           CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  FPSATTN_CHECK(status == CUDA_SUCCESS, what, ": no TMA tensor map for a ", rows, " x ", Tile::kColumns, " matrix at ",
                data, " (CUresult ", static_cast<int>(status), "): the address must be a multiple of 16 bytes");
  return local.map;
}

}  // namespace fpsattn::sm90
