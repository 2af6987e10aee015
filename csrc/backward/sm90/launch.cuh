// From checked parameters to launches: prepare, then two main kernels (deterministic) or the fused one and finish.
#pragma once

#include "backward/sm90/dkdv_kernel.h"
#include "backward/sm90/dq_kernel.h"
#include "backward/sm90/finish_kernel.h"
#include "backward/sm90/prepare_kernel.h"
#include "backward/sm90/tensor_maps.h"
#include "common/check_params.h"
#include "common/numeric.h"

namespace fpsattn::sm90::bwd {

inline InputTensor input_tensor(const TokenTensor& t) {
  return {static_cast<const char*>(t.data), t.stride_batch, t.stride_head, t.stride_token, has_aligned_rows(t)};
}

inline GradientTensor gradient_tensor(const TokenTensor& t, DType dtype) {
  return {static_cast<char*>(t.data), t.stride_batch,          t.stride_head, t.stride_token,
          has_aligned_rows(t),        dtype == DType::kFloat16};
}

inline DeviceLists device_lists(const BlockLists& lists) {
  return {lists.num_blocks, lists.indices, lists.batch, lists.heads, lists.rows, lists.max_blocks};
}

template <class Kernel, class Args>
void launch(const char* what, Kernel kernel, dim3 grid, int threads, int shared_bytes, cudaStream_t stream,
            const Args& args) {
  if (shared_bytes > 48 * 1024) {
    FPSATTN_CUDA_CHECK(what, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
  }
  kernel<<<grid, threads, shared_bytes, stream>>>(args);
  FPSATTN_CUDA_CHECK(what, cudaGetLastError());
}

template <int D>
class Launcher {
 public:
  Launcher(const BackwardParams& params, cudaStream_t stream)
      : params_(params),
        stream_(stream),
        space_(Workspace::of(params)),
        base_(static_cast<char*>(params.workspace)),
        rows_(uint64_t(params.size.batch) * params.size.heads * params.size.num_blocks * kBlockSlots),
        blocks_(params.size.num_blocks, params.size.heads, params.size.batch) {}

  void run() {
    prepare();
    if (params_.deterministic) {
      dkdv<SeparateDq>();
      dq();
    } else {
      FPSATTN_CUDA_CHECK("backward: dq_sum",
                         cudaMemsetAsync(at<float>(space_.dq_sum), 0, rows_ * D * sizeof(float), stream_));
      dkdv<ReducedDq>();
      finish();
    }
  }

 private:
  template <class T>
  T* at(size_t offset) const {
    return reinterpret_cast<T*>(base_ + offset);
  }

  void prepare() {
    const BackwardParams& p = params_;
    PrepareArgs args{};
    args.q8 = p.q8, args.k8 = p.k8, args.v8t = p.v8t;
    args.q_scale = p.q_scale, args.k_scale = p.k_scale, args.v_scale = p.v_scale;
    args.row_max = p.row_max, args.row_sum = p.row_sum;
    args.q_scale_per_token = p.q_scale_per_token, args.k_scale_per_token = p.k_scale_per_token;
    args.half = p.dtype == DType::kFloat16;
    args.token_of_slot = p.token_of_slot;
    args.out = input_tensor(p.out), args.grad_out = input_tensor(p.grad_out);
    args.q = at<uint16_t>(space_.q), args.k = at<uint16_t>(space_.k), args.v = at<uint16_t>(space_.v);
    args.d_out = at<uint16_t>(space_.d_out);
    args.row_facts = at<float>(space_.row_facts), args.k_scale_of_slot = at<float>(space_.k_scale);
    args.heads = p.size.heads, args.num_blocks = p.size.num_blocks, args.num_tokens = p.size.num_tokens;
    launch("backward: prepare", prepare_kernel<D>, blocks_, kPrepareThreads, 0, stream_, args);
  }

  template <template <int> class DqPolicy>
  void dkdv() {
    const BackwardParams& p = params_;
    DkdvArgs args{};
    args.k8 = fp8_map("backward: k8", p.k8, rows_, D, kBlockSlots);
    args.q8 = fp8_map("backward: q8", p.q8, rows_, D, kQueryRows);
    args.v = panel_map("backward: workspace v", at<char>(space_.v), rows_, D, kPanelColumns, kBlockSlots);
    args.q = panel_map("backward: workspace q", at<char>(space_.q), rows_, D, kPanelColumns, kQueryRows);
    args.d_out = panel_map("backward: workspace d_out", at<char>(space_.d_out), rows_, D, kPanelColumns, kQueryRows);
    args.k = panel_map("backward: workspace k", at<char>(space_.k), rows_, D, D / 2, kBlockSlots);
    args.row_facts = at<float>(space_.row_facts), args.k_scale = at<float>(space_.k_scale);
    args.token_of_slot = p.token_of_slot;
    args.queries = device_lists(p.q);
    args.heads = p.size.heads, args.num_blocks = p.size.num_blocks;
    args.softmax_scale = p.softmax_scale, args.scale_log2e = scale_in_log2_units(p.softmax_scale);
    args.dk = gradient_tensor(p.dk, p.dtype), args.dv = gradient_tensor(p.dv, p.dtype);
    args.dq_sum = at<float>(space_.dq_sum);
    constexpr int kSharedBytes = sizeof(DkdvStorage<D, DqPolicy>);
    static_assert(kSharedBytes <= kSharedMemoryLimit, "shared memory of a CTA");
    launch("backward: dK and dV", dkdv_kernel<D, DqPolicy>, blocks_, kThreads, kSharedBytes, stream_, args);
  }

  void dq() {
    const BackwardParams& p = params_;
    DqArgs args{};
    args.q8 = fp8_map("backward: q8", p.q8, rows_, D, kBlockSlots);
    args.k8 = fp8_map("backward: k8", p.k8, rows_, D, kBlockSlots);
    args.d_out = panel_map("backward: workspace d_out", at<char>(space_.d_out), rows_, D, kPanelColumns, kBlockSlots);
    args.k = panel_map("backward: workspace k", at<char>(space_.k), rows_, D, kPanelColumns, kBlockSlots);
    args.v = panel_map("backward: workspace v", at<char>(space_.v), rows_, D, kPanelColumns, kBlockSlots);
    args.row_facts = at<float>(space_.row_facts), args.k_scale = at<float>(space_.k_scale);
    args.token_of_slot = p.token_of_slot, args.tile_of_block = p.tile_of_block;
    args.keys = device_lists(p.kv);
    args.heads = p.size.heads, args.num_blocks = p.size.num_blocks;
    args.softmax_scale = p.softmax_scale, args.scale_log2e = scale_in_log2_units(p.softmax_scale);
    args.dq = gradient_tensor(p.dq, p.dtype);
    constexpr int kSharedBytes = sizeof(DqStorage<D>);
    static_assert(kSharedBytes <= kSharedMemoryLimit, "shared memory of a CTA");
    launch("backward: dQ", dq_kernel<D>, blocks_, kThreads, kSharedBytes, stream_, args);
  }

  void finish() {
    const BackwardParams& p = params_;
    const FinishArgs args{at<float>(space_.dq_sum), p.token_of_slot, gradient_tensor(p.dq, p.dtype),
                          p.softmax_scale,          p.size.heads,    p.size.num_blocks};
    launch("backward: finish", finish_kernel<D>, dim3(blocks_.x * kHalves, blocks_.y, blocks_.z), kFinishThreads, 0,
           stream_, args);
  }

  const BackwardParams& params_;
  cudaStream_t stream_;
  Workspace space_;
  char* base_;
  uint64_t rows_;
  dim3 blocks_;
};

}  // namespace fpsattn::sm90::bwd
