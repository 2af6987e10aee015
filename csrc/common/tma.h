// TMA on the device: tiled loads through a tensor map, plain bulk copies, reductions. One thread issues.
// Tensor maps are made on the host (tensor_map.h) and passed as `const __grid_constant__ CUtensorMap`.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "common/mbarrier.h"
#include "common/sm90/ptx.h"

namespace fpsattn::sm90 {

// L2 eviction hints: the encodings of createpolicy.fractional with fraction 1.0, as CUTLASS's TMA::CacheHintSm90 has
// them.
enum class CacheHint : uint64_t {
  kEvictNormal = 0x1000000000000000,
  kEvictFirst = 0x12F0000000000000,
  kEvictLast = 0x14F0000000000000
};

__device__ __forceinline__ void tma_prefetch_descriptor(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(reinterpret_cast<uint64_t>(map)) : "memory");
}

// Box at (column, row) of a 2D map to shared memory (128-byte aligned; 1024 with the 128-byte swizzle). `full` receives
// the bytes.
__device__ __forceinline__ void tma_load_2d(void* shared, const CUtensorMap* map, Mbarrier* full, int32_t column,
                                            int32_t row, CacheHint hint = CacheHint::kEvictNormal) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%3, "
      "%4}], [%2], %5;" ::"r"(shared_address(shared)),
      "l"(reinterpret_cast<uint64_t>(map)), "r"(shared_address(full)), "r"(column), "r"(row),
      "l"(static_cast<uint64_t>(hint))
      : "memory");
}
__device__ __forceinline__ void tma_load_3d(void* shared, const CUtensorMap* map, Mbarrier* full, int32_t c0,
                                            int32_t c1, int32_t c2, CacheHint hint = CacheHint::kEvictNormal) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%3, %4, "
      "%5}], [%2], %6;" ::"r"(shared_address(shared)),
      "l"(reinterpret_cast<uint64_t>(map)), "r"(shared_address(full)), "r"(c0), "r"(c1), "r"(c2),
      "l"(static_cast<uint64_t>(hint))
      : "memory");
}

// Contiguous bytes (addresses and size multiples of 16) to shared memory.
__device__ __forceinline__ void bulk_load(void* shared, const void* global, uint32_t bytes, Mbarrier* full) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(shared)),
               "l"(reinterpret_cast<uint64_t>(global)), "r"(bytes), "r"(shared_address(full))
               : "memory");
}
// Contiguous bytes from shared memory; fence_async_shared() after the stores that filled it. Groups: bulk_commit,
// bulk_wait_*.
__device__ __forceinline__ void bulk_store(void* global, const void* shared, uint32_t bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(reinterpret_cast<uint64_t>(global)),
               "r"(shared_address(shared)), "r"(bytes)
               : "memory");
}
// global[i] += shared[i], FP32.
__device__ __forceinline__ void bulk_reduce_add(float* global, const float* shared, uint32_t bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(
                   reinterpret_cast<uint64_t>(global)),
               "r"(shared_address(shared)), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// At most kPending groups still read shared memory.
template <int kPending>
__device__ __forceinline__ void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}
}  // namespace fpsattn::sm90
