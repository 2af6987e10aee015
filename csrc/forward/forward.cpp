// fpsattn::forward: checks its parameters and picks the kernels of the device.
#include "common/check_params.h"
#include "forward/sm90/launch.h"
#include "fpsattn/launch.h"

namespace fpsattn {
namespace {

constexpr const char* kOp = "forward";

void check_sizes(const ForwardParams& params) {
  check_size(kOp, params.size);
  check_lists(kOp, "kv", params.kv, params.size, params.size.num_tiles, "num_tiles", "query tile");
  // TMA coordinates are 32 bit: rows of the V^T matrix, the tallest.
  const ProblemSize& size = params.size;
  const int64_t of_queries = int64_t{size.heads} * size.num_blocks;
  const int64_t of_keys = int64_t{size.key_heads()} * size.key_blocks();
  const int64_t items = size.batch * (of_queries > of_keys ? of_queries : of_keys);
  const int64_t rows = items * (kBlockSlots + kVExtraRows);
  FPSATTN_CHECK(rows <= INT32_MAX, kOp, ": batch * heads * num_blocks is ", items, ", expected at most ",
                INT32_MAX / (kBlockSlots + kVExtraRows), " (32-bit TMA coordinates): split the batch or the heads");
}

void check(const ForwardParams& params) {
  check_sizes(params);
  check_softmax_scale(kOp, params.softmax_scale);
  check_out_dtype(kOp, "out_dtype", params.out_dtype);
  check_pointer(kOp, "q8", params.q8);
  check_pointer(kOp, "k8", params.k8);
  check_pointer(kOp, "v8t", params.v8t);
  check_pointer(kOp, "q_scale", params.q_scale, 4);
  check_pointer(kOp, "k_scale", params.k_scale, params.k_scale_per_token ? kPointerAlignment : 4);
  check_pointer(kOp, "v_scale", params.v_scale);
  check_pointer(kOp, "token_of_slot", params.token_of_slot.data, 4);
  check_pointer(kOp, "tile_of_block", params.tile_of_block, 4);
  check_list_pointers(kOp, "kv", params.kv);
  if (params.q_k_mean != nullptr) check_pointer(kOp, "q_k_mean", params.q_k_mean, 4);
  check_pointer(kOp, "lse", params.lse, 4);
  check_pointer(kOp, "row_max", params.row_max, 4);
  check_pointer(kOp, "row_sum", params.row_sum, 4);
  check_tensor(kOp, "out", params.out, true);
  check_workspace(kOp, params.workspace, params.workspace_bytes, forward_workspace_bytes(params));
}

}  // namespace

size_t forward_workspace_bytes(const ForwardParams& params) {
  check_sizes(params);
  return sm90::forward::workspace_bytes(params);
}

void forward(const ForwardParams& params, cudaStream_t stream) {
  check(params);
  switch (device_architecture(kOp)) {
    case Architecture::kSm90:
      return sm90::forward::launch(params, stream);
  }
}

}  // namespace fpsattn
