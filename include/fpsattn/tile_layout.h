// Tiles of a video token grid: which token sits in which slot. Host only; no torch, no CUDA.
//
// A *tile* is a box of the (T, H, W) grid. It owns ceil(tokens / 128) whole *blocks* of 128 *slots*, valid slots first,
// so slot 0 of every block is valid. Video tiles come in raster order of the tile grid, then the text tiles
// (docs/layout.md).
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <vector>

namespace fpsattn {

using Int3 = std::array<int, 3>;  // (T, H, W)

enum class TextPosition : int { kNone = 0, kSuffix = 1, kPrefix = 2 };  // where the text tokens are in the sequence

inline constexpr int kMaxTextTileTokens = 512;     // text is cut into tiles of at most this many tokens
inline constexpr int kMaxPlannedTileTokens = 512;  // the search stops here; explicit tiles may be larger

struct TileLayout {
  Int3 grid{};
  Int3 tile{};       // nominal size: the largest along each axis, never larger than the grid
  Int3 tile_grid{};  // number of tiles along each axis
  std::array<std::vector<int32_t>, 3> tile_sizes;  // sizes along each axis, first to last
  int text_len = 0;
  TextPosition text_position = TextPosition::kSuffix;

  int num_tokens = 0;  // S: video and text
  int num_tiles = 0;   // video and text
  int num_blocks = 0;
  int num_slots = 0;  // num_blocks * 128

  std::vector<int32_t> token_of_slot;       // [num_slots], -1 in padding
  std::vector<int32_t> slot_of_token;       // [num_tokens]
  std::vector<int32_t> tile_of_block;       // [num_blocks]
  std::vector<int32_t> tile_block_offsets;  // [num_tiles + 1], first block of each tile
  std::vector<int32_t> tile_tokens;         // [num_tiles], valid tokens

  int num_video_tiles() const { return tile_grid[0] * tile_grid[1] * tile_grid[2]; }
};

// The tile of at most 512 tokens that needs the fewest slots on `grid`. Temporal size 2..8 (less where the grid is
// shorter), longest side at most 2.5 times the shortest; a side that spans the whole grid is not counted as short, it
// could not be longer. Ties: closest to two blocks, then the most cubic, the smallest, the least lexicographically.
Int3 choose_tile(const Int3& grid);

// Cuts the grid with `tile`, or with choose_tile(grid). A tile larger than the grid is clamped to it. Along each axis
// of length n the sizes are all t with a smaller last one (clipped) or, where ceil(n / ceil(n / t)) == t, differ by at
// most one (balanced): whichever needs fewer slots, clipped on a tie. A tile therefore means the same cut however it
// was chosen. Throws fpsattn::Error on sizes below 1, on text without a position and when the slots do not fit 32 bits.
TileLayout plan(const Int3& grid, const std::optional<Int3>& tile = std::nullopt, int64_t text_len = 0,
                TextPosition text_position = TextPosition::kSuffix);

}  // namespace fpsattn
