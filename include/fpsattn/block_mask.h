// Block lists: which KV blocks a query tile visits, in which order. Host only; no torch, no CUDA.
//
// A table of lists has a row per query tile for each of `matrices` = Bm * Hm masks; all blocks of a tile share its
// list. Lists start with the query's own tile (the running row maximum is then near its final value from the first
// block on), then ascend. Unused entries are 0.
#pragma once

#include <cstdint>
#include <vector>

#include "fpsattn/tile_layout.h"

namespace fpsattn {

struct BlockListTable {
  int64_t matrices = 1;
  int64_t rows = 0;
  int64_t width = 0;                // entries per row: the longest list, at least 1
  std::vector<int32_t> num_blocks;  // [matrices, rows]
  std::vector<int32_t> indices;     // [matrices, rows, width]
};

// A table of lists in somebody else's memory.
struct BlockListView {
  const int32_t* num_blocks = nullptr;  // [batch, heads, rows]
  const int32_t* indices = nullptr;     // [batch, heads, rows, width]
  int64_t batch = 1, heads = 1, rows = 0, width = 0;
};

// Sliding tile window (Sliding Tile Attention, arXiv 2502.04507) of `window` tiles, clamped at the borders: on an axis
// of n tiles the window of tile c starts at clamp(c - w / 2, 0, n - w), so every video tile attends the same number of
// tiles. Text tiles are attended by all and attend all. Throws on w < 1 and on w > n.
BlockListTable sliding_tile_lists(const TileLayout& layout, const Int3& window);

// The same from the numbers that matter, for callers that keep their own tables. `tile_block_offsets` [num_tiles + 1];
// the first tile_grid[0] * tile_grid[1] * tile_grid[2] tiles are video, the rest text.
BlockListTable sliding_tile_lists(const Int3& tile_grid, const int32_t* tile_block_offsets, int64_t num_tiles,
                                  const Int3& window);

// Lists of a boolean matrix [matrices, num_tiles, columns]; columns are tiles (columns == num_tiles) or blocks.
BlockListTable lists_from_matrix(const int32_t* tile_block_offsets, int64_t num_tiles, const bool* mask,
                                 int64_t matrices, bool columns_are_blocks);

// The transpose: a row per KV block, entries are query blocks, ascending.
BlockListTable transpose_lists(const BlockListView& lists, const int32_t* tile_block_offsets, int64_t num_tiles);

// Throws, naming the place, unless counts are in [0, width] and the counted indices are in [0, num_blocks) and unlike
// each other within a row.
void validate_lists(const BlockListView& lists, int64_t num_blocks);

}  // namespace fpsattn
