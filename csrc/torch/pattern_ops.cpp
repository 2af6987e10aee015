// Block lists made on the device: see fpsattn/patterns.h.
#include "torch/pattern_ops.h"

#include <cmath>
#include <tuple>

#include "fpsattn/patterns.h"
#include "torch/launch.h"

namespace fpsattn {
namespace {

std::tuple<Tensor, Tensor, Tensor> select_blocks_op(Tensor values, Tensor tile_block_offsets, Tensor block_tokens,
                                                    int64_t num_video_tiles, int64_t count, double mass,
                                                    int64_t min_count, int64_t max_count, bool own_first,
                                                    int64_t width) {
  const char* op = "select_blocks";
  const Launch launch(op, values);
  FPSATTN_CHECK(values.dim() == 4, op, ": values has shape ", shape_text(values), ", expected (B, H, tiles, blocks)");
  const int64_t batch = values.size(0), heads = values.size(1), tiles = values.size(2), blocks = values.size(3);
  SelectParams params;
  params.values = input<float>(op, "values", values, values, {batch, heads, tiles, blocks});
  params.tile_block_offsets = input<int32_t>(op, "tile_block_offsets", tile_block_offsets, values, {tiles + 1});
  params.block_tokens = input<int32_t>(op, "block_tokens", block_tokens, values, {blocks});
  FPSATTN_CHECK(std::isfinite(mass) && std::abs(mass) <= 2.0, op, ": mass is ", mass, ", expected a share");
  params.lists = int_of(op, "B * H", batch * heads);
  params.num_tiles = int_of(op, "tiles", tiles);
  params.num_video_tiles = int_of(op, "num_video_tiles", num_video_tiles);
  params.num_blocks = int_of(op, "blocks", blocks);
  params.count = int_of(op, "count", count);
  params.mass = static_cast<int64_t>(std::ceil(std::ldexp(mass < 0.0 ? 0.0 : mass, 40)));
  params.min_count = int_of(op, "min_count", min_count);
  params.max_count = int_of(op, "max_count", max_count);
  params.own_first = own_first;
  params.width = int_of(op, "width", width);
  Tensor kv_num_blocks = output(params.kv_num_blocks, values, {batch, heads, tiles});
  Tensor kv_indices = output(params.kv_indices, values, {batch, heads, tiles, width});
  Tensor attended = output(params.attended, values, {batch, heads, tiles, 2});
  select_blocks(params, launch.stream());
  return {kv_num_blocks, kv_indices, attended};
}

std::tuple<Tensor, Tensor> transpose_blocks_op(Tensor kv_num_blocks, Tensor kv_indices, Tensor tile_block_offsets,
                                               int64_t num_blocks, int64_t width) {
  const char* op = "transpose_blocks";
  const Launch launch(op, kv_num_blocks);
  FPSATTN_CHECK(kv_num_blocks.dim() == 3, op, ": kv_num_blocks has shape ", shape_text(kv_num_blocks),
                ", expected (Bm, Hm, tiles)");
  const int64_t batch = kv_num_blocks.size(0), heads = kv_num_blocks.size(1), tiles = kv_num_blocks.size(2);
  TransposeParams params;
  params.kv = block_lists(op, "kv", kv_num_blocks, kv_indices, kv_num_blocks, batch, heads, tiles);
  params.tile_block_offsets = input<int32_t>(op, "tile_block_offsets", tile_block_offsets, kv_num_blocks, {tiles + 1});
  params.num_blocks = int_of(op, "num_blocks", num_blocks);
  params.width = int_of(op, "width", width);
  Tensor q_num_blocks = output(params.q_num_blocks, kv_num_blocks, {batch, heads, num_blocks});
  Tensor q_indices = output(params.q_indices, kv_num_blocks, {batch, heads, num_blocks, width});
  const Tensor workspace = workspace_of(params, transpose_workspace_bytes(params), kv_num_blocks);
  transpose_blocks(params, launch.stream());
  return {q_num_blocks, q_indices};
}

}  // namespace

void register_pattern_ops(torch::stable::detail::StableLibrary& m) {
  m.impl("select_blocks", TORCH_BOX(&select_blocks_op));
  m.impl("transpose_blocks", TORCH_BOX(&transpose_blocks_op));
}

}  // namespace fpsattn
