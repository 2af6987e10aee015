// mbarriers, named barriers and fences: CUTLASS's, as the compiler must see them.
//
// An mbarrier in shared memory counts arrivals (and bytes of TMA loads) and flips its phase when none is missing. A
// waiter names the parity of the phase it waits for the end of: a fresh barrier is in phase 0, so wait(0) waits for
// the first flip and wait(1) returns at once (what a producer wants of an "empty" barrier in its first lap).
#pragma once

#include <cutlass/arch/barrier.h>
#include <cutlass/arch/reg_reconfig.h>

#include <cstdint>
#include <cute/arch/cluster_sm90.hpp>

#include "common/sm90/ptx.h"

namespace fpsattn::sm90 {

using cutlass::arch::warpgroup_reg_alloc;  // registers of a warpgroup, by all its warps, multiples of 8 in 24..256
using cutlass::arch::warpgroup_reg_dealloc;

__device__ __forceinline__ uint32_t shared_address(const void* pointer) { return cute::cast_smem_ptr_to_uint(pointer); }

// With the memory clobbers that CUTLASS 4.2 leaves out (ptx.h says what could go wrong).
struct Mbarrier : cutlass::arch::ClusterTransactionBarrier {
  // init: by one thread, before any use; then fence_barrier_init() and a CTA barrier.

  __device__ __forceinline__ void arrive() const {
    compiler_fence();
    cutlass::arch::ClusterTransactionBarrier::arrive();
  }
  __device__ __forceinline__ void arrive_if(bool arrives) const { mbarrier_arrive_if(shared_address(this), arrives); }
  // Arrives once and announces `bytes` that TMA loads naming this barrier will bring.
  __device__ __forceinline__ void arrive_and_expect_tx(uint32_t bytes) const {
    compiler_fence();
    cutlass::arch::ClusterTransactionBarrier::arrive_and_expect_tx(bytes);
  }
  // The same two, at this barrier of CTA `rank` of the cluster.
  __device__ __forceinline__ void arrive_at(uint32_t rank) const {
    compiler_fence();
    cutlass::arch::ClusterTransactionBarrier::arrive(rank);
  }
  __device__ __forceinline__ void arrive_and_expect_tx_at(uint32_t rank, uint32_t bytes) const {
    compiler_fence();
    cutlass::arch::ClusterTransactionBarrier::arrive_and_expect_tx(bytes, rank);
  }
  __device__ __forceinline__ void wait(uint32_t parity) const {
    cutlass::arch::ClusterTransactionBarrier::wait(parity);
    compiler_fence();
  }

  __device__ __forceinline__ uint64_t* pointer() { return &barrier_; }
};

// Makes initialised mbarriers visible to TMA.
__device__ __forceinline__ void fence_barrier_init() {
  cutlass::arch::fence_barrier_init();
  compiler_fence();
}

// All threads of the cluster that have not returned.
__device__ __forceinline__ void cluster_barrier() {
  compiler_fence();
  cute::cluster_sync();
  compiler_fence();
}

// Orders generic stores to shared memory before reads of it by WGMMA or TMA. By the writing threads, before the
// barrier.
__device__ __forceinline__ void fence_async_shared() {
  compiler_fence();
  cutlass::arch::fence_view_async_shared();
  compiler_fence();
}

// Named barriers of the CTA, 1 to 15 (0 is __syncthreads). `threads` counts those that sync and those that arrive. The
// ids are the hardware's: CUTLASS's interface for users adds 8 to them, at run time where they are not constants.
struct NamedBarrier {
  using Id = cutlass::arch::ReservedNamedBarriers;
  __device__ __forceinline__ static void sync(uint32_t threads, uint32_t id) {
    compiler_fence();
    cutlass::arch::NamedBarrier::sync(threads, static_cast<Id>(id));
    compiler_fence();
  }
  __device__ __forceinline__ static void arrive(uint32_t threads, uint32_t id) {
    compiler_fence();
    cutlass::arch::NamedBarrier::arrive(threads, static_cast<Id>(id));
  }
};

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

}  // namespace fpsattn::sm90
