// The softmax of a 64 x 128 score tile as one thread of a warpgroup sees it: rows g and g + 8 of its warp (g = lane /
// 4), of each row the columns 8 i + 2 q, 8 i + 2 q + 1 (q = lane % 4). Registers 4 i + 2 half + pair.
#pragma once

#include <cstdint>

#include "common/sm90/fragments.h"
#include "common/sm90/probability.h"
#include "common/sm90/ptx.h"
#include "fpsattn/params.h"

namespace fpsattn::sm90::forward {

// Running maxima m of a thread's two rows, integers in log2 units (or -inf before the first block), as exponents need them:
// shift = 8 - m. The four lanes of a quad agree.
struct RowMax {
  float shift[2] = {__builtin_huge_valf(), __builtin_huge_valf()};
};

// What a move of the maxima of a thread's rows was, in shifts. In shared memory: moves are rare, and registers are not.
struct MaxMove {
  float from[2], to[2];
};

// 2^(to - from) for integers to <= from, exact; 1 where nothing moved (also for inf), 0 below the normal range.
__device__ __forceinline__ float rescale_factor(float from, float to) {
  const float exponent = fmaxf(to - from, -127.0f);
  return from == to ? 1.0f : __int_as_float((static_cast<int>(exponent) + 127) << 23);
}

// max(0, greatest score) of the thread's two rows, over its own columns. Floats from 0 on are ordered as integers are,
// and of those sm_90 compares three at a time: half the instructions of fmaxf. A NaN
// wins: the tensor cores and multiplications make the positive one only, 0x7fffffff.
__device__ __forceinline__ void own_top_or_zero(const float (&score)[64], float (&top)[2]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    auto bits = [&](int i) { return __float_as_int(score[4 * (i / 2) + 2 * half + i % 2]); };
    int first = bits(0), second = bits(17);  // two chains
#pragma unroll
    for (int i = 1; i < 17; i += 2) first = __vimax3_s32(first, bits(i), bits(i + 1));
#pragma unroll
    for (int i = 18; i < 32; i += 2) second = __vimax3_s32(second, bits(i), bits(i + 1));
    top[half] = __int_as_float(__vimax3_s32(first, second, 0));
  }
}

// The greatest score of the two rows, all columns. NaNs are passed over.
__device__ __forceinline__ void row_top(const float (&score)[64], float (&top)[2]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    top[half] = score[2 * half];
#pragma unroll
    for (int i = 1; i < 32; ++i) top[half] = fmaxf(top[half], score[4 * (i / 2) + 2 * half + i % 2]);
    top[half] = fmaxf(top[half], __shfl_xor_sync(~0u, top[half], 1));
    top[half] = fmaxf(top[half], __shfl_xor_sync(~0u, top[half], 2));
  }
}

// The integer to subtract from a row whose greatest score is x: ceil(x), or, where that takes all 24 bits of a float,
// an ulp or two less. make_exponents rounds score * factor - m once, x is rounded before: there the greatest exponent
// may lie an ulp below 8, which beyond 2^27 is a row of zeros. It lies above this way, and P saturates: the winner
// still takes all.
__device__ __forceinline__ float integer_bound(float x) { return ceilf(__fmaf_rn(-fabsf(x), 0x1p-23f, x)); }

// Maxima from which on scores lie so far apart that an exponent may exceed 8 by more than codes have room for.
inline constexpr float kHugeMax = 0x1p21f;

