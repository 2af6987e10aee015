// Device tables with an entry that is out of range: the launch reports an error instead of reading somewhere else. Its
// own executable, one case a process (ctest -R), as the error stays in the context on a GPU.
#include "forward_case.h"
#include "support/device.h"

namespace fpsattn::test {
namespace {

struct Guarded {
  const char* name;
  std::function<void(ForwardInputs&)> spoil;
};

class ForwardGuard : public testing::TestWithParam<Guarded> {};

TEST_P(ForwardGuard, EntryOutOfRangeFailsTheLaunch) {
  FPSATTN_SKIP_WITHOUT_DEVICE();
  ForwardCase test;
  test.head_dim = 64;
  ForwardInputs in = make_inputs(test);
  GetParam().spoil(in);
  EXPECT_TRUE(launch_fails(in));
}

const Guarded kGuarded[] = {
    {"tile_too_large", [](ForwardInputs& in) { in.table.tile_of_block[1] = in.size.num_tiles; }},
    {"tile_negative", [](ForwardInputs& in) { in.table.tile_of_block[1] = -1; }},
    {"block_too_large", [](ForwardInputs& in) { in.indices[1] = in.size.num_blocks; }},
    {"count_too_large", [](ForwardInputs& in) { in.num_blocks[0] = in.max_blocks + 1; }},
    {"count_negative", [](ForwardInputs& in) { in.num_blocks[0] = -1; }},
};
INSTANTIATE_TEST_SUITE_P(Tables, ForwardGuard, testing::ValuesIn(kGuarded),
                         [](const auto& info) { return info.param.name; });

}  // namespace
}  // namespace fpsattn::test
