// Forward calls on the device: making inputs, running, comparing with the host reference.
#pragma once

#include <gtest/gtest.h>

#include <functional>
#include <string>
#include <vector>

#include "host_reference_forward.h"

namespace fpsattn::test {

enum class OutMemory {
  kNhd,
  kHnd,
  kPadded
};  // kPadded: gaps of 8 elements after every row and head, which must stay untouched

struct ForwardCase {
  std::string name;
  std::array<int, 3> grid{4, 8, 8};
  std::array<int, 3> tile{4, 8, 4};
  int text = 0;
  int batch = 1, heads = 1, head_dim = 128;
  Granularity granularity = Granularity::kTile;
  bool mask_batch = false, mask_heads = false;  // lists of their own per batch or head
  // Length of the list of a tile, clamped to num_blocks; the own tile's blocks come first, then others in pseudo-random
  // order.
  std::function<int(int b, int h, int tile)> length = [](int, int, int) { return 1 << 30; };
  std::function<float(Random&, char what, int token, int d)> generate;  // what: q, k or v; null: normal
  float softmax_scale = 0.0f;                                           // 0: 1 / sqrt(D)
  bool smooth_k = true, pow2 = false, with_q_k_mean = true;
  DType out_dtype = DType::kBFloat16;
  OutMemory memory = OutMemory::kNhd;
};

std::ostream& operator<<(std::ostream& stream, const ForwardCase& test);

struct ForwardOutputs {
  std::vector<uint32_t> out_bits;  // [B, H, S, D]
  std::vector<float> out, lse, row_max, row_sum;
};

ForwardInputs make_inputs(const ForwardCase& test, uint64_t seed = 1);
// Runs fpsattn::forward, or another way to launch it, and checks that guard zones and gaps of the outputs are untouched.
using ForwardCall = std::function<void(const ForwardParams&)>;
ForwardOutputs run_forward(const ForwardInputs& inputs, DType out_dtype = DType::kBFloat16,
                           OutMemory memory = OutMemory::kNhd, const ForwardCall& call = nullptr);
// Whether fpsattn::forward reports an error, at once or when the device is waited for.
bool launch_fails(const ForwardInputs& inputs);
// Values of outputs outside of what reference_forward allows on this device.
int count_mismatches(const ForwardInputs& inputs, const ForwardOutputs& outputs, DType out_dtype, bool report);
void expect_matches_reference(const ForwardInputs& inputs, const ForwardOutputs& outputs, DType out_dtype);
// sum |a - b| / sum |b|
double relative_l1(const std::vector<float>& a, const std::vector<double>& b);

}  // namespace fpsattn::test
