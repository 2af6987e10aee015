// Plan, workspace, launches. Every instance of the kernels is compiled here.
#include <cuda_runtime.h>

#include <algorithm>

#include "common/element.h"
#include "fpsattn/status.h"
#include "quantize/sm90/kernel.h"
#include "quantize/sm90/launch.h"
#include "quantize/sm90/statistics.h"

namespace fpsattn::sm90::quantize {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

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
  FPSATTN_CHECK(ctas <= INT32_MAX, "quantize: ", groups, " tiles or blocks x ", size.heads,
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
void launch_instances(const QuantizeParams& params, const Plan& plan, cudaStream_t stream) {
  launch_statistics<RowConfig<kHeadDim, Element>>(params, plan, stream);
  if (params.granularity == Granularity::kToken) {
    launch_quantize<Config<kHeadDim, Element, GroupScope::kToken>>(params, plan, stream);
  } else {
    launch_quantize<Config<kHeadDim, Element, GroupScope::kTile>>(params, plan, stream);
  }
}

template <class Element>
void launch_instances(const QuantizeParams& params, const Plan& plan, cudaStream_t stream) {
  switch (params.size.head_dim) {
    case 64:
      return launch_instances<64, Element>(params, plan, stream);
    case 96:
      return launch_instances<96, Element>(params, plan, stream);
    default:
      return launch_instances<128, Element>(params, plan, stream);
  }
}

}  // namespace

Plan Plan::of(const QuantizeParams& params, void* workspace) {
  const ProblemSize& size = params.size;
  Plan plan;
  if (params.smooth_k && params.given_k_mean == nullptr) {
    plan.k_rows = ceil_div(size.num_tokens, params.k_mean_stride);
    plan.k_parts = static_cast<int>(ceil_div(plan.k_rows, kStatisticsRows));
  }
  if (params.given_v_absmax == nullptr) {
    plan.v_parts = static_cast<int>(ceil_div(size.num_tokens, kStatisticsRows));
  }
  if (params.granularity == Granularity::kTile) {
    plan.cluster_size = static_cast<int>(std::min<int64_t>(ceil_div(size.num_blocks, size.num_tiles), kMaxClusterSize));
  }
  const size_t channels = static_cast<size_t>(size.batch) * size.heads * size.head_dim;
  plan.k_partial = static_cast<float*>(workspace);
  plan.v_partial = plan.k_partial + channels * plan.k_parts;
  plan.workspace_bytes = sizeof(float) * channels * (plan.k_parts + plan.v_parts);
  return plan;
}

size_t workspace_bytes(const QuantizeParams& params) { return Plan::of(params, nullptr).workspace_bytes; }

void launch(const QuantizeParams& params, cudaStream_t stream) {
  const Plan plan = Plan::of(params, params.workspace);
  if (params.dtype == DType::kBFloat16) {
    launch_instances<BFloat16>(params, plan, stream);
  } else {
    launch_instances<Float16>(params, plan, stream);
  }
}

}  // namespace fpsattn::sm90::quantize
