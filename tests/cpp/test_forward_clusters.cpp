// Clusters of two CTAs that share K and V: the same bits as without, whatever the lists and tiles (test_forward compares
// both with the reference, as its cases meet the rule of launch.h or not).
#include "forward/sm90/launch.h"
#include "forward_case.h"
#include "support/device.h"

namespace fpsattn::test {
namespace {

using sm90::forward::Clusters;

class ForwardClusters : public testing::TestWithParam<ForwardCase> {};

TEST_P(ForwardClusters, SameBitsAsWithout) {
  FPSATTN_SKIP_WITHOUT_DEVICE();
  const ForwardCase& test = GetParam();
  const ForwardInputs in = make_inputs(test);
  const auto run = [&](Clusters clusters) {
    return run_forward(in, test.out_dtype, test.memory,
                       [=](const ForwardParams& params) { sm90::forward::launch(params, nullptr, clusters); });
  };
  const ForwardOutputs with = run(Clusters::kAlways), without = run(Clusters::kNever);
  EXPECT_EQ(with.out_bits, without.out_bits);
  EXPECT_EQ(with.lse, without.lse);
  EXPECT_EQ(with.row_max, without.row_max);
  EXPECT_EQ(with.row_sum, without.row_sum);
}

std::vector<ForwardCase> cases() {
  std::vector<ForwardCase> list;
  const auto add = [&](const std::string& name, const std::function<void(ForwardCase&)>& change) {
    for (const int dim : {128, 64}) {
      for (const Granularity granularity : {Granularity::kTile, Granularity::kToken}) {
        ForwardCase test;
        test.name = name + "_d" + std::to_string(dim) + (granularity == Granularity::kToken ? "_token_scales" : "");
        test.head_dim = dim;
        test.granularity = granularity;
        change(test);
        list.push_back(test);
      }
    }
  };
  // Blocks of a tile: (grid) / (tile) tokens, 128 a block.
  add("one_block", [](ForwardCase& t) { t.grid = {1, 5, 5}, t.tile = {1, 5, 5}; });  // nobody has a partner
  add("one_pair", [](ForwardCase& t) { t.grid = {2, 8, 13}, t.tile = {2, 8, 13}; });
  add("tiles_of_2", [](ForwardCase& t) { t.grid = {4, 7, 21}, t.tile = {4, 7, 7}, t.heads = 2; });
  add("tiles_of_3_and_text_of_1", [](ForwardCase& t) {  // pairs first, then a third of the video and the text alone
    t.grid = {5, 7, 18}, t.tile = {5, 7, 9}, t.text = 77, t.out_dtype = DType::kFloat32;
  });
  add("long_and_short_lists_per_head",
      [](ForwardCase& t) {  // the ring's laps end anywhere; rows empty and of one block
        t.grid = {4, 7, 28}, t.tile = {4, 7, 7}, t.heads = 2, t.mask_heads = true;
        t.length = [](int, int h, int tile) { return (5 * tile + 3 * h) % 9; };
      });
  add("all_lists_empty", [](ForwardCase& t) {
    t.grid = {2, 8, 26}, t.tile = {2, 8, 13};
    t.length = [](int, int, int) { return 0; };
  });
  return list;
}
INSTANTIATE_TEST_SUITE_P(Cases, ForwardClusters, testing::ValuesIn(cases()),
                         [](const auto& info) { return info.param.name; });

}  // namespace
}  // namespace fpsattn::test
