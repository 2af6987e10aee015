// Selection and transposition on Hopper, of checked parameters.
#pragma once

#include <cuda_runtime_api.h>

#include "fpsattn/patterns.h"

namespace fpsattn::sm90::patterns {

void launch(const SelectParams& params, cudaStream_t stream);

size_t workspace_bytes(const TransposeParams& params);
void launch(const TransposeParams& params, cudaStream_t stream);

}  // namespace fpsattn::sm90::patterns
