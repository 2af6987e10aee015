// Schemas of torch.ops.fpsattn.*, nothing else: built on every machine, with or without nvcc.
// All token tensors are (B, H, S, D) with unit stride in D and any other strides. Outputs that are token tensors have
// (B, S, H, D) memory. python/fpsattention/ops.py documents every argument.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(fpsattn, m) {
  m.def(
      "quantize(Tensor q, Tensor k, Tensor v, Tensor token_of_slot, Tensor tile_block_offsets, *, int granularity, "
      "bool smooth_k, bool pow2_scales, int k_mean_stride=1, Tensor? k_mean=None, Tensor? v_absmax=None) -> "
      "(Tensor q8, Tensor k8, Tensor v8t, Tensor q_scale, Tensor k_scale, Tensor v_scale, Tensor k_mean_used, "
      "Tensor q_k_mean)");
  m.def(
      "forward(Tensor q8, Tensor k8, Tensor v8t, Tensor q_scale, Tensor k_scale, Tensor v_scale, Tensor token_of_slot, "
      "Tensor tile_of_block, Tensor kv_num_blocks, Tensor kv_indices, *, int num_tokens, float softmax_scale, "
      "ScalarType out_dtype, Tensor? q_k_mean=None) -> (Tensor out, Tensor lse, Tensor row_max, Tensor row_sum)");
  m.def(
      "backward(Tensor grad_out, Tensor out, Tensor q8, Tensor k8, Tensor v8t, Tensor q_scale, Tensor k_scale, "
      "Tensor v_scale, Tensor row_max, Tensor row_sum, Tensor token_of_slot, Tensor tile_of_block, "
      "Tensor kv_num_blocks, Tensor kv_indices, Tensor q_num_blocks, Tensor q_indices, *, float softmax_scale, "
      "bool deterministic=False) -> (Tensor dq, Tensor dk, Tensor dv)");
  m.def(
      "attention(Tensor q, Tensor k, Tensor v, Tensor token_of_slot, Tensor tile_of_block, Tensor tile_block_offsets, "
      "Tensor kv_num_blocks, Tensor kv_indices, Tensor? q_num_blocks=None, Tensor? q_indices=None, *, int granularity, "
      "float softmax_scale, bool smooth_k, bool pow2_scales, int k_mean_stride=1, Tensor? k_mean=None, "
      "Tensor? v_absmax=None, bool deterministic=False) -> (Tensor out, Tensor lse, Tensor q8, Tensor k8, Tensor v8t, "
      "Tensor q_scale, Tensor k_scale, Tensor v_scale, Tensor row_max, Tensor row_sum)");
}
