// Where an op's kernels go, and the memory that they read and write.
#pragma once

#include <dlfcn.h>
#include <torch/csrc/stable/ops.h>

#include <utility>
#include <vector>

#include "common/check_params.h"
#include "torch/check.h"

namespace fpsattn {

// The stable ABI's function for torch's current stream. It is in libtorch_cuda, which a CPU build of torch lacks, so
// this library cannot depend on it; and Python loads torch's libraries with local scope, so a weak reference would stay
// null with a CUDA torch, too. It is looked up in the libtorch_cuda that this process has loaded.
using CurrentStream = int32_t (*)(int32_t device_index, void** stream);

inline CurrentStream find_current_stream() {
  void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  void* const scope = library != nullptr ? library : RTLD_DEFAULT;
  return reinterpret_cast<CurrentStream>(dlsym(scope, "aoti_torch_get_current_cuda_stream"));
}

// Where a launch goes: the current stream of the tensors' device. Makes that device current for the scope.
class Launch {
 public:
  Launch(const char* op, const Tensor& first) {
    if (!first.is_cuda()) return;  // registered only where device code runs on the host
    const int device = first.get_device_index();
    int major = 0, minor = 0;
    FPSATTN_CUDA_CHECK(op, cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
    FPSATTN_CUDA_CHECK(op, cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
    FPSATTN_CHECK(major == 9 && minor == 0, op, ": device ", device, " has compute capability ", major, ".", minor,
                  ", the kernels are built for 9.0 (Hopper: H100, H200, H20)");
    static const CurrentStream current_stream = find_current_stream();
    FPSATTN_CHECK(current_stream != nullptr, op, ": this torch has no CUDA support (no libtorch_cuda.so is loaded)");
    void* stream = nullptr;
    FPSATTN_CHECK(current_stream(device, &stream) == 0, op, ": torch gave no current stream");
    stream_ = static_cast<cudaStream_t>(stream);
    FPSATTN_CUDA_CHECK(op, cudaGetDevice(&previous_));
    FPSATTN_CUDA_CHECK(op, cudaSetDevice(device));  // last: nothing may throw once the device has changed
  }
  ~Launch() {
    if (previous_ >= 0) (void)cudaSetDevice(previous_);
  }
  Launch(const Launch&) = delete;
  Launch& operator=(const Launch&) = delete;
  cudaStream_t stream() const { return stream_; }

 private:
  int previous_ = -1;
  cudaStream_t stream_ = nullptr;
};

inline Tensor empty(const Tensor& like, std::vector<int64_t> shape, ScalarType type) {
  return torch::stable::new_empty(like, shape, type);
}

// An output, at which `pointer` then points.
template <class T>
Tensor output(T*& pointer, const Tensor& like, std::vector<int64_t> shape) {
  Tensor x = empty(like, std::move(shape), kScalarType<T>);
  pointer = data<T>(x);
  return x;
}

// To be held until the launch: torch's allocator orders what comes after it behind the kernels.
template <class Params>
Tensor workspace_of(Params& params, size_t bytes, const Tensor& like) {
  Tensor workspace = empty(like, {static_cast<int64_t>(bytes)}, ScalarType::Byte);
  params.workspace = workspace.data_ptr();
  params.workspace_bytes = bytes;
  return workspace;
}

}  // namespace fpsattn
