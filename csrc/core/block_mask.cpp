#include "fpsattn/block_mask.h"

#include <algorithm>
#include <limits>
#include <string>

#include "fpsattn/status.h"

namespace fpsattn {
namespace {

std::string text(const Int3& v) {
  return "(" + std::to_string(v[0]) + ", " + std::to_string(v[1]) + ", " + std::to_string(v[2]) + ")";
}

// Rows become `width` entries each. Torch and the kernels index tables of lists with 64 bits, but one of more than 2^31
// entries (8 GiB) is a mistake, not a mask.
BlockListTable make_table(int64_t matrices, int64_t rows, const std::vector<int32_t>& counts) {
  BlockListTable table;
  table.matrices = matrices;
  table.rows = rows;
  table.num_blocks = counts;
  table.width = std::max<int64_t>(1, counts.empty() ? 1 : *std::max_element(counts.begin(), counts.end()));
  FPSATTN_CHECK(matrices * rows <= std::numeric_limits<int32_t>::max() / table.width, "BlockMask: ", matrices, " x ",
                rows, " lists of up to ", table.width, " blocks exceed 2^31 entries: use larger tiles");
  table.indices.assign(matrices * rows * table.width, 0);
  return table;
}

int32_t* append(int32_t* out, int32_t first, int32_t last) {
  for (int32_t block = first; block < last; ++block) *out++ = block;
  return out;
}

// A window along one axis: tiles [start, start + size).
int window_start(int center, int size, int tiles) { return std::clamp(center - size / 2, 0, tiles - size); }

// The tiles [first, last) of each line (t, h) of a window are consecutive, and so are their blocks. Calls visit(first,
// last).
template <class Visit>
void for_each_run(const Int3& tiles, const Int3& window, const Int3& center, Visit visit) {
  Int3 start;
  for (int axis = 0; axis < 3; ++axis) start[axis] = window_start(center[axis], window[axis], tiles[axis]);
  for (int t = start[0]; t < start[0] + window[0]; ++t) {
    for (int h = start[1]; h < start[1] + window[1]; ++h) {
      const int first = (t * tiles[1] + h) * tiles[2] + start[2];
      visit(first, first + window[2]);
    }
  }
}

Int3 coordinates(int tile, const Int3& tiles) {
  return {tile / (tiles[1] * tiles[2]), tile / tiles[2] % tiles[1], tile % tiles[2]};
}

}  // namespace

BlockListTable sliding_tile_lists(const Int3& tile_grid, const int32_t* offsets, int64_t num_tiles,
                                  const Int3& window) {
  for (int axis = 0; axis < 3; ++axis) {
    FPSATTN_CHECK(window[axis] >= 1, "sliding_tile_mask: window ", text(window),
                  ", every size must be at least 1 (in tiles)");
    FPSATTN_CHECK(window[axis] <= tile_grid[axis], "sliding_tile_mask: window ", text(window),
                  " is larger than the grid of tiles ", text(tile_grid), ": a window counts tiles, not tokens");
  }
  const int num_video = tile_grid[0] * tile_grid[1] * tile_grid[2];
  const int32_t num_blocks = offsets[num_tiles];
  const int32_t text_blocks = num_blocks - offsets[num_video];

  std::vector<int32_t> counts(num_tiles, num_blocks);  // text tiles attend all
  for (int tile = 0; tile < num_video; ++tile) {
    counts[tile] = text_blocks;
    for_each_run(tile_grid, window, coordinates(tile, tile_grid),
                 [&](int first, int last) { counts[tile] += offsets[last] - offsets[first]; });
  }
  BlockListTable table = make_table(1, num_tiles, counts);
  for (int64_t tile = 0; tile < num_tiles; ++tile) {
    const int32_t own_first = offsets[tile], own_last = offsets[tile + 1];
    int32_t* out = append(table.indices.data() + tile * table.width, own_first, own_last);
    const auto append_others = [&](int32_t first, int32_t last) {
      out = append(out, first, std::clamp(own_first, first, last));
      out = append(out, std::clamp(own_last, first, last), last);
    };
    if (tile >= num_video) {
      append_others(0, num_blocks);
      continue;
    }
    for_each_run(tile_grid, window, coordinates(static_cast<int>(tile), tile_grid),
                 [&](int first, int last) { append_others(offsets[first], offsets[last]); });
    append_others(offsets[num_video], num_blocks);
  }
  return table;
}

BlockListTable sliding_tile_lists(const TileLayout& layout, const Int3& window) {
  return sliding_tile_lists(layout.tile_grid, layout.tile_block_offsets.data(), layout.num_tiles, window);
}

BlockListTable lists_from_matrix(const int32_t* offsets, int64_t num_tiles, const bool* mask, int64_t matrices,
                                 bool columns_are_blocks) {
  const int64_t columns = columns_are_blocks ? offsets[num_tiles] : num_tiles;
  const auto first_block = [&](int64_t column) {
    return columns_are_blocks ? static_cast<int32_t>(column) : offsets[column];
  };
  std::vector<int32_t> counts(matrices * num_tiles, 0);
  for (int64_t row = 0; row < matrices * num_tiles; ++row) {
    for (int64_t column = 0; column < columns; ++column) {
      if (mask[row * columns + column]) counts[row] += first_block(column + 1) - first_block(column);
    }
  }
  BlockListTable table = make_table(matrices, num_tiles, counts);
  for (int64_t row = 0; row < matrices * num_tiles; ++row) {
    const int64_t tile = row % num_tiles;
    const int64_t own_first = columns_are_blocks ? offsets[tile] : tile;
    const int64_t own_last = columns_are_blocks ? offsets[tile + 1] : tile + 1;
    int32_t* out = table.indices.data() + row * table.width;
    const auto append_columns = [&](int64_t first, int64_t last) {
      for (int64_t column = first; column < last; ++column) {
        if (mask[row * columns + column]) out = append(out, first_block(column), first_block(column + 1));
      }
    };
    append_columns(own_first, own_last);
    append_columns(0, own_first);
    append_columns(own_last, columns);
  }
  return table;
}

BlockListTable transpose_lists(const BlockListView& lists, const int32_t* offsets, int64_t num_tiles) {
  const int64_t num_blocks = offsets[num_tiles];
  const int64_t matrices = lists.batch * lists.heads;
  // Calls visit(row of the transpose, tile): tiles ascend, so the lists of the transpose do, too.
  const auto for_each_entry = [&](auto visit) {
    for (int64_t matrix = 0; matrix < matrices; ++matrix) {
      for (int64_t tile = 0; tile < num_tiles; ++tile) {
        const int64_t row = matrix * num_tiles + tile;
        const int32_t* list = lists.indices + row * lists.width;
        for (int32_t i = 0; i < lists.num_blocks[row]; ++i) visit(matrix * num_blocks + list[i], tile);
      }
    }
  };
  std::vector<int32_t> counts(matrices * num_blocks, 0);
  for_each_entry([&](int64_t row, int64_t tile) { counts[row] += offsets[tile + 1] - offsets[tile]; });
  BlockListTable table = make_table(matrices, num_blocks, counts);
  std::vector<int32_t*> out(counts.size());
  for (size_t row = 0; row < out.size(); ++row) out[row] = table.indices.data() + row * table.width;
  for_each_entry([&](int64_t row, int64_t tile) { out[row] = append(out[row], offsets[tile], offsets[tile + 1]); });
  return table;
}

void validate_lists(const BlockListView& lists, int64_t num_blocks) {
  std::vector<int64_t> last_row(num_blocks, -1);  // the row that listed a block last
  for (int64_t row = 0; row < lists.batch * lists.heads * lists.rows; ++row) {
    const auto place = [&] {
      return "[" + std::to_string(row / lists.rows / lists.heads) + ", " +
             std::to_string(row / lists.rows % lists.heads) + ", " + std::to_string(row % lists.rows);
    };
    const int32_t count = lists.num_blocks[row];
    FPSATTN_CHECK(count >= 0 && count <= lists.width, "BlockMask: kv_num_blocks", place(), "] is ", count,
                  ", expected 0..", lists.width, " (the last size of kv_indices)");
    for (int32_t i = 0; i < count; ++i) {
      const int32_t block = lists.indices[row * lists.width + i];
      FPSATTN_CHECK(block >= 0 && block < num_blocks, "BlockMask: kv_indices", place(), ", ", i, "] is ", block,
                    ", expected 0..", num_blocks - 1, ": the layout has ", num_blocks, " blocks of 128 slots");
      FPSATTN_CHECK(last_row[block] != row, "BlockMask: kv_indices", place(), "] lists block ", block,
                    " twice, expected each KV block at most once: its keys would count double");
      last_row[block] = row;
    }
  }
}

}  // namespace fpsattn
