// A block list with an index that is out of range: the launch reports an error instead of reading somewhere else. Its own
// executable, as the error stays in the context on a GPU.
#include "backward_case.h"

namespace fpsattn::test {
namespace {

TEST(BackwardGuard, BlockIndexOutOfRangeFailsTheLaunch) {
  FPSATTN_SKIP_WITHOUT_DEVICE();
  BackwardCase c;
  c.head_dim = 64;
  BackwardRun run(c);
  const int32_t broken = run.params.size.num_blocks;
  ASSERT_EQ(cudaMemcpy(const_cast<int32_t*>(run.params.q.indices), &broken, 4, cudaMemcpyHostToDevice), cudaSuccess);
  run.params.deterministic = true;
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

}  // namespace
}  // namespace fpsattn::test
