// Quantization on Hopper, of checked parameters.
#pragma once

#include <cuda_runtime_api.h>

#include "fpsattn/params.h"

namespace fpsattn::sm90::quantize {

size_t workspace_bytes(const QuantizeParams& params);
void launch(const QuantizeParams& params, cudaStream_t stream);

}  // namespace fpsattn::sm90::quantize
