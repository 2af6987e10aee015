// Between launch.cu and the instances: one launcher per compiled kernel.
#pragma once

#include <cuda_runtime_api.h>

#include "forward/sm90/arguments.h"

namespace fpsattn::sm90::forward {

using Launcher = void (*)(const Arguments& args, int num_sms, cudaStream_t stream);

void launch_d64(const Arguments& args, int num_sms, cudaStream_t stream);
void launch_d64_k_per_token(const Arguments& args, int num_sms, cudaStream_t stream);
void launch_d128(const Arguments& args, int num_sms, cudaStream_t stream);
void launch_d128_k_per_token(const Arguments& args, int num_sms, cudaStream_t stream);

// The caller's workspace, cut into pieces.
struct Workspace {
  int64_t* load;         // [Bm, Hm]: KV blocks on all lists, once per query block
  int32_t* next_item;    // [1]
  int32_t* head_order;   // [B H]
  int32_t* block_order;  // [Bm, Hm, num_blocks]
  size_t bytes;

  static Workspace at(void* base, const ForwardParams& params) {
    const size_t lists = static_cast<size_t>(params.kv.batch) * params.kv.heads;
    const size_t batch_heads = static_cast<size_t>(params.size.batch) * params.size.heads;
    Workspace pieces;
    pieces.load = static_cast<int64_t*>(base);
    pieces.next_item = reinterpret_cast<int32_t*>(pieces.load + lists);
    pieces.head_order = pieces.next_item + 1;
    pieces.block_order = pieces.head_order + batch_heads;
    pieces.bytes = 8 * lists + 4 * (1 + batch_heads + lists * params.size.num_blocks);
    return pieces;
  }
};

// Fills the workspace (schedule.cu).
void launch_schedule(const Arguments& args, const Workspace& workspace, int batch, cudaStream_t stream);

}  // namespace fpsattn::sm90::forward
