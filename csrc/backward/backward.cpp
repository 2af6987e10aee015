// fpsattn::backward: checks its parameters and picks the kernels of the device.
#include "backward/sm90/launch.h"
#include "common/check_params.h"
#include "fpsattn/launch.h"

namespace fpsattn {
namespace {

constexpr const char* kOp = "backward";

void check_sizes(const BackwardParams& params) {
  const ProblemSize& size = params.size;
  check_size(kOp, size);
  FPSATTN_CHECK(int64_t{size.batch} * size.heads <= INT32_MAX, kOp, ": batch * heads is ",
                int64_t{size.batch} * size.heads, ", expected at most ", INT32_MAX);
  check_lists(kOp, "kv", params.kv, size, size.num_tiles, "num_tiles", "query tile");
  check_lists(kOp, "q", params.q, size, size.key_blocks(), size.kv_blocks > 0 ? "kv_blocks" : "num_blocks", "KV block");
}

void check(const BackwardParams& params) {
  check_sizes(params);
  check_softmax_scale(kOp, params.softmax_scale);
  check_dtype(kOp, "dtype", params.dtype);
  check_pointers(kOp, kPointerAlignment, {{"q8", params.q8}, {"k8", params.k8}, {"v8t", params.v8t}});
  check_pointers(kOp, 4, {{"q_scale", params.q_scale}, {"k_scale", params.k_scale}, {"v_scale", params.v_scale}});
  check_pointers(kOp, 4, {{"row_max", params.row_max}, {"row_sum", params.row_sum}});
  check_pointers(kOp, 4, {{"tile_of_block", params.tile_of_block}});
  check_slot_tables(kOp, params, 4);
  check_list_pointers(kOp, "kv", params.kv);
  check_list_pointers(kOp, "q", params.q);
  check_tensor(kOp, "out", params.out, true);
  check_tensor(kOp, "grad_out", params.grad_out, true);
  check_tensor(kOp, "dq", params.dq, true);
  check_tensor(kOp, "dk", params.dk, true);
  check_tensor(kOp, "dv", params.dv, true);
  check_workspace(kOp, params.workspace, params.workspace_bytes, sm90::backward::least_workspace_bytes(params));
}

}  // namespace

size_t backward_workspace_bytes(const BackwardParams& params) {
  check_sizes(params);
  return sm90::backward::workspace_bytes(params);
}

void backward(const BackwardParams& params, cudaStream_t stream) {
  check(params);
  switch (device_architecture(kOp)) {
    case Architecture::kSm90:
      return sm90::backward::launch(params, stream);
  }
}

}  // namespace fpsattn
