// The accumulator of FP8 WGMMA on the host: which bits of a sum of products a tensor core may lose.
//
// Model (computed, not documented by NVIDIA; the emulator's --fp8-acc=truncated is this): an instruction adds 32
// products and the accumulator. All are aligned to the largest exponent among them and cut, towards zero,
// kFractionBits below it; so is the result. A tensor core that keeps more bits loses less of each addend, so its
// result lies between this one and the exact sum: `below` and `above` bound what a sum may lose whatever the signs.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace fpsattn::test {

enum class Fp8Sum {
  kExact,    // nothing is lost: the emulator's default
  kAllowed,  // the exact sum, and bounds of what may be lost
  kCut,      // what the model computes
};

class Fp8Accumulator {
 public:
  static constexpr int kFractionBits = 13;
  static constexpr int kProducts = 32;  // of an instruction: K of 8-bit operands

  explicit Fp8Accumulator(Fp8Sum mode) : mode_(mode) {}

  double value = 0.0;
  double below = 0.0, above = 0.0;  // the tensor core's sum is in [value - below, value + above]

  // One instruction. `doubt[i] > 0`: the product may be another number, doubt[i] away at most (that difference itself
  // is the caller's to allow for).
  void add(const double* products, const double* doubt = nullptr) {
    double largest = std::fabs(value) + std::max(below, above), sum = value;
    for (int i = 0; i < kProducts; ++i) {
      largest = std::max(largest, std::fabs(products[i]) + (doubt ? doubt[i] : 0.0));
      sum += products[i];
    }
    if (mode_ == Fp8Sum::kExact || !std::isfinite(sum) || largest == 0.0) {
      value = sum;
      return;
    }
    const double unit = unit_of(largest), inverse = 1.0 / unit;
    if (mode_ == Fp8Sum::kCut) {
      sum = cut(value, unit, inverse);
      for (int i = 0; i < kProducts; ++i) sum += cut(products[i], unit, inverse);
      const double result_unit = sum == 0.0 ? unit : unit_of(std::fabs(sum));
      value = cut(sum, result_unit, 1.0 / result_unit);
      return;
    }
    if (value != 0.0 && unit > unit_of(std::fabs(value))) lose(value, unit);
    for (int i = 0; i < kProducts; ++i) {
      if (doubt && doubt[i] > 0.0) {
        lose(products[i], unit);
      } else if (products[i] != 0.0) {
        lose(products[i], std::fabs(products[i] - cut(products[i], unit, inverse)));
      }
    }
    value = sum;
    const double result_unit = unit_of(std::fabs(value) + std::max(below, above));
    if (result_unit > unit) lose(value, result_unit);
  }

  void scale(double factor) { value *= factor, below *= factor, above *= factor; }

 private:
  // 2^(exponent - kFractionBits) of x > 0, a normal number.
  static double unit_of(double x) {
    uint64_t bits;
    std::memcpy(&bits, &x, 8);
    bits = ((bits >> 52) - kFractionBits) << 52;
    std::memcpy(&x, &bits, 8);
    return x;
  }
  // Exact: x / unit is below 2^53 for products of e4m3 values, and unit is a power of two.
  static double cut(double x, double unit, double inverse) {
    return static_cast<double>(static_cast<int64_t>(x * inverse)) * unit;
  }
  void lose(double addend, double loss) { (addend > 0.0 ? below : above) += loss; }

  Fp8Sum mode_;
};

// How the device at hand adds: the emulator exactly unless told otherwise.
inline Fp8Sum device_fp8_sum() {
  cudaDeviceProp properties{};
  const bool emulated =
      cudaGetDeviceProperties(&properties, 0) == cudaSuccess && std::strstr(properties.name, "emu") != nullptr;
  const char* options = std::getenv("HOPPER_EMU_OPTS");
  const bool cuts = !emulated || (options != nullptr && std::strstr(options, "fp8-acc=truncated") != nullptr);
  return cuts ? Fp8Sum::kAllowed : Fp8Sum::kExact;
}

}  // namespace fpsattn::test
