// The backward on Hopper, of checked parameters.
#pragma once

#include <cuda_runtime_api.h>

#include "fpsattn/params.h"

namespace fpsattn::sm90::backward {

size_t workspace_bytes(const BackwardParams& params);        // what is worth handing in
size_t least_workspace_bytes(const BackwardParams& params);  // one head at a time
void launch(const BackwardParams& params, cudaStream_t stream);

}  // namespace fpsattn::sm90::backward
