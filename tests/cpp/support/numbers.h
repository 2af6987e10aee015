// Number formats on the host, written from their definitions (independent of the device code), and a small random
// generator.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "fpsattn/params.h"

namespace fpsattn::test {

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

// Rounds |x| to a multiple of `quantum`, ties to even. Exact: quantum is a power of two.
inline double round_to(double x, double quantum) { return std::nearbyint(x / quantum) * quantum; }

// FP32 to e4m3 (1-4-3, bias 7, largest 448, no Inf): nearest even, saturating; NaN to 0x7f.
inline uint8_t to_e4m3(float x) {
  if (std::isnan(x)) {
    return 0x7f;
  }
  const uint8_t sign = std::signbit(x) ? 0x80 : 0;
  double a = std::fabs(static_cast<double>(x));
  if (a >= 448.0) {
    return sign | 0x7e;
  }
  if (a > 0) {
    a = round_to(a, std::exp2(std::max(std::ilogb(a), -6) - 3));
  }
  if (a < std::exp2(-6)) {
    return sign | static_cast<uint8_t>(a * 512);  // subnormal: multiples of 2^-9
  }
  const int exponent = std::ilogb(a);
  return sign | static_cast<uint8_t>((exponent + 7) * 8 + static_cast<int>(a / std::exp2(exponent - 3)) - 8);
}

inline float e4m3_to_float(uint8_t byte) {
  const int exponent = (byte >> 3) & 15, mantissa = byte & 7;
  if ((byte & 0x7f) == 0x7f) {
    return NAN;
  }
  const double a = exponent == 0 ? mantissa * std::exp2(-9) : (8 + mantissa) * std::exp2(exponent - 10);
  return static_cast<float>(byte & 0x80 ? -a : a);
}

// The 16-bit formats: rounding from FP32, and back (exact).
inline uint16_t to_bits16(float x, DType dtype) {
  if (dtype == DType::kBFloat16) {
    const uint32_t bits = bits_of(x);
    if (std::isnan(x)) {
      return 0x7fc0;
    }
    return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
  }
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  if (std::isnan(x)) {
    return 0x7e00;
  }
  double a = std::fabs(static_cast<double>(x));
  if (a > 0 && std::isfinite(a)) {
    a = round_to(a, std::exp2(std::max(std::ilogb(a), -14) - 10));
  }
  if (a >= 65520.0) {
    return sign | 0x7c00;
  }
  if (a < std::exp2(-14)) {
    return sign | static_cast<uint16_t>(a * std::exp2(24));
  }
  const int exponent = std::ilogb(a);
  return sign | static_cast<uint16_t>((exponent + 15) * 1024 + static_cast<int>(a / std::exp2(exponent - 10)) - 1024);
}

inline float from_bits16(uint16_t bits, DType dtype) {
  if (dtype == DType::kBFloat16) {
    return float_of(static_cast<uint32_t>(bits) << 16);
  }
  const int exponent = (bits >> 10) & 31, mantissa = bits & 1023;
  double a = exponent == 0 ? mantissa * std::exp2(-24) : (1024 + mantissa) * std::exp2(exponent - 25);
  if (exponent == 31) {
    a = mantissa == 0 ? INFINITY : NAN;
  }
  return static_cast<float>(bits & 0x8000 ? -a : a);
}

// e4m3 code of 2^y by arithmetic (docs/numerics.md, step 4). NaN gives 0.
inline uint8_t exponent_code(double y) {
  if (std::isnan(y)) return 0;
  const float h = static_cast<float>(1.0 - (32.0 * y + 264.125) / 2048.0);
  const float clamped = std::fmin(std::fmax(h, 1.0f - 547.0f / 2048.0f), 1.0f);
  const int steps = 0x3c00 - to_bits16(clamped, DType::kFloat16);  // 32 an octave, 0 at the end of the tail
  const bool inner = (steps + 15) / 16 % 2 == 0;                   // of an octave: its second or third quarter
  int quarters = steps - 86 - inner;                               // of a code, from the border of the tail on
  if (quarters < 0) {                                              // half as many below: to nearest, ties to even
    const int odd = -quarters % 2, down = quarters / 2;
    quarters = odd == 0 ? down : down - (down % 2 != 0);
  }
  return static_cast<uint8_t>((quarters + 46) / 4);
}

// SplitMix64: the same numbers on every machine.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t next() {
    uint64_t z = (state_ += 0x9e3779b97f4a7c15ull);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
  }
  int below(int n) { return static_cast<int>(next() % n); }
  float uniform() { return static_cast<float>(next() >> 40) * 0x1p-24f; }  // [0, 1)
  float normal() {                                                         // sum of 12 uniforms: close enough
    float sum = -6.0f;
    for (int i = 0; i < 12; ++i) {
      sum += uniform();
    }
    return sum;
  }

 private:
  uint64_t state_;
};

}  // namespace fpsattn::test
