// mbarriers and named barriers. An mbarrier in shared memory counts arrivals (and bytes of TMA loads) and flips its
// phase when none is missing. A waiter names the parity of the phase it waits for the end of: a fresh barrier is in
// phase 0, so wait(0) waits for the first flip and wait(1) returns at once (what a producer wants of an "empty" barrier
// in its first lap).
#pragma once

#include <cstdint>

namespace fpsattn::sm90 {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

struct alignas(8) Mbarrier {
  uint64_t state;

  // One thread, before any use; then fence_mbarrier_init() and a CTA barrier.
  __device__ __forceinline__ void init(uint32_t arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(this)), "r"(arrivals) : "memory");
  }
  __device__ __forceinline__ void arrive() {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(this)) : "memory");
  }
  // The same under a predicate: cheaper than a branch, which ptxas does not trust to be uniform.
  __device__ __forceinline__ void arrive_if(bool arrives) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %1, 0;\n@p mbarrier.arrive.shared::cta.b64 _, [%0];\n}" ::"r"(
                     shared_address(this)),
                 "r"(static_cast<int>(arrives))
                 : "memory");
  }
  // Arrives once and announces `bytes` that TMA loads naming this barrier will bring.
  __device__ __forceinline__ void arrive_expect_bytes(uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(this)), "r"(bytes)
                 : "memory");
  }
  __device__ __forceinline__ void wait(uint32_t parity) {
    asm volatile(
        "{\n.reg .pred done;\n"
        "WAIT_%=:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@done bra DONE_%=;\n"
        "bra WAIT_%=;\n"
        "DONE_%=:\n}" ::"r"(shared_address(this)),
        "r"(parity)
        : "memory");
  }
};

// Makes initialised mbarriers visible to TMA.
__device__ __forceinline__ void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Orders generic stores to shared memory before reads of it by WGMMA or TMA. By the writing threads, before the
// barrier.
__device__ __forceinline__ void fence_async_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Position in a ring of kStages slots, and the parity of the current lap.
template <int kStages>
struct RingPosition {
  uint32_t stage = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// Named barriers (0 is __syncthreads). `threads` counts those that sync and those that arrive.
__device__ __forceinline__ void named_barrier_sync(uint32_t id, uint32_t threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void named_barrier_arrive(uint32_t id, uint32_t threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Register reallocation between warpgroups: all warps of the warpgroup, kRegisters a multiple of 8 in 24..256.
template <uint32_t kRegisters>
__device__ __forceinline__ void release_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <uint32_t kRegisters>
__device__ __forceinline__ void acquire_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

}  // namespace fpsattn::sm90
