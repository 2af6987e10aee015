// A slot table built straight from the definition (clipped tiles in raster order, then text), independent of the
// planner.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <vector>

#include "fpsattn/params.h"

namespace fpsattn::test {

struct SlotTable {
  std::vector<int32_t> token_of_slot;
  std::vector<int32_t> tile_block_offsets{0};
  std::vector<int32_t> tile_of_block;

  int num_tokens = 0;
  int num_tiles() const { return static_cast<int>(tile_block_offsets.size()) - 1; }
  int num_blocks() const { return tile_block_offsets.back(); }

  void add_tile(const std::vector<int32_t>& tokens) {
    token_of_slot.insert(token_of_slot.end(), tokens.begin(), tokens.end());
    num_tokens += static_cast<int>(tokens.size());
    const int blocks = (static_cast<int>(tokens.size()) + kBlockSlots - 1) / kBlockSlots;
    tile_of_block.insert(tile_of_block.end(), blocks, num_tiles());
    tile_block_offsets.push_back(num_blocks() + blocks);
    token_of_slot.resize(static_cast<size_t>(num_blocks()) * kBlockSlots, -1);
  }
};

// grid and tile are (T, H, W); text tokens follow the video tokens, in tiles of at most 512.
inline SlotTable make_slot_table(std::array<int, 3> grid, std::array<int, 3> tile, int text_len = 0) {
  SlotTable table;
  for (int t0 = 0; t0 < grid[0]; t0 += tile[0]) {
    for (int h0 = 0; h0 < grid[1]; h0 += tile[1]) {
      for (int w0 = 0; w0 < grid[2]; w0 += tile[2]) {
        std::vector<int32_t> tokens;
        for (int t = t0; t < std::min(t0 + tile[0], grid[0]); ++t) {
          for (int h = h0; h < std::min(h0 + tile[1], grid[1]); ++h) {
            for (int w = w0; w < std::min(w0 + tile[2], grid[2]); ++w) {
              tokens.push_back((t * grid[1] + h) * grid[2] + w);
            }
          }
        }
        table.add_tile(tokens);
      }
    }
  }
  for (int first = 0; first < text_len; first += 512) {
    std::vector<int32_t> tokens;
    for (int i = first; i < std::min(first + 512, text_len); ++i) {
      tokens.push_back(grid[0] * grid[1] * grid[2] + i);
    }
    table.add_tile(tokens);
  }
  return table;
}

}  // namespace fpsattn::test
