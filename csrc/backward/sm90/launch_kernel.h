// From checked parameters to launches: prepare, then two main kernels (deterministic) or the fused one and finish.
#pragma once

#include <algorithm>

#include "backward/sm90/dkdv_kernel.h"
#include "backward/sm90/dq_kernel.h"
#include "backward/sm90/finish_kernel.h"
#include "backward/sm90/prepare_kernel.h"
#include "common/numeric.h"
#include "common/sm90/tensor_map.h"
#include "fpsattn/status.h"

namespace fpsattn::sm90::backward {

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
        heads_(static_cast<int>(Workspace::heads_of(params, params.workspace_bytes))),
        space_(Workspace::at(params.workspace, params, heads_)) {}

  void run() {
    const int64_t all_heads = int64_t{params_.size.batch} * params_.size.heads;
    for (first_head_ = 0; first_head_ < all_heads; first_head_ += heads_) {
      round(static_cast<int>(std::min<int64_t>(heads_, all_heads - first_head_)));
    }
  }

 private:
  // Heads first_head_ .. + heads - 1.
  void round(int heads) {
    blocks_ = dim3(params_.size.num_blocks, heads);
    rows_ = int64_t{heads} * params_.size.num_blocks * kBlockSlots;
    prepare();
    if (params_.deterministic) {
      dkdv<SeparateDq>();
      dq();
    } else {
      FPSATTN_CUDA_CHECK("backward: dq_sum", cudaMemsetAsync(space_.dq_sum, 0, rows_ * D * sizeof(float), stream_));
      dkdv<ReducedDq>();
      finish();
    }
  }

  void prepare() {
    const BackwardParams& p = params_;
    PrepareArgs args{};
    args.q8 = p.q8, args.k8 = p.k8, args.v8t = p.v8t;
    args.q_scale = p.q_scale, args.k_scale = p.k_scale, args.v_scale = p.v_scale;
    args.row_max = p.row_max, args.row_sum = p.row_sum;
    args.q_scale_per_token = p.q_scale_per_token, args.k_scale_per_token = p.k_scale_per_token;
    args.fp16 = p.dtype == DType::kFloat16;
    args.token_of_slot = p.token_of_slot;
    args.out = p.out, args.grad_out = p.grad_out;
    args.q = space_.q, args.k = space_.k, args.v = space_.v, args.d_out = space_.d_out;
    args.row_facts = space_.row_facts, args.k_scale_of_slot = space_.k_scale;
    args.head_dim = p.size.head_dim;
    args.first_head = first_head_, args.heads = p.size.heads, args.num_blocks = p.size.num_blocks,
    args.num_tokens = p.size.num_tokens;
    launch("backward: prepare", prepare_kernel<D>, blocks_, kPrepareThreads, 0, stream_, args);
  }

  // What both main kernels are told.
  template <class Args>
  Args common_args() const {
    Args args{};
    args.row_facts = space_.row_facts, args.k_scale = space_.k_scale;
    args.token_of_slot = params_.token_of_slot;
    args.head_dim = params_.size.head_dim;
    args.first_head = first_head_, args.heads = params_.size.heads, args.num_blocks = params_.size.num_blocks;
    args.softmax_scale = params_.softmax_scale, args.scale_log2 = scale_in_log2_units(params_.softmax_scale);
    args.k_scale_per_token = params_.k_scale_per_token;
    args.fp16 = params_.dtype == DType::kFloat16;
    return args;
  }

  template <template <int> class DqPolicy>
  void dkdv() {
    auto args = common_args<DkdvArgs>();
    args.k8 = tile_map<Fp8Block<D>>("backward: k8", of_round(params_.k8), rows_);
    args.q8 = tile_map<Fp8Half<D>>("backward: q8", of_round(params_.q8), rows_);
    args.v = tile_map<Block<D>>("backward: workspace v", space_.v, rows_);
    args.q = tile_map<Half<D>>("backward: workspace q", space_.q, rows_);
    args.d_out = tile_map<Half<D>>("backward: workspace d_out", space_.d_out, rows_);
    args.k = tile_map<typename ReducedDq<D>::KeyPanels>("backward: workspace k", space_.k, rows_);
    args.queries = params_.q;
    args.dk = params_.dk, args.dv = params_.dv;
    args.dq_sum = space_.dq_sum;
    launch("backward: dK and dV", dkdv_kernel<D, DqPolicy>, blocks_, kThreads, shared_bytes<DkdvStorage<D, DqPolicy>>(),
           stream_, args);
  }

  void dq() {
    auto args = common_args<DqArgs>();
    args.q8 = tile_map<Fp8Block<D>>("backward: q8", of_round(params_.q8), rows_);
    args.k8 = tile_map<Fp8Block<D>>("backward: k8", of_round(params_.k8), rows_);
    args.d_out = tile_map<Block<D>>("backward: workspace d_out", space_.d_out, rows_);
    args.k = tile_map<Block<D>>("backward: workspace k", space_.k, rows_);
    args.v = tile_map<Block<D>>("backward: workspace v", space_.v, rows_);
    args.tile_of_block = params_.tile_of_block;
    args.keys = params_.kv;
    args.dq = params_.dq;
    launch("backward: dQ", dq_kernel<D>, blocks_, kThreads, shared_bytes<DqStorage<D>>(), stream_, args);
  }

  void finish() {
    const FinishArgs args{space_.dq_sum,          params_.token_of_slot, params_.dq,  params_.dtype == DType::kFloat16,
                          params_.softmax_scale,  params_.size.head_dim, first_head_, params_.size.heads,
                          params_.size.num_blocks};
    launch("backward: finish", finish_kernel<D>, dim3(blocks_.x * kHalves, blocks_.y), kFinishThreads, 0, stream_,
           args);
  }

  // Q8 or K8, from the first head of the round.
  const uint8_t* of_round(const uint8_t* bytes) const {
    return bytes + int64_t{first_head_} * params_.size.num_blocks * kBlockSlots * D;
  }

  const BackwardParams& params_;
  cudaStream_t stream_;
  int heads_;  // of a round
  Workspace space_;
  int first_head_ = 0;
  int64_t rows_ = 0;  // of the workspace that the round uses
  dim3 blocks_;
};

}  // namespace fpsattn::sm90::backward
