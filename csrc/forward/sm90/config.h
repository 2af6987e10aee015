// Compile-time choices of the forward kernel: tiles, stages, roles, registers. Nothing else.
#pragma once

#include <cstdint>

#include "common/sm90/mbarrier.h"
#include "common/sm90/mma.h"
#include "common/sm90/tile.h"
#include "fpsattn/params.h"

namespace fpsattn::sm90::forward {

template <int kHeadDim_, bool kKScalePerToken_>
struct Config {
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr bool kKScalePerToken =
      kKScalePerToken_;  // an instance of its own: 64 more FMULs per thread and block
  static_assert(kHeadDim == 64 || kHeadDim == 128);

  // Roles
  static constexpr int kConsumers = 2;                     // warpgroups that compute, 64 query rows each
  static constexpr int kRows = 64 * kConsumers;            // query rows of a work item: one query block
  static constexpr int kThreads = 128 * (kConsumers + 1);  // warpgroup 0: producer (one warp works)
  static constexpr int kConsumerWarps = 4 * kConsumers;
  // The CTA owns 168 registers a thread; setmaxnreg moves them. 24/240 would spill in the producer, and the main loop
  // peaks at 225.
  static constexpr uint32_t kProducerRegisters = 40;
  static constexpr uint32_t kConsumerRegisters = 232;
  static_assert(kRows == kBlockSlots);
  static_assert(kProducerRegisters + kConsumers * kConsumerRegisters <= 3 * 168,
                "registers the CTA starts with: 65536 / 384, rounded down to 8");
  static_assert(kConsumers == 2);

  static constexpr int kCodeSlots = code_slots(kHeadDim);
  static_assert(kCodeSlots % 32 == 0 && kCodeSlots < kBlockSlots);
  // k steps of PV, 32 slots each, in their order. Where the last one, of exponentials, goes first, either half of P has codes
  // in it, which run while the exponential unit is busy. The model had 905 clocks a block instead of 959 at D = 64, 1819
  // instead of 1875 with K scales per token at D = 128 (64 slots of codes then); and 1147 instead of 1056 in clusters.
  static constexpr bool kExponentialsFirst = kHeadDim == 64 || kKScalePerToken;
  static constexpr int pv_step(int place) { return kExponentialsFirst ? (place + 3) % 4 : place; }

  // Shared-memory rings
  static constexpr int kStages = 4;  // K and V blocks each: D = 128 fills 4 x 33 KB; the producer runs 2-3 blocks ahead
  static constexpr int kItems = 2;   // work items in flight: Q of the next one loads while this one computes
  static constexpr int kVRows = kHeadDim + kVExtraRows;
  using QTile = Tile<E4m3, kRows, kHeadDim>;        // rows of both warpgroups
  using KTile = Tile<E4m3, kBlockSlots, kHeadDim>;  // [slot][D]
  using VTile = Tile<E4m3, kVRows, kBlockSlots>;    // [D + 8][slot]

  // MMA
  using QkMma = Mma<E4m3, kBlockSlots>;  // S[64, 128] += Q[64, 32] K[128, 32]^T
  using PvMma = Mma<E4m3, kVRows>;       // O[64, D + 8] += P[64, 32] V^T[D + 8, 32]^T
  static constexpr int kScoreRegisters = kBlockSlots / 2;
  static constexpr int kOutRegisters = kHeadDim / 2;  // of the FP32 master of O
  static constexpr int kWorkRegisters = kVRows / 2;   // of the PV accumulator: O, then the row sum, then zeros
  static constexpr int kProbabilityRegisters = kBlockSlots / 8;

  // O and the row sum are promoted to FP32 every kPromoteBlocks blocks. FP8 WGMMA keeps 13 bits below the largest
  // addend. Bias under that model (computed: the emulator, --fp8-acc=truncated) at 256 keys, scores of sigma 1 (2.9),
  // V of sigma 1: row sum -0.02 % (-0.20 %), O -0.00 % (+0.10 %) where V has mean 0.3, -0.16 % (-0.08 %) where it has
  // mean 2. At 128 keys all are below 0.11 %, for 33 more instructions per thread and block; at 1024 keys O is 0.3 %
  // and the row sum 0.9 % low with scores of sigma 1.4.
  static constexpr int kPromoteBlocks = 2;
  static_assert((kPromoteBlocks & (kPromoteBlocks - 1)) == 0 && kPromoteBlocks * kBlockSlots <= 1024);

  // Named barrier order_barrier(w) opens the tensor cores to consumer warpgroup w. The other one hands them over when its
  // PV is issued; at D = 64, where the softmax binds and not the tensor cores, when its scores are there: without the
  // barrier both warpgroups may stay in step, which the model has at 1088 clocks a block instead of 885.
  static constexpr bool kHandOverWithScores = kHeadDim == 64;
  static constexpr uint32_t order_barrier(uint32_t warpgroup) { return 1 + warpgroup; }
};

}  // namespace fpsattn::sm90::forward
