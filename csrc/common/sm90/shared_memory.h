// The shared memory of a CTA on sm_90.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/device_check.h"

namespace fpsattn::sm90 {

inline constexpr size_t kMaxSharedBytes = 227 * 1024;  // opt-in limit of a CTA
inline constexpr size_t kSharedAlignment = 1024;       // of the 128-byte swizzle: 8 rows of 128 bytes

// What to ask for at launch. Dynamic shared memory is 16-byte aligned by contract, so there is room to align it.
template <class Storage>
constexpr size_t shared_bytes() {
  static_assert(sizeof(Storage) + kSharedAlignment - 16 <= kMaxSharedBytes, "shared memory of a CTA");
  static_assert(alignof(Storage) <= kSharedAlignment);
  return sizeof(Storage) + kSharedAlignment - 16;
}

// The same for kernels that need every byte: they declare their dynamic shared memory with this alignment, which the
// compiler and the driver keep, and declared_storage() makes sure of it.
template <class Storage>
constexpr size_t declared_bytes() {
  static_assert(sizeof(Storage) <= kMaxSharedBytes, "shared memory of a CTA");
  static_assert(alignof(Storage) <= kSharedAlignment);
  return sizeof(Storage);
}

#ifdef __CUDACC__
// The CTA's Storage in `extern __shared__ __align__(kSharedAlignment) uint8_t dynamic[]`.
template <class Storage>
__device__ __forceinline__ Storage& declared_storage(uint8_t* dynamic) {
  trap_if(static_cast<uint32_t>(__cvta_generic_to_shared(dynamic)) % kSharedAlignment != 0);
  return *reinterpret_cast<Storage*>(dynamic);
}

// The CTA's Storage in its dynamic shared memory.
template <class Storage>
__device__ __forceinline__ Storage& aligned_storage(uint8_t* dynamic) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(dynamic));
  return *reinterpret_cast<Storage*>(dynamic + (-address & (kSharedAlignment - 1)));
}
#endif

}  // namespace fpsattn::sm90
