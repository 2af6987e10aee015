// Shared memory of a CTA and what the producer tells the consumers about a work item.
#pragma once

#include "forward/sm90/config.h"

namespace fpsattn::sm90::forward {

// One query block of one (batch, head). count < 0 ends the kernel.
struct WorkItem {
  int32_t batch_head;
  int32_t q_block;
  int32_t count;  // KV blocks on its list
};

template <class C>
struct Storage {
  alignas(1024) uint8_t q[C::kItems][C::kQBytes];                     // [row][D], swizzled
  alignas(1024) uint8_t k[C::kStages][C::kKBytes];                    // [slot][D], swizzled
  alignas(1024) uint8_t v[C::kStages][C::kVBytes];                    // [D + 8][slot], 128-byte swizzle
  alignas(128) uint8_t out[C::kConsumerWarps][16 * C::kHeadDim * 2];  // 16-bit rows of a warp on their way out
  alignas(128) float v_scale[C::kItems][C::kHeadDim];
  // Of the block in k[stage]. One scale stands in [0]; 8 bytes a stage, as the barriers have, so that one address serves both.
  alignas(128) float k_scale[C::kStages][C::kKScalePerToken ? kBlockSlots : 2];
  WorkItem item[C::kItems];

  Mbarrier item_full[C::kItems], item_empty[C::kItems];  // item, Q, v_scale
  Mbarrier k_full[C::kStages], k_empty[C::kStages];      // K block, its scale
  Mbarrier v_full[C::kStages], v_empty[C::kStages];
};

inline constexpr size_t kMaxSharedBytes = 227 * 1024;  // opt-in limit of a CTA on sm_90
inline constexpr size_t kSharedAlignment =
    1024;  // of the 128-byte swizzle; dynamic shared memory is only 16-byte aligned by contract

template <class C>
constexpr size_t shared_bytes() {
  static_assert(sizeof(Storage<C>) + kSharedAlignment <= kMaxSharedBytes);
  return sizeof(Storage<C>) + kSharedAlignment;
}

}  // namespace fpsattn::sm90::forward
