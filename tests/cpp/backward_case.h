// One backward call on the device, compared with the host reference.
#pragma once

#include <gtest/gtest.h>

#include <array>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "fpsattn/launch.h"
#include "host_reference_backward.h"
#include "support/device.h"
#include "support/slot_table.h"
#include "support/token_data.h"

namespace fpsattn::test {

enum class Mask {
  kDense,     // every tile attends every block, its own first
  kRandom,    // unequal lists; some rows empty, some of one block, some KV blocks attended by none
  kOwnBlock,  // one block each
  kEmpty,     // nothing at all
};

struct BackwardCase {
  std::string name;
  std::array<int, 3> grid{4, 6, 7};
  std::array<int, 3> tile{4, 6, 6};  // 144 and 24 tokens: 3 blocks
  int text = 0;
  int batch = 1;
  int heads = 1;
  int mask_batch = 1;
  int mask_heads = 1;
  int head_dim = 128;
  DType dtype = DType::kBFloat16;
  Granularity granularity = Granularity::kTile;
  bool pow2 = true;
  Memory memory = Memory::kNhd;  // of out, grad_out and the gradients
  Mask mask = Mask::kDense;
  float magnitude = 1.0f;  // of q and k: how peaked the softmax is
  int extra_columns = 0;   // of both tables of lists: unused entries beyond the longest list
};

inline void PrintTo(const BackwardCase& c, std::ostream* out) { *out << c.name; }

// A token tensor between poison: reads back what was written and whether anything else was.
class TokenBuffer {
 public:
  TokenBuffer(const ProblemSize& size, Memory memory);
  TokenTensor tensor() const;
  void poison();
  void fill(DType dtype, const std::function<float(int b, int h, int s, int d)>& value);
  // Logical (B, H, S, D). Fails on an element written outside of it or, as a NaN may look like the poison, unless
  // nan_expected, not written.
  std::vector<uint16_t> read(const char* name, bool nan_expected) const;

 private:
  static constexpr uint16_t kPoison = 0x7fff;
  size_t offset(int b, int h, int s, int d) const;
  ProblemSize size_;
  TokenTensor strides_;
  int64_t first_ = 0;
  std::unique_ptr<DeviceBuffer<uint16_t>> device_;
};

struct Gradients {
  std::vector<uint16_t> dq, dk, dv;
  bool operator==(const Gradients& other) const { return dq == other.dq && dk == other.dk && dv == other.dv; }
};

class BackwardRun {
 public:
  // poison(x, tensor, b, h, s, d) may replace an input value (tensor 0 to 3: q, k, v, grad_out).
  using Poison = std::function<float(float x, int tensor, int b, int h, int s, int d)>;
  explicit BackwardRun(
      const BackwardCase& c, const Poison& poison = [](float x, int, int, int, int, int) { return x; });

  // rounds: what the workspace asked for is divided by.
  Gradients launch(bool deterministic, bool nan_expected = false, int rounds = 1);
  void check(const Gradients& got);  // tolerance: see the definition

  BackwardParams params;

 private:
  void make_lists();
  void make_operands(const Poison& poison);
  void upload();

  BackwardCase case_;
  SlotTable table_;
  std::vector<Lists> kv_lists_;  // [mask_batch * mask_heads]
  std::vector<HostHead> heads_;
  std::vector<HostForward> forwards_;
  std::vector<uint8_t> q8_, k8_, v8t_;
  std::vector<float> q_scale_, k_scale_, v_scale_;
  std::vector<std::unique_ptr<DeviceBuffer<uint8_t>>> bytes_;
  std::vector<std::unique_ptr<DeviceBuffer<float>>> floats_;
  std::vector<std::unique_ptr<DeviceBuffer<int32_t>>> ints_;
  TokenBuffer out_, grad_out_, dq_, dk_, dv_;
};

}  // namespace fpsattn::test
