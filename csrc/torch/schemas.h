// The op schemas of torch.ops.fpsattn: the kernel follows the device of the tensors.
//
// All token tensors are (B, H, S, D) with unit stride in D and any other strides. Outputs that are token tensors have
// (B, S, H, D) memory. Tensor arguments are never keyword-only: torch.library.register_vmap forbids it.
// python/fpsattention/ops/core.py documents every argument.
#pragma once

namespace fpsattn {

inline constexpr const char* kQuantizeSchema =
    "quantize(Tensor q, Tensor k, Tensor v, Tensor token_of_slot, Tensor tile_block_offsets, "
    "Tensor? k_mean=None, Tensor? v_absmax=None, Tensor? kv_token_of_slot=None, Tensor? kv_tile_block_offsets=None, *, "
    "int granularity, bool smooth_k, bool pow2_scales, "
    "SymInt k_mean_stride=1, bool block_sums=False) -> (Tensor q8, Tensor k8, Tensor v8t, Tensor q_scale, "
    "Tensor k_scale, Tensor v_scale, Tensor k_mean_used, Tensor q_k_mean, Tensor q_block_sum, Tensor k_block_sum)";

inline constexpr const char* kPrepareSchema =
    "prepare(Tensor q, Tensor k, Tensor v, Tensor token_of_slot, Tensor tile_block_offsets, Tensor? q_weight=None, "
    "Tensor? k_weight=None, Tensor? q_bias=None, Tensor? k_bias=None, Tensor? cos=None, Tensor? sin=None, "
    "Tensor? k_mean=None, Tensor? v_absmax=None, *, int norm, float eps, bool rope_halves=False, "
    "SymInt first_rotated=0, SymInt weights_begin=0, SymInt weights_end=-1, int granularity, bool smooth_k, "
    "bool pow2_scales, SymInt k_mean_stride=1, bool block_sums=False) -> (Tensor q8, Tensor k8, Tensor v8t, "
    "Tensor q_scale, Tensor k_scale, Tensor v_scale, Tensor k_mean_used, Tensor q_k_mean, Tensor q_block_sum, "
    "Tensor k_block_sum)";

inline constexpr const char* kForwardSchema =
    "forward(Tensor q8, Tensor k8, Tensor v8t, Tensor q_scale, Tensor k_scale, Tensor v_scale, Tensor token_of_slot, "
    "Tensor tile_of_block, Tensor kv_num_blocks, Tensor kv_indices, Tensor? q_k_mean=None, *, SymInt num_tokens, "
    "float softmax_scale, ScalarType out_dtype) -> (Tensor out, Tensor lse, Tensor row_max, Tensor row_sum)";

inline constexpr const char* kBackwardSchema =
    "backward(Tensor grad_out, Tensor out, Tensor q8, Tensor k8, Tensor v8t, Tensor q_scale, Tensor k_scale, "
    "Tensor v_scale, Tensor row_max, Tensor row_sum, Tensor token_of_slot, Tensor tile_of_block, "
    "Tensor kv_num_blocks, Tensor kv_indices, Tensor q_num_blocks, Tensor q_indices, Tensor? kv_token_of_slot=None, *, "
    "float softmax_scale, bool deterministic=False, SymInt num_kv_tokens=0) -> (Tensor dq, Tensor dk, Tensor dv)";

inline constexpr const char* kAttentionSchema =
    "attention(Tensor q, Tensor k, Tensor v, Tensor token_of_slot, Tensor tile_of_block, Tensor tile_block_offsets, "
    "Tensor kv_num_blocks, Tensor kv_indices, Tensor? q_num_blocks=None, Tensor? q_indices=None, Tensor? k_mean=None, "
    "Tensor? v_absmax=None, Tensor? kv_token_of_slot=None, Tensor? kv_tile_block_offsets=None, *, int granularity, "
    "float softmax_scale, bool smooth_k, bool pow2_scales, "
    "SymInt k_mean_stride=1, bool deterministic=False) -> (Tensor out, Tensor lse, Tensor q8, Tensor k8, Tensor v8t, "
    "Tensor q_scale, Tensor k_scale, Tensor v_scale, Tensor row_max, Tensor row_sum)";

inline constexpr const char* kSelectBlocksSchema =
    "select_blocks(Tensor values, Tensor tile_block_offsets, Tensor block_tokens, *, SymInt num_video_tiles, int "
    "count=-1, "
    "float mass=0.0, int min_count=0, SymInt max_count, bool own_first=False, SymInt width) -> (Tensor kv_num_blocks, "
    "Tensor kv_indices, Tensor attended)";

inline constexpr const char* kTransposeBlocksSchema =
    "transpose_blocks(Tensor kv_num_blocks, Tensor kv_indices, Tensor tile_block_offsets, *, SymInt num_blocks, "
    "SymInt width) -> (Tensor q_num_blocks, Tensor q_indices)";

}  // namespace fpsattn
