// fpsattn::select_blocks and fpsattn::transpose_blocks: check their parameters and pick the kernels of the device.
#include "fpsattn/patterns.h"

#include "common/check_params.h"
#include "patterns/sm90/launch.h"

namespace fpsattn {
namespace {

void check_rows(const char* op, int64_t lists, int num_tiles, int num_blocks, int width) {
  FPSATTN_CHECK(lists >= 1 && num_tiles >= 1, op, ": ", lists, " lists of ", num_tiles, " tiles, expected at least 1");
  FPSATTN_CHECK(lists * num_tiles <= INT32_MAX, op, ": ", lists, " lists of ", num_tiles,
                " tiles are too many for one launch");
  FPSATTN_CHECK(num_blocks >= num_tiles && num_blocks <= kMaxSelectBlocks, op, ": num_blocks is ", num_blocks,
                ", expected num_tiles (", num_tiles, ") to ", kMaxSelectBlocks);
  FPSATTN_CHECK(width >= 1 && width <= num_blocks, op, ": width is ", width, ", expected 1 to num_blocks (", num_blocks,
                ")");
}

void check(const SelectParams& params) {
  const char* op = "select_blocks";
  check_rows(op, params.lists, params.num_tiles, params.num_blocks, params.width);
  FPSATTN_CHECK(params.num_video_tiles >= 1 && params.num_video_tiles <= params.num_tiles, op, ": num_video_tiles is ",
                params.num_video_tiles, ", expected 1 to num_tiles (", params.num_tiles, ")");
  FPSATTN_CHECK(params.count >= 0 || params.mass >= 0, op, ": mass is ", params.mass, ", expected at least 0");
  FPSATTN_CHECK(!params.own_first || params.count >= 0, op, ": own_first with a mass, expected it with a count");
  check_pointers(op, 4, {{"values", params.values}, {"block_tokens", params.block_tokens}});
  check_pointers(op, 4, {{"tile_block_offsets", params.tile_block_offsets}});
  check_pointers(op, 4, {{"kv_num_blocks", params.kv_num_blocks}, {"kv_indices", params.kv_indices}});
  check_pointer(op, "attended", params.attended, 8);
}

void check_sizes(const TransposeParams& params) {
  check_rows("transpose_blocks", int64_t{params.kv.batch} * params.kv.heads, params.kv.rows, params.num_blocks,
             params.width);
}

void check(const TransposeParams& params) {
  const char* op = "transpose_blocks";
  check_sizes(params);
  check_list_pointers(op, "kv", params.kv);
  check_pointers(op, 4, {{"tile_block_offsets", params.tile_block_offsets}});
  check_pointers(op, 4, {{"q_num_blocks", params.q_num_blocks}, {"q_indices", params.q_indices}});
  check_workspace(op, params.workspace, params.workspace_bytes, transpose_workspace_bytes(params));
}

}  // namespace

void select_blocks(const SelectParams& params, cudaStream_t stream) {
  check(params);
  switch (device_architecture("select_blocks")) {
    case Architecture::kSm90:
      return sm90::patterns::launch(params, stream);
  }
}

size_t transpose_workspace_bytes(const TransposeParams& params) {
  check_sizes(params);
  return sm90::patterns::workspace_bytes(params);
}

void transpose_blocks(const TransposeParams& params, cudaStream_t stream) {
  check(params);
  switch (device_architecture("transpose_blocks")) {
    case Architecture::kSm90:
      return sm90::patterns::launch(params, stream);
  }
}

}  // namespace fpsattn
