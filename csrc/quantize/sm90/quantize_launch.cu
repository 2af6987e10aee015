// Plan, workspace, launches. Every instance of the kernels is compiled here.
#include <cuda_runtime.h>

#include <algorithm>

#include "common/element.h"
#include "fpsattn/status.h"
#include "quantize/sm90/instances.h"
#include "quantize/sm90/kernel.h"
#include "quantize/sm90/launch.h"
#include "quantize/sm90/statistics.h"

namespace fpsattn::sm90::quantize {
namespace {

template <class Config>
void launch_statistics_of(const QuantizeParams& params, const Plan& plan, cudaStream_t stream) {
  const dim3 grid(params.size.heads, plan.k_parts + plan.v_parts, params.size.batch);
  statistics_kernel<Config><<<grid, kStatisticsThreads, 0, stream>>>(params, plan);
  FPSATTN_CUDA_CHECK("quantize: statistics kernel", cudaGetLastError());
}

template <class Config>
void launch_finish_of(const QuantizeParams& params, const Plan& plan, cudaStream_t stream) {
  const dim3 grid(params.size.heads, params.size.batch);
  finish_kernel<Config><<<grid, Config::kHeadDim * kFinishGroups, 0, stream>>>(params, plan);
  FPSATTN_CUDA_CHECK("quantize: finish kernel", cudaGetLastError());
}

template <class Config>
void launch_quantize(const QuantizeParams& params, const Plan& plan, cudaStream_t stream) {
  launch_blocks<Config>("quantize: kernel", params, plan, 0, stream, quantize_kernel<Config>, params, plan);
}

template <int kHeadDim, class Element>
void launch_quantize_of(const QuantizeParams& params, const Plan& plan, cudaStream_t stream) {
  if (params.granularity == Granularity::kToken) {
    launch_quantize<Config<kHeadDim, Element, GroupScope::kToken>>(params, plan, stream);
  } else {
    launch_quantize<Config<kHeadDim, Element, GroupScope::kTile>>(params, plan, stream);
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

void launch_statistics(const QuantizeParams& params, const Plan& plan, cudaStream_t stream) {
  if (plan.k_parts + plan.v_parts == 0) {
    return;
  }
  for_instance(params, [&](auto dim, auto element) {
    launch_statistics_of<RowConfig<dim(), decltype(element)>>(params, plan, stream);
  });
}

void launch_finish(const QuantizeParams& params, const Plan& plan, cudaStream_t stream) {
  for_instance(params, [&](auto dim, auto element) {
    launch_finish_of<RowConfig<dim(), decltype(element)>>(params, plan, stream);
  });
}

size_t workspace_bytes(const QuantizeParams& params) { return Plan::of(params, nullptr).workspace_bytes; }

void launch(const QuantizeParams& params, cudaStream_t stream) {
  const Plan plan = Plan::of(params, params.workspace);
  launch_statistics(params, plan, stream);
  launch_finish(params, plan, stream);
  for_instance(params,
               [&](auto dim, auto element) { launch_quantize_of<dim(), decltype(element)>(params, plan, stream); });
}

}  // namespace fpsattn::sm90::quantize
