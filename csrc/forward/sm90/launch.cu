// fpsattn::forward: checks, tensor maps, schedule, kernel.
#include <cmath>

#include "common/check_params.h"
#include "common/numeric.h"
#include "common/tensor_map.h"
#include "forward/sm90/launch.h"
#include "fpsattn/launch.h"

namespace fpsattn {
namespace {

using sm90::forward::Arguments;
using sm90::forward::Launcher;
using sm90::forward::Workspace;

constexpr const char* kOp = "forward";

void check_lists(const ForwardParams& params) {
  const BlockLists& kv = params.kv;
  FPSATTN_CHECK(kv.batch == 1 || kv.batch == params.size.batch, kOp, ": kv.batch is ", kv.batch,
                ", expected 1 or batch (", params.size.batch, ")");
  FPSATTN_CHECK(kv.heads == 1 || kv.heads == params.size.heads, kOp, ": kv.heads is ", kv.heads,
                ", expected 1 or heads (", params.size.heads, ")");
  FPSATTN_CHECK(kv.rows == params.size.num_tiles, kOp, ": kv.rows is ", kv.rows, ", expected num_tiles (",
                params.size.num_tiles, "): a row per query tile");
  FPSATTN_CHECK(kv.max_blocks >= 0, kOp, ": kv.max_blocks is ", kv.max_blocks, ", expected at least 0");
}

void check_sizes(const ForwardParams& params) {
  check_size(kOp, params.size);
  check_lists(params);
  // TMA coordinates are 32 bit: rows of the V^T matrix, the tallest.
  const int64_t items = int64_t{params.size.batch} * params.size.heads * params.size.num_blocks;
  const int64_t rows = items * (kBlockSlots + kVExtraRows);
  FPSATTN_CHECK(rows <= INT32_MAX, kOp, ": batch * heads * num_blocks is ", items, ", expected at most ",
                INT32_MAX / (kBlockSlots + kVExtraRows), " (32-bit TMA coordinates): split the batch or the heads");
}

void check(const ForwardParams& params) {
  check_sizes(params);
  FPSATTN_CHECK(std::isfinite(params.softmax_scale) && params.softmax_scale > 0.0f, kOp, ": softmax_scale is ",
                params.softmax_scale, ", expected a positive finite number");
  FPSATTN_CHECK(params.out_dtype == DType::kBFloat16 || params.out_dtype == DType::kFloat16, kOp, ": out_dtype is ",
                static_cast<int>(params.out_dtype), ", expected 0 (bfloat16) or 1 (float16)");
  check_pointer(kOp, "q8", params.q8);
  check_pointer(kOp, "k8", params.k8);
  check_pointer(kOp, "v8t", params.v8t);
  check_pointer(kOp, "q_scale", params.q_scale, 4);
  check_pointer(kOp, "k_scale", params.k_scale, params.k_scale_per_token ? kPointerAlignment : 4);
  check_pointer(kOp, "v_scale", params.v_scale);
  check_pointer(kOp, "token_of_slot", params.token_of_slot, 4);
  check_pointer(kOp, "tile_of_block", params.tile_of_block, 4);
  check_pointer(kOp, "kv.num_blocks", params.kv.num_blocks, 4);
  if (params.kv.max_blocks > 0) check_pointer(kOp, "kv.indices", params.kv.indices, 4);
  if (params.q_k_mean != nullptr) check_pointer(kOp, "q_k_mean", params.q_k_mean, 4);
  check_pointer(kOp, "lse", params.lse, 4);
  check_pointer(kOp, "row_max", params.row_max, 4);
  check_pointer(kOp, "row_sum", params.row_sum, 4);
  check_tensor(kOp, "out", params.out, true);
  check_workspace(kOp, params.workspace, params.workspace_bytes, Workspace::at(nullptr, params).bytes);
  check_device(kOp);
}

CUtensorMap map_of(const char* what, const uint8_t* data, int64_t rows, int columns, int box_rows) {
  sm90::MatrixMap matrix;
  matrix.data = data;
  matrix.rows = rows;
  matrix.columns = matrix.row_stride = matrix.box_columns = columns;
  matrix.box_rows = box_rows;
  matrix.swizzle = columns == 128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B;
  return sm90::encode_matrix_map(what, matrix);
}

Arguments arguments_of(const ForwardParams& params, const Workspace& workspace) {
  const ProblemSize& size = params.size;
  const int64_t blocks = int64_t{size.batch} * size.heads * size.num_blocks;
  const int v_rows = size.head_dim + kVExtraRows;
  Arguments args{};
  args.q_map = map_of("forward: q8", params.q8, blocks * kBlockSlots, size.head_dim, kBlockSlots);
  args.k_map = map_of("forward: k8", params.k8, blocks * kBlockSlots, size.head_dim, kBlockSlots);
  args.v_map = map_of("forward: v8t", params.v8t, blocks * v_rows, kBlockSlots, v_rows);
  args.heads = size.heads;
  args.num_tokens = size.num_tokens;
  args.num_blocks = size.num_blocks;
  args.num_items = static_cast<int32_t>(blocks);
  args.scale_log2 = scale_in_log2_units(params.softmax_scale);
  args.softmax_scale = params.softmax_scale;
  args.q_scale_per_token = params.q_scale_per_token;
  args.fp16_out = params.out_dtype == DType::kFloat16;
  args.q_scale = params.q_scale;
  args.k_scale = params.k_scale;
  args.v_scale = params.v_scale;
  args.q_k_mean = params.q_k_mean;
  args.token_of_slot = params.token_of_slot;
  args.tile_of_block = params.tile_of_block;
  args.kv = params.kv;
  args.out = params.out;
  args.lse = params.lse;
  args.row_max = params.row_max;
  args.row_sum = params.row_sum;
  args.next_item = workspace.next_item;
  args.head_order = workspace.head_order;
  args.block_order = workspace.block_order;
  return args;
}

Launcher launcher_of(const ForwardParams& params) {
  using namespace sm90::forward;
  if (params.size.head_dim == 64) return params.k_scale_per_token ? launch_d64_k_per_token : launch_d64;
  return params.k_scale_per_token ? launch_d128_k_per_token : launch_d128;
}

}  // namespace

size_t forward_workspace_bytes(const ForwardParams& params) {
  check_sizes(params);
  return Workspace::at(nullptr, params).bytes;
}

void forward(const ForwardParams& params, cudaStream_t stream) {
  check(params);
  int device = 0, num_sms = 0;
  FPSATTN_CUDA_CHECK(kOp, cudaGetDevice(&device));
  FPSATTN_CUDA_CHECK(kOp, cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, device));
  const Workspace workspace = Workspace::at(params.workspace, params);
  const Arguments args = arguments_of(params, workspace);
  sm90::forward::launch_schedule(args, workspace, params.size.batch, stream);
  launcher_of(params)(args, num_sms, stream);
}

}  // namespace fpsattn
