// PTX written by hand, each piece with the reason why CUTLASS's or CUDA's own will not do; more only in probability.h.
#pragma once

#include <cstdint>

namespace fpsattn::sm90 {

// Nothing that touches memory moves across, in the compiler's eyes. CUTLASS 4.2's barrier and fence wrappers are
// volatile but do not say that they touch memory: plain loads could be hoisted above a wait, or sink below the arrival
// that releases them.
__device__ __forceinline__ void compiler_fence() { asm volatile("" ::: "memory"); }

// The same value, about which the compiler knows nothing from here on: what is computed from it stays where it is
// written.
__device__ __forceinline__ uint32_t opaque(uint32_t value) {
  asm volatile("" : "+r"(value));
  return value;
}

// The same value, of which ptxas now knows that the warp agrees on it, and no longer how it was computed: it keeps it
// in a uniform register and adds to it with 64-bit adds, instead of deriving every matrix descriptor anew in a loop.
// CuTe's DescriptorIterator adds to 32 bits of a descriptor: more instructions.
__device__ __forceinline__ uint64_t warp_uniform(uint64_t value) {
  asm volatile(
      "{\n.reg .b32 low, high;\nmov.b64 {low, high}, %0;\n"
      "shfl.sync.idx.b32 low, low, 0, 31, -1;\nshfl.sync.idx.b32 high, high, 0, 31, -1;\n"
      "mov.b64 %0, {low, high};\n}"
      : "+l"(value));
  return value;
}

// One arrival of the threads whose predicate is set. CUTLASS branches, which ptxas does not trust to be uniform.
__device__ __forceinline__ void mbarrier_arrive_if(uint32_t barrier, bool arrives) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %1, 0;\n@p mbarrier.arrive.shared::cta.b64 _, [%0];\n}" ::"r"(barrier),
               "r"(static_cast<int>(arrives))
               : "memory");
}

// The same, of a barrier of any CTA of the cluster: a shared::cluster address (cute::set_block_rank).
__device__ __forceinline__ void mbarrier_arrive_in_cluster_if(uint32_t barrier, bool arrives) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %1, 0;\n@p mbarrier.arrive.shared::cluster.b64 _, [%0];\n}" ::"r"(barrier),
      "r"(static_cast<int>(arrives))
      : "memory");
}

// Contiguous bytes to the same place in the shared memory of every CTA of `ctas` (a bit each), and their number to the
// same mbarrier there. CUTLASS has this copy for one CTA only.
__device__ __forceinline__ void bulk_load_multicast(uint32_t shared, const void* global, uint32_t bytes,
                                                    uint32_t barrier, uint16_t ctas) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, [%3], "
      "%4;" ::"r"(shared),
      "l"(reinterpret_cast<uint64_t>(global)), "r"(bytes), "r"(barrier), "h"(ctas)
      : "memory");
}

// global[i] += shared[i], FP32, in the current bulk group. CUTLASS has bulk copies, but no bulk reduction without a
// tensor map.
__device__ __forceinline__ void bulk_reduce_add(float* global, uint32_t shared, uint32_t bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(
                   reinterpret_cast<uint64_t>(global)),
               "r"(shared), "r"(bytes)
               : "memory");
}

// At most kPending bulk groups are not yet written to global memory. CuTe's tma_store_wait waits for the reads only.
template <int kPending>
__device__ __forceinline__ void bulk_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
}

// base + a * b bytes, one instruction. The compiler hoists the extension of b to 64 bits out of loops and multiplies in
// six.
__device__ __forceinline__ const char* multiply_add(int32_t a, int32_t b, const char* base) {
  const char* result;
  asm("mad.wide.s32 %0, %1, %2, %3;" : "=l"(result) : "r"(a), "r"(b), "l"(base));
  return result;
}

// 16 bytes of global memory that are read once, so not kept in L1: CUDA has no such load. Volatile: loads stay where
// they are written, in front of what uses them, so that all of a batch are in flight.
__device__ __forceinline__ uint4 load_uncached(const char* address) {
  uint4 x;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "l"(address)
               : "memory");
  return x;
}

// 2^x, 2 ulp, subnormal results are 0: one MUFU instruction. CUDA's exp2f scales around it unless the whole file is
// compiled with fast math.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// max(a, b), NaN if one of them is: fmaxf drops NaNs, and CUDA has an intrinsic for 16-bit types only.
__device__ __forceinline__ float fmax_nan(float a, float b) {
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}

// Four FP32 values to e4m3, nearest even, saturating at +-448, NaN to 0x7F; the first in the lowest byte. Volatile and
// in one piece, unlike to_e4m3x4 (fp8.h): ptxas then merges both halves inside the second F2FP, and the conversions
// stay on their side of a WGMMA wait.
__device__ __forceinline__ uint32_t to_e4m3x4_in_place(float x0, float x1, float x2, float x3) {
  uint32_t packed;
  asm volatile(
      "{\n.reg .b16 low, high;\n"
      "cvt.rn.satfinite.e4m3x2.f32 low, %2, %1;\n"
      "cvt.rn.satfinite.e4m3x2.f32 high, %4, %3;\n"
      "mov.b32 %0, {low, high};\n}"
      : "=r"(packed)
      : "f"(x0), "f"(x1), "f"(x2), "f"(x3));
  return packed;
}

}  // namespace fpsattn::sm90
