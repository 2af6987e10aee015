// The four kinds of product of the backward kernels, on the WGMMA wrappers of common/wgmma.h (fragments: see there).
//
// An FP32 accumulator packed pairwise to BF16 already is an A operand: registers 4k..4k+3 are the fragment of k step k
// (16 columns). So P^T and dS^T (or dS) feed the next product from registers, without a shuffle.
#pragma once

#include <cstdint>

#include "common/wgmma.h"

namespace fpsattn::sm90 {

// m64n32k16, both operands in shared memory: dQ in fast mode at D = 64, 32 columns to each warpgroup.
template <Major kMajorA, Major kMajorB>
struct WgmmaBf16<32, kMajorA, kMajorB> {
  static __device__ __forceinline__ void ss(float (&d)[16], uint64_t a, uint64_t b, bool accumulate) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %18, 0;\nwgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, %16, %17, p, 1, 1, %19, %20;\n}"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]),
          "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])
        : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)), "n"(static_cast<int>(kMajorA)),
          "n"(static_cast<int>(kMajorB)));
  }
};

}  // namespace fpsattn::sm90

namespace fpsattn::sm90::bwd {

// Descriptor of a tile with rows of kRowBytes = 64 or 128 bytes, swizzled over that width. K-major and MN-major alike,
// groups of 8 rows follow each other; panel_bytes leads from a panel of 64 columns to the next (MN-major, D = 128).
template <int kRowBytes>
__device__ __forceinline__ uint64_t tile_descriptor(const void* tile, uint32_t panel_bytes = 16) {
  static_assert(kRowBytes == 64 || kRowBytes == 128, "the swizzle is as wide as a row");
  return matrix_descriptor<kRowBytes == 128 ? Swizzle::k128B : Swizzle::k64B>(tile, 8 * kRowBytes, panel_bytes);
}

// A descriptor `bytes` further on (a multiple of 16).
__device__ __forceinline__ constexpr uint64_t advance(uint64_t descriptor, int bytes) {
  return descriptor + (bytes >> 4);
}

// d[64, N] = A[64, K] B[N, K]^T in e4m3, K = kRowBytes; both tiles are one panel.
template <int kRowBytes, int R>
__device__ __forceinline__ void multiply_fp8(float (&d)[R], uint64_t a, uint64_t b) {
#pragma unroll
  for (int k = 0; k < kRowBytes / 32; ++k) {
    WgmmaE4m3<2 * R>::ss(d, advance(a, 32 * k), advance(b, 32 * k), k > 0);
  }
}

// d[64, N] = A[64, D] B[N, D]^T in BF16, K-major panels of 64 columns (128 bytes); a_panel, b_panel: bytes of a panel.
template <int D, int R>
__device__ __forceinline__ void multiply_rows(float (&d)[R], uint64_t a, int a_panel, uint64_t b, int b_panel) {
#pragma unroll
  for (int k = 0; k < D / 16; ++k) {
    WgmmaBf16<2 * R>::ss(d, advance(a, k / 4 * a_panel + k % 4 * 32), advance(b, k / 4 * b_panel + k % 4 * 32), k > 0);
  }
}

// d[64, N] += A[64, K] B[K, N] in BF16: A is a packed accumulator in registers, B has rows of K, 128 bytes a panel row.
template <int K, int R>
__device__ __forceinline__ void accumulate_registers(float (&d)[R], const uint32_t (&a)[K / 4], uint64_t b) {
#pragma unroll
  for (int k = 0; k < K / 16; ++k) {
    WgmmaBf16<2 * R, Major::kK, Major::kMN>::rs(d, a + 4 * k, advance(b, k * 16 * 128), true);
  }
}

// d[64, N] = A[K, 64]^T B[K, N] in BF16: both tiles have rows of K; A rows are 128 bytes wide, B rows kRowBytes = 2 N.
template <int K, int kRowBytes, int R>
__device__ __forceinline__ void multiply_columns(float (&d)[R], uint64_t a, uint64_t b) {
  static_assert(kRowBytes == 4 * R, "one panel of B is the whole width of d");
#pragma unroll
  for (int k = 0; k < K / 16; ++k) {
    WgmmaBf16<2 * R, Major::kMN, Major::kMN>::ss(d, advance(a, k * 16 * 128), advance(b, k * 16 * kRowBytes), k > 0);
  }
}

// Two FP32 to packed BF16, nearest even; `low` in the low half.
__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

}  // namespace fpsattn::sm90::bwd
