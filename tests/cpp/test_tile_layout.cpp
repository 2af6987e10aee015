// The planner: quality figures, exact cuts, tables, errors.
#include <gtest/gtest.h>

#include <functional>
#include <numeric>
#include <string>

#include "fpsattn/params.h"
#include "fpsattn/status.h"
#include "fpsattn/tile_layout.h"

namespace fpsattn {
namespace {

std::string error_of(const std::function<void()>& call) {
  try {
    call();
  } catch (const Error& error) {
    return error.what();
  }
  return "no error";
}

// Every table against what its comment promises.
void check_tables(const TileLayout& layout) {
  ASSERT_EQ(static_cast<int>(layout.token_of_slot.size()), layout.num_slots);
  ASSERT_EQ(static_cast<int>(layout.slot_of_token.size()), layout.num_tokens);
  ASSERT_EQ(static_cast<int>(layout.tile_of_block.size()), layout.num_blocks);
  ASSERT_EQ(static_cast<int>(layout.tile_block_offsets.size()), layout.num_tiles + 1);
  ASSERT_EQ(static_cast<int>(layout.tile_tokens.size()), layout.num_tiles);
  EXPECT_EQ(layout.num_slots, layout.num_blocks * kBlockSlots);
  EXPECT_EQ(layout.tile_block_offsets.front(), 0);
  EXPECT_EQ(layout.tile_block_offsets.back(), layout.num_blocks);
  EXPECT_EQ(std::accumulate(layout.tile_tokens.begin(), layout.tile_tokens.end(), 0), layout.num_tokens);
  for (int token = 0; token < layout.num_tokens; ++token) {
    ASSERT_EQ(layout.token_of_slot[layout.slot_of_token[token]], token);
  }
  for (int tile = 0; tile < layout.num_tiles; ++tile) {
    const int first = layout.tile_block_offsets[tile], last = layout.tile_block_offsets[tile + 1];
    ASSERT_EQ(last - first, (layout.tile_tokens[tile] + kBlockSlots - 1) / kBlockSlots);
    for (int block = first; block < last; ++block) ASSERT_EQ(layout.tile_of_block[block], tile);
    for (int slot = first * kBlockSlots; slot < last * kBlockSlots; ++slot) {  // valid slots first
      ASSERT_EQ(layout.token_of_slot[slot] >= 0, slot < first * kBlockSlots + layout.tile_tokens[tile]);
    }
  }
}

struct Case {
  Int3 grid, tile;
  int slots;
};

TEST(TileLayout, ChoosesTheTilesOfTheDesign) {
  const Case cases[] = {
      {{21, 45, 80}, {7, 9, 4}, 76800},  {{21, 30, 52}, {7, 9, 6}, 33408}, {{33, 45, 80}, {7, 9, 8}, 121600},
      {{33, 34, 60}, {7, 6, 12}, 69760}, {{31, 22, 40}, {8, 4, 8}, 28160},
  };
  for (const Case& c : cases) {
    const TileLayout layout = plan(c.grid);
    EXPECT_EQ(layout.tile, c.tile);
    EXPECT_EQ(layout.num_slots, c.slots);
    check_tables(layout);
  }
}

TEST(TileLayout, AnExplicitTileIsClippedAndClamped) {
  const TileLayout layout = plan({21, 45, 80}, Int3{6, 8, 8});
  EXPECT_EQ(layout.tile_grid, (Int3{4, 6, 10}));
  EXPECT_EQ(layout.tile_sizes[0], (std::vector<int32_t>{6, 6, 6, 3}));
  EXPECT_EQ(layout.tile_sizes[1], (std::vector<int32_t>{8, 8, 8, 8, 8, 5}));
  check_tables(layout);

  const TileLayout whole = plan({3, 20, 20}, Int3{100, 100, 100});  // one tile of 1200 tokens, ten blocks
  EXPECT_EQ(whole.tile, (Int3{3, 20, 20}));
  EXPECT_EQ(whole.num_tiles, 1);
  EXPECT_EQ(whole.num_blocks, 10);
  check_tables(whole);
}

TEST(TileLayout, BalancesWhereThatSavesSlots) {
  const TileLayout layout =
      plan({10, 16, 16}, Int3{4, 8, 4});  // clipped 4 + 4 + 2, balanced 4 + 3 + 3: 128 slots each way
  EXPECT_EQ(layout.tile_sizes[0], (std::vector<int32_t>{4, 4, 2}));
  const TileLayout balanced = plan({1, 1, 385}, Int3{1, 1, 129});  // 129 + 129 + 127 = 5 blocks, 129 + 128 + 128 = 4
  EXPECT_EQ(balanced.tile_sizes[2], (std::vector<int32_t>{129, 128, 128}));
  EXPECT_EQ(balanced.num_blocks, 4);
  check_tables(balanced);
}

TEST(TileLayout, TextComesInTilesAfterTheVideoTiles) {
  const TileLayout suffix = plan({3, 5, 7}, Int3{2, 3, 4}, 1100, TextPosition::kSuffix);
  const TileLayout prefix = plan({3, 5, 7}, Int3{2, 3, 4}, 1100, TextPosition::kPrefix);
  for (const TileLayout* layout : {&suffix, &prefix}) {
    check_tables(*layout);
    EXPECT_EQ(layout->num_tiles, layout->num_video_tiles() + 3);
    EXPECT_EQ(layout->tile_tokens[layout->num_tiles - 1], 1100 - 1024);
  }
  const int text_slot = suffix.tile_block_offsets[suffix.num_video_tiles()] * kBlockSlots;
  EXPECT_EQ(suffix.token_of_slot[text_slot], 105);
  EXPECT_EQ(prefix.token_of_slot[text_slot], 0);
  EXPECT_EQ(suffix.token_of_slot[0], 0);
  EXPECT_EQ(prefix.token_of_slot[0], 1100);
}

TEST(TileLayout, PrimesOnesAndThinGrids) {
  for (const Int3& grid :
       {Int3{1, 1, 1}, Int3{1, 45, 80}, Int3{2, 1, 997}, Int3{13, 17, 19}, Int3{31, 1, 1}, Int3{1, 1, 5003}}) {
    const TileLayout layout = plan(grid);
    check_tables(layout);
    EXPECT_LE(layout.tile[0] * layout.tile[1] * layout.tile[2], 512);
    EXPECT_EQ(plan(grid, layout.tile).token_of_slot, layout.token_of_slot);  // the tile alone says how the grid is cut
  }
}

TEST(TileLayout, SaysWhatIsWrong) {
  EXPECT_EQ(error_of([] { plan({0, 3, 4}); }), "fpsattn.plan: grid (0, 3, 4), every size must be at least 1");
  EXPECT_EQ(error_of([] { plan({1, 3, 4}, Int3{1, -2, 4}); }),
            "fpsattn.plan: tile (1, -2, 4), every size must be at least 1");
  EXPECT_EQ(error_of([] { plan({1, 3, 4}, std::nullopt, -1); }), "fpsattn.plan: text_len -1, expected 0 or more");
  EXPECT_NE(error_of([] { plan({1, 3, 4}, std::nullopt, 5, TextPosition::kNone); }).find("text_position 'none'"),
            std::string::npos);
  EXPECT_NE(error_of([] { plan({100000, 100000, 100000}); }).find("too many tokens"), std::string::npos);
  EXPECT_NE(error_of([] { plan({400, 400, 400}, Int3{1, 1, 1}); }).find("needs 8192000000 slots"), std::string::npos);
  EXPECT_NE(error_of([] { plan({1, 1, 1}, std::nullopt, int64_t{1} << 40); }).find("slots"), std::string::npos);
}

}  // namespace
}  // namespace fpsattn
