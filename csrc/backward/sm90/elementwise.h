// What both main kernels share besides products: their work, quantized probabilities, and rows of a gradient from
// accumulators.
#pragma once

#include <cstdint>

#include "backward/sm90/config.h"
#include "common/fp8.h"
#include "common/indexing.h"
#include "common/numeric.h"
#include "common/sm90/probability.h"
#include "common/sm90/ptx.h"

namespace fpsattn::sm90::backward {

// What a CTA of a main kernel works on: x = block, last first (text tiles, the longest lists, come last in slot order),
// y = head. Read anew where it is needed: kept, it would take registers of the main loop.
struct Work {
  int head;  // of the workspace
  int b, h;
  int block;

  __device__ __forceinline__ static Work of_cta(const Side& side) {
    const int head = static_cast<int>(opaque(blockIdx.y)), all_heads = side.first_head + head;
    return {head, all_heads / side.heads, all_heads % side.heads,
            side.num_blocks - 1 - static_cast<int>(opaque(blockIdx.x))};
  }
};

// Whether the forward takes P of a slot of a block from arithmetic.
template <int D>
__device__ __forceinline__ constexpr bool is_code_slot(int slot) {
  return slot < code_slots(D);
}

// P of two scores and the lines of their rows, as FP32: the bits that the forward multiplied with V. codes: in a code slot.
__device__ __forceinline__ float2 quantized_probabilities(float s0, float s1, const ExponentLine& y0,
                                                          const ExponentLine& y1, bool codes) {
  if (codes) {
    const float h0 = code_argument(s0, code_line(y0)), h1 = code_argument(s1, code_line(y1));
    return e4m3x2_to_float2(__byte_perm(exponent_codes<false>(h0, h1), 0, 0x4431));
  }
  const float e0 = fmaf(s0, y0.factor, y0.shift), e1 = fmaf(s1, y1.factor, y1.shift);
  return e4m3x2_to_float2(to_e4m3x2(exp2_approx(e0), exp2_approx(e1)));
}

// The four lanes of a quad hold words w[i] of column group i; then lane q holds the words of group q, in lane order.
__device__ __forceinline__ void transpose_quad(uint32_t (&w)[4]) {
  const int lane = threadIdx.x % 4;
#pragma unroll
  for (int distance = 1; distance <= 2; distance *= 2) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if ((i & distance) == 0) {
        const bool upper = (lane & distance) != 0;
        const uint32_t received = __shfl_xor_sync(0xffffffffu, upper ? w[i] : w[i + distance], distance);
        w[i] = upper ? received : w[i];
        w[i + distance] = upper ? w[i + distance] : received;
      }
    }
  }
}

// 8 elements to columns column .. column + 7 of a token's row.
__device__ __forceinline__ void store_8(const TokenTensor& out, int64_t row_offset, int column,
                                        const uint32_t (&w)[4]) {
  *reinterpret_cast<uint4*>(static_cast<uint16_t*>(out.data) + row_offset + column) =
      make_uint4(w[0], w[1], w[2], w[3]);
}

// Stores the columns of factor * accumulator (64 x D) that there are to the tokens of slots `slot` (accumulator row g) and
// slot + 8 of the CTA's block of `side`; of padding, nothing.
template <int D, class Accumulator>
__device__ __forceinline__ void store_rows(const Accumulator& accumulator, float factor, const Round& round,
                                           const Side& side, const TokenTensor& out, int slot) {
  const Work work = Work::of_cta(side);
  const int32_t* token = slots_of(side.token_of_slot, side.first_head + work.head) + work.block * kBlockSlots + slot;
  const int tokens[2] = {token[0], token[8]};
  const int head_dim = round.params.size.head_dim;  // fewer than D for 96
  const bool fp16 = round.params.dtype == DType::kFloat16;
  const int quad_lane = threadIdx.x % 4;
#pragma unroll
  for (int columns = 0; columns < D; columns += 32) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      uint32_t w[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int pair = 4 * (columns / 8 + i) + 2 * r;
        w[i] = pack_16bit(factor * accumulator(pair), factor * accumulator(pair + 1), fp16);
      }
      transpose_quad(w);
      if (tokens[r] >= 0 && columns + 8 * quad_lane < head_dim) {
        store_8(out, token_offset(out, work.b, work.h, tokens[r]), columns + 8 * quad_lane, w);
      }
    }
  }
}

}  // namespace fpsattn::sm90::backward
