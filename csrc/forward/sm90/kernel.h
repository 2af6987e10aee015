// FP8 block-sparse attention forward, sm_90a.
//
//   x[i, j] = (q8[i] . k8[j]) * ((s_q s_k) * (softmax_scale * log2 e))       over the KV blocks of list(tile of the query block)
//   P = e4m3(2^(x - m + 8)),  m = ceil(row maximum so far),  l = sum P,  O = (P V8) * s_v / l,  lse = (m - 8 + log2 l) * ln 2
//
// PLACEHOLDER-HEADER
#pragma once

#include "forward/sm90/epilogue.h"
#include "forward/sm90/mainloop.h"
#include "forward/sm90/producer.h"

namespace fpsattn::sm90::forward {

template <class C>
__device__ __forceinline__ void init_barriers(Storage<C>& shared) {
  for (int i = 0; i < C::kItems; ++i) {
    shared.item_full[i].init(1);
    shared.item_empty[i].init(C::kConsumerWarps);
  }
  for (int i = 0; i < C::kStages; ++i) {
    shared.k_full[i].init(1);
    shared.k_empty[i].init(C::kConsumerWarps);
    shared.v_full[i].init(1);
    shared.v_empty[i].init(C::kConsumerWarps);
  }
  fence_mbarrier_init();
}

template <class C>
__device__ __forceinline__ void consume(const Arguments& args, Storage<C>& shared) {
  const uint32_t warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0) - 1;  // the shuffle tells ptxas that the warp agrees
  const uint32_t lane = threadIdx.x % 32;
  Mainloop<C> mainloop(shared, warpgroup);
  const Epilogue<C> epilogue{args, shared};
  RingPosition<C::kItems> item_slot;
  if (C::kOrdered && warpgroup == 1) named_barrier_arrive(C::order_barrier(0), 2 * 128);  // warpgroup 0 goes first

  while (true) {
    const uint32_t s = item_slot.stage;
    shared.item_full[s].wait(item_slot.parity);
    const WorkItem item = shared.item[s];
    if (item.count < 0) break;
    const int32_t tokens = epilogue.load_tokens(item);
    auto release_item = [&] {
      __syncwarp();
      if (lane == 0) shared.item_empty[s].arrive();
    };
    if (item.count == 0) {
      release_item();
      epilogue.store_empty(item, tokens);
    } else {
      float q_scale[2];
      const int64_t block = static_cast<int64_t>(item.batch_head) * args.num_blocks + item.q_block;
      for (int half = 0; half < 2; ++half) {
        const uint32_t row = 64 * warpgroup + threadIdx.x % 128 / 32 * 16 + lane / 4 + 8 * half;
        q_scale[half] = args.q_scale[args.q_scale_per_token ? block * kBlockSlots + row : block];
      }
      RowState<C> state;
      mainloop.run(item.count, s, q_scale, args.scale_log2, state);
      epilogue.store(item, shared.v_scale[s], tokens, state);
      release_item();
    }
    item_slot.advance();
  }
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, 1) forward_kernel(const __grid_constant__ Arguments args) {
  extern __shared__ uint8_t raw_shared[];
  Storage<C>& shared = *reinterpret_cast<Storage<C>*>(raw_shared + (-shared_address(raw_shared) & (kSharedAlignment - 1)));
  if (threadIdx.x == 0) {
    tma_prefetch_descriptor(&args.q_map);
    tma_prefetch_descriptor(&args.k_map);
    tma_prefetch_descriptor(&args.v_map);
    init_barriers(shared);
  }
  __syncthreads();

  if (threadIdx.x < 128) {
    release_registers<C::kProducerRegisters>();
    if (threadIdx.x < 32) Producer<C>{args, shared}.run();
  } else {
    acquire_registers<C::kConsumerRegisters>();
    consume(args, shared);
  }
}

}  // namespace fpsattn::sm90::forward
