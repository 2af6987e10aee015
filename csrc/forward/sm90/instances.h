// Between forward_launch.cu and the .cu files: one launcher per compiled kernel.
#pragma once

#include <cuda_runtime_api.h>

#include "forward/sm90/arguments.h"

namespace fpsattn::sm90::forward {

using Launcher = void (*)(const Arguments& args, int num_sms, cudaStream_t stream);

void launch_d64(const Arguments& args, int num_sms, cudaStream_t stream);
void launch_d64_k_per_token(const Arguments& args, int num_sms, cudaStream_t stream);
void launch_d128(const Arguments& args, int num_sms, cudaStream_t stream);
void launch_d128_k_per_token(const Arguments& args, int num_sms, cudaStream_t stream);

// Fills the workspace (schedule.cu).
void launch_schedule(const Arguments& args, const Workspace& workspace, cudaStream_t stream);

}  // namespace fpsattn::sm90::forward
