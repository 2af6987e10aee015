// Selection: a warp per row of values, columns in registers, lane l holding columns l, l + 32, ...
//
// The threshold is found bit by bit, from the top of a 32-bit key that grows with the value: a step counts (or weighs) the columns at or
// above a candidate. Steps end as soon as the count is exact, for k random values of n after about 9 + log2(n) of 32. At 600 columns a step is
// 19 compares and adds and one reduction; a row is read once and its list written once.
#pragma once

#include "common/device_check.h"
#include "fpsattn/patterns.h"

namespace fpsattn::sm90::patterns {

inline constexpr int kWarps = 4;  // rows of a CTA
inline constexpr unsigned kAllLanes = 0xFFFFFFFFu;
inline constexpr uint32_t kNanKey = 0xFFFFFFFEu;
inline constexpr uint32_t kFirstKey = 0xFFFFFFFFu;  // own blocks, where they come first; 0: no video block

// Grows with the value; -0 is below +0; at least 1.
__device__ __forceinline__ uint32_t key_of(float value) {
  const uint32_t bits = __float_as_uint(value);
  if (value != value) return kNanKey;
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// floor(w * 2^40) of w in [0, 1]; NaN is 0.
__device__ __forceinline__ int64_t fixed_point(float weight) {
  return static_cast<int64_t>(fminf(fmaxf(weight, 0.0f), 1.0f) * 1099511627776.0f);
}

// The value whose key is `key`: that of a weight, for `fixed_point`.
__device__ __forceinline__ float value_of(uint32_t key) {
  if (key == kNanKey) return 0.0f;
  return __uint_as_float(key & 0x80000000u ? key & 0x7FFFFFFFu : ~key);
}

__device__ __forceinline__ int64_t warp_sum(int64_t x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  return x;
}

template <int kPerLane>
struct Row {
  uint32_t keys[kPerLane];

  __device__ int count_from(uint32_t key) const {
    int count = 0;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) count += keys[i] >= key;
    return __reduce_add_sync(kAllLanes, count);
  }

  __device__ int64_t weight_from(uint32_t key) const {
    int64_t weight = 0;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if (keys[i] >= key) weight += fixed_point(value_of(keys[i]));  // 0 is below every candidate
    }
    return warp_sum(weight);
  }

  // The largest key that at least `count` columns reach, or one that exactly `count` columns reach. 0 < count <= columns.
  __device__ uint32_t threshold(int count) const {
    uint32_t key = 0;
    for (uint32_t bit = 0x80000000u; bit != 0; bit >>= 1) {
      const int above = count_from(key | bit);
      if (above >= count) key |= bit;
      if (above == count) break;
    }
    return key;
  }

  // How many columns make the smallest set, largest first, that holds `mass`: those with less than `mass` before them.
  __device__ int count_of_mass(int64_t mass, int columns) const {
    if (mass <= 0) return 0;
    if (weight_from(1) < mass) return columns;
    uint32_t key = 0;  // the largest at and above which `mass` is reached
    for (uint32_t bit = 0x80000000u; bit != 0; bit >>= 1) {
      if (weight_from(key | bit) >= mass) key |= bit;
    }
    const int64_t above = weight_from(key + 1), weight = fixed_point(value_of(key));
    return count_from(key + 1) + static_cast<int>((mass - above + weight - 1) / weight);
  }
};

template <int kPerLane>
__global__ void __launch_bounds__(kWarps * 32) select_kernel(const SelectParams params) {
  const int lane = threadIdx.x % 32;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (row >= static_cast<int64_t>(params.lists) * params.num_tiles) return;
  const int tile = static_cast<int>(row % params.num_tiles);
  const int own_begin = params.tile_block_offsets[tile], own_end = params.tile_block_offsets[tile + 1];
  const int video_blocks = params.tile_block_offsets[params.num_video_tiles];
  trap_if(own_begin < 0 || own_end > params.num_blocks || video_blocks > params.num_blocks);
  const bool text_row = tile >= params.num_video_tiles;

  Row<kPerLane> values;
  const float* const source = params.values + row * params.num_blocks;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int column = i * 32 + lane;
    uint32_t key = 0;
    if (column < video_blocks) {
      const bool first = params.own_first && column >= own_begin && column < own_end;
      key = first ? kFirstKey : key_of(source[column]);
    }
    values.keys[i] = key;
  }

  // Kept: keys above `threshold`, and of those equal to it the first `ties`.
  uint32_t threshold = 0;
  int ties = 0;
  if (!text_row) {
    int count = params.count >= 0 ? params.count : values.count_of_mass(params.mass, video_blocks);
    count = min(max(count, params.min_count), min(params.max_count, video_blocks));
    if (count <= 0) {
      threshold = kFirstKey;
    } else if (count < video_blocks) {
      threshold = values.threshold(count);
      ties = threshold == kFirstKey ? count : count - values.count_from(threshold + 1);
    }
  }

  int32_t* const list = params.kv_indices + row * params.width;
  const unsigned before = (1u << lane) - 1;
  int length = own_end - own_begin, seen_ties = 0, by_rule = 0, by_kernel = 0;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int column = i * 32 + lane;
    const bool exists = column < params.num_blocks;
    const bool own = column >= own_begin && column < own_end;
    const uint32_t key = values.keys[i];
    const unsigned tied = __ballot_sync(kAllLanes, exists && key == threshold);
    const bool tie = key == threshold && seen_ties + __popc(tied & before) < ties;
    seen_ties += __popc(tied);
    const bool chosen = exists && (text_row || column >= video_blocks || key > threshold || tie);
    const bool other = chosen && !own;
    const unsigned others = __ballot_sync(kAllLanes, other);
    const int place = own ? column - own_begin : length + __popc(others & before);
    if ((own || other) && place < params.width) list[place] = column;
    length += __popc(others);
    const int tokens = chosen || own ? params.block_tokens[column] : 0;
    by_rule += chosen ? tokens : 0;
    by_kernel += tokens;
  }
  by_rule = __reduce_add_sync(kAllLanes, by_rule);
  by_kernel = __reduce_add_sync(kAllLanes, by_kernel);
  if (lane == 0) {
    params.kv_num_blocks[row] = min(length, params.width);
    params.attended[2 * row] = by_rule;
    params.attended[2 * row + 1] = by_kernel;
  }
}

}  // namespace fpsattn::sm90::patterns
