// Shared memory of a CTA and what the producer tells the consumers about a work item.
#pragma once

#include "common/sm90/shared_memory.h"
#include "forward/sm90/config.h"
#include "forward/sm90/softmax.h"

namespace fpsattn::sm90::forward {

// One query block of one (batch, head). count < 0 ends the kernel.
struct WorkItem {
  int32_t batch_head;
  int32_t q_block;
  int32_t count;  // KV blocks on its list
  int32_t pair;   // 1: the other CTA of the cluster has another query block of the tile, and the same KV blocks at hand
};

template <class C>
struct Storage {
  alignas(kSharedAlignment) E4m3 q[C::kItems][C::QTile::kElements];
  alignas(kSharedAlignment) E4m3 k[C::kStages][C::KTile::kElements];
  alignas(kSharedAlignment) E4m3 v[C::kStages][C::VTile::kElements];
  alignas(128) uint8_t out[C::kConsumerWarps][16 * C::kHeadDim * 2];  // 16-bit rows of a warp on their way out
  alignas(128) float v_scale[C::kItems][C::kHeadDim];
  alignas(128) int32_t tokens[C::kItems][kBlockSlots];  // of the query block's slots, -1 in padding
  // Of the block in k[stage]. One scale stands in [0]; 8 bytes a stage, as the barriers have, so that one address
  // serves both.
  alignas(128) float k_scale[C::kStages][C::kKScalePerToken ? kBlockSlots : 2];
  WorkItem item[C::kItems];
  MaxMove move[128 * C::kConsumers];  // of each thread's rows

  Mbarrier item_full[C::kItems], item_empty[C::kItems];  // item, tokens, Q, v_scale
  Mbarrier k_full[C::kStages], k_empty[C::kStages];      // K block, its scale
  Mbarrier v_full[C::kStages], v_empty[C::kStages];

  int32_t mail;  // of CTA 1: the pair that CTA 0 drew for both, or -1
  Mbarrier mail_full, mail_empty;
};

}  // namespace fpsattn::sm90::forward
