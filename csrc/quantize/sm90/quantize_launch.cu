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

QuantizeParams of_keys(const QuantizeParams& params) {
  QuantizeParams keys = params;
  const ProblemSize& size = params.size;
  const int tiles = size.kv_tiles > 0 ? size.kv_tiles : size.num_tiles;
  keys.size = {size.batch, size.key_heads(), size.head_dim, size.key_tokens(), size.key_blocks(), tiles};
  keys.token_of_slot = key_slots(params);
  if (size.kv_tiles > 0) keys.tile_block_offsets = params.kv_tile_block_offsets;
  return keys;
}

size_t workspace_bytes(const QuantizeParams& params) { return Plan::of(of_keys(params), nullptr).workspace_bytes; }

void launch(const QuantizeParams& params, cudaStream_t stream) {
  const QuantizeParams keys = of_keys(params);
  Plan plan = Plan::of(keys, params.workspace);
  launch_statistics(keys, plan, stream);
  launch_finish(keys, plan, stream);
  const auto run = [&](const QuantizeParams& side, const Plan& roles) {
    for_instance(side,
                 [&](auto dim, auto element) { launch_quantize_of<dim(), decltype(element)>(side, roles, stream); });
  };
  if (params.size.group == 1 && params.kv_token_of_slot.data == nullptr) {
    run(params, plan);
    return;
  }
  plan.roles = kRoles - 1;  // V, K
  run(keys, plan);
  Plan of_queries = Plan::of(params, params.workspace);
  of_queries.first_role = static_cast<int>(Role::kQ);
  of_queries.roles = 1;
  run(params, of_queries);
}

}  // namespace fpsattn::sm90::quantize
