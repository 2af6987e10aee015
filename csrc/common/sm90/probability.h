// P in the slots of a block that take it from arithmetic: the e4m3 code of 2^y without the exponential unit.
#pragma once

#include <cstdint>

namespace fpsattn::sm90 {

// docs/numerics.md, step 4, for two exponents: the code of 2^y0 in byte 1 of the result, that of 2^y1 in byte 3; bytes
// 0 and 2 are fractions. NaN gives 0. Volatile: it stays on its side of a WGMMA wait.
__device__ __forceinline__ uint32_t exponent_codes(float y0, float y1) {
  uint32_t codes;
  asm volatile(
      "{\n.reg .b32 w, r, slope, offset, outer;\n"
      "cvt.rn.f16x2.f32 w, %2, %1;\n"
      "mov.b32 slope, 0x2c102c10;\n"   // 65 / 1024
      "mov.b32 offset, 0x37163716;\n"  // 1814 / 4096
      "fma.rn.sat.f16x2 w, w, slope, offset;\n"
      "mov.b32 slope, 0x3fe03fe0;\n"               // 63 / 32
      "mov.b32 offset, 0x40104010;\n"              // 2 + 1 / 32
      "fma.rn.f16x2 r, w, slope, offset;\n"        // 0x4000 + 8 (code + 2)
      "lop3.b32 outer, r, 0x00200020, 0, 0x0c;\n"  // ~r & 32: the code is in the first or last quarter of its octave
      "mad.lo.u32 outer, outer, 3, 0xfdfffe00;\n"  // 3 / 8 of a code there; minus 2 codes
      "mad.lo.u32 %0, r, 32, outer;\n}"
      : "=r"(codes)
      : "f"(y0), "f"(y1));
  return codes;
}

}  // namespace fpsattn::sm90
