// q, k or v for a test: logical (B, H, S, D) values in one of the memory layouts that callers have.
#pragma once

#include <functional>
#include <memory>
#include <vector>

#include "fpsattn/params.h"
#include "support/device.h"
#include "support/numbers.h"

namespace fpsattn::test {

enum class Memory {
  kHnd,       // (B, H, S, D)
  kNhd,       // (B, S, H, D)
  kFusedQkv,  // (B, S, 3, H, D): q, k and v are views of one projection
};

// Values are rounded to `dtype`; value(b, h, s, d) reads them back as FP32.
class TokenData {
 public:
  using Generator = std::function<float(int b, int h, int s, int d)>;

  TokenData(const ProblemSize& size, DType dtype, Memory memory, const Generator& generate)
      : size_(size),
        dtype_(dtype),
        strides_(strides(size, memory)),
        bits_(static_cast<size_t>(size.batch) * strides_.stride_batch + 64, 0x7fff) {
    for (int b = 0; b < size.batch; ++b) {
      for (int h = 0; h < size.heads; ++h) {
        for (int s = 0; s < size.num_tokens; ++s) {
          for (int d = 0; d < size.head_dim; ++d) {
            bits_[offset(b, h, s, d)] = to_bits16(generate(b, h, s, d), dtype);
          }
        }
      }
    }
    device_ = std::make_unique<DeviceBuffer<uint16_t>>(bits_);
  }

  std::vector<uint16_t> host_bits() const { return bits_; }                 // as they were given
  std::vector<uint16_t> device_bits() const { return device_->to_host(); }  // as they are now

  float value(int b, int h, int s, int d) const { return from_bits16(bits_[offset(b, h, s, d)], dtype_); }

  TokenTensor tensor() const {
    TokenTensor tensor = strides_;
    tensor.data = device_->data() + first_;
    return tensor;
  }

  // Of an element in the bits.
  size_t offset(int b, int h, int s, int d) const {
    return first_ + b * strides_.stride_batch + h * strides_.stride_head + s * strides_.stride_token + d;
  }

 private:
  TokenTensor strides(const ProblemSize& size, Memory memory) {
    const int64_t dim = size.head_dim, heads = size.heads, tokens = size.num_tokens;
    switch (memory) {
      case Memory::kHnd:
        return {nullptr, heads * tokens * dim, tokens * dim, dim};
      case Memory::kNhd:
        return {nullptr, tokens * heads * dim, dim, heads * dim};
      case Memory::kFusedQkv:
        first_ = heads * dim;  // the middle one; the others hold NaN
        return {nullptr, tokens * 3 * heads * dim, dim, 3 * heads * dim};
    }
    return {};
  }

  ProblemSize size_;
  DType dtype_;
  int64_t first_ = 0;
  TokenTensor strides_;
  std::vector<uint16_t> bits_;
  std::unique_ptr<DeviceBuffer<uint16_t>> device_;
};

}  // namespace fpsattn::test
