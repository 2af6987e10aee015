// Compile-time choices that the backward kernels share: roles, registers, tiles.
#pragma once

#include "backward/sm90/workspace.h"
#include "common/sm90/shared_memory.h"
#include "common/sm90/tile.h"

namespace fpsattn::sm90::backward {

inline constexpr int kWarpgroupThreads = 128;
inline constexpr int kConsumerWarpgroups = 2;  // 64 rows each
inline constexpr int kConsumerWarps = 4 * kConsumerWarpgroups;
inline constexpr int kThreads = kWarpgroupThreads * (1 + kConsumerWarpgroups);  // warpgroup 0 holds the producer
inline constexpr int kProducerRegisters = 40;
inline constexpr int kConsumerRegisters = 232;
static_assert(kWarpgroupThreads * (kProducerRegisters + kConsumerWarpgroups * kConsumerRegisters) <= kThreads * 168,
              "registers that the launch of kThreads threads reserves");

template <int D>
using Fp8Block = Tile<E4m3, kBlockSlots, D>;  // K8, Q8
template <int D>
using Fp8Half = Tile<E4m3, kQueryRows, D>;  // half a block of Q8
template <int D>
using Block = Tile<Bf16, kBlockSlots, D>;  // K16, V~, dO
template <int D>
using Half = Tile<Bf16, kQueryRows, D>;  // half a block of Q16, dO

}  // namespace fpsattn::sm90::backward
