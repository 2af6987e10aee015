// The shared memory of a CTA on sm_90: one struct per kernel.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef __CUDACC__
#include "common/device_check.h"
#endif

namespace fpsattn::sm90 {

inline constexpr size_t kMaxSharedBytes = 227 * 1024;  // opt-in limit of a CTA
inline constexpr size_t kSharedAlignment = 1024;       // of the 128-byte swizzle: 8 rows of 128 bytes

// What to ask for at launch.
template <class Storage>
constexpr size_t shared_bytes() {
  static_assert(sizeof(Storage) <= kMaxSharedBytes, "shared memory of a CTA");
  static_assert(alignof(Storage) <= kSharedAlignment);
  return sizeof(Storage);
}

#ifdef __CUDACC__
// The CTA's Storage, all of its dynamic shared memory: a kernel that uses it declares no other. Declared with its
// alignment, which compiler and driver keep; padding it by hand would cost a kernel that needs every byte up to 1008.
template <class Storage>
__device__ __forceinline__ Storage& shared_storage() {
  extern __shared__ __align__(kSharedAlignment) uint8_t dynamic_shared[];
  trap_if(static_cast<uint32_t>(__cvta_generic_to_shared(dynamic_shared)) % kSharedAlignment != 0);
  return *reinterpret_cast<Storage*>(dynamic_shared);
}
#endif

}  // namespace fpsattn::sm90
