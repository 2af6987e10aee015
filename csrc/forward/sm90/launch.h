// The forward on Hopper, of checked parameters.
#pragma once

#include <cuda_runtime_api.h>

#include "fpsattn/params.h"

namespace fpsattn::sm90::forward {

size_t workspace_bytes(const ForwardParams& params);
void launch(const ForwardParams& params, cudaStream_t stream);

}  // namespace fpsattn::sm90::forward
