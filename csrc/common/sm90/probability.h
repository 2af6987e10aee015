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

// The same line for slots with codes: h = kCodeOrigin - y / 32, exact but for the shifts of rows whose maximum is 2^16
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
  uint32_t bits;  // two halves, 0x3c00 - e each
  asm volatile("cvt.rn.f16x2.f32 %0, %2, %1;" : "=r"(bits) : "f"(h0), "f"(h1));
  if constexpr (!kBounded) {
    asm volatile("max.f16x2 %0, %0, %1;" : "+r"(bits) : "r"(0x10001u * kLeastCodeBits));
  }
  // x = 32 e - 2 codes, in halves of a code's 256ths: bit 10 is then set in the outer halves of an octave (and for e = 0).
  // It becomes the 64 of 2/8 of a code, and bit 13 of `bits`, which is always set, the 2 codes. The 16 keeps the borrow
  // of the lower half out of the bits that matter.
  uint32_t codes;
  asm volatile(
      "{\n.reg .b32 x, outer;\n"
      "mad.lo.u32 x, %1, -32, %2;\n"
      "lop3.b32 outer, %1, x, 0x24002400, 0xa8;\n"  // (bits | x) & mask
      "shr.u32 outer, outer, 4;\n"
      "add.u32 %0, x, outer;\n}"
      : "=r"(codes)
      : "r"(bits), "n"(0x10001u * (32 * 0x3c00 - 512 + 16)));
  return codes;
}

}  // namespace fpsattn::sm90
