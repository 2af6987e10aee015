#include "fpsattn/tile_layout.h"

#include <algorithm>
#include <cstdlib>
#include <limits>
#include <string>
#include <tuple>

#include "fpsattn/params.h"
#include "fpsattn/status.h"

namespace fpsattn {
namespace {

constexpr int64_t kInt32Max = std::numeric_limits<int32_t>::max();

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

std::string text(const Int3& v) {
  return "(" + std::to_string(v[0]) + ", " + std::to_string(v[1]) + ", " + std::to_string(v[2]) + ")";
}

// An axis cut into tiles of at most two sizes: `num_large` of size `large` first, then `num_small` of size `small`.
struct AxisCut {
  int64_t large = 0, num_large = 0, small = 0, num_small = 0;
};

AxisCut clipped(int64_t length, int64_t size) {
  const int64_t rest = length % size;
  return {size, length / size, rest, rest ? 1 : 0};
}

AxisCut balanced(int64_t length, int64_t size) {
  const int64_t n = ceil_div(length, size);
  const int64_t rest = length % n;
  if (rest == 0) return {length / n, n, 0, 0};
  return {length / n + 1, rest, length / n, n - rest};
}

struct Cut {
  std::array<AxisCut, 3> axes;
  int64_t slots = std::numeric_limits<int64_t>::max();
};

int64_t slots_of(const std::array<AxisCut, 3>& axes) {
  int64_t blocks = 0;
  for (int corner = 0; corner < 8; ++corner) {  // every combination of large and small sides
    int64_t volume = 1, count = 1;
    for (int axis = 0; axis < 3; ++axis) {
      const AxisCut& cut = axes[axis];
      const bool small = corner >> axis & 1;
      volume *= small ? cut.small : cut.large;
      count *= small ? cut.num_small : cut.num_large;
    }
    if (count > 0) blocks += count * ceil_div(volume, kBlockSlots);
  }
  return blocks * kBlockSlots;
}

// `tile` <= `grid`. The first of equally good choices wins, and choice 0 is clipped along every axis.
Cut best_cut(const Int3& grid, const Int3& tile) {
  Cut best;
  for (int choice = 0; choice < 8; ++choice) {
    std::array<AxisCut, 3> axes;
    bool allowed = true;
    for (int axis = 0; axis < 3; ++axis) {
      const bool balance = choice >> axis & 1;
      axes[axis] = balance ? balanced(grid[axis], tile[axis]) : clipped(grid[axis], tile[axis]);
      allowed =
          allowed && (!balance || axes[axis].large == tile[axis]);  // else the tile would not be the one asked for
    }
    if (!allowed) continue;
    const int64_t slots = slots_of(axes);
    if (slots < best.slots) best = {axes, slots};
  }
  return best;
}

// True if longest / shortest <= 2.5, sides that span the grid not counted as short.
bool well_shaped(const Int3& grid, const Int3& tile) {
  const int longest = std::max({tile[0], tile[1], tile[2]});
  for (int axis = 0; axis < 3; ++axis) {
    if (tile[axis] < grid[axis] && 2 * longest > 5 * tile[axis]) return false;
  }
  return true;
}

void check_grid(const Int3& grid) {
  int64_t tokens = 1;
  for (int size : grid) {
    FPSATTN_CHECK(size >= 1, "plan: grid ", text(grid), ", every size must be at least 1");
    tokens *= size;
    FPSATTN_CHECK(tokens <= kInt32Max, "plan: grid ", text(grid),
                  " has too many tokens, at most 2^31 - 1 are supported");
  }
}

std::vector<int32_t> sizes_of(const AxisCut& cut) {
  std::vector<int32_t> sizes(cut.num_large, static_cast<int32_t>(cut.large));
  sizes.insert(sizes.end(), cut.num_small, static_cast<int32_t>(cut.small));
  return sizes;
}

// Appends tiles one after another and keeps the tables consistent.
class TableBuilder {
 public:
  explicit TableBuilder(TileLayout* layout) : layout_(*layout) { layout_.tile_block_offsets.push_back(0); }

  void add_token(int32_t token) {
    layout_.slot_of_token[token] = slot_;
    layout_.token_of_slot[slot_++] = token;
    ++tokens_;
  }

  void end_tile() {
    const int32_t first = layout_.tile_block_offsets.back();
    const int32_t last = first + static_cast<int32_t>(ceil_div(tokens_, kBlockSlots));
    std::fill(layout_.tile_of_block.begin() + first, layout_.tile_of_block.begin() + last,
              static_cast<int32_t>(layout_.tile_tokens.size()));
    layout_.tile_block_offsets.push_back(last);
    layout_.tile_tokens.push_back(tokens_);
    slot_ = last * kBlockSlots;
    tokens_ = 0;
  }

