// Tables that point out of range: the launch reports an error instead of reading or writing somewhere else. Its own
// executable, and a process for each case (backward.cmake): the error stays in the context.
#include "backward_case.h"

namespace fpsattn::test {
namespace {

struct Spoiled {
  const char* name;
  bool deterministic;
  std::function<std::pair<const int32_t*, int32_t>(const BackwardParams&)> entry;  // where, and what is written there
};

void PrintTo(const Spoiled& spoiled, std::ostream* out) { *out << spoiled.name; }

class BackwardGuard : public testing::TestWithParam<Spoiled> {};

TEST_P(BackwardGuard, FailsTheLaunch) {
  FPSATTN_SKIP_WITHOUT_DEVICE();
  if (cudaDeviceSynchronize() != cudaSuccess) {
    GTEST_SKIP() << "the context is lost to the case before: run one per process (--gtest_filter)";
  }
  BackwardCase c;
  c.head_dim = 64;
  BackwardRun run(c);
  const auto [where, value] = GetParam().entry(run.params);
  ASSERT_EQ(cudaMemcpy(const_cast<int32_t*>(where), &value, 4, cudaMemcpyHostToDevice), cudaSuccess);
  run.params.deterministic = GetParam().deterministic;
  run.params.workspace_bytes = backward_workspace_bytes(run.params);
  const DeviceBuffer<uint8_t> workspace(run.params.workspace_bytes);
  run.params.workspace = workspace.data();
  bool failed = false;
  try {
    backward(run.params, nullptr);
  } catch (const std::exception&) {
    failed = true;  // where launches are synchronous
  }
  failed |= cudaDeviceSynchronize() != cudaSuccess;
  EXPECT_TRUE(failed);
}

INSTANTIATE_TEST_SUITE_P(
    , BackwardGuard,
    testing::Values(
        Spoiled{"query_block", true, [](auto& p) { return std::pair(p.q.indices, p.size.num_blocks); }},
        Spoiled{"kv_block", true, [](auto& p) { return std::pair(p.kv.indices, -1); }},
        Spoiled{"list_length", false, [](auto& p) { return std::pair(p.q.num_blocks + 1, p.q.max_blocks + 1); }},
        Spoiled{"tile", true, [](auto& p) { return std::pair(p.tile_of_block + 1, p.size.num_tiles); }},
        Spoiled{"token", false, [](auto& p) { return std::pair(p.token_of_slot.data + 3, p.size.num_tokens); }}),
    [](const auto& info) { return std::string(info.param.name); });

}  // namespace
}  // namespace fpsattn::test
