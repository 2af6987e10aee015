// WGMMA (wgmma.mma_async, sm_90a): thin typed wrappers of the few shapes the kernels use, descriptors and fences.
//
// D (64 x N, FP32, registers) = A (64 x K) B^T + (accumulate ? D : 0), K = 32 for e4m3 and 16 for BF16. A comes from
// shared memory (ss) or from registers (rs), B always from shared memory. A thread of the warpgroup (w = warp, g = lane
// / 4, q = lane % 4) owns of D, with register index i = 4 * group + 2 * half + pair:
//     row 16 w + g + 8 * half,   column 8 * group + 2 q + pair
// and of an 8-bit A (K = 32), register r = 2 * high + half, byte b:  row 16 w + g + 8 * half,  k = 16 * high + 4 q + b
// and of a 16-bit A (K = 16), register r = 2 * high + half, half b:  row 16 w + g + 8 * half,  k = 8 * high + 2 q + b.
// Layouts: PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions".
//
// How to use: write operands; fence_async_shared() if generic stores wrote shared memory; wgmma_fence(); issue;
// wgmma_commit(); wgmma_wait<n>() until at most n groups are in flight; keep_registers(d) before D is read and after D
// is written by hand. ptxas serializes silently (warnings C7510, C7514, ...) when accumulators are touched between
// issue and wait, or when a batch sits behind a branch; and (C7513) when the registers of an A operand are written before
// a wait has retired the group that reads them.
#pragma once

#include <cstdint>

