// Between backward_launch.cpp and the .cu files: one function per compiled head dimension.
#pragma once

#include <cuda_runtime_api.h>

#include "fpsattn/params.h"

namespace fpsattn::sm90::backward {

void launch_d64(const BackwardParams& params, cudaStream_t stream);
void launch_d128(const BackwardParams& params, cudaStream_t stream);

}  // namespace fpsattn::sm90::backward
