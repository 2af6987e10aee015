// The consumer side of one work item: the schedule of QK, softmax and PV over a block list. kernel.h has the picture.
#pragma once

#include "forward/sm90/softmax.h"
#include "forward/sm90/storage.h"

namespace fpsattn::sm90::forward {

// What a consumer thread holds at the end of a list, for its rows g and g + 8.
template <class C>
struct RowState {
  float out[C::kOutRegisters];  // FP32 master of O, before division by the row sum; accumulator order
  float max[2];                 // m
  float sum[2];                 // row sums in lanes q = 0; other lanes of the quad hold 0
};

template <class C>
struct Mainloop {
  Storage<C>& shared;
  const uint32_t warpgroup;         // 0 or 1 of the consumers
  RingPosition<C::kStages> k_slot;  // of the next K block. V blocks lie in the same order in slots of the same numbers

  __device__ Mainloop(Storage<C>& storage, uint32_t consumer_warpgroup)
      : shared(storage), warpgroup(consumer_warpgroup) {}

  // One list of count >= 1 blocks. q_scale: of the two rows. scale_log2 = softmax_scale * log2(e). empty_barriers:
  // k_empty[0] of the CTA at which this lane reports slots that its warp has read, 0: another lane does. under_last:
  // called when the last MMAs are in flight.
  template <class UnderLast>
  __device__ __forceinline__ void run(int32_t count, uint32_t item_slot, const float (&q_scale)[2], float scale_log2,
                                      uint32_t empty_barriers, RowState<C>& state, const UnderLast& under_last) {
    const uint64_t q_tiles = warp_uniform(C::QTile::descriptor(shared.q[0]) + warpgroup * C::QTile::step(64, 0));
    const uint64_t k_tiles = warp_uniform(C::KTile::descriptor(shared.k[0]));
    const uint64_t v_tiles = warp_uniform(C::VTile::descriptor(shared.v[0]));
    const uint32_t own_turn = C::order_barrier(warpgroup);
    const uint32_t other_turn = C::order_barrier(0) + C::order_barrier(1) - own_turn;  // of warpgroup ^ 1
    float score[C::kScoreRegisters];
    float work[C::kWorkRegisters];  // PV accumulator: O and the row sum since the last promotion
    uint32_t p[C::kProbabilityRegisters];
    float factor[2];  // of the scores in flight or in registers
    RowMax m;         // of the scores in registers; O follows in rescale

#pragma unroll
    for (int i = 0; i < C::kOutRegisters; ++i) state.out[i] = 0.0f;
    state.sum[0] = state.sum[1] = 0.0f;
    // The first MMAs ignore these zeros, but whether they accumulate is a run-time value: ptxas before 12.9 sees
    // registers that are read without having been written, and serializes every WGMMA (C7515).
#pragma unroll
    for (int i = 0; i < C::kScoreRegisters; ++i) score[i] = 0.0f;
#pragma unroll
    for (int i = 0; i < C::kWorkRegisters; ++i) work[i] = 0.0f;

    auto move = [&]() -> MaxMove& { return shared.move[opaque(threadIdx.x) - 128]; };
    auto await_k = [&] { shared.k_full[k_slot.stage].wait(k_slot.parity); };
    auto await_scores = [&](auto pending) {  // at most `pending` groups of PV are then in flight
      // Scales are read here, under the MMAs, and not in await_k, where their latency would hold up the exponentials.
      if constexpr (C::kKScalePerToken) {
        factor[0] = q_scale[0] * scale_log2;
        factor[1] = q_scale[1] * scale_log2;
      } else {
        const float k_scale = shared.k_scale[k_slot.stage][0];
        factor[0] = (q_scale[0] * k_scale) * scale_log2;
        factor[1] = (q_scale[1] * k_scale) * scale_log2;
      }
      warpgroup_wait<decltype(pending)::value>();
      keep_registers(score);
    };
    auto issue_qk = [&] {
      item_slot = opaque(item_slot);  // Q's sum is one instruction here; hoisted out of the loop it costs two moves
      const uint64_t q_tile = q_tiles + static_cast<uint64_t>(item_slot) * (C::QTile::kBytes / 16);
      const uint64_t k_tile = k_tiles + static_cast<uint64_t>(k_slot.stage) * (C::KTile::kBytes / 16);
#pragma unroll
      for (int step = 0; step < C::kHeadDim / 32; ++step)
        C::QkMma::ss(score, q_tile + C::QTile::step(0, 32 * step), k_tile + C::KTile::step(0, 32 * step), step > 0);
      warpgroup_commit_batch();
    };
    auto issue_pv = [&](uint32_t v_stage, bool accumulate) {
      const uint64_t v_tile = v_tiles + static_cast<uint64_t>(v_stage) * (C::VTile::kBytes / 16);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int step = C::pv_step(i);
        C::PvMma::rs(work, p + 4 * step, v_tile + C::VTile::step(0, 32 * step), i > 0 || accumulate);
        if (i % 2 == 1) warpgroup_commit_batch();  // two groups: each frees half of P
      }
    };
    auto release = [&](const Mbarrier(&empty)[C::kStages], uint32_t stage) {
      const uint32_t offset =
          reinterpret_cast<const uint8_t*>(empty) - reinterpret_cast<const uint8_t*>(shared.k_empty);
      mbarrier_arrive_in_cluster_if(empty_barriers + offset + stage * sizeof(Mbarrier), empty_barriers != 0);
    };
    auto release_k = [&] {  // scores are in registers: nobody of this warp reads the K block or its scales again
      if constexpr (C::kKScalePerToken) {
        scale_columns(score, shared.k_scale[k_slot.stage]);
        __syncwarp();  // one lane answers for the reads of all
      }
      release(shared.k_empty, k_slot.stage);
    };
    auto promote = [&] {  // column D of the accumulator is the row sum: the ones row of V
      constexpr int kSum = C::kOutRegisters;
#pragma unroll
      for (int i = 0; i < C::kOutRegisters; ++i) state.out[i] += work[i];
      state.sum[0] += work[kSum];
      state.sum[1] += work[kSum + 2];
    };
    auto follow_move = [&] {
      m.shift[0] = move().to[0];
      m.shift[1] = move().to[1];
    };
    auto rescale = [&] {  // by exact powers of two. Maxima are integers: rare after the first blocks
      follow_move();
      const float alpha[2] = {rescale_factor(move().from[0], m.shift[0]), rescale_factor(move().from[1], m.shift[1])};
#pragma unroll
      for (int i = 0; i < C::kWorkRegisters; ++i) work[i] *= alpha[i / 2 % 2];
#pragma unroll
      for (int i = 0; i < C::kOutRegisters; ++i) state.out[i] *= alpha[i / 2 % 2];
      state.sum[0] *= alpha[0];
      state.sum[1] *= alpha[1];
    };

