// Quantization on Hopper, of checked parameters.
#pragma once

#include <cuda_runtime_api.h>

#include "fpsattn/prepare.h"
#include "quantize/sm90/config.h"

namespace fpsattn::sm90::quantize {

size_t workspace_bytes(const QuantizeParams& params);
void launch(const QuantizeParams& params, cudaStream_t stream);

size_t workspace_bytes(const PrepareParams& params);
void launch(const PrepareParams& params, cudaStream_t stream);

// The call as the keys see it: their sizes and tables in the place of those of the queries.
QuantizeParams of_keys(const QuantizeParams& params);

// What both share (quantize_launch.cu): partial sums of the raw K and partial maxima of V, as many as the plan says; then
// k_mean and v_scale of the partials.
void launch_statistics(const QuantizeParams& params, const Plan& plan, cudaStream_t stream);
void launch_finish(const QuantizeParams& params, const Plan& plan, cudaStream_t stream);

}  // namespace fpsattn::sm90::quantize
