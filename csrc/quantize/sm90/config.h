// Sizes of the quantize kernels, and how a block is divided among threads.
//
// The unit of work of a thread is a *patch*: 16 consecutive slots x 8 channels of a block, 16 x 16 bytes of BF16/FP16
// in 64 registers. A block (128 slots x C) is 8 x C/8 patches, one for each of C threads; C = D, or 128 for D = 96,
// whose last 4 chunks of a row are zeros that nothing is read for. Both roles use it: rows (Q,
// K) pack the 8 channels of a slot; columns (V) pack the 16 slots of a channel, which transposes V without shared
// memory.
#pragma once

#include <cstddef>
#include <cstdint>

#include "fpsattn/params.h"

namespace fpsattn::sm90::quantize {

inline constexpr int kPatchSlots = 16;
inline constexpr int kPatchChannels = 8;                              // 16 bytes of a 16-bit format
inline constexpr int kPatchRowsPerBlock = kBlockSlots / kPatchSlots;  // 8
inline constexpr int kMaxClusterSize = 8;                             // the portable limit of sm_90
inline constexpr int kStatisticsThreads = 256;
inline constexpr int kStatisticsRows = 512;  // tokens that one statistics CTA reads
inline constexpr int kFinishGroups = 8;      // threads that share the partials of a channel

enum class GroupScope { kTile, kToken };  // what shares a scale; a block is a tile of one block

// What blockIdx.y says. V first: its bytes are the ones that the statistics kernel left in the L2 cache.
enum class Role : int { kV = 0, kK = 1, kQ = 2 };
inline constexpr int kRoles = 3;

// A row of K or V: what the statistics kernels need to know.
template <int kHeadDim_, class Element_>
struct RowConfig {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kCodeDim = code_dim(kHeadDim);        // columns of q8 and k8, rows of v8t but for the extra ones
  static constexpr int kChunks = kCodeDim / kPatchChannels;  // lanes that share one row
  static_assert(kHeadDim % kPatchChannels == 0 && kHeadDim <= kCodeDim);

  // Whether chunk `chunk` of a row is there; a constant where all are.
  __host__ __device__ static constexpr bool has_chunk(int chunk) {
    return kHeadDim == kCodeDim || chunk < kHeadDim / kPatchChannels;
  }
};

template <int kHeadDim, class Element, GroupScope kScope_>
struct Config : RowConfig<kHeadDim, Element> {
  using RowConfig<kHeadDim, Element>::kChunks;
  using RowConfig<kHeadDim, Element>::kCodeDim;
  static constexpr GroupScope kScope = kScope_;
  static constexpr int kThreads = kCodeDim;                   // one patch each
  static constexpr int kMinCtas = 512 / kThreads;             // 128 registers a thread: 64 hold the patch
  static constexpr int kRowsPerLane = kPatchSlots / kChunks;  // rows that a lane owns after a transposing reduction
  static_assert(kCodeDim == 64 || kCodeDim == 128, "a row must be spread over 8 or 16 lanes of one warp");
  static_assert(kPatchRowsPerBlock * kChunks == kThreads, "one patch per thread");
};

// What the launcher decides, beside the caller's parameters; and the caller's workspace, cut into pieces.
struct Plan {
  int64_t k_rows = 0;          // tokens of K that enter the mean
  int k_parts = 0;             // partial sums per (batch, head); 0: the mean is given or not wanted
  int v_parts = 0;             // partial maxima per (batch, head); 0: the absmax is given
  float* k_partial = nullptr;  // [B, H, k_parts, D], workspace
  float* v_partial = nullptr;  // [B, H, v_parts, D], workspace
  int cluster_size = 1;        // CTAs that share a tile
  int first_role = 0;          // of the launch
  int roles = kRoles;          // in it
  size_t workspace_bytes = 0;

  static Plan of(const QuantizeParams& params, void* workspace);
};

// Position p of 16 in v8t holds this slot: kVSlotOrder as a formula, so that device code can unroll it.
constexpr int slot_at_position(int p) { return 2 * (p / 4) + (p & 1) + ((p & 2) ? 8 : 0); }

constexpr bool slot_order_agrees() {
  for (int p = 0; p < 16; ++p) {
    if (slot_at_position(p) != kVSlotOrder[p]) {
      return false;
    }
  }
  return true;
}
static_assert(slot_order_agrees(), "slot_at_position must equal kVSlotOrder");

}  // namespace fpsattn::sm90::quantize
