// Workspace and launches of prepare. Every instance of its kernels is compiled here.
#include "quantize/sm90/instances.h"
#include "quantize/sm90/launch.h"
#include "quantize/sm90/prepare_kernels.h"

namespace fpsattn::sm90::quantize {
namespace {

bool across_heads(const PrepareParams& params) { return params.norm == Norm::kRmsAcrossHeads; }

// [B, S] of q, then of k, behind what quantize needs.
size_t factor_count(const PrepareParams& params) {
  return across_heads(params) ? static_cast<size_t>(params.quantize.size.batch) * params.quantize.size.num_tokens : 0;
}

NormRope norm_rope_of(const PrepareParams& params, const ChannelVector& weight, const ChannelVector& bias,
                      const float* factor) {
  const bool as_rotated = params.weights_end < 0;
  return {params.norm,
          params.eps,
          weight,
          bias,
          factor,
          params.cos,
          params.sin,
          params.table_stride_batch,
          params.table_stride_head,
          params.first_rotated,
          params.num_rotated,
          as_rotated ? params.first_rotated : params.weights_begin,
          as_rotated ? params.num_rotated : params.weights_end - params.weights_begin,
          params.rope_halves};
}

template <class Config>
void launch_prepare(const QuantizeParams& params, const Plan& plan, const NormRope& q, const NormRope& k,
                    cudaStream_t stream) {
  launch_blocks<Config>("prepare: kernel", params, plan, PreparedRows<Config>::kBytes, stream, prepare_kernel<Config>,
                        params, plan, q, k);
}

}  // namespace

size_t workspace_bytes(const PrepareParams& params) {
  return workspace_bytes(params.quantize) + 2 * sizeof(float) * factor_count(params);
}

void launch(const PrepareParams& all, cudaStream_t stream) {
  const QuantizeParams& params = all.quantize;
  const Plan plan = Plan::of(params, params.workspace);
  float* q_factor = reinterpret_cast<float*>(static_cast<char*>(params.workspace) + plan.workspace_bytes);
  float* k_factor = q_factor + factor_count(all);
  const NormRope q = norm_rope_of(all, all.q_weight, all.q_bias, q_factor);
  const NormRope k = norm_rope_of(all, all.k_weight, all.k_bias, k_factor);
  Plan of_v = plan;  // K's partial sums are of prepared keys
  of_v.k_parts = 0;
  launch_statistics(params, of_v, stream);
  for_instance(params, [&](auto dim, auto element) {
    using Rows = RowConfig<dim(), decltype(element)>;
    if (across_heads(all)) {
      const dim3 grid(static_cast<unsigned>(ceil_div(params.size.num_tokens, kFactorWarps)), 2, params.size.batch);
      factor_kernel<Rows><<<grid, 32 * kFactorWarps, 0, stream>>>(params, q_factor, k_factor, all.eps);
      FPSATTN_CUDA_CHECK("prepare: factor kernel", cudaGetLastError());
    }
    if (plan.k_parts > 0) {
      const dim3 grid(params.size.heads, plan.k_parts, params.size.batch);
      prepared_mean_kernel<Rows><<<grid, kStatisticsThreads, 0, stream>>>(params, plan, k);
      FPSATTN_CUDA_CHECK("prepare: mean kernel", cudaGetLastError());
    }
  });
  launch_finish(params, plan, stream);
  for_instance(params, [&](auto dim, auto element) {
    using Element = decltype(element);
    if (params.granularity == Granularity::kToken) {
      launch_prepare<Config<dim(), Element, GroupScope::kToken>>(params, plan, q, k, stream);
    } else {
      launch_prepare<Config<dim(), Element, GroupScope::kTile>>(params, plan, q, k, stream);
    }
  });
}

}  // namespace fpsattn::sm90::quantize
