// P in the slots of a block that take it from arithmetic: the e4m3 code of 2^y without the exponential unit.
// docs/numerics.md, "Codes by arithmetic".
#pragma once

#include <cstdint>

#include "common/numeric.h"

namespace fpsattn::sm90 {

// Exponents of P of a row: y = factor * score + shift.
struct ExponentLine {
  float factor, shift;
};

// The same line for slots with codes: h = kCodeOrigin - y / 64, exact but for the shifts of rows whose maximum is 2^16
// and more.
__device__ __forceinline__ ExponentLine code_line(const ExponentLine& y) {
  return {y.factor * kCodeSlope, fmaf(y.shift, kCodeSlope, kCodeOrigin)};
}

// h of a score, at most 1: what lies far below the maximum ends there, at code 0. NaN gives 0.
__device__ __forceinline__ float code_argument(float score, const ExponentLine& h) {
  return __saturatef(fmaf(score, h.factor, h.shift));
}

// For two h: the code in byte 1 of the result and in byte 3; bytes 0 and 2 are fractions. kBounded: neither is below
// kLeastCodeArgument, or its row is NaN; other h must be raised to it, and NaN is, too.
// Volatile: it stays on its side of a WGMMA wait.
template <bool kBounded>
__device__ __forceinline__ uint32_t exponent_codes(float h0, float h1) {
  uint32_t bits;
  asm volatile("cvt.rn.f16x2.f32 %0, %2, %1;" : "=r"(bits) : "f"(h0), "f"(h1));
  if constexpr (!kBounded) {
    asm volatile("max.f16x2 %0, %0, %1;" : "+r"(bits) : "r"(0x10001u * kLeastCodeBits));
  }
  // v falls where y grows, and its grid of 1/4 becomes one of 1/2 at 512: there the tail begins, with half the slope.
  uint32_t codes;
  asm volatile(
      "{\n.reg .b32 rest, v;\n"
      "lop3.b32 rest, %1, 0x100010, %2, 0xae;\n"  // (~bits & 16) | kCodeRestBits
      "fma.rn.f16x2 v, %1, %3, rest;\n"
      "mad.lo.u32 %0, v, -64, %4;\n}"
      : "=r"(codes)
      : "r"(bits), "n"(0x10001u * kCodeRestBits), "r"(0x10001u * kCodeFactorBits), "n"(0x10001u * (64 * kCodeTop)));
  return codes;
}

}  // namespace fpsattn::sm90