    await_k();
    warpgroup_arrive();
    issue_qk();
    await_scores(cute::Int<0>{});
    release_k();
    raise_max(score, factor, m, move());
    make_exponents<C::kCodeSlots>(score, factor, m);
    follow_move();
    exponentiate<C, 0, 4>(score, p);

    int32_t block = 0;  // whose P is in registers
    if (count > 1) {
      const int32_t last = count - 2;
      RingPosition<C::kStages> v_slot = k_slot;
      bool another;
      k_slot.advance();
      await_k();
#pragma unroll 1
      do {  // PV of this block, QK and softmax of the next
        NamedBarrier::sync(256, own_turn);
        warpgroup_arrive();
        issue_qk();
        const uint32_t v_stage = v_slot.stage;
        shared.v_full[v_stage].wait(v_slot.parity);
        warpgroup_arrive();
        issue_pv(v_stage, block % C::kPromoteBlocks != 0);
        if constexpr (!C::kHandOverWithScores) NamedBarrier::arrive(256, other_turn);
        await_scores(cute::Int<2>{});
        if constexpr (C::kHandOverWithScores) NamedBarrier::arrive(256, other_turn);
        release_k();
        const bool moved = raise_max(score, factor, m, move());
        make_exponents<C::kCodeSlots>(score, factor, m);
        warpgroup_wait<1>();  // the first half of PV
        exponentiate<C, 0, 2>(score, p);
        v_slot = k_slot;
        another = block < last;
        // This wait is needed before the next QK anyway. Here it ends a basic block: without one ptxas hoists the
        // wgmma wait below above the exponentials, and nothing overlaps. The other half of them runs after PV: its P
        // registers are free then, and the tensor cores are the other warpgroup's by that time.
        if (another) {
          k_slot.advance();
          await_k();
        }
        warpgroup_wait<0>();
        keep_registers(work);
        release(shared.v_empty, v_stage);
        exponentiate<C, 2, 4>(score, p);
        if (block % C::kPromoteBlocks == C::kPromoteBlocks - 1) promote();
        if (moved) rescale();
        keep_registers(p);
        keep_registers(work);
        ++block;
      } while (another);
    }

    shared.v_full[k_slot.stage].wait(k_slot.parity);
    warpgroup_arrive();
    issue_pv(k_slot.stage, block % C::kPromoteBlocks != 0);
    under_last();
    warpgroup_wait<0>();
    keep_registers(work);
    release(shared.v_empty, k_slot.stage);
    k_slot.advance();
    promote();
    state.max[0] = kProbabilityShift - m.shift[0];
    state.max[1] = kProbabilityShift - m.shift[1];
  }
};

}  // namespace fpsattn::sm90::forward
