// Device memory for tests, and the skip when there is nothing to run on.
#pragma once

#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

namespace fpsattn::test {

// Why device tests cannot run here; empty when they can.
inline std::string no_device_reason() {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status != cudaSuccess || count == 0) {
    return std::string("no CUDA device (") + cudaGetErrorString(status) +
           "): needs an sm_90 GPU, or the emulator (FPSATTN_EMULATOR=AUTO at configure time)";
  }
  int major = 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0);
  return major == 9 ? "" : "device 0 has compute capability " + std::to_string(major) + ".x: these kernels need 9.0";
}

#define FPSATTN_SKIP_WITHOUT_DEVICE()                                \
  do {                                                               \
    const std::string reason_ = ::fpsattn::test::no_device_reason(); \
    if (!reason_.empty()) {                                          \
      GTEST_SKIP() << reason_;                                       \
    }                                                                \
  } while (0)

// `count` elements on the device between two guard zones that check_guards() looks at.
template <class T>
class DeviceBuffer {
 public:
  explicit DeviceBuffer(size_t count, uint8_t fill = 0xee) : count_(count) {
    EXPECT_EQ(cudaMalloc(&memory_, bytes() + 2 * kGuard), cudaSuccess);
    EXPECT_EQ(cudaMemset(memory_, kGuardByte, bytes() + 2 * kGuard), cudaSuccess);
    EXPECT_EQ(cudaMemset(data(), fill, bytes()), cudaSuccess);
  }
  explicit DeviceBuffer(const std::vector<T>& values) : DeviceBuffer(values.size()) {
    EXPECT_EQ(cudaMemcpy(data(), values.data(), bytes(), cudaMemcpyHostToDevice), cudaSuccess);
  }
  ~DeviceBuffer() { cudaFree(memory_); }
  DeviceBuffer(const DeviceBuffer&) = delete;
  DeviceBuffer& operator=(const DeviceBuffer&) = delete;

  T* data() const { return reinterpret_cast<T*>(memory_ + kGuard); }
  size_t size() const { return count_; }
  size_t bytes() const { return count_ * sizeof(T); }

  std::vector<T> to_host() const {
    std::vector<T> values(count_);
    EXPECT_EQ(cudaMemcpy(values.data(), data(), bytes(), cudaMemcpyDeviceToHost), cudaSuccess);
    return values;
  }

  void check_guards(const char* name) const {
    std::vector<uint8_t> all(bytes() + 2 * kGuard);
    ASSERT_EQ(cudaMemcpy(all.data(), memory_, all.size(), cudaMemcpyDeviceToHost), cudaSuccess);
    for (size_t i = 0; i < kGuard; ++i) {
      ASSERT_EQ(all[i], kGuardByte) << name << ": written " << kGuard - i << " bytes before its begin";
      ASSERT_EQ(all[kGuard + bytes() + i], kGuardByte) << name << ": written " << i << " bytes past its end";
    }
  }

 private:
  static constexpr size_t kGuard = 1024;
  static constexpr uint8_t kGuardByte = 0xab;
  size_t count_;
  uint8_t* memory_ = nullptr;
};

}  // namespace fpsattn::test
