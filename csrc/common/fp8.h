// e4m3: conversion, scale rule, division by a scale. Bit for bit what python/fpsattention/ops/reference.py computes.
#pragma once

#include <cuda_fp8.h>

#include <cstdint>

#include "common/sm90/ptx.h"
#include "fpsattn/params.h"

namespace fpsattn {

// Two FP32 values to e4m3, nearest even, saturating at +-448, NaN to 0x7F; `low` lands in the low byte.
__device__ __forceinline__ uint32_t to_e4m3x2(float low, float high) {
  return __nv_cvt_float2_to_fp8x2(make_float2(low, high), __NV_SATFINITE, __NV_E4M3);
}

// Four values, the first in the lowest byte.
__device__ __forceinline__ uint32_t to_e4m3x4(float x0, float x1, float x2, float x3) {
  return to_e4m3x2(x0, x1) | (to_e4m3x2(x2, x3) << 16);
}

// Two e4m3 bytes (the low half of `pair`) to FP32, exact.
__device__ __forceinline__ float2 e4m3x2_to_float2(uint32_t pair) {
  const __half2_raw halves = __nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(pair), __NV_E4M3);
  return __half22float2(halves);
}

// max(a, |x|) that keeps a NaN, unlike fmaxf.
__device__ __forceinline__ float absmax_nan(float a, float x) { return sm90::fmax_nan(a, fabsf(x)); }

inline constexpr float kScaleFloor = 0x1p-100f;

// Scale of a group from its largest absolute value: absmax / 448, at least 2^-100; 1 for an all-zero group; NaN if the
// group holds a NaN or an Inf. pow2: rounded up to a power of two.
__device__ __forceinline__ float scale_of_absmax(float absmax, bool pow2) {
  const uint32_t bits = __float_as_uint(absmax) & 0x7fffffffu;
  if (bits >= 0x7f800000u) {
    return __uint_as_float(0x7fc00000u);
  }
  if (bits == 0) {
    return 1.0f;
  }
  float scale = fmaxf(__fdiv_rn(absmax, kE4m3Max), kScaleFloor);  // normal: the exponent field can be counted up
  if (pow2) {
    scale = __uint_as_float((__float_as_uint(scale) + 0x007fffffu) & 0xff800000u);
  }
  return scale;
}

// x / scale, correctly rounded, in four FP32 instructions, one logic instruction and no branch.
//
// Markstein's correction: with r = rn(1/s), q = rn(x r), the remainder e = x - q s is exact where |q - x/s| <= 1 ulp,
// and rn(q + e r) is then the correctly rounded quotient. q can be 1.5 ulp off, but not where it matters, with x/s next
// to a rounding boundary: the error before q is rounded stays below 1 ulp, so q is one of the two neighbours of that
// boundary. The correction of -0 is +0: the sign comes from x (scales are positive). The remainder must not underflow:
// scales below 2^-60 are lifted, with x, by 2^64 (exact). The product x r must not overflow: it does not for |x| <= 448
// s; use divide_saturating where x may be larger.
struct Divisor {
  float scale;
  float reciprocal;
  float lift;

  __device__ __forceinline__ static Divisor of(float scale) {
    const float lift = scale < 0x1p-60f ? 0x1p64f : 1.0f;
    return {scale * lift, __frcp_rn(scale * lift), lift};
  }

  __device__ __forceinline__ float divide(float x) const {
    const float lifted = __fmul_rn(x, lift);
    const float q = __fmul_rn(lifted, reciprocal);
    return corrected(lifted, q);
  }

  // For values beyond the range that the scale was made for: +-448 or more comes back as some value that e4m3
  // saturates, an infinite x as NaN.
  __device__ __forceinline__ float divide_saturating(float x) const {
    const float lifted = __fmul_rn(x, lift);
    const float q = __fmul_rn(lifted, reciprocal);
    const float quotient = fabsf(q) > 2.0f * kE4m3Max ? q : corrected(lifted, q);
    return fabsf(x) == __uint_as_float(0x7f800000u) ? __uint_as_float(0x7fc00000u) : quotient;
  }

 private:
  __device__ __forceinline__ float corrected(float x, float q) const {
    return copysignf(__fmaf_rn(__fmaf_rn(-q, scale, x), reciprocal, q), x);
  }
};

}  // namespace fpsattn
