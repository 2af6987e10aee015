// fpsattn::backward: checks its parameters and picks the instance.
#include <cmath>

#include "backward/sm90/config.h"
#include "backward/sm90/instances.h"
#include "common/check_params.h"
#include "fpsattn/launch.h"

namespace fpsattn {
namespace {

constexpr const char* kOp = "backward";

void check_lists(const char* name, const BlockLists& lists, const ProblemSize& size, int rows, const char* row_is) {
  check_pointer(kOp, name, lists.num_blocks, sizeof(int32_t));
  FPSATTN_CHECK(lists.batch == 1 || lists.batch == size.batch, kOp, ": ", name, ".batch is ", lists.batch,
                ", expected 1 or ", size.batch);
  FPSATTN_CHECK(lists.heads == 1 || lists.heads == size.heads, kOp, ": ", name, ".heads is ", lists.heads,
                ", expected 1 or ", size.heads);
  FPSATTN_CHECK(lists.rows == rows, kOp, ": ", name, ".rows is ", lists.rows, ", expected ", rows, ": one row per ",
                row_is);
  FPSATTN_CHECK(lists.max_blocks >= 0, kOp, ": ", name, ".max_blocks is ", lists.max_blocks, ", expected at least 0");
  if (lists.max_blocks > 0) {  // nothing is read from indices otherwise
    check_pointer(kOp, name, lists.indices, sizeof(int32_t));
  }
}

// Everything but the pointers: what the workspace size hangs on.
void check_shape(const BackwardParams& p) {
  check_size(kOp, p.size);
  const int64_t rows = int64_t{p.size.batch} * p.size.heads * p.size.num_blocks * kBlockSlots;
  FPSATTN_CHECK(rows <= INT32_MAX, kOp, ": batch * heads * num_blocks * 128 is ", rows, ", expected at most ",
                INT32_MAX, " (TMA coordinates are 32 bit): split the batch");
}

void check_params(const BackwardParams& p) {
  check_shape(p);
  FPSATTN_CHECK(p.dtype == DType::kBFloat16 || p.dtype == DType::kFloat16, kOp, ": dtype is ",
                static_cast<int>(p.dtype), ", expected 0 (BF16) or 1 (FP16)");
  FPSATTN_CHECK(std::isfinite(p.softmax_scale) && p.softmax_scale > 0.0f, kOp, ": softmax_scale is ", p.softmax_scale,
                ", expected a positive finite number");
  const struct {
    const char* name;
    const void* pointer;
    int alignment;
  } pointers[] = {
      {"q8", p.q8, kPointerAlignment},
      {"k8", p.k8, kPointerAlignment},
      {"v8t", p.v8t, kPointerAlignment},
      {"q_scale", p.q_scale, 4},
      {"k_scale", p.k_scale, 4},
      {"v_scale", p.v_scale, 4},
      {"row_max", p.row_max, 4},
      {"row_sum", p.row_sum, 4},
      {"token_of_slot", p.token_of_slot, 4},
      {"tile_of_block", p.tile_of_block, 4},
  };
  for (const auto& entry : pointers) {
    check_pointer(kOp, entry.name, entry.pointer, entry.alignment);
  }
  check_lists("kv", p.kv, p.size, p.size.num_tiles, "query tile");
  check_lists("q", p.q, p.size, p.size.num_blocks, "KV block");
  const struct {
    const char* name;
    const TokenTensor& tensor;
  } tensors[] = {{"out", p.out}, {"grad_out", p.grad_out}, {"dq", p.dq}, {"dk", p.dk}, {"dv", p.dv}};
  for (const auto& entry : tensors) {
    check_tensor(kOp, entry.name, entry.tensor, /*require_aligned_rows=*/false);
  }
  check_workspace(kOp, p.workspace, p.workspace_bytes, backward_workspace_bytes(p));
}

}  // namespace

size_t backward_workspace_bytes(const BackwardParams& params) {
  check_shape(params);
  return sm90::bwd::Workspace::of(params).bytes;
}

void backward(const BackwardParams& params, cudaStream_t stream) {
  check_params(params);
  check_device(kOp);
  if (params.size.head_dim == 128) {
    sm90::bwd::launch_d128(params, stream);
  } else {
    sm90::bwd::launch_d64(params, stream);
  }
}

}  // namespace fpsattn
