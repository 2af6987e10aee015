// Which blocks a CTA works on.
#pragma once

#include <cstdint>

#include "common/device_check.h"
#include "quantize/sm90/config.h"

namespace fpsattn::sm90::quantize {

// blockIdx = (index of group and head) * cluster_size + rank, role, batch. Heads are faster than groups: in (B, S, H,
// D) memory, neighbouring CTAs then read neighbouring 2 D bytes of the same tokens. Groups and batches go from last to
// first: the statistics kernel ended with the last tokens of V, which are still in the L2 cache, and the forward begins
// with the first blocks. A group is a tile, or a block where blocks do not share a scale; CTA `rank` of a cluster has
// blocks rank, rank + cluster_size ...
struct WorkItem {
  int batch;
  int head;
  int first_block;  // of this CTA; >= end_block: nothing to do
  int end_block;    // of the group
  int step;
  int active_ctas;  // CTAs of the cluster that have work

  __device__ __forceinline__ int64_t batch_head(const QuantizeParams& params) const {
    return static_cast<int64_t>(batch) * params.size.heads + head;
  }
};

__device__ __forceinline__ WorkItem work_item(const QuantizeParams& params, const Plan& plan) {
  const unsigned rank = blockIdx.x % plan.cluster_size;
  const unsigned index = (gridDim.x - 1 - blockIdx.x) / plan.cluster_size;
  const int group = index / params.size.heads;
  WorkItem work;
  work.batch = gridDim.z - 1 - blockIdx.z;
  work.head = index % params.size.heads;
  int begin = group;
  work.end_block = group + 1;
  if (params.granularity == Granularity::kTile) {
    begin = __ldg(params.tile_block_offsets + group);
    work.end_block = __ldg(params.tile_block_offsets + group + 1);
  }
  trap_if(begin < 0 || work.end_block > params.size.num_blocks);
  work.first_block = begin + rank;
  work.step = plan.cluster_size;
  work.active_ctas = min(plan.cluster_size, work.end_block - begin);
  return work;
}

}  // namespace fpsattn::sm90::quantize
