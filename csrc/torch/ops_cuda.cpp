// The sm_90a kernels as torch ops, on torch's stable ABI: check, allocate with torch's allocator, fill plain Params,
// launch on the current stream. They serve CUDA tensors and, where FPSATTN_SM90_ON_HOST=1 says at load time that device
// code runs on the host (an emulator), CPU tensors. `attention` is composed of quantize and forward in Python
// (ops/core.py). Nothing synchronizes, so the ops can be captured in CUDA graphs.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cstdlib>
#include <cstring>
#include <tuple>
#include <utility>
#include <vector>

#include "common/check_params.h"
#include "fpsattn/launch.h"
#include "fpsattn/prepare.h"
#include "torch/check.h"
#include "torch/launch.h"
#include "torch/pattern_ops.h"
#include "torch/schemas.h"

namespace fpsattn {
namespace {

using OptionalTensor = std::optional<Tensor>;

// (B, H, S, D) over (B, S, H, D) memory.
Tensor empty_tokens(const Tensor& like, int64_t batch, int64_t heads, int64_t tokens, int64_t dim, ScalarType type) {
  return torch::stable::transpose(empty(like, {batch, tokens, heads, dim}, type), 1, 2);
}

// A view whose rows the kernels cannot read 16 bytes at a time (a pointer or a stride off by a few elements), or whose
// tokens lie further apart than they count, is copied.
Tensor with_aligned_rows(const char* op, const char* name, const Tensor& x) {
  const TokenTensor view = token_tensor(op, name, x);
  if (has_aligned_rows(view) && std::abs(view.stride_token) <= kMaxTokenStride) return x;
  Tensor copy = empty(x, {x.size(0), x.size(1), x.size(2), x.size(3)}, x.scalar_type());
  return torch::stable::copy_(copy, x);
}

const float* optional_floats(const char* op, const char* name, const OptionalTensor& x, const Tensor& like,
                             std::initializer_list<int64_t> shape) {
  return x.has_value() ? input<float>(op, name, *x, like, shape) : nullptr;
}

// One table [num_blocks * 128] or one of every (batch, head), [B, H, num_blocks * 128]. Contents are checked where that
// costs no synchronization, on the CPU; on a GPU the kernels trap on what is out of range.
SlotTable slot_table(const char* op, const char* name, const Tensor& x, const Tensor& like, int64_t batch,
                     int64_t heads, int64_t num_tokens) {
  const bool shared = x.dim() != 3;
  const int32_t* tokens = shared ? input<int32_t>(op, name, x, like, {kAnySize})
                                 : input<int32_t>(op, name, x, like, {batch, heads, kAnySize});
  const int64_t slots = x.size(x.dim() - 1);
  FPSATTN_CHECK(slots > 0 && slots % kBlockSlots == 0, op, ": ", name, " has ", slots,
                " entries, expected a positive multiple of ", kBlockSlots);
  const SlotTable table = {tokens, shared ? 0 : slots};
  if (x.is_cuda()) return table;
  for (int64_t i = 0; i < x.numel(); ++i) {
    FPSATTN_CHECK(tokens[i] >= -1 && tokens[i] < num_tokens, op, ": ", name, "[", i, "] is ", tokens[i],
                  ", expected -1 to ", num_tokens - 1);
    FPSATTN_CHECK(tokens[i] >= 0 || i % kBlockSlots != 0, op, ": ", name, "[", i,
                  "] is padding: valid slots come first in each block of ", kBlockSlots);
  }
  return table;
}

int64_t num_blocks_of(const Tensor& token_of_slot) { return token_of_slot.size(token_of_slot.dim() - 1) / kBlockSlots; }

// Query heads of a head of K and V.
int group_of(const char* op, const char* name, int64_t heads, int64_t kv_heads) {
  FPSATTN_CHECK(kv_heads > 0 && heads % kv_heads == 0, op, ": ", name, " has ", kv_heads,
                " heads, expected a divisor of the ", heads, " of q");
  return static_cast<int>(heads / kv_heads);
}

// Entries of a table of block or tile numbers, likewise.
void check_entries(const char* op, const char* name, const Tensor& x, int64_t end) {
  if (x.is_cuda()) return;
  const int32_t* entries = data<const int32_t>(x);
  for (int64_t i = 0; i < x.numel(); ++i) {
    FPSATTN_CHECK(entries[i] >= 0 && entries[i] < end, op, ": ", name, "[", i, "] is ", entries[i], ", expected 0 to ",
                  end - 1);
  }
}

using Quantized = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// What quantize and prepare share: checks, outputs, and all parameters but the workspace. `run(params, stream)` launches.
template <class Run>
Quantized quantized(const char* op, Tensor q, Tensor k, Tensor v, const Tensor& token_of_slot,
                    const Tensor& tile_block_offsets, const OptionalTensor& k_mean, const OptionalTensor& v_absmax,
                    const OptionalTensor& kv_token_of_slot, const OptionalTensor& kv_tile_block_offsets,
                    int64_t granularity, bool smooth_k, bool pow2_scales, int64_t k_mean_stride, bool block_sums,
                    const Run& run) {
  const Launch launch(op, q);
  FPSATTN_CHECK(q.dim() == 4, op, ": q has shape ", shape_text(q), ", expected (B, H, S, D)");
  const int64_t batch = q.size(0), heads = q.size(1), tokens = q.size(2), dim = q.size(3);
  FPSATTN_CHECK(is_head_dim(dim), op, ": q has head dimension ", dim, ", supported are ", kHeadDims);
  FPSATTN_CHECK(batch > 0 && heads > 0 && tokens > 0, op, ": q has shape ", shape_text(q), ": no size may be 0");
  FPSATTN_CHECK(k.dim() == 4, op, ": k has shape ", shape_text(k), ", expected (B, H, S, D)");
  const bool own_keys = kv_token_of_slot.has_value();
  FPSATTN_CHECK(own_keys == kv_tile_block_offsets.has_value(), op, ": ",
                own_keys ? "kv_tile_block_offsets" : "kv_token_of_slot", " is missing: both or none");
  const int64_t kv_heads = k.size(1), kv_tokens = own_keys ? k.size(2) : tokens;
  FPSATTN_CHECK(kv_tokens > 0, op, ": k has shape ", shape_text(k), ": no size may be 0");
  QuantizeParams params;
  params.dtype = kernel_dtype(op, "q", q.scalar_type());
  Tensor* const tensors[] = {&q, &k, &v};
  TokenTensor* const views[] = {&params.q, &params.k, &params.v};
  const char* const names[] = {"q", "k", "v"};
  for (int i = 0; i < 3; ++i) {
    check_same_device(op, names[i], *tensors[i], q);
    check_dtype(op, names[i], *tensors[i], q.scalar_type());
    check_shape(op, names[i], *tensors[i], {batch, i == 0 ? heads : kv_heads, i == 0 ? tokens : kv_tokens, dim});
    *tensors[i] = with_aligned_rows(op, names[i], *tensors[i]);
    *views[i] = token_tensor(op, names[i], *tensors[i]);
  }
  params.token_of_slot = slot_table(op, "token_of_slot", token_of_slot, q, batch, heads, tokens);
  FPSATTN_CHECK(granularity >= 0 && granularity <= 2, op, ": granularity is ", granularity,
                ", expected 0 (tile), 1 (block) or 2 (token)");
  FPSATTN_CHECK(k_mean_stride >= 1, op, ": k_mean_stride is ", k_mean_stride, ", expected at least 1");
  const auto offsets_of = [&](const char* name, const Tensor& x, int64_t blocks) {
    const int32_t* offsets = input<int32_t>(op, name, x, q, {kAnySize});
    FPSATTN_CHECK(x.size(0) >= 2, op, ": ", name, " has ", x.size(0), " entries, expected num_tiles + 1, at least 2");
    check_entries(op, name, x, blocks + 1);
    return offsets;
  };
  const int64_t num_blocks = num_blocks_of(token_of_slot);
  params.tile_block_offsets = offsets_of("tile_block_offsets", tile_block_offsets, num_blocks);
  params.size = {static_cast<int>(batch),      static_cast<int>(heads),
                 static_cast<int>(dim),        static_cast<int>(tokens),
                 static_cast<int>(num_blocks), static_cast<int>(tile_block_offsets.size(0) - 1)};
  params.size.group = group_of(op, "k", heads, kv_heads);
  int64_t kv_blocks = num_blocks;
  if (own_keys) {
    params.kv_token_of_slot = slot_table(op, "kv_token_of_slot", *kv_token_of_slot, q, batch, kv_heads, kv_tokens);
    kv_blocks = num_blocks_of(*kv_token_of_slot);
    params.kv_tile_block_offsets = offsets_of("kv_tile_block_offsets", *kv_tile_block_offsets, kv_blocks);
    params.size.kv_tokens = static_cast<int>(kv_tokens);
    params.size.kv_blocks = static_cast<int>(kv_blocks);
    params.size.kv_tiles = static_cast<int>(kv_tile_block_offsets->size(0) - 1);
  }
  params.granularity = static_cast<Granularity>(granularity);
  params.smooth_k = smooth_k;
  params.pow2_scales = pow2_scales;
  params.k_mean_stride = static_cast<int>(k_mean_stride < kv_tokens ? k_mean_stride : kv_tokens);
  params.given_k_mean = optional_floats(op, "k_mean", k_mean, q, {batch, kv_heads, dim});
  params.given_v_absmax = optional_floats(op, "v_absmax", v_absmax, q, {batch, kv_heads, dim});

  const int64_t columns = code_dim(params.size.head_dim);
  Tensor q8 = output(params.q8, q, {batch, heads, num_blocks, kBlockSlots, columns});
  Tensor k8 = output(params.k8, q, {batch, kv_heads, kv_blocks, kBlockSlots, columns});
  Tensor v8t = output(params.v8t, q, {batch, kv_heads, kv_blocks, columns + kVExtraRows, kBlockSlots});
  const auto scales = [&](float*& pointer, int64_t of_heads, int64_t blocks) {
    std::vector<int64_t> shape = {batch, of_heads, blocks};
    if (params.granularity == Granularity::kToken) shape.push_back(kBlockSlots);
    return output(pointer, q, shape);
  };
  Tensor q_scale = scales(params.q_scale, heads, num_blocks), k_scale = scales(params.k_scale, kv_heads, kv_blocks);
  Tensor v_scale = output(params.v_scale, q, {batch, kv_heads, dim});
  Tensor used_mean = output(params.k_mean, q, {batch, kv_heads, dim});
  Tensor q_k_mean = output(params.q_k_mean, q, {batch, heads, tokens});
  Tensor q_block_sum = output(params.q_block_sum, q, {batch, heads, block_sums ? num_blocks : 0, dim});
  Tensor k_block_sum = output(params.k_block_sum, q, {batch, kv_heads, block_sums ? kv_blocks : 0, dim});
  if (!block_sums) params.q_block_sum = params.k_block_sum = nullptr;
  run(params, launch.stream());
  return {q8, k8, v8t, q_scale, k_scale, v_scale, used_mean, q_k_mean, q_block_sum, k_block_sum};
}

Quantized quantize_op(Tensor q, Tensor k, Tensor v, Tensor token_of_slot, Tensor tile_block_offsets,
                      OptionalTensor k_mean, OptionalTensor v_absmax, OptionalTensor kv_token_of_slot,
                      OptionalTensor kv_tile_block_offsets, int64_t granularity, bool smooth_k, bool pow2_scales,
                      int64_t k_mean_stride, bool block_sums) {
  const auto run = [&](QuantizeParams& params, cudaStream_t stream) {
    const Tensor workspace = workspace_of(params, quantize_workspace_bytes(params), q);
    quantize(params, stream);
  };
  return quantized("quantize", q, k, v, token_of_slot, tile_block_offsets, k_mean, v_absmax, kv_token_of_slot,
                   kv_tile_block_offsets, granularity, smooth_k, pow2_scales, k_mean_stride, block_sums, run);
}

// A weight or bias [1 or 2, channels], FP32 and aligned: `kept` holds what had to be copied.
ChannelVector channel_vector(const char* op, const char* name, const OptionalTensor& x, const Tensor& like,
                             int64_t channels, std::vector<Tensor>& kept) {
  if (!x.has_value()) return {};
  check_same_device(op, name, *x, like);
  FPSATTN_CHECK(x->dim() == 2 && (x->size(0) == 1 || x->size(0) == 2) && x->size(1) == channels, op, ": ", name,
                " has shape ", shape_text(*x), ", expected (1, ", channels,
                "), or 2 rows: of a run of tokens and of the others");
  kept.push_back(empty(like, {x->size(0), channels}, ScalarType::Float));
  torch::stable::copy_(kept.back(), *x);
  return {data<const float>(kept.back()), x->size(0) == 2 ? channels : 0};
}

Quantized prepare_op(Tensor q, Tensor k, Tensor v, Tensor token_of_slot, Tensor tile_block_offsets,
                     OptionalTensor q_weight, OptionalTensor k_weight, OptionalTensor q_bias, OptionalTensor k_bias,
                     OptionalTensor cos, OptionalTensor sin, OptionalTensor k_mean, OptionalTensor v_absmax,
                     int64_t norm, double eps, bool rope_halves, int64_t first_rotated, int64_t weights_begin,
                     int64_t weights_end, int64_t granularity, bool smooth_k, bool pow2_scales, int64_t k_mean_stride,
                     bool block_sums) {
  const char* op = "prepare";
  const auto run = [&](const QuantizeParams& quantize_params, cudaStream_t stream) {
    const ProblemSize& size = quantize_params.size;
    PrepareParams params;
    params.quantize = quantize_params;
    FPSATTN_CHECK(norm >= 0 && norm <= 3, op, ": norm is ", norm,
                  ", expected 0 (none), 1 (rms), 2 (rms_across_heads), 3 (layer)");
    params.norm = static_cast<Norm>(norm);
    params.eps = static_cast<float>(eps);
    params.rope_halves = rope_halves;
    FPSATTN_CHECK(cos.has_value() == sin.has_value(), op, ": ", cos.has_value() ? "sin" : "cos",
                  " is missing: both or none of cos and sin");
    if (cos.has_value()) {
      FPSATTN_CHECK(cos->dim() == 4 && (cos->size(0) == 1 || cos->size(0) == size.batch) &&
                        (cos->size(1) == 1 || cos->size(1) == size.heads),
                    op, ": cos has shape ", shape_text(*cos), ", expected (1 or ", size.batch, ", 1 or ", size.heads,
                    ", n, ", size.head_dim / 2, ")");
      const int64_t rows = cos->size(2), width = size.head_dim / 2;
      params.cos = input<float>(op, "cos", *cos, q, {cos->size(0), cos->size(1), rows, width});
      params.sin = input<float>(op, "sin", *sin, q, {cos->size(0), cos->size(1), rows, width});
      FPSATTN_CHECK(first_rotated >= 0 && first_rotated + rows <= size.num_tokens, op, ": cos has ", rows,
                    " tokens from first_rotated=", first_rotated, " on, expected at most the ", size.num_tokens,
                    " of q");
      params.table_stride_head = cos->size(1) == 1 ? 0 : rows * width;
      params.table_stride_batch = cos->size(0) == 1 ? 0 : cos->size(1) * rows * width;
      params.first_rotated = static_cast<int>(first_rotated);
      params.num_rotated = static_cast<int>(rows);
    }
    params.weights_begin = int_of(op, "weights_begin", weights_begin);
    params.weights_end = int_of(op, "weights_end", weights_end);
    std::vector<Tensor> kept;
    const int64_t channels = params.norm == Norm::kRmsAcrossHeads ? int64_t{size.heads} * size.head_dim : size.head_dim;
    const auto vector = [&](const char* name, const OptionalTensor& x) {
      return channel_vector(op, name, x, q, channels, kept);
    };
    params.q_weight = vector("q_weight", q_weight);
    params.k_weight = vector("k_weight", k_weight);
    params.q_bias = vector("q_bias", q_bias);
    params.k_bias = vector("k_bias", k_bias);
    const Tensor workspace = workspace_of(params.quantize, prepare_workspace_bytes(params), q);
    prepare(params, stream);
  };
  return quantized(op, q, k, v, token_of_slot, tile_block_offsets, k_mean, v_absmax, {}, {}, granularity, smooth_k,
                   pow2_scales, k_mean_stride, block_sums, run);
}

// What forward and backward share of their arguments.
template <class Params>
void fill_operands(const char* op, Params& params, const Tensor& q8, const Tensor& k8, const Tensor& v8t,
                   const Tensor& q_scale, const Tensor& k_scale, const Tensor& v_scale, const Tensor& token_of_slot,
                   const Tensor& tile_of_block, const Tensor& kv_num_blocks, const Tensor& kv_indices,
                   int64_t num_tokens) {
  FPSATTN_CHECK(q8.dim() == 5, op, ": q8 has shape ", shape_text(q8), ", expected (B, H, num_blocks, 128, D)");
  // D is the length of v_scale; the codes have code_dim(D) columns.
  FPSATTN_CHECK(v_scale.dim() == 3, op, ": v_scale has shape ", shape_text(v_scale), ", expected (B, H, D)");
  const int64_t batch = q8.size(0), heads = q8.size(1), num_blocks = q8.size(2), dim = v_scale.size(2);
  FPSATTN_CHECK(is_head_dim(dim), op, ": v_scale has head dimension ", dim, ", supported are ", kHeadDims);
  const int64_t columns = code_dim(static_cast<int>(dim));
  FPSATTN_CHECK(k8.dim() == 5, op, ": k8 has shape ", shape_text(k8), ", expected (B, H, num_blocks, 128, D)");
  const int64_t kv_heads = k8.size(1), kv_blocks = k8.size(2);
  params.q8 = input<uint8_t>(op, "q8", q8, q8, {batch, heads, num_blocks, kBlockSlots, columns});
  params.k8 = input<uint8_t>(op, "k8", k8, q8, {batch, kv_heads, kv_blocks, kBlockSlots, columns});
  params.v8t = input<uint8_t>(op, "v8t", v8t, q8, {batch, kv_heads, kv_blocks, columns + kVExtraRows, kBlockSlots});
  const auto scales = [&](const char* name, const Tensor& x, int64_t of_heads, int64_t blocks) {
    return x.dim() == 4 ? input<float>(op, name, x, q8, {batch, of_heads, blocks, kBlockSlots})
                        : input<float>(op, name, x, q8, {batch, of_heads, blocks});
  };
  params.q_scale = scales("q_scale", q_scale, heads, num_blocks);
  params.k_scale = scales("k_scale", k_scale, kv_heads, kv_blocks);
  params.q_scale_per_token = q_scale.dim() == 4;
  params.k_scale_per_token = k_scale.dim() == 4;
  params.v_scale = input<float>(op, "v_scale", v_scale, q8, {batch, kv_heads, dim});
  params.token_of_slot = slot_table(op, "token_of_slot", token_of_slot, q8, batch, heads, num_tokens);
  FPSATTN_CHECK(num_blocks_of(token_of_slot) == num_blocks, op, ": token_of_slot has shape ", shape_text(token_of_slot),
                ", expected ", num_blocks * kBlockSlots, " slots, those of q8");
  params.tile_of_block = input<int32_t>(op, "tile_of_block", tile_of_block, q8, {num_blocks});
  FPSATTN_CHECK(num_tokens >= 1 && num_tokens <= num_blocks * kBlockSlots, op, ": num_tokens is ", num_tokens,
                ", expected 1 to ", num_blocks * kBlockSlots);
  const int64_t num_tiles = kv_num_blocks.dim() == 3 ? kv_num_blocks.size(2) : 0;
  params.kv = block_lists(op, "kv", kv_num_blocks, kv_indices, q8, batch, heads, num_tiles);
  check_entries(op, "tile_of_block", tile_of_block, num_tiles);
  params.size = {static_cast<int>(batch),      static_cast<int>(heads),      static_cast<int>(dim),
                 static_cast<int>(num_tokens), static_cast<int>(num_blocks), static_cast<int>(num_tiles)};
  params.size.group = group_of(op, "k8", heads, kv_heads);
  if (kv_blocks != num_blocks) params.size.kv_blocks = static_cast<int>(kv_blocks);
}

using Attended = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Attended forward_op(Tensor q8, Tensor k8, Tensor v8t, Tensor q_scale, Tensor k_scale, Tensor v_scale,
                    Tensor token_of_slot, Tensor tile_of_block, Tensor kv_num_blocks, Tensor kv_indices,
                    OptionalTensor q_k_mean, int64_t num_tokens, double softmax_scale, ScalarType out_dtype) {
  const char* op = "forward";
  const Launch launch(op, q8);
  ForwardParams params;
  fill_operands(op, params, q8, k8, v8t, q_scale, k_scale, v_scale, token_of_slot, tile_of_block, kv_num_blocks,
                kv_indices, num_tokens);
  const int64_t batch = q8.size(0), heads = q8.size(1), num_blocks = q8.size(2), dim = v_scale.size(2);
  params.out_dtype = kernel_out_dtype(op, "out_dtype", out_dtype);
  params.softmax_scale = static_cast<float>(softmax_scale);
  params.q_k_mean = optional_floats(op, "q_k_mean", q_k_mean, q8, {batch, heads, num_tokens});
  Tensor out = empty_tokens(q8, batch, heads, num_tokens, dim, out_dtype);
  params.out = token_tensor(op, "out", out);
  Tensor lse = output(params.lse, q8, {batch, heads, num_tokens});
  Tensor row_max = output(params.row_max, q8, {batch, heads, num_blocks * kBlockSlots});
  Tensor row_sum = output(params.row_sum, q8, {batch, heads, num_blocks * kBlockSlots});
  const Tensor workspace = workspace_of(params, forward_workspace_bytes(params), q8);
  forward(params, launch.stream());
  return {out, lse, row_max, row_sum};
}

std::tuple<Tensor, Tensor, Tensor> backward_op(Tensor grad_out, Tensor out, Tensor q8, Tensor k8, Tensor v8t,
                                               Tensor q_scale, Tensor k_scale, Tensor v_scale, Tensor row_max,
                                               Tensor row_sum, Tensor token_of_slot, Tensor tile_of_block,
                                               Tensor kv_num_blocks, Tensor kv_indices, Tensor q_num_blocks,
                                               Tensor q_indices, OptionalTensor kv_token_of_slot, double softmax_scale,
                                               bool deterministic, int64_t num_kv_tokens) {
  const char* op = "backward";
  const Launch launch(op, grad_out);
  FPSATTN_CHECK(out.dim() == 4, op, ": out has shape ", shape_text(out), ", expected (B, H, S, D)");
  const int64_t tokens = out.size(2);
  BackwardParams params;
  fill_operands(op, params, q8, k8, v8t, q_scale, k_scale, v_scale, token_of_slot, tile_of_block, kv_num_blocks,
                kv_indices, tokens);
  const int64_t batch = q8.size(0), heads = q8.size(1), num_blocks = q8.size(2), dim = v_scale.size(2);
  const ScalarType type = out.scalar_type();
  params.dtype = kernel_dtype(op, "out", type);
  check_dtype(op, "grad_out", grad_out, type);
  check_same_device(op, "grad_out", grad_out, q8);
  check_same_device(op, "out", out, q8);
  check_shape(op, "out", out, {batch, heads, tokens, dim});
  check_shape(op, "grad_out", grad_out, {batch, heads, tokens, dim});
  params.row_max = input<float>(op, "row_max", row_max, q8, {batch, heads, num_blocks * kBlockSlots});
  params.row_sum = input<float>(op, "row_sum", row_sum, q8, {batch, heads, num_blocks * kBlockSlots});
  const int64_t kv_heads = k8.size(1), kv_blocks = k8.size(2);
  params.q = block_lists(op, "q", q_num_blocks, q_indices, q8, batch, heads, kv_blocks);
  const bool own_keys = kv_token_of_slot.has_value();
  FPSATTN_CHECK(own_keys == (num_kv_tokens > 0), op, ": num_kv_tokens is ", num_kv_tokens, " and kv_token_of_slot is ",
                own_keys ? "given" : "missing", ": both or none");
  const int64_t kv_tokens = own_keys ? num_kv_tokens : tokens;
  if (own_keys) {
    params.kv_token_of_slot = slot_table(op, "kv_token_of_slot", *kv_token_of_slot, q8, batch, kv_heads, kv_tokens);
    params.size.kv_tokens = static_cast<int>(kv_tokens);
    params.size.kv_blocks = static_cast<int>(kv_blocks);
  }
  FPSATTN_CHECK(num_blocks_of(own_keys ? *kv_token_of_slot : token_of_slot) == kv_blocks, op, ": k8 has ", kv_blocks,
                " blocks, expected those of its table of slots");
  grad_out = with_aligned_rows(op, "grad_out", grad_out);
  out = with_aligned_rows(op, "out", out);
  params.grad_out = token_tensor(op, "grad_out", grad_out);
  params.out = token_tensor(op, "out", out);
  params.softmax_scale = static_cast<float>(softmax_scale);
  params.deterministic = deterministic;
  const auto gradient = [&](const char* name, TokenTensor& view, int64_t of_heads, int64_t of_tokens) {
    Tensor x = empty_tokens(out, batch, of_heads, of_tokens, dim, type);
    view = token_tensor(op, name, x);
    return x;
  };
  Tensor dq = gradient("dq", params.dq, heads, tokens), dk = gradient("dk", params.dk, kv_heads, kv_tokens);
  Tensor dv = gradient("dv", params.dv, kv_heads, kv_tokens);
  const Tensor workspace = workspace_of(params, backward_workspace_bytes(params), q8);
  backward(params, launch.stream());
  return {dq, dk, dv};
}

bool device_code_runs_on_host() {
  const char* on_host = std::getenv("FPSATTN_SM90_ON_HOST");
  return on_host != nullptr && std::strcmp(on_host, "1") == 0;
}

void register_ops(torch::stable::detail::StableLibrary& m) {
  m.impl("quantize", TORCH_BOX(&quantize_op));
  m.impl("prepare", TORCH_BOX(&prepare_op));
  m.impl("forward", TORCH_BOX(&forward_op));
  m.impl("backward", TORCH_BOX(&backward_op));
  register_pattern_ops(m);
}

}  // namespace
}  // namespace fpsattn

STABLE_TORCH_LIBRARY_IMPL(fpsattn, CUDA, m) { fpsattn::register_ops(m); }
STABLE_TORCH_LIBRARY_IMPL(fpsattn, CPU, m) {
  if (fpsattn::device_code_runs_on_host()) fpsattn::register_ops(m);  // else Python registers the CPU kernels
}
