// fpsattn::prepare: without norm and RoPE it is quantize, within its buffers; with them, see tests/python. What it says about
// bad parameters.
#include <functional>
#include <string>

#include "fpsattn/prepare.h"
#include "fpsattn/status.h"
#include "quantize_case.h"

namespace fpsattn::test {
namespace {

PrepareParams prepare_params(const QuantizeRun& run) {
  PrepareParams params;
  params.quantize = run.params;
  return params;
}

class Prepare : public testing::TestWithParam<std::tuple<Granularity, int>> {};

TEST_P(Prepare, WithoutNormAndRopeHasTheBitsOfQuantize) {
  FPSATTN_SKIP_WITHOUT_DEVICE();
  const auto [granularity, head_dim] = GetParam();
  QuantizeCase c{"prepare", {5, 7, 11}, {3, 7, 8}, 5};
  c.granularity = granularity, c.head_dim = head_dim, c.memory = Memory::kFusedQkv;
  QuantizeRun run(c);
  PrepareParams params = prepare_params(run);
  ASSERT_NO_THROW(prepare(params, nullptr));
  ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess) << cudaGetErrorString(cudaGetLastError());
  run.host_k_mean = run.k_mean.to_host();
  run.check();
}
INSTANTIATE_TEST_SUITE_P(All, Prepare,
                         testing::Values(std::tuple(Granularity::kTile, 128), std::tuple(Granularity::kToken, 96),
                                         std::tuple(Granularity::kBlock, 64)));

TEST(PrepareErrors, NameTheArgumentAndWhatWasWanted) {
  FPSATTN_SKIP_WITHOUT_DEVICE();
  QuantizeRun run(QuantizeCase{"errors", {1, 1, 9}, {1, 1, 9}});
  const float* floats = run.k_mean.data();
  struct {
    const char* text;
    std::function<void(PrepareParams&)> spoil;
  } const cases[] = {
      {"prepare: head_dim is 80, expected 64, 96 or 128", [](auto& p) { p.quantize.size.head_dim = 80; }},
      {"prepare: q8 is null", [](auto& p) { p.quantize.q8 = nullptr; }},
      {"prepare: norm is 4, expected 0 (none)", [](auto& p) { p.norm = static_cast<Norm>(4); }},
      {"prepare: eps is -1, expected", [](auto& p) { p.eps = -1.0f; }},
      {"prepare: k_weight is given but norm is 0", [&](auto& p) { p.k_weight.data = floats; }},
      {"prepare: q_bias is at", [&](auto& p) { p.norm = Norm::kLayer, p.q_bias.data = floats + 1; }},
      {"prepare: q_weight.others is 6, expected a multiple of 4",
       [&](auto& p) { p.norm = Norm::kRms, p.q_weight = {floats, 6}; }},
      {"prepare: k_bias has 2 rows but there is no rope and no run of tokens",
       [&](auto& p) { p.norm = Norm::kLayer, p.k_bias = {floats, 128}; }},
      {"prepare: weights_end is 10 and weights_begin 3, expected a run of the 9 tokens",
       [](auto& p) { p.weights_begin = 3, p.weights_end = 10; }},
      {"prepare: weights_end is -1 and weights_begin 3", [](auto& p) { p.weights_begin = 3; }},
      {"prepare: tokens 3 to 3 + 7 are rotated, expected a run of the 9 tokens",
       [](auto& p) { p.first_rotated = 3, p.num_rotated = 7; }},
      {"prepare: cos is null", [](auto& p) { p.num_rotated = 9; }},
      {"prepare: sin is at", [&](auto& p) { p.num_rotated = 9, p.cos = floats, p.sin = floats + 1; }},
      {"prepare: table strides are 0 and 2",
       [&](auto& p) { p.num_rotated = 9, p.cos = p.sin = floats, p.table_stride_head = 2; }},
      {"prepare: workspace_bytes is", [](auto& p) { p.norm = Norm::kRmsAcrossHeads; }},  // quantize's is too small
  };
  for (const auto& bad : cases) {
    PrepareParams params = prepare_params(run);
    bad.spoil(params);
    try {
      prepare(params, nullptr);
      ADD_FAILURE() << "accepted: " << bad.text;
    } catch (const Error& error) {
      EXPECT_NE(std::string(error.what()).find(bad.text), std::string::npos)
          << "got '" << error.what() << "', want '" << bad.text << "'";
    }
  }
}

}  // namespace
}  // namespace fpsattn::test
