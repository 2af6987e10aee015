// A launcher in a shared library, for host_memory.py.
#include <cuda_runtime.h>

__global__ void axpy(float a, const float* x, float* y, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) y[i] += a * x[i];
}

extern "C" int launch_axpy(float a, const float* x, float* y, int n) {
  axpy<<<(n + 127) / 128, 128>>>(a, x, y, n);
  return static_cast<int>(cudaDeviceSynchronize());
}
