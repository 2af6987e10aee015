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
      : stream_(stream),
        heads_(static_cast<int>(Workspace::heads_of(params, params.workspace_bytes))),
        round_{params,
               Workspace::at(params.workspace, params, heads_),
               {params.token_of_slot, params.size.heads, params.size.num_tokens, params.size.num_blocks, 0},
               {key_slots(params), params.size.key_heads(), params.size.key_tokens(), params.size.key_blocks(), 0},
               scale_in_log2_units(params.softmax_scale)} {}

  void run() {
    const int64_t all_heads = int64_t{params_.size.batch} * keys_.heads;
    for (int64_t first = 0; first < all_heads; first += heads_) {
      round_.keys.first_head = static_cast<int>(first);
      round_.queries.first_head = static_cast<int>(first) * params_.size.group;
      round(static_cast<int>(std::min<int64_t>(heads_, all_heads - first)));
    }
  }

 private:
  // Of so many heads of K and V, and their query heads.
  void round(int heads) {
    query_blocks_ = dim3(queries_.num_blocks, heads * params_.size.group);
    key_blocks_ = dim3(keys_.num_blocks, heads);
    query_rows_ = int64_t{query_blocks_.x} * query_blocks_.y * kBlockSlots;
    key_rows_ = int64_t{key_blocks_.x} * key_blocks_.y * kBlockSlots;
    launch("backward: prepare", prepare_kernel<D>, dim3(std::max(query_blocks_.x, key_blocks_.x), query_blocks_.y),
           kPrepareThreads, 0, stream_, round_);
    if (params_.deterministic) {
      dkdv<SeparateDq>();
      dq();
    } else {
      FPSATTN_CUDA_CHECK("backward: dq_sum",
                         cudaMemsetAsync(space_.dq_sum, 0, query_rows_ * D * sizeof(float), stream_));
      dkdv<ReducedDq>();
      launch("backward: finish", finish_kernel<D>, dim3(query_blocks_.x * kHalves, query_blocks_.y), kFinishThreads, 0,
             stream_, round_);
    }
  }

  template <template <int> class DqPolicy>
  void dkdv() {
    const auto kernel = params_.k_scale_per_token ? dkdv_kernel<D, DqPolicy, true> : dkdv_kernel<D, DqPolicy, false>;
    DkdvArgs args{};
    static_cast<Round&>(args) = round_;
    args.k8 = tile_map<Fp8Block<D>>("backward: k8", of_round(params_.k8, keys_), key_rows_);
    args.q8 = tile_map<Fp8Half<D>>("backward: q8", of_round(params_.q8, queries_), query_rows_);
    args.v = tile_map<Block<D>>("backward: workspace v", space_.v, key_rows_);
    args.q = tile_map<Half<D>>("backward: workspace q", space_.q, query_rows_);
    args.d_out = tile_map<Half<D>>("backward: workspace d_out", space_.d_out, query_rows_);
    args.k = tile_map<typename ReducedDq<D>::KeyPanels>("backward: workspace k", space_.k, key_rows_);
    launch("backward: dK and dV", kernel, key_blocks_, kThreads, shared_bytes<DkdvStorage<D, DqPolicy>>(), stream_,
           args);
  }

  void dq() {
    const auto kernel = params_.k_scale_per_token ? dq_kernel<D, true> : dq_kernel<D, false>;
    DqArgs args{};
    static_cast<Round&>(args) = round_;
    args.q8 = tile_map<Fp8Block<D>>("backward: q8", of_round(params_.q8, queries_), query_rows_);
    args.k8 = tile_map<Fp8Block<D>>("backward: k8", of_round(params_.k8, keys_), key_rows_);
    args.d_out = tile_map<Block<D>>("backward: workspace d_out", space_.d_out, query_rows_);
    args.k = tile_map<Block<D>>("backward: workspace k", space_.k, key_rows_);
    args.v = tile_map<Block<D>>("backward: workspace v", space_.v, key_rows_);
    launch("backward: dQ", kernel, query_blocks_, kThreads, shared_bytes<DqStorage<D>>(), stream_, args);
  }

  // Q8 or K8, from the first head of the round.
  static const uint8_t* of_round(const uint8_t* bytes, const Side& side) {
    return bytes + int64_t{side.first_head} * side.num_blocks * kBlockSlots * D;
  }

  cudaStream_t stream_;
  int heads_;  // of K and V, of a round, but for the last
  Round round_;
  const BackwardParams& params_ = round_.params;
  const Workspace& space_ = round_.space;
  const Side &queries_ = round_.queries, &keys_ = round_.keys;
  int64_t query_rows_ = 0, key_rows_ = 0;  // of the workspace that the round uses
  dim3 query_blocks_, key_blocks_;
};

}  // namespace fpsattn::sm90::backward
