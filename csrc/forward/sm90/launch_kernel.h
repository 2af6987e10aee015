// How an instance is launched: persistent, one CTA per SM.
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
  forward_kernel<C><<<std::min(num_sms, args.num_items), C::kThreads, kBytes, stream>>>(args);
  FPSATTN_CUDA_CHECK("forward: launch", cudaGetLastError());
}

}  // namespace fpsattn::sm90::forward
