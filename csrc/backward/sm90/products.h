// The four kinds of product of the backward kernels, of tiles (common/sm90/tile.h) and CuTe's WGMMA atoms
// (common/sm90/mma.h).
//
// An FP32 accumulator packed pairwise to BF16 already is an A operand: registers 4k..4k+3 are the fragment of k step k
// (16 columns). So P^T and dS^T (or dS) feed the next product from registers, without a shuffle.
#pragma once

#include "common/sm90/mma.h"

namespace fpsattn::sm90::backward {

// d[64, B::kRows] = A B^T over the columns of both. a: 64 rows of an A.
template <class A, class B, int R>
__device__ __forceinline__ void multiply_rows(float (&d)[R], uint64_t a, uint64_t b) {
  constexpr int kStep = 32 / sizeof(typename A::Element);
#pragma unroll
  for (int k = 0; k < A::kColumns; k += kStep) {
    Mma<typename A::Element, B::kRows>::ss(d, a + A::step(0, k), b + B::step(0, k), k > 0);
  }
}

// d[64, B::kColumns] += A B over the rows of B. A: a packed accumulator of 64 x B::kRows.
template <class B, int R>
__device__ __forceinline__ void accumulate_registers(float (&d)[R], const uint32_t (&a)[B::kRows / 4], uint64_t b) {
#pragma unroll
  for (int k = 0; k < B::kRows; k += 16) {
    Mma<Bf16, B::kColumns, Major::K, Major::MN>::rs(d, a + k / 4, b + B::step(k, 0), true);
  }
}

// d[64, B::kColumns] = A^T B over the rows of both. A has 64 columns.
template <class A, class B, int R>
__device__ __forceinline__ void multiply_columns(float (&d)[R], uint64_t a, uint64_t b) {
  static_assert(A::kColumns == 64);
#pragma unroll
  for (int k = 0; k < A::kRows; k += 16) {
    Mma<Bf16, B::kColumns, Major::MN, Major::MN>::ss(d, a + A::step(k, 0), b + B::step(k, 0), k > 0);
  }
}

}  // namespace fpsattn::sm90::backward
