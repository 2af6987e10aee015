// Numbers that more than one kernel, and the host references of the tests, must agree on to the bit.
#pragma once

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

#include <cstdint>

namespace fpsattn {

inline constexpr double kLog2E = 1.4426950408889634;
inline constexpr double kLn2 = 0.6931471805599453;

// softmax_scale * log2(e), rounded once: scores in log2 units. Forward and backward compute P from it, so both must
// have the same float.
constexpr float scale_in_log2_units(float softmax_scale) { return static_cast<float>(softmax_scale * kLog2E); }

// Codes by arithmetic (docs/numerics.md): h = kCodeOrigin + kCodeSlope * y, so that in FP16 e = 64 y + 446.75 is
// 0x3c00 - bits(h), an integer, eighths of a code. From kLeastCodeArgument on the code is 126, the greatest.
inline constexpr float kCodeSlope = -1.0f / 32;
inline constexpr float kCodeOrigin = 1.0f - 446.75f / 2048;
inline constexpr float kLeastCodeArgument = 1.0f - 1012.0f / 2048;
inline constexpr uint16_t kLeastCodeBits = 0x3c00 - 1012;

#ifdef __CUDACC__
// Two FP32 to two 16-bit values, nearest even; `low` in the low half.
__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}
__device__ __forceinline__ uint32_t pack_fp16(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}
__device__ __forceinline__ uint32_t pack_16bit(float low, float high, bool fp16) {
  return fp16 ? pack_fp16(low, high) : pack_bf16(low, high);
}
#endif

}  // namespace fpsattn
