// Block lists on the device: BlockLists of params.h with the arithmetic of broadcasting.
#pragma once

#include <cstdint>

namespace fpsattn::sm90::bwd {

struct DeviceLists {
  const int32_t* num_blocks;
  const int32_t* indices;
  int batch, heads, rows, max_blocks;

  __device__ __forceinline__ int64_t row(int b, int h, int r) const {
    return (int64_t(batch == 1 ? 0 : b) * heads + (heads == 1 ? 0 : h)) * rows + r;
  }
};

}  // namespace fpsattn::sm90::bwd
