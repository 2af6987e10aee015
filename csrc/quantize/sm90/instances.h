// Which instance of a kernel serves a call, and how a kernel that works block by block is launched.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include "common/element.h"
#include "fpsattn/status.h"
#include "quantize/sm90/config.h"

namespace fpsattn::sm90::quantize {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// run(head dimension as a constant, element type), of the three times two that there are.
template <class Run>
void for_instance(const QuantizeParams& params, const Run& run) {
  const auto of_dim = [&](auto element) {
    switch (params.size.head_dim) {
      case 64:
        return run(std::integral_constant<int, 64>(), element);
      case 96:
        return run(std::integral_constant<int, 96>(), element);
      default:
        return run(std::integral_constant<int, 128>(), element);
    }
  };
  params.dtype == DType::kBFloat16 ? of_dim(BFloat16()) : of_dim(Float16());
}

// One cluster for each (tile or block, head), once per role of the plan.
template <class Config, class Kernel, class... Arguments>
void launch_blocks(const char* what, const QuantizeParams& params, const Plan& plan, int shared_bytes,
                   cudaStream_t stream, Kernel kernel, const Arguments&... arguments) {
  const ProblemSize& size = params.size;
  const int64_t groups = params.granularity == Granularity::kTile ? size.num_tiles : size.num_blocks;
  const int64_t ctas = groups * size.heads * plan.cluster_size;
  FPSATTN_CHECK(ctas <= INT32_MAX, what, ": ", groups, " tiles or blocks x ", size.heads,
                " heads are too many for one launch");
  if (shared_bytes > 48 * 1024) {
    FPSATTN_CUDA_CHECK(what, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
  }
  cudaLaunchConfig_t launch_config = {};
  launch_config.gridDim = dim3(static_cast<unsigned>(ctas), plan.roles, size.batch);
  launch_config.blockDim = dim3(Config::kThreads);
  launch_config.dynamicSmemBytes = shared_bytes;
  launch_config.stream = stream;
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = plan.cluster_size;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  launch_config.attrs = &cluster;
  launch_config.numAttrs = 1;
  FPSATTN_CUDA_CHECK(what, cudaLaunchKernelEx(&launch_config, kernel, arguments...));
}

}  // namespace fpsattn::sm90::quantize
