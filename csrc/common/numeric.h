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

// Codes by arithmetic (docs/numerics.md): h = kCodeOrigin + kCodeSlope * y, so that 0x3c00 - bits(h) in FP16 is an integer,
// quarters of a code. From kLeastCodeArgument on the code is 126, the greatest.
inline constexpr float kCodeSlope = -1.0f / 64;
inline constexpr float kCodeOrigin = 1.0f - 264.125f / 2048;
inline constexpr int kMostCodeSteps = 547;
inline constexpr float kLeastCodeArgument = 1.0f - kMostCodeSteps / 2048.0f;
inline constexpr uint16_t kLeastCodeBits = 0x3c00 - kMostCodeSteps;
// v = 512 h + 21.5, and 1/4 in the inner halves of octaves; code = (kCodeTop - bits(v)) / 4, rounded down.
inline constexpr uint16_t kCodeFactorBits = 0x6000;  // 512
inline constexpr uint16_t kCodeRestBits = 0x4d60;    // 21.5
inline constexpr int kCodeTop = 0x6000 + 46;

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
