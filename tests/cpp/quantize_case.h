// One quantize call on the device, compared with the host reference: bytes and scales bit for bit.
#pragma once

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "fpsattn/launch.h"
#include "host_reference_quantize.h"
#include "support/device.h"
#include "support/slot_table.h"
#include "support/token_data.h"

namespace fpsattn::test {

enum class Mean { kOff, kComputed, kGiven };
enum class Values {
  kNormal,    // K with a bias per channel, V with a magnitude per channel
  kOutliers,  // 1 % of N(0, 100)
  kTies,      // midpoints between e4m3 neighbours at a power-of-two scale; every token holds a 448
  kTiny,      // around and below the smallest scale, subnormal inputs included
  kHuge,      // up to the largest BF16 values
  kZeros,     // whole tiles, channels and tokens of zeros
};

struct QuantizeCase {
  std::string name;
  std::array<int, 3> grid;
  std::array<int, 3> tile;
  int text = 0;
  int batch = 1;
  int heads = 2;
  int head_dim = 128;
  DType dtype = DType::kBFloat16;
  Granularity granularity = Granularity::kTile;
  Memory memory = Memory::kNhd;
  Mean mean = Mean::kComputed;
  int k_mean_stride = 1;
  bool pow2 = false;
  bool given_v_absmax = false;
  bool block_sums = true;
  Values values = Values::kNormal;
};

inline void PrintTo(const QuantizeCase& c, std::ostream* out) { *out << c.name; }

// Inputs, outputs and parameters of one call. `poison(b, h, s, d, tensor)` may replace a value (tensor 0, 1, 2 for q,
// k, v).
class QuantizeRun {
 public:
  using Poison = std::function<float(float x, int tensor, int b, int h, int s, int d)>;

  explicit QuantizeRun(
      const QuantizeCase& c, const Poison& poison = [](float x, int, int, int, int, int) { return x; });

  void launch();
  void check();        // against the host reference
  void check_twice();  // launch, check, launch into freshly dirtied outputs, same bits

  QuantizeParams params;
  SlotTable table;
  std::vector<float> host_k_mean;    // given or read back
  std::vector<float> host_v_absmax;  // given, else empty

  TokenData q, k, v;
  DeviceBuffer<int32_t> token_of_slot, tile_block_offsets;
  DeviceBuffer<float> given_k_mean, given_v_absmax;
  DeviceBuffer<uint8_t> q8, k8, v8t;
  DeviceBuffer<float> q_scale, k_scale, v_scale, k_mean, q_k_mean, q_block_sum, k_block_sum;
  DeviceBuffer<uint8_t> workspace;

 private:
  void check_mean();
  QuantizeCase case_;
};

// First difference of two byte vectors, NaN bytes (0x7f, 0xff) being equal; -1 when there is none.
int64_t first_byte_difference(const std::vector<uint8_t>& a, const std::vector<uint8_t>& b);
void expect_same_bytes(const char* name, const std::vector<uint8_t>& got, const std::vector<uint8_t>& want);
void expect_same_floats(const char* name, const std::vector<float>& got,
                        const std::vector<float>& want);  // bits; NaN == NaN

}  // namespace fpsattn::test
