// Tables that point out of range: the launch reports an error instead of reading somewhere else. Its own executable,
// and a process for each case (quantize.cmake): the error stays in the context.
#include "quantize_case.h"

namespace fpsattn::test {
namespace {

struct Spoiled {
  const char* name;
  std::function<std::pair<int32_t*, int32_t>(const QuantizeRun&)> entry;  // where, and what is written there
};

void PrintTo(const Spoiled& spoiled, std::ostream* out) { *out << spoiled.name; }

class QuantizeGuard : public testing::TestWithParam<Spoiled> {};

TEST_P(QuantizeGuard, FailsTheLaunch) {
  FPSATTN_SKIP_WITHOUT_DEVICE();
  if (cudaDeviceSynchronize() != cudaSuccess) {
    GTEST_SKIP() << "the context is lost to the case before: run one per process (--gtest_filter)";
  }
  QuantizeCase c;
  c.grid = {4, 6, 7};
  c.tile = {4, 6, 6};
  QuantizeRun run(c);
  const auto [where, value] = GetParam().entry(run);
  ASSERT_EQ(cudaMemcpy(where, &value, 4, cudaMemcpyHostToDevice), cudaSuccess);
  bool failed = false;
  try {
    quantize(run.params, nullptr);
  } catch (const std::exception&) {
    failed = true;  // where launches are synchronous
  }
  failed |= cudaDeviceSynchronize() != cudaSuccess;
  EXPECT_TRUE(failed);
}

INSTANTIATE_TEST_SUITE_P(
    , QuantizeGuard,
    testing::Values(
        Spoiled{"token", [](auto& run) { return std::pair(run.token_of_slot.data() + 3, run.params.size.num_tokens); }},
        Spoiled{"tile_end",
                [](auto& run) {
                  return std::pair(run.tile_block_offsets.data() + run.params.size.num_tiles,
                                   run.params.size.num_blocks + 1);
                }},
        Spoiled{"tile_begin", [](auto& run) { return std::pair(run.tile_block_offsets.data(), -1); }}),
    [](const auto& info) { return std::string(info.param.name); });

}  // namespace
}  // namespace fpsattn::test
