// How an instance is launched: persistent, one CTA per SM, in clusters of args.cluster_size.
#pragma once

#include <algorithm>

#include "forward/sm90/instances.h"
#include "forward/sm90/kernel.h"
#include "fpsattn/status.h"

namespace fpsattn::sm90::forward {

template <class C>
void launch(const Arguments& args, int num_sms, cudaStream_t stream) {
  constexpr int kBytes = shared_bytes<Storage<C>>();
  FPSATTN_CUDA_CHECK("forward: shared memory",
                     cudaFuncSetAttribute(forward_kernel<C>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes));
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {static_cast<unsigned>(args.cluster_size), 1, 1};
  const int wanted = std::min(num_sms, args.batch_heads * args.num_blocks);
  cudaLaunchConfig_t config{};
  config.gridDim = std::max(wanted / args.cluster_size, 1) * args.cluster_size;
  config.blockDim = C::kThreads;
  config.dynamicSmemBytes = kBytes;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = args.cluster_size > 1 ? 1 : 0;
  FPSATTN_CUDA_CHECK("forward: launch", cudaLaunchKernelEx(&config, forward_kernel<C>, args));
}

}  // namespace fpsattn::sm90::forward
