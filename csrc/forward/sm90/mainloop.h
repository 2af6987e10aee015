// The consumer side of one work item: the schedule of QK, softmax and PV over a block list. kernel.h has the picture.
#pragma once

#include "forward/sm90/softmax.h"
#include "forward/sm90/storage.h"

namespace fpsattn::sm90::forward {

// What a consumer thread holds at the end of a list, for its rows g and g + 8.
template <class C>
struct RowState {
  float out[C::kOutRegisters];  // FP32 master of O, before division by the row sum; accumulator order
  RowMax m;
  float sum[2];  // row sums in lanes q = 0; other lanes of the quad hold 0
};

template <class C>
struct Mainloop {
  Storage<C>& shared;
  const uint32_t warpgroup;  // 0 or 1 of the consumers
  RingPosition<C::kStages>
      k_slot;  // of the K block whose scores come next. V blocks lie in the same order in slots of the same numbers

  __device__ Mainloop(Storage<C>& storage, uint32_t consumer_warpgroup)
      : shared(storage), warpgroup(consumer_warpgroup) {}

  // One list of count >= 1 blocks. q_scale: of the two rows. scale_log2 = softmax_scale * log2(e).
  __device__ __forceinline__ void run(int32_t count, uint32_t item_slot, const float (&q_scale)[2], float scale_log2,
                                      RowState<C>& state) {
    const uint64_t q_tile =
        matrix_descriptor<C::kQkSwizzle>(shared.q[item_slot] + warpgroup * 64 * C::kHeadDim, 8 * C::kHeadDim);
    float score[C::kScoreRegisters];
    float work[C::kWorkRegisters];  // PV accumulator: O and the row sum since the last promotion
    uint32_t p[C::kProbabilityRegisters];
    uint16_t pairs[2 * C::kProbabilityRegisters];
    float factor[2];  // of the scores in flight or in registers
    RowMax before;
    RingPosition<C::kStages> v_slot = k_slot, next_v_slot;

#pragma unroll
    for (int i = 0; i < C::kOutRegisters; ++i) state.out[i] = 0.0f;
    state.sum[0] = state.sum[1] = 0.0f;
    state.m = RowMax{};

    auto await_k = [&] {
      shared.k_full[k_slot.stage].wait(k_slot.parity);
      if constexpr (C::kKScalePerToken) {
        factor[0] = q_scale[0] * scale_log2;
        factor[1] = q_scale[1] * scale_log2;
      } else {
        const float k_scale = shared.k_scale[k_slot.stage][0];
        factor[0] = (q_scale[0] * k_scale) * scale_log2;
        factor[1] = (q_scale[1] * k_scale) * scale_log2;
      }
    };
    auto issue_qk = [&] {
      const uint64_t k_tile = matrix_descriptor<C::kQkSwizzle>(shared.k[k_slot.stage], 8 * C::kHeadDim);
#pragma unroll
      for (int step = 0; step < C::kHeadDim / 32; ++step)
        C::QkMma::ss(score, q_tile + 2 * step, k_tile + 2 * step, step > 0);
      wgmma_commit();
    };
    auto issue_pv = [&](bool accumulate) {
      const uint64_t v_tile = matrix_descriptor<Swizzle::k128B>(shared.v[v_slot.stage], 8 * kBlockSlots);
#pragma unroll
      for (int step = 0; step < kBlockSlots / 32; ++step)
        C::PvMma::rs(work, p + 4 * step, v_tile + 2 * step, step > 0 || accumulate);
      wgmma_commit();
    };
    auto release_k = [&] {  // scores are in registers: nobody of this warp reads the K block or its scales again
      if constexpr (C::kKScalePerToken) scale_columns(score, shared.k_scale[k_slot.stage]);
      if (threadIdx.x % 32 == 0) shared.k_empty[k_slot.stage].arrive();
      next_v_slot = k_slot;
      k_slot.advance();
    };
    auto release_v = [&] {
      if (threadIdx.x % 32 == 0) shared.v_empty[v_slot.stage].arrive();
      v_slot = next_v_slot;
    };
    auto softmax = [&] {
      before = state.m;
      update_row_max(score, factor, state.m);
      exponentiate(score, factor, state.m);
    };
    auto collect_sum = [&] {  // column D of the accumulator: the ones row of V. Promoted every block.
      constexpr int kSum = C::kOutRegisters;
      state.sum[0] += work[kSum];
      state.sum[1] += work[kSum + 2];
      work[kSum] = work[kSum + 2] = 0.0f;
    };
    auto promote = [&] {
#pragma unroll
      for (int i = 0; i < C::kOutRegisters; ++i) state.out[i] += work[i];
    };
    auto rescale_if_moved = [&] {  // integer maxima: rare after the first blocks, and by exact powers of two
      const bool moved = state.m.row[0] != before.row[0] || state.m.row[1] != before.row[1];
      if (__any_sync(~0u, moved)) {
        const float alpha[2] = {rescale_factor(before.row[0], state.m.row[0]),
                                rescale_factor(before.row[1], state.m.row[1])};
#pragma unroll
        for (int i = 0; i < C::kOutRegisters; ++i) {
          work[i] *= alpha[i / 2 % 2];
          state.out[i] *= alpha[i / 2 % 2];
        }
        state.sum[0] *= alpha[0];
        state.sum[1] *= alpha[1];
      }
    };

    await_k();
    wgmma_fence();
    issue_qk();
    wgmma_wait<0>();
    keep_registers(score);
    release_k();
    softmax();
    convert_to_pairs(score, pairs);
    join_pairs(pairs, p);
    if (count > 1) await_k();

#pragma unroll 1
    for (int32_t block = 0; block < count - 1; ++block) {  // PV of this block, QK and softmax of the next
      if constexpr (C::kOrdered) named_barrier_sync(C::order_barrier(warpgroup), 256);
      wgmma_fence();
      issue_qk();
      shared.v_full[v_slot.stage].wait(v_slot.parity);
      wgmma_fence();
      issue_pv(block % C::kPromoteBlocks != 0);
      if constexpr (C::kOrdered) named_barrier_arrive(C::order_barrier(warpgroup ^ 1), 256);
      wgmma_wait<1>();
      keep_registers(score);
      release_k();
      softmax();
      convert_to_pairs(score, pairs);
      // This wait is needed before the next QK anyway. Here it ends a basic block: without one ptxas hoists the wgmma
      // wait below above the exponentials, and nothing overlaps.
      if (block + 2 < count) await_k();
      wgmma_wait<0>();
      keep_registers(work);
      release_v();
      collect_sum();
      if (block % C::kPromoteBlocks == C::kPromoteBlocks - 1) promote();
      rescale_if_moved();
      join_pairs(pairs, p);
      keep_registers(p);
      keep_registers(work);
    }

    shared.v_full[v_slot.stage].wait(v_slot.parity);
    wgmma_fence();
    issue_pv((count - 1) % C::kPromoteBlocks != 0);
    wgmma_wait<0>();
    keep_registers(work);
    release_v();
    collect_sum();
    promote();
  }
};

}  // namespace fpsattn::sm90::forward
