// The order of work items: the same as a stable sort by list length, at any size, ties in index order.
#include <algorithm>
#include <numeric>

#include "forward/sm90/instances.h"
#include "support/device.h"
#include "support/numbers.h"

namespace fpsattn::test {
namespace {

using sm90::forward::Arguments;
using sm90::forward::Workspace;

struct ScheduleCase {
  const char* name;
  int num_blocks, num_tiles, max_blocks;
  int batch = 1, heads = 1, mask_batch = 1, mask_heads = 1;
};

class ForwardSchedule : public testing::TestWithParam<ScheduleCase> {};

TEST_P(ForwardSchedule, LongestListsFirst) {
  FPSATTN_SKIP_WITHOUT_DEVICE();
  const ScheduleCase& test = GetParam();
  const int lists = test.mask_batch * test.mask_heads, batch_heads = test.batch * test.heads;
  Random random(3);
  std::vector<int32_t> tile_of_block(test.num_blocks), lengths(static_cast<size_t>(lists) * test.num_tiles);
  for (int32_t& tile : tile_of_block) tile = random.below(test.num_tiles);
  for (size_t i = 0; i < lengths.size(); ++i) {
    // A few equal lengths, lengths all apart, and every list as long as it may be
    lengths[i] = i % 3 == 0   ? random.below(5) * test.max_blocks / 5
                 : i % 3 == 1 ? random.below(test.max_blocks + 1)
                              : test.max_blocks;
  }
  DeviceBuffer<int32_t> tiles(tile_of_block), counts(lengths);
  ForwardParams params;
  params.size = {test.batch, test.heads, 128, 1, test.num_blocks, test.num_tiles};
  params.kv = {counts.data(), nullptr, test.mask_batch, test.mask_heads, test.num_tiles, test.max_blocks};
  DeviceBuffer<uint8_t> memory(Workspace::at(nullptr, params).bytes);
  const Workspace workspace = Workspace::at(memory.data(), params);
  Arguments args{};
  args.kv = params.kv;
  args.tile_of_block = tiles.data();
  args.heads = test.heads;
  args.num_blocks = test.num_blocks;
  sm90::forward::launch_schedule(args, workspace, test.batch, nullptr);
  ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  memory.check_guards("workspace");

  const std::vector<uint8_t> bytes = memory.to_host();
  const auto read = [&](const void* from, size_t count) {
    std::vector<int32_t> values(count);
    std::memcpy(values.data(), bytes.data() + (static_cast<const uint8_t*>(from) - memory.data()), 4 * count);
    return values;
  };
  int class_shift = 0;  // where lists may be longer than 4095 blocks, only these leading bits of a length count
  while (test.max_blocks >> class_shift > 4095) ++class_shift;
  std::vector<int64_t> load(lists, 0);
  for (int list = 0; list < lists; ++list) {
    std::vector<int32_t> expected(test.num_blocks);
    std::iota(expected.begin(), expected.end(), 0);
    const auto length = [&](int32_t block) { return lengths[list * test.num_tiles + tile_of_block[block]]; };
    std::stable_sort(expected.begin(), expected.end(),
                     [&](int32_t a, int32_t b) { return length(a) >> class_shift > length(b) >> class_shift; });
    for (int block = 0; block < test.num_blocks; ++block) load[list] += length(block);
    EXPECT_EQ(read(workspace.block_order + static_cast<size_t>(list) * test.num_blocks, test.num_blocks), expected);
  }
  std::vector<int32_t> heads(batch_heads);
  std::iota(heads.begin(), heads.end(), 0);
  const auto load_of = [&](int32_t bh) { return load[list_head(params.kv, bh / test.heads, bh % test.heads)]; };
  std::stable_sort(heads.begin(), heads.end(), [&](int32_t a, int32_t b) { return load_of(a) > load_of(b); });
  EXPECT_EQ(read(workspace.head_order, batch_heads), heads);
  EXPECT_EQ(read(workspace.next_item, 1)[0], 0);
}

const ScheduleCase kCases[] = {
    {"one_block", 1, 1, 1},
    {"one_warp", 32, 7, 5},
    {"prime", 1021, 53, 997, 2, 3, 2, 3},
    {"chunk_and_one", 1025, 40, 1025, 2, 2, 1, 2},
    {"empty_lists", 100, 10, 0},
    {"long_video", 20011, 4999, 4095, 1, 2, 1, 2},
    {"lists_beyond_the_classes", 9001, 3000, 9001},
};
INSTANTIATE_TEST_SUITE_P(Cases, ForwardSchedule, testing::ValuesIn(kCases),
                         [](const auto& info) { return info.param.name; });

}  // namespace
}  // namespace fpsattn::test
