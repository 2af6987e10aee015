// The softmax of a 64 x 128 score tile as one thread of a warpgroup sees it: rows g and g + 8 of its warp (g = lane /
// 4), of each row the columns 8 i + 2 q, 8 i + 2 q + 1 (q = lane % 4). Registers 4 i + 2 half + pair.
#pragma once

#include <cstdint>

#include "fpsattn/params.h"

namespace fpsattn::sm90::forward {

__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Running maxima of a thread's two rows, in log2 units, integers (or -inf before the first block). The four lanes of a
// quad agree.
struct RowMax {
  float row[2] = {-__builtin_huge_valf(), -__builtin_huge_valf()};
};

// 2^(from - to) for integers from <= to, exact; 1 where nothing moved (also for -inf), 0 below the normal range.
__device__ __forceinline__ float rescale_factor(float from, float to) {
  const float exponent = fmaxf(from - to, -127.0f);
  return from == to ? 1.0f : __int_as_float((static_cast<int>(exponent) + 127) << 23);
}

// max over the tile and before, rounded up to an integer: m = max(m, ceil(factor * max acc)). factor > 0 (or NaN), so
// the maximum may be taken first. fmaxf drops NaNs; they reach the output through the probabilities.
__device__ __forceinline__ void update_row_max(const float (&score)[64], const float (&factor)[2], RowMax& m) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float even = score[2 * half], odd = score[2 * half + 1];  // two chains a row
#pragma unroll
    for (int i = 4; i < 64; i += 4) {
      even = fmaxf(even, score[i + 2 * half]);
      odd = fmaxf(odd, score[i + 2 * half + 1]);
    }
    float top = fmaxf(even, odd);
    top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
    top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
    m.row[half] = fmaxf(m.row[half], ceilf(top * factor[half]));
  }
}

// score <- score * scale of its column (scales in shared memory): per-token scales of K.
__device__ __forceinline__ void scale_columns(float (&score)[64], const float* column_scale) {
  const uint32_t q = threadIdx.x % 4;
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const float2 scale = *reinterpret_cast<const float2*>(column_scale + 8 * i + 2 * q);
    score[4 * i] *= scale.x;
    score[4 * i + 1] *= scale.y;
    score[4 * i + 2] *= scale.x;
    score[4 * i + 3] *= scale.y;
  }
}

// score <- 2^(factor * score - m + 8), in place. At most 256: m is an integer bound of the row.
__device__ __forceinline__ void exponentiate(float (&score)[64], const float (&factor)[2], const RowMax& m) {
  const float shift[2] = {kProbabilityShift - m.row[0], kProbabilityShift - m.row[1]};
#pragma unroll
  for (int i = 0; i < 64; ++i) score[i] = exp2_approx(__fmaf_rn(score[i], factor[i / 2 % 2], shift[i / 2 % 2]));
}

// P to e4m3, two columns to a register half. Done before the previous PV is over; only join_pairs needs its P registers
// free.
__device__ __forceinline__ void convert_to_pairs(const float (&p)[64], uint16_t (&pairs)[32]) {
#pragma unroll
  for (int i = 0; i < 32; ++i) {
    asm volatile("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pairs[i]) : "f"(p[2 * i + 1]), "f"(p[2 * i]));
  }
}

// P as the A operand of PV. Byte b of lane q in k step s is column 16 (2 s + high) + {2q, 2q + 1, 8 + 2q, 9 + 2q}[b]:
// the slots that v8t holds at positions 4q + b (kVSlotOrder), so nothing is shuffled.
__device__ __forceinline__ void join_pairs(const uint16_t (&pairs)[32], uint32_t (&a)[16]) {
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const int first = 4 * (i / 2) + i % 2;
    asm volatile("mov.b32 %0, {%1, %2};" : "=r"(a[i]) : "h"(pairs[first]), "h"(pairs[first + 2]));
  }
}

}  // namespace fpsattn::sm90::forward
