// What the microbenchmarks share: timing with CUDA events, several functions interleaved, and one line of JSON per
// case.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <functional>
#include <sstream>
#include <string>
#include <vector>

#include "fpsattn/status.h"

namespace fpsattn::bench {

struct Timing {
  double min_ms = 0, median_ms = 0, max_ms = 0;
};

// Times each function `repeats` times, in turns: clock and temperature drift hit all of them alike. The argument counts
// calls, so that a function can rotate through inputs larger together than the L2 cache.
inline std::vector<Timing> time_interleaved(const std::vector<std::function<void(int)>>& functions, int repeats,
                                            int warmup) {
  cudaEvent_t begin, end;
  FPSATTN_CUDA_CHECK("bench", cudaEventCreate(&begin));
  FPSATTN_CUDA_CHECK("bench", cudaEventCreate(&end));
  std::vector<std::vector<float>> times(functions.size());
  for (int i = 0; i < warmup + repeats; ++i) {
    for (size_t f = 0; f < functions.size(); ++f) {
      FPSATTN_CUDA_CHECK("bench", cudaEventRecord(begin, nullptr));
      functions[f](i);
      FPSATTN_CUDA_CHECK("bench", cudaEventRecord(end, nullptr));
      FPSATTN_CUDA_CHECK("bench", cudaEventSynchronize(end));
      float ms = 0;
      FPSATTN_CUDA_CHECK("bench", cudaEventElapsedTime(&ms, begin, end));
      if (i >= warmup) {
        times[f].push_back(ms);
      }
    }
  }
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  std::vector<Timing> result;
  for (std::vector<float>& t : times) {
    std::sort(t.begin(), t.end());
    result.push_back({t.front(), t[t.size() / 2], t.back()});
  }
  return result;
}

// Sets of inputs needed so that a set has left the L2 cache before its turn comes again.
inline int rotation_sets(size_t bytes_per_set) {
  int l2_bytes = 0;
  FPSATTN_CUDA_CHECK("bench", cudaDeviceGetAttribute(&l2_bytes, cudaDevAttrL2CacheSize, 0));
  return static_cast<int>(
      std::clamp<size_t>(3 * static_cast<size_t>(l2_bytes) / std::max<size_t>(bytes_per_set, 1), 1, 8));
}

inline std::string device_name() {
  cudaDeviceProp properties;
  FPSATTN_CUDA_CHECK("bench", cudaGetDeviceProperties(&properties, 0));
  return properties.name;
}

// {"key": value, ...} in the order of the calls.
class JsonLine {
 public:
  JsonLine& add(const char* key, const std::string& value) { return raw(key, "\"" + value + "\""); }
  JsonLine& add(const char* key, const char* value) { return add(key, std::string(value)); }
  template <class Number>
  JsonLine& add(const char* key, Number value) {
    std::ostringstream text;
    text.precision(6);
    text << value;
    return raw(key, text.str());
  }
  JsonLine& add(const char* key, const Timing& timing) {
    JsonLine nested;
    nested.add("min", timing.min_ms).add("median", timing.median_ms).add("max", timing.max_ms);
    return raw(key, nested.text_ + "}");
  }
  void print() const { std::printf("%s}\n", text_.c_str()); }

 private:
  JsonLine& raw(const char* key, const std::string& value) {
    text_ += (text_.size() > 1 ? ", \"" : "\"") + std::string(key) + "\": " + value;
    return *this;
  }
  std::string text_ = "{";
};

// Device memory that lives as long as the object.
class Memory {
 public:
  explicit Memory(size_t bytes) : bytes_(bytes) { FPSATTN_CUDA_CHECK("bench: cudaMalloc", cudaMalloc(&data_, bytes)); }
  ~Memory() { cudaFree(data_); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }
  size_t bytes() const { return bytes_; }

 private:
  void* data_ = nullptr;
  size_t bytes_;
};

}  // namespace fpsattn::bench
