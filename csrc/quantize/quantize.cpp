// fpsattn::quantize: checks its parameters and picks the kernels of the device.
#include <cstdlib>

#include "common/check_params.h"
#include "fpsattn/launch.h"
#include "quantize/sm90/launch.h"

namespace fpsattn {
namespace {

constexpr const char* kOp = "quantize";

// What the workspace size hangs on, and what is divided by.
void check_sizes(const QuantizeParams& params) {
  check_size(kOp, params.size);
  FPSATTN_CHECK(params.k_mean_stride >= 1, kOp, ": k_mean_stride is ", params.k_mean_stride, ", expected at least 1");
}

void check_rows(const char* name, const TokenTensor& tensor) {
  check_tensor(kOp, name, tensor, true);
  FPSATTN_CHECK(std::abs(tensor.stride_token) <= kMaxTokenStride, kOp, ": ", name, " has a token stride of ",
                tensor.stride_token, " elements, expected at most ", kMaxTokenStride, ": make it contiguous");
}

void check(const QuantizeParams& params) {
  check_sizes(params);
  check_dtype(kOp, "dtype", params.dtype);
  FPSATTN_CHECK(params.granularity == Granularity::kTile || params.granularity == Granularity::kBlock ||
                    params.granularity == Granularity::kToken,
                kOp, ": granularity is ", static_cast<int>(params.granularity),
                ", expected 0 (tile), 1 (block) or 2 (token)");
  check_rows("q", params.q);
  check_rows("k", params.k);
  check_rows("v", params.v);
  check_pointer(kOp, "token_of_slot", params.token_of_slot);
  check_pointer(kOp, "tile_block_offsets", params.tile_block_offsets, 4);
  check_pointer(kOp, "q8", params.q8);
  check_pointer(kOp, "k8", params.k8);
  check_pointer(kOp, "v8t", params.v8t);
  check_pointer(kOp, "q_scale", params.q_scale, 4);
  check_pointer(kOp, "k_scale", params.k_scale, 4);
  check_pointer(kOp, "v_scale", params.v_scale, 4);
  check_pointer(kOp, "k_mean", params.k_mean);
  check_pointer(kOp, "q_k_mean", params.q_k_mean, 4);
  if (params.q_block_sum != nullptr) check_pointer(kOp, "q_block_sum", params.q_block_sum, 4);
  if (params.k_block_sum != nullptr) check_pointer(kOp, "k_block_sum", params.k_block_sum, 4);
  check_workspace(kOp, params.workspace, params.workspace_bytes, quantize_workspace_bytes(params));
}

}  // namespace

size_t quantize_workspace_bytes(const QuantizeParams& params) {
  check_sizes(params);
  return sm90::quantize::workspace_bytes(params);
}

void quantize(const QuantizeParams& params, cudaStream_t stream) {
  check(params);
  switch (device_architecture(kOp)) {
    case Architecture::kSm90:
      return sm90::quantize::launch(params, stream);
  }
}

}  // namespace fpsattn
