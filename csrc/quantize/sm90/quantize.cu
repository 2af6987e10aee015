// fpsattn::quantize: checks, plan, launches. Every instance of the kernels is compiled here.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdlib>

#include "common/check_params.h"
#include "common/element.h"
#include "fpsattn/launch.h"
#include "quantize/sm90/kernel.h"
#include "quantize/sm90/statistics.h"

namespace fpsattn {
namespace sm90::quantization {
namespace {

constexpr const char* kOp = "quantize";

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Sizes only; partial result pointers are set from the workspace by the caller.
Plan make_plan(const QuantizeParams& params) {
  Plan plan;
  if (params.smooth_k && params.given_k_mean == nullptr) {
    plan.k_rows = ceil_div(params.size.num_tokens, params.k_mean_stride);
    plan.k_parts = static_cast<int>(ceil_div(plan.k_rows, kStatisticsRows));
  }
  if (params.given_v_absmax == nullptr) {
    plan.v_parts = static_cast<int>(ceil_div(params.size.num_tokens, kStatisticsRows));
  }
  if (params.granularity == Granularity::kTile) {
    const int64_t blocks_per_tile = ceil_div(params.size.num_blocks, params.size.num_tiles);
    plan.cluster_size = static_cast<int>(std::min<int64_t>(blocks_per_tile, kMaxClusterSize));
  }
  return plan;
}

size_t partial_floats(const QuantizeParams& params, int parts) {
  return static_cast<size_t>(params.size.batch) * params.size.heads * parts * params.size.head_dim;
}

// What TokenRows can read: 16 bytes at a time, 32-bit strides of tokens.
void check_rows(const char* name, const TokenTensor& tensor) {
  check_tensor(kOp, name, tensor, true);
  FPSATTN_CHECK(std::abs(tensor.stride_token) <= kMaxTokenStride, kOp, ": ", name, " has a token stride of ",
                tensor.stride_token, " elements, expected at most ", kMaxTokenStride, ": make it contiguous");
}

// What the workspace size hangs on, and what is divided by.
void check_sizes(const QuantizeParams& params) {
  check_size(kOp, params.size);
  FPSATTN_CHECK(params.k_mean_stride >= 1, kOp, ": k_mean_stride is ", params.k_mean_stride, ", expected at least 1");
}

void check(const QuantizeParams& params) {
  check_sizes(params);
  FPSATTN_CHECK(params.dtype == DType::kBFloat16 || params.dtype == DType::kFloat16, kOp, ": dtype is ",
                static_cast<int>(params.dtype), ", expected 0 (bfloat16) or 1 (float16)");
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
  check_workspace(kOp, params.workspace, params.workspace_bytes, quantize_workspace_bytes(params));
}

template <class Config>
void launch_statistics(const QuantizeParams& params, const Plan& plan, cudaStream_t stream) {
  const ProblemSize& size = params.size;
  if (plan.k_parts + plan.v_parts > 0) {
    const dim3 grid(size.heads, plan.k_parts + plan.v_parts, size.batch);
    statistics_kernel<Config><<<grid, kStatisticsThreads, 0, stream>>>(params, plan);
    FPSATTN_CUDA_CHECK("quantize: statistics kernel", cudaGetLastError());
  }
  finish_kernel<Config><<<dim3(size.heads, size.batch), Config::kHeadDim * kFinishGroups, 0, stream>>>(params, plan);
  FPSATTN_CUDA_CHECK("quantize: finish kernel", cudaGetLastError());
}

template <class Config>
void launch_quantize(const QuantizeParams& params, const Plan& plan, cudaStream_t stream) {
  const ProblemSize& size = params.size;
  const int64_t groups = params.granularity == Granularity::kTile ? size.num_tiles : size.num_blocks;
  const int64_t ctas = groups * size.heads * plan.cluster_size;
  FPSATTN_CHECK(ctas <= INT32_MAX, kOp, ": ", groups, " tiles or blocks x ", size.heads,
                " heads are too many for one launch");
  cudaLaunchConfig_t launch_config = {};
  launch_config.gridDim = dim3(static_cast<unsigned>(ctas), kRoles, size.batch);
  launch_config.blockDim = dim3(Config::kThreads);
  launch_config.stream = stream;
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = plan.cluster_size;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  launch_config.attrs = &cluster;
  launch_config.numAttrs = 1;
  FPSATTN_CUDA_CHECK("quantize: kernel", cudaLaunchKernelEx(&launch_config, quantize_kernel<Config>, params, plan));
}

template <int kHeadDim, class Element>
void launch(const QuantizeParams& params, const Plan& plan, cudaStream_t stream) {
  launch_statistics<RowConfig<kHeadDim, Element>>(params, plan, stream);
  if (params.granularity == Granularity::kToken) {
    launch_quantize<Config<kHeadDim, Element, GroupScope::kToken>>(params, plan, stream);
  } else {
    launch_quantize<Config<kHeadDim, Element, GroupScope::kTile>>(params, plan, stream);
  }
}

template <class Element>
void launch(const QuantizeParams& params, const Plan& plan, cudaStream_t stream) {
  if (params.size.head_dim == 64) {
    launch<64, Element>(params, plan, stream);
  } else {
    launch<128, Element>(params, plan, stream);
  }
}

}  // namespace
}  // namespace sm90::quantization

size_t quantize_workspace_bytes(const QuantizeParams& params) {
  using namespace sm90::quantization;
  check_sizes(params);
  const Plan plan = make_plan(params);
  return sizeof(float) * (partial_floats(params, plan.k_parts) + partial_floats(params, plan.v_parts));
}

void quantize(const QuantizeParams& params, cudaStream_t stream) {
  using namespace sm90::quantization;
  check(params);
  check_device(kOp);
  Plan plan = make_plan(params);
  plan.k_partial = static_cast<float*>(params.workspace);
  plan.v_partial = plan.k_partial + partial_floats(params, plan.k_parts);
  if (params.dtype == DType::kBFloat16) {
    launch<BFloat16>(params, plan, stream);
  } else {
    launch<Float16>(params, plan, stream);
  }
}

}  // namespace fpsattn