namespace fpsattn::sm90 {

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most kPending of the newest groups are in flight.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Pins registers at this point of the program: the compiler may move no access of theirs across it.
template <int kRegisters>
__device__ __forceinline__ void keep_registers(float (&registers)[kRegisters]) {
#pragma unroll
  for (int i = 0; i < kRegisters; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}
template <int kRegisters>
__device__ __forceinline__ void keep_registers(uint32_t (&registers)[kRegisters]) {
#pragma unroll
  for (int i = 0; i < kRegisters; ++i) asm volatile("" : "+r"(registers[i])::"memory");
}

// ---- Shared-memory matrix descriptors

enum class Swizzle : uint32_t { k128B = 1, k64B = 2, k32B = 3 };  // the values of the descriptor's layout field

// Descriptor of a swizzled tile. `tile` is aligned to 8 rows (1024 bytes with k128B, 512 with k64B).
// K-major tile (rows of M or N, 128 or 64 bytes of K each): stride_bytes = 8 rows, leading_bytes is ignored; a step of
// 32 bytes along K advances the descriptor by 2 (units of 16 bytes). MN-major tile (16-bit types only; rows of K, 128
// bytes of M or N each): stride_bytes is the distance between groups of 8 K rows, leading_bytes the distance between
// panels of 64 elements along M or N. A tile n bytes further on: descriptor + n / 16.
template <Swizzle kSwizzle>
__device__ __forceinline__ uint64_t matrix_descriptor(const void* tile, uint32_t stride_bytes,
                                                      uint32_t leading_bytes = 16) {
  const uint64_t address = static_cast<uint32_t>(__cvta_generic_to_shared(tile));
  return ((address & 0x3ffff) >> 4) | (static_cast<uint64_t>(leading_bytes >> 4) << 16) |
         (static_cast<uint64_t>(stride_bytes >> 4) << 32) | (static_cast<uint64_t>(kSwizzle) << 62);
}

// ---- Instructions

enum class Major : int { kK = 0, kMN = 1 };

template <int N>
struct WgmmaE4m3;  // ss(d, a, b, accumulate), rs(d, a, b, accumulate); A and B K-major, K = 32

template <int N, Major kMajorA = Major::kK, Major kMajorB = Major::kK>
struct WgmmaBf16;  // likewise, K = 16; rs needs a K-major A

// Register lists "%0, ..., %n-1" and their constraints.
#define FPSATTN_LIST_32                                                                                            \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, " \
  "%24, %25, %26, %27, %28, %29, %30, %31"
#define FPSATTN_LIST_36 FPSATTN_LIST_32 ", %32, %33, %34, %35"
#define FPSATTN_LIST_64                                                                                   \
  FPSATTN_LIST_36                                                                                         \
      ", %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, " \
      "%55, %56, %57, %58, %59, %60, %61, %62, %63"
#define FPSATTN_LIST_68   FPSATTN_LIST_64 ", %64, %65, %66, %67"
#define FPSATTN_OUT_4(i)  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define FPSATTN_OUT_16(i) FPSATTN_OUT_4(i), FPSATTN_OUT_4(i + 4), FPSATTN_OUT_4(i + 8), FPSATTN_OUT_4(i + 12)
#define FPSATTN_OUT_32    FPSATTN_OUT_16(0), FPSATTN_OUT_16(16)
#define FPSATTN_OUT_36    FPSATTN_OUT_32, FPSATTN_OUT_4(32)
#define FPSATTN_OUT_64    FPSATTN_OUT_32, FPSATTN_OUT_16(32), FPSATTN_OUT_16(48)
#define FPSATTN_OUT_68    FPSATTN_OUT_64, FPSATTN_OUT_4(64)

// One instruction: `registers` accumulator registers; `a`, `b`, `flag` are the operand numbers after them. `modifiers`
// are the transpose bits of 16-bit types.
#define FPSATTN_WGMMA_SS(shape, registers, a, b, flag, modifiers, ...)                                \
  static __device__ __forceinline__ void ss(float (&d)[registers], uint64_t desc_a, uint64_t desc_b,  \
                                            bool accumulate) {                                        \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " flag ", 0;\nwgmma.mma_async.sync.aligned." shape \
                 " {" FPSATTN_LIST_##registers "}, " a ", " b ", p, 1, 1" modifiers ";\n}"            \
                 : FPSATTN_OUT_##registers                                                            \
                 : "l"(desc_a), "l"(desc_b), "r"(static_cast<int>(accumulate))__VA_ARGS__);           \
  }
#define FPSATTN_WGMMA_RS(shape, registers, a, b, flag, modifiers, ...)                                  \
  static __device__ __forceinline__ void rs(float (&d)[registers], const uint32_t* ra, uint64_t desc_b, \
                                            bool accumulate) {                                          \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " flag ", 0;\nwgmma.mma_async.sync.aligned." shape   \
                 " {" FPSATTN_LIST_##registers "}, " a ", " b ", p, 1, 1" modifiers ";\n}"              \
                 : FPSATTN_OUT_##registers                                                              \
                 : "r"(ra[0]), "r"(ra[1]), "r"(ra[2]), "r"(ra[3]), "l"(desc_b),                         \
                   "r"(static_cast<int>(accumulate))__VA_ARGS__);                                       \
  }

template <>
struct WgmmaE4m3<64> {
  FPSATTN_WGMMA_SS("m64n64k32.f32.e4m3.e4m3", 32, "%32", "%33", "%34", "")
  FPSATTN_WGMMA_RS("m64n64k32.f32.e4m3.e4m3", 32, "{%32, %33, %34, %35}", "%36", "%37", "")
};
template <>
struct WgmmaE4m3<72> {
  FPSATTN_WGMMA_RS("m64n72k32.f32.e4m3.e4m3", 36, "{%36, %37, %38, %39}", "%40", "%41", "")
};
template <>
struct WgmmaE4m3<128> {
  FPSATTN_WGMMA_SS("m64n128k32.f32.e4m3.e4m3", 64, "%64", "%65", "%66", "")
  FPSATTN_WGMMA_RS("m64n128k32.f32.e4m3.e4m3", 64, "{%64, %65, %66, %67}", "%68", "%69", "")
};
template <>
struct WgmmaE4m3<136> {
  FPSATTN_WGMMA_RS("m64n136k32.f32.e4m3.e4m3", 68, "{%68, %69, %70, %71}", "%72", "%73", "")
};

template <Major kMajorA, Major kMajorB>
struct WgmmaBf16<64, kMajorA, kMajorB> {
  static constexpr int kA = static_cast<int>(kMajorA), kB = static_cast<int>(kMajorB);
  FPSATTN_WGMMA_SS("m64n64k16.f32.bf16.bf16", 32, "%32", "%33", "%34", ", %35, %36", , "n"(kA), "n"(kB))
  FPSATTN_WGMMA_RS("m64n64k16.f32.bf16.bf16", 32, "{%32, %33, %34, %35}", "%36", "%37", ", %38", , "n"(kB))
};
template <Major kMajorA, Major kMajorB>
struct WgmmaBf16<128, kMajorA, kMajorB> {
  static constexpr int kA = static_cast<int>(kMajorA), kB = static_cast<int>(kMajorB);
  FPSATTN_WGMMA_SS("m64n128k16.f32.bf16.bf16", 64, "%64", "%65", "%66", ", %67, %68", , "n"(kA), "n"(kB))
  FPSATTN_WGMMA_RS("m64n128k16.f32.bf16.bf16", 64, "{%64, %65, %66, %67}", "%68", "%69", ", %70", , "n"(kB))
};

#undef FPSATTN_LIST_32
#undef FPSATTN_LIST_36
#undef FPSATTN_LIST_64
#undef FPSATTN_LIST_68
#undef FPSATTN_OUT_4
#undef FPSATTN_OUT_16
#undef FPSATTN_OUT_32
#undef FPSATTN_OUT_36
#undef FPSATTN_OUT_64
#undef FPSATTN_OUT_68
#undef FPSATTN_WGMMA_SS
#undef FPSATTN_WGMMA_RS

}  // namespace fpsattn::sm90