// m = max(m, integer_bound(factor * max score)): integers. factor > 0 (or NaN), so the maximum may be taken first.
// Returns whether a row of the warp may have moved, and `move`. Where none has, all exponents are below 8 and m is right as
// it is; that is all that most blocks need to know. Where m <= 0, a score of 0 has 8 or more, so own_top_or_zero never
// hides a move. A NaN counts as a move; it reaches the output through the probabilities, whatever m is, from the last
// column of a row at the latest: codes by arithmetic cannot carry it, so it is copied there.
// m is what make_exponents wants: where a maximum is huge, scores are cut off where P saturates, and the shift is 0 until
// it is set to move.to.
__device__ __forceinline__ bool raise_max(float (&score)[64], const float (&factor)[2], RowMax& m, MaxMove& move) {
  float top[2];
  own_top_or_zero(score, top);
  const bool below = __fmaf_rn(top[0], factor[0], m.shift[0]) < kProbabilityShift &&
                     __fmaf_rn(top[1], factor[1], m.shift[1]) < kProbabilityShift;
  const bool moved = __any_sync(~0u, !below);
  if (moved) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (isnan(top[half])) score[60 + 2 * half] = top[half];
    }
    row_top(score, top);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      move.from[half] = m.shift[half];
      m.shift[half] = fminf(m.shift[half], kProbabilityShift - integer_bound(top[half] * factor[half]));
      move.to[half] = m.shift[half];
    }
    if (fmaxf(fabsf(m.shift[0]), fabsf(m.shift[1])) >= kHugeMax) {
      constexpr float kMost = (kCodeOrigin - kLeastCodeArgument) / -kCodeSlope;
      const float inverse[2] = {__fdividef(1.0f, factor[0]), __fdividef(1.0f, factor[1])};
#pragma unroll
      for (int i = 0; i < 64; ++i) {
        const float exponent = __fmaf_rn(score[i], factor[i / 2 % 2], m.shift[i / 2 % 2]);
        score[i] = (exponent > kMost ? kMost : exponent) * inverse[i / 2 % 2];  // NaN stays
      }
      m.shift[0] = m.shift[1] = 0.0f;
    }
  }
  return moved;
}

// score <- score * scale of its column (scales in shared memory): per-token scales of K.
__device__ __forceinline__ void scale_columns(float (&score)[64], const float* column_scale) {
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const float2 scale = *reinterpret_cast<const float2*>(column_scale + accumulator_column(threadIdx.x % 128, 4 * i));
    score[4 * i] *= scale.x;
    score[4 * i + 1] *= scale.y;
    score[4 * i + 2] *= scale.x;
    score[4 * i + 3] *= scale.y;
  }
}

// score <- factor * score - m + 8, the exponents of P: at most 8 (and a rounding error), as m is an integer bound of the
// row. In the first kCodeSlots columns score <- what exponent_codes takes.
template <int kCodeSlots>
__device__ __forceinline__ void make_exponents(float (&score)[64], const float (&factor)[2], const RowMax& m) {
#pragma unroll
  for (int i = 0; i < 64; ++i) {
    const int half = i / 2 % 2;
    score[i] = i < kCodeSlots / 2 ? code_argument(score[i], code_line({factor[half], m.shift[half]}))
                                  : __fmaf_rn(score[i], factor[half], m.shift[half]);
  }
}

// P = e4m3(2^exponent), or its code by arithmetic in the first C::kCodeSlots columns, for the k steps of PV (32 columns
// each) at places kFirst .. kLast - 1 of their order, as its A operand: v8t holds its slots in the order in which the bytes
// come to lie (kVSlotOrder), so nothing is shuffled.
template <class C, int kFirst, int kLast>
__device__ __forceinline__ void exponentiate(const float (&exponent)[64], uint32_t (&p)[16]) {
#pragma unroll
  for (int place = 4 * kFirst; place < 4 * kLast; ++place) {
    const int step = C::pv_step(place / 4), i = 4 * step + place % 4;
    const auto y = [&](int byte) { return exponent[accumulator_of_byte(i, byte)]; };
    if (32 * step < C::kCodeSlots) {
      p[i] = __byte_perm(exponent_codes<true>(y(0), y(1)), exponent_codes<true>(y(2), y(3)), 0x7531);
    } else {
      p[i] = to_e4m3x4_in_place(exp2_approx(y(0)), exp2_approx(y(1)), exp2_approx(y(2)), exp2_approx(y(3)));
    }
  }
}

}  // namespace fpsattn::sm90::forward
