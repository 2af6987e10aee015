// Checks on the device. A failed one traps: the launch then reports cudaErrorLaunchFailure instead of writing garbage.
// Only for what the host cannot check without a synchronization, and only where it costs nothing in a loop.
#pragma once

namespace fpsattn {

__device__ __forceinline__ void trap_if(bool broken) {
  if (broken) {
    __trap();
  }
}

}  // namespace fpsattn
