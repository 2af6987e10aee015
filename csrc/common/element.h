// The two 16-bit input formats as types: how a packed pair becomes FP32.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

namespace fpsattn {

struct BFloat16 {
  // Element `half` (0: low, 1: high) of a packed pair; exact.
  __device__ __forceinline__ static float to_float(uint32_t pair, int half) {
    return __uint_as_float(half == 0 ? pair << 16 : pair & 0xffff0000u);
  }
};

struct Float16 {
  __device__ __forceinline__ static float to_float(uint32_t pair, int half) {
    return __half2float(__ushort_as_half(static_cast<unsigned short>(half == 0 ? pair : pair >> 16)));
  }
};

}  // namespace fpsattn
