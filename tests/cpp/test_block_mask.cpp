// Block lists against a direct reading of the rules, on matrices small enough to spell out.
#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <string>

#include "fpsattn/block_mask.h"
#include "fpsattn/status.h"

namespace fpsattn {
namespace {

using Lists = std::vector<std::vector<int32_t>>;

Lists rows_of(const BlockListTable& table) {
  Lists rows;
  for (int64_t row = 0; row < table.matrices * table.rows; ++row) {
    const int32_t* first = table.indices.data() + row * table.width;
    rows.emplace_back(first, first + table.num_blocks[row]);
  }
  return rows;
}

BlockListView view_of(const BlockListTable& table) {
  return {table.num_blocks.data(), table.indices.data(), 1, table.matrices, table.rows, table.width};
}

std::string error_of(const std::function<void()>& call) {
  try {
    call();
  } catch (const Error& error) {
    return error.what();
  }
  return "no error";
}

// The rule, tile by tile: own tile first, then ascending.
std::vector<int32_t> expected_row(const TileLayout& layout, const Int3& window, int tile) {
  const Int3& n = layout.tile_grid;
  const auto coordinate = [&](int t, int axis) {
    return axis == 0 ? t / (n[1] * n[2]) : axis == 1 ? t / n[2] % n[1] : t % n[2];
  };
  const int video = layout.num_video_tiles();
  std::vector<int32_t> own, rest;
  for (int other = 0; other < layout.num_tiles; ++other) {
    bool attends = true;
    if (tile < video && other < video) {
      for (int axis = 0; axis < 3; ++axis) {
        const int start = std::clamp(coordinate(tile, axis) - window[axis] / 2, 0, n[axis] - window[axis]);
        const int c = coordinate(other, axis);
        attends = attends && start <= c && c < start + window[axis];
      }
    }
    if (!attends) continue;
    for (int b = layout.tile_block_offsets[other]; b < layout.tile_block_offsets[other + 1]; ++b) {
      (other == tile ? own : rest).push_back(b);
    }
  }
  own.insert(own.end(), rest.begin(), rest.end());
  return own;
}

TEST(BlockMask, SlidingWindowFollowsTheRule) {
  for (const int text_len : {0, 600}) {
    const TileLayout layout = plan({7, 11, 13}, Int3{2, 5, 3}, text_len);  // tiles 4 x 3 x 5, the last ones smaller
    ASSERT_EQ(layout.tile_grid, (Int3{4, 3, 5}));
    for (const Int3& window : {Int3{1, 1, 1}, Int3{2, 2, 2}, Int3{3, 3, 3}, Int3{4, 3, 5}, Int3{1, 3, 4}}) {
      const Lists rows = rows_of(sliding_tile_lists(layout, window));
      for (int tile = 0; tile < layout.num_tiles; ++tile) EXPECT_EQ(rows[tile], expected_row(layout, window, tile));
    }
  }
}

TEST(BlockMask, RowsAreEquallyLongWhereTilesAre) {
  const TileLayout layout = plan({21, 45, 80});
  const BlockListTable table = sliding_tile_lists(layout, {3, 3, 6});
  EXPECT_EQ(table.width, 108);  // 54 tiles of two blocks
  for (int32_t count : table.num_blocks) EXPECT_EQ(count, 108);
}

TEST(BlockMask, WindowsBeyondTheGridAreErrors) {
  const TileLayout layout = plan({21, 45, 80});
  EXPECT_NE(error_of([&] { sliding_tile_lists(layout, {4, 3, 6}); }).find("larger than the grid of tiles (3, 5, 20)"),
            std::string::npos);
  EXPECT_NE(error_of([&] { sliding_tile_lists(layout, {1, 0, 6}); }).find("at least 1"), std::string::npos);
}

TEST(BlockMask, MatrixOfTilesAndMatrixOfBlocks) {
  const TileLayout layout = plan({1, 1, 300}, Int3{1, 1, 130});  // blocks: tile 0 {0, 1}, tile 1 {2, 3}, tile 2 {4}
  ASSERT_EQ(layout.tile_block_offsets, (std::vector<int32_t>{0, 2, 4, 5}));
  const int32_t* offsets = layout.tile_block_offsets.data();
  const bool tiles[2][3][3] = {{{true, false, true}, {true, true, false}, {false, false, false}},
                               {{false, true, false}, {true, false, true}, {true, true, true}}};
  EXPECT_EQ(rows_of(lists_from_matrix(offsets, 3, &tiles[0][0][0], 2, false)),
            (Lists{{0, 1, 4}, {2, 3, 0, 1}, {}, {2, 3}, {0, 1, 4}, {4, 0, 1, 2, 3}}));
  const bool blocks[3][5] = {{false, true, false, true, false}, {true, false, false, true, true}, {}};
  EXPECT_EQ(rows_of(lists_from_matrix(offsets, 3, &blocks[0][0], 1, true)), (Lists{{1, 3}, {3, 0, 4}, {}}));
  const bool none[3][3] = {};
  EXPECT_EQ(lists_from_matrix(offsets, 3, &none[0][0], 1, false).width, 1);  // tensors stay addressable
}

TEST(BlockMask, TransposeListsQueryBlocks) {
  const TileLayout layout = plan({1, 1, 300}, Int3{1, 1, 130});
  const bool tiles[1][3][3] = {{{true, false, true}, {true, true, false}, {false, false, false}}};
  const BlockListTable lists = lists_from_matrix(layout.tile_block_offsets.data(), 3, &tiles[0][0][0], 1, false);
  EXPECT_EQ(rows_of(transpose_lists(view_of(lists), layout.tile_block_offsets.data(), 3)),
            (Lists{{0, 1, 2, 3}, {0, 1, 2, 3}, {2, 3}, {2, 3}, {0, 1}}));
}

TEST(BlockMask, ValidationNamesThePlace) {
  const TileLayout layout = plan({4, 8, 8}, Int3{2, 8, 8});
  const BlockListTable good = sliding_tile_lists(layout, {2, 1, 1});
  validate_lists(view_of(good), layout.num_blocks);
  const auto broken = [&](const std::function<void(BlockListTable&)>& change) {
    BlockListTable table = good;
    change(table);
    return error_of([&] { validate_lists(view_of(table), layout.num_blocks); });
  };
  EXPECT_NE(broken([](auto& t) { t.indices[3] = 2; }).find("kv_indices[0, 0, 1, 1] is 2, expected 0..1"),
            std::string::npos);
  EXPECT_NE(broken([](auto& t) { t.indices[0] = -1; }).find("kv_indices[0, 0, 0, 0] is -1"), std::string::npos);
  EXPECT_NE(broken([](auto& t) { t.indices[1] = 0; }).find("kv_indices[0, 0, 0] lists block 0 twice"),
            std::string::npos);
  EXPECT_NE(broken([](auto& t) { t.num_blocks[1] = 3; }).find("kv_num_blocks[0, 0, 1] is 3, expected 0..2"),
            std::string::npos);
  EXPECT_NE(broken([](auto& t) { t.num_blocks[0] = -1; }).find("kv_num_blocks[0, 0, 0] is -1"), std::string::npos);
  // What lies beyond a list's length does not matter.
  EXPECT_EQ(broken([](auto& t) { t.num_blocks[0] = 1, t.indices[1] = 99; }), "no error");
}

}  // namespace
}  // namespace fpsattn
