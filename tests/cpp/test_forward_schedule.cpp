// The order of work items: the same as a stable sort by the leading bits of list lengths, at any size, ties in index
// order; with clusters, pairs of blocks of a tile in front.
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
  int longest_tile = 0;  // tiles of 1 to so many blocks, in order, for clusters; 0: tiles of blocks at random, none
};

class ForwardSchedule : public testing::TestWithParam<ScheduleCase> {};

TEST_P(ForwardSchedule, LongestListsFirst) {
  FPSATTN_SKIP_WITHOUT_DEVICE();
  const ScheduleCase& test = GetParam();
  const int lists = test.mask_batch * test.mask_heads, batch_heads = test.batch * test.heads;
  Random random(3);
  std::vector<int32_t> tile_of_block(test.num_blocks), lengths(static_cast<size_t>(lists) * test.num_tiles);
  if (test.longest_tile == 0) {
    for (int32_t& tile : tile_of_block) tile = random.below(test.num_tiles);
  } else {
    for (int tile = 0, block = 0; block < test.num_blocks; tile = std::min(tile + 1, test.num_tiles - 1)) {
      for (int n = 1 + random.below(test.longest_tile); n > 0 && block < test.num_blocks; --n)
        tile_of_block[block++] = tile;
    }
  }
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
  args.batch_heads = batch_heads;
  args.num_blocks = test.num_blocks;
  args.cluster_size = test.longest_tile > 0 ? 2 : 1;
  sm90::forward::launch_schedule(args, workspace, nullptr);
  ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  memory.check_guards("workspace");

  const std::vector<uint8_t> bytes = memory.to_host();
  const auto read = [&](const void* from, size_t count) {
    std::vector<int32_t> values(count);
    std::memcpy(values.data(), bytes.data() + (static_cast<const uint8_t*>(from) - memory.data()), 4 * count);
    return values;
  };
  const auto leading_bits = [](int64_t n) {
    int shift = 0;
    while (n >> shift > 15) ++shift;
    return n >> shift << shift;
  };
  std::vector<bool> alone(test.num_blocks, true);
  int num_pairs = 0;
  for (int block = 0; args.cluster_size > 1 && block + 1 < test.num_blocks; ++block) {
    if (alone[block] && tile_of_block[block] == tile_of_block[block + 1]) {
      alone[block] = alone[block + 1] = false;
      ++num_pairs;
      ++block;
    }
  }
  std::vector<int64_t> load(lists, 0);
  for (int list = 0; list < lists; ++list) {
    std::vector<int32_t> expected(test.num_blocks);
    std::iota(expected.begin(), expected.end(), 0);
    const auto length = [&](int32_t block) { return lengths[list * test.num_tiles + tile_of_block[block]]; };
    std::stable_sort(expected.begin(), expected.end(), [&](int32_t a, int32_t b) {
      if (alone[a] != alone[b]) return alone[b] == true;
      return leading_bits(length(a)) > leading_bits(length(b));
    });
    for (int block = 0; block < test.num_blocks; ++block) load[list] += length(block);
    const std::vector<int32_t> got =
        read(workspace.block_order + static_cast<size_t>(list) * test.num_blocks, 4 * test.num_blocks);
    for (int i = 0; i < test.num_blocks; ++i) {
      const int32_t block = expected[i];
      ASSERT_EQ(got[4 * i], block) << "place " << i << " of list " << list;
      ASSERT_EQ(got[4 * i + 1], tile_of_block[block]);
      ASSERT_EQ(got[4 * i + 2], length(block));
    }
    for (int i = 0; i < 2 * num_pairs; i += 2) ASSERT_EQ(got[4 * i + 1], got[4 * i + 5]) << "a pair of two tiles";
  }
  std::vector<int32_t> heads(batch_heads);
  std::iota(heads.begin(), heads.end(), 0);
  const auto load_of = [&](int32_t bh) {
    return leading_bits(load[list_head(params.kv, bh / test.heads, bh % test.heads)]);
  };
  std::stable_sort(heads.begin(), heads.end(), [&](int32_t a, int32_t b) { return load_of(a) > load_of(b); });
  EXPECT_EQ(read(workspace.head_order, batch_heads), heads);
  EXPECT_EQ(read(workspace.next_pair, 3), (std::vector<int32_t>{0, 0, num_pairs}));
}

const ScheduleCase kCases[] = {
    {"one_block", 1, 1, 1},
    {"one_warp", 32, 7, 5},
    {"prime", 1021, 53, 997, 2, 3, 2, 3},
    {"chunk_and_one", 1025, 40, 1025, 2, 2, 1, 2},
    {"empty_lists", 100, 10, 0},
    {"long_video", 20011, 4999, 4095, 1, 2, 1, 2},
    {"lists_of_thousands", 9001, 3000, 9001},
    {"many_heads", 3, 2, 3, 37, 61, 37, 61},
    {"pairs_one_block", 1, 1, 1, 1, 1, 1, 1, 2},
    {"pairs_one_tile_of_many", 2050, 1, 40, 1, 1, 1, 1, 9999},
    {"pairs", 1200, 640, 97, 2, 3, 2, 3, 3},
    {"pairs_across_chunks", 4097, 1400, 300, 1, 1, 1, 1, 5},
};
INSTANTIATE_TEST_SUITE_P(Cases, ForwardSchedule, testing::ValuesIn(kCases),
                         [](const auto& info) { return info.param.name; });

}  // namespace
}  // namespace fpsattn::test
