// One launch function per operation. Each checks its parameters, throws fpsattn::Error on bad ones, enqueues its
// kernels on `stream`, never synchronizes and never allocates: the caller hands in the workspace.
#pragma once

#include <cuda_runtime_api.h>

#include "fpsattn/params.h"

namespace fpsattn {

size_t quantize_workspace_bytes(const QuantizeParams& params);
void quantize(const QuantizeParams& params, cudaStream_t stream);

size_t forward_workspace_bytes(const ForwardParams& params);
void forward(const ForwardParams& params, cudaStream_t stream);

size_t backward_workspace_bytes(const BackwardParams& params);
void backward(const BackwardParams& params, cudaStream_t stream);

}  // namespace fpsattn