 private:
  TileLayout& layout_;
  int32_t slot_ = 0;
  int32_t tokens_ = 0;
};

void add_video_tiles(const TileLayout& layout, int32_t first_token, TableBuilder& table) {
  int t0 = 0;
  for (int tile_t : layout.tile_sizes[0]) {
    int h0 = 0;
    for (int tile_h : layout.tile_sizes[1]) {
      int w0 = 0;
      for (int tile_w : layout.tile_sizes[2]) {
        for (int t = t0; t < t0 + tile_t; ++t) {
          for (int h = h0; h < h0 + tile_h; ++h) {
            const int32_t row = first_token + (t * layout.grid[1] + h) * layout.grid[2];
            for (int w = w0; w < w0 + tile_w; ++w) table.add_token(row + w);
          }
        }
        table.end_tile();
        w0 += tile_w;
      }
      h0 += tile_h;
    }
    t0 += tile_t;
  }
}

}  // namespace

Int3 choose_tile(const Int3& grid) {
  check_grid(grid);
  // The key is compared left to right. Two blocks on a tie: half the lists of one-block tiles and pairs of query blocks
  // that share one, yet patterns and scales finer than with three or four.
  using Key = std::tuple<int64_t, int64_t, double, int64_t, Int3>;
  std::optional<Key> best;
  for (int t = std::min(2, grid[0]); t <= std::min(8, grid[0]); ++t) {
    for (int h = 1; h <= std::min(grid[1], kMaxPlannedTileTokens / t); ++h) {
      for (int w = 1; w <= std::min(grid[2], kMaxPlannedTileTokens / (t * h)); ++w) {
        const Int3 tile{t, h, w};
        if (!well_shaped(grid, tile)) continue;
        const int64_t volume = int64_t{t} * h * w;
        const double aspect = static_cast<double>(std::max({t, h, w})) / std::min({t, h, w});
        const int64_t from_two_blocks = std::abs(ceil_div(volume, kBlockSlots) - 2);
        const Key key{best_cut(grid, tile).slots, from_two_blocks, aspect, volume, tile};
        if (!best || key < *best) best = key;
      }
    }
  }
  return std::get<Int3>(*best);  // (min(2, T), 1, 1) clamped or (2, 2, 2) is always well shaped: there is a candidate
}

TileLayout plan(const Int3& grid, const std::optional<Int3>& tile, int64_t text_len, TextPosition text_position) {
  check_grid(grid);
  if (tile) {
    for (int size : *tile) FPSATTN_CHECK(size >= 1, "plan: tile ", text(*tile), ", every size must be at least 1");
  }
  FPSATTN_CHECK(text_len >= 0, "plan: text_len ", text_len, ", expected 0 or more");
  FPSATTN_CHECK(text_len == 0 || text_position != TextPosition::kNone, "plan: text_len ", text_len,
                " with text_position 'none', expected 'suffix' or 'prefix': say where the text tokens are");

  TileLayout layout;
  layout.grid = grid;
  layout.tile = tile ? *tile : choose_tile(grid);
  for (int axis = 0; axis < 3; ++axis) layout.tile[axis] = std::min(layout.tile[axis], grid[axis]);
  const Cut cut = best_cut(grid, layout.tile);

  const int64_t video_tokens = int64_t{grid[0]} * grid[1] * grid[2];
  const int64_t text_tiles = ceil_div(text_len, kMaxTextTileTokens);
  // 512 is a multiple of 128: only the last text tile has padding.
  const int64_t slots = text_len > kInt32Max ? text_len : cut.slots + ceil_div(text_len, kBlockSlots) * kBlockSlots;
  FPSATTN_CHECK(slots <= kInt32Max, "plan: grid ", text(grid), " with tile ", text(layout.tile), " and text_len ",
                text_len, " needs ", slots,
                " slots, at most 2^31 - 1 are supported: use a larger tile or a smaller grid");

  for (int axis = 0; axis < 3; ++axis) {
    layout.tile_sizes[axis] = sizes_of(cut.axes[axis]);
    layout.tile_grid[axis] = static_cast<int>(layout.tile_sizes[axis].size());
  }
  layout.text_len = static_cast<int>(text_len);
  layout.text_position = text_position;
  layout.num_tokens = static_cast<int>(video_tokens + text_len);
  layout.num_tiles = layout.num_video_tiles() + static_cast<int>(text_tiles);
  layout.num_slots = static_cast<int>(slots);
  layout.num_blocks = layout.num_slots / kBlockSlots;

  layout.token_of_slot.assign(layout.num_slots, -1);
  layout.slot_of_token.assign(layout.num_tokens, -1);
  layout.tile_of_block.assign(layout.num_blocks, -1);
  layout.tile_block_offsets.reserve(layout.num_tiles + 1);
  layout.tile_tokens.reserve(layout.num_tiles);
  const bool text_first = text_position == TextPosition::kPrefix;
  TableBuilder table(&layout);
  add_video_tiles(layout, text_first ? layout.text_len : 0, table);
  const int32_t first_text_token = text_first ? 0 : static_cast<int32_t>(video_tokens);
  for (int64_t start = 0; start < text_len; start += kMaxTextTileTokens) {
    const int64_t end = std::min<int64_t>(start + kMaxTextTileTokens, text_len);
    for (int64_t i = start; i < end; ++i) table.add_token(first_text_token + static_cast<int32_t>(i));
    table.end_tile();
  }
  return layout;
}

}  // namespace fpsattn
