// FP8 block-sparse attention forward, sm_90a.
//
//   x[i, j] = (q8[i] . k8[j]) * ((s_q s_k) * (softmax_scale * log2 e))    over the KV blocks of the list of i's tile
//   P = e4m3(2^(x - m + 8)),  m = ceil(row maximum so far),  l = sum P
//   O = (P V8) * s_v / l,  lse = (m - 8 + log2 l) * ln 2
//
// Shapes     q8, k8 [B, H, num_blocks, 128, D] e4m3, D = 64 or 128   v8t [B, H, num_blocks, D + 8, 128] e4m3, row D: 1
//            in valid slots   s_q, s_k [B, H, num_blocks] or [.., 128] f32   s_v [B, H, D] f32   out: token order, bf16,
//            fp16 or f32. K and V may have fewer heads (H / group) and other blocks than Q: only the producer knows
// Work item  one query block of one (batch, head); 2 consumer warpgroups x 64 rows; persistent CTAs, longest lists
//            first (schedule.cu); clusters of 2 CTAs where tiles have several query blocks
// Layouts    Q, K, V^T: tiles of config.h, K-major, swizzled   P: registers, operand A of PV (kVSlotOrder: no shuffle)
//
// Pipeline   producer  Q K0 K1 V0 K2 V1 ...
//            WG 0      QK0 | sm0 | QK1 PV0 | sm1 (under PV0) | QK2 PV1 | sm2 (under PV1) | ... | PVn | store
//            WG 1              QK0 | sm0 | QK1 PV0 | ...                   (order barriers keep them apart)
//
// Barriers   name           kind       arrives                    waits       phase flips
//            item_full[2]   mbarrier   producer + TMA (Q, s_v)    consumers   per work item
//            item_empty[2]  mbarrier   each consumer warp (8)     producer    per work item
//            k_full[4]      mbarrier   producer + TMA (K, scales) consumers   per lap of the ring
//            k_empty[4]     mbarrier   each consumer warp (8)     producer    when QK is done (clusters: 16 arrivals)
//            v_full[4]      mbarrier   TMA                        consumers   per lap of the ring
//            v_empty[4]     mbarrier   each consumer warp (8)     producer    when PV is done (clusters: 16 arrivals)
//            mail_full      mbarrier   CTA 0's word in CTA 1      producer 1  per pair (clusters)
//            mail_empty     mbarrier   CTA 1's producer in CTA 0  producer 0  per pair (clusters)
//            order 1, 2     named      other WG (256 threads)     this WG     per KV block but the first: MMAs of this
//                                                                             WG may be issued
//
// Clusters   The query blocks of a tile follow one list. Where tiles have several (launch.h has the rule) the same kernel
//            runs in clusters of two CTAs, and each block of K and V crosses from L2 once for both.
//            Work      schedule.cu puts query blocks 2 i, 2 i + 1 of a tile in front, as pairs; what a tile of an odd
//                      number leaves over follows. A cluster draws pairs (CTA 0 draws and writes the number to CTA 1's
//                      mail); when none is left, each CTA draws query blocks by itself. It never goes back, so the
//                      rings of the two need not stay in step any more, and lists may end anywhere.
//            Pair      CTA 0 loads K (and its scales) into the same slot of both CTAs, CTA 1 loads V: halves of a tile
//                      would break its swizzle. The loading producer waits for its own k_empty (v_empty), where the
//                      warps of both CTAs report; then it arrives at k_full of both, announces the bytes there and
//                      issues one multicast. A scale of 4 bytes goes by st.async, which counts as bytes of k_full too.
//            Release   One instruction a warp, as without clusters: lane r arrives at CTA r's barrier. Alone, both lanes
//                      arrive at their own CTA's, so that a phase always takes 16 arrivals, and the barriers that nobody
//                      waits for (k_empty of CTA 1, v_empty of CTA 0 in a pair) stay in step with their slots.
//            Parities  A producer that leaves its pairs waits again for barriers that it had not looked at: it is not two
//                      phases ahead of them. Its other ring let it issue V of block n only when PV of n - 4 was done, or
//                      K of n when QK of n - 4, hence PV of n - 6, was done.
//            Start     cluster barrier behind the initialisation.  End: cluster barrier; a CTA stays until the other has
//                      sent its last arrivals.
//            Budget    no instruction and no byte of a ring more; one register (where to report); L2 to SM 17 instead of
//                      33 KB per KV block and CTA.
//
// Budget     D = 128, scales per tile or block; clocks of an SM for one KV block of both warpgroups; counts of the SASS
//   tensor     2 x (4 x 64 + 4 x 68) = 1056        exponentials  2 x 32 x 8 = 512, the other half are codes
//   issue      2 x 341 = 682 (65 %): 308 in every block, 66 of promotion in every second one. Of the 308: 32 EX2, 32 F2FP,
//              16 IMAD, 16 LOP3, 16 LEA.HI, 8 PRMT (P), 64 FFMA, 32 VIMNMX3, 8 QGMMA, descriptors, barriers, scales, control
//   smem operands 656
//   registers  232: S 64, PV accumulator 68, FP32 master of O 64, P 16, sums, maxima, factors; peak live 227; no spill.
//              Producer 40
//   shared     Q 2 x 16 K, K 4 x 16 K, V 4 x 17 K, output staging 32 K = 197 K of 227 K
//
// Why it is so short (mainloop.h, softmax.h)
//   * A maximum that stays below the running one need not be known. So each thread only asks whether one of its scores
//     exceeds it: 3-input integer maxima against 0, no shuffles. Where one does (rare after the first blocks) the warp
//     computes the exact maximum and rescales.
//   * PV is committed in two halves. When the first is done, half of the P registers can be written while the other
//     half of PV runs, and pairs of e4m3 merge in F2FP itself.
//   * Descriptors are 64-bit uniform values; one multiply-add per tile, one add per step.
//
// Schedules  A (built): softmax of block j + 1 under PV of block j, FP32 master of O in registers: 64 + 68 + 64 + 16 =
//            212 registers of data. Promotion is 64 FADD every 256 keys and touches no shared memory.
//            B: the same overlap with the master in shared memory (148 registers of data). A promotion then moves
//            128 KB through the shared-memory port of the SM, 1024 clocks: at 256 keys half of the port, which the
//            operands already hold at 62 %; at 1024 keys 12 %, but O is then biased by 0.3 % (config.h). A fits without
//            a spill, so it needs no compromise between accuracy and the port.
//            C: plain ping-pong (QK, softmax, PV in sequence, the warpgroups alternate): 152 registers, but each tile
//            waits for its own MMAs; FlashAttention-3 loses 12-14 % without the overlap inside a warpgroup.
//            None of the three has been timed by this project yet.
//
// Invariants slot 0 of every block is valid and padding keys repeat it, so padding cannot move a maximum; the ones row
//            drops it from O and l. O of a warp leaves through 16 staging rows of its own; rows with token -1 are never
//            stored.
#pragma once

#include "forward/sm90/epilogue.h"
#include "forward/sm90/mainloop.h"
#include "forward/sm90/producer.h"

namespace fpsattn::sm90::forward {

template <class C>
__device__ __forceinline__ void init_barriers(Storage<C>& shared, uint32_t cluster_size) {
  for (int i = 0; i < C::kItems; ++i) {
    shared.item_full[i].init(1);
    shared.item_empty[i].init(C::kConsumerWarps);
  }
  for (int i = 0; i < C::kStages; ++i) {
    shared.k_full[i].init(1);
    shared.k_empty[i].init(C::kConsumerWarps * cluster_size);
    shared.v_full[i].init(1);
    shared.v_empty[i].init(C::kConsumerWarps * cluster_size);
  }
  shared.mail_full.init(1);
  shared.mail_empty.init(1);
  fence_barrier_init();
}

template <class C>
__device__ __forceinline__ void consume(const Arguments& args, Storage<C>& shared) {
  const uint32_t warpgroup =
      __shfl_sync(~0u, threadIdx.x / 128, 0) - 1;  // the shuffle tells ptxas that the warp agrees
  const uint32_t lane = threadIdx.x % 32;
  Mainloop<C> mainloop(shared, warpgroup);
  const Epilogue<C> epilogue{args, shared};
  uint32_t items = 0;  // done: stage and parity of the ring in one register
  if (warpgroup == 1) NamedBarrier::arrive(2 * 128, C::order_barrier(0));  // warpgroup 0 goes first

  while (true) {
    const uint32_t s = items % C::kItems;
    shared.item_full[s].wait(items / C::kItems % 2);
    const WorkItem item = shared.item[s];
    if (item.count < 0) break;
    auto release_item = [&] {
      __syncwarp();
      if (lane == 0) shared.item_empty[s].arrive();
    };
    if (item.count == 0) {
      epilogue.store_empty(item, shared.tokens[s]);
      release_item();
    } else {
      float q_scale[2];
      const int64_t block = static_cast<int64_t>(item.batch_head) * args.num_blocks + item.q_block;
      for (int half = 0; half < 2; ++half) {
        const uint32_t row = 64 * warpgroup + accumulator_row(threadIdx.x % 128, 2 * half);
        q_scale[half] = args.q_scale[args.q_scale_per_token ? block * kBlockSlots + row : block];
      }
      // Lane r reports to CTA r what a pair has read, and to its own CTA otherwise.
      uint32_t empty_barriers = 0;
      if (lane < args.cluster_size) {
        empty_barriers =
            cute::set_block_rank(shared_address(shared.k_empty), item.pair ? lane : cute::block_rank_in_cluster());
      }
      RowState<C> state;
      float q_k_mean[2];
      mainloop.run(item.count, s, q_scale, args.scale_log2, empty_barriers, state,
                   [&] { epilogue.load_q_k_mean(shared.item[s], shared.tokens[opaque(s)], q_k_mean); });
      const uint32_t same = opaque(s);  // all addresses anew: registers are scarce in the main loop
      epilogue.store(shared.item[same], shared.tokens[same], shared.v_scale[same], q_k_mean, state);
      release_item();
    }
    ++items;
  }
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, 1) forward_kernel(const __grid_constant__ Arguments args) {
  auto& shared = shared_storage<Storage<C>>();
  if (threadIdx.x == 0) {
    prefetch_tma_descriptor(&args.q_map);
    prefetch_tma_descriptor(&args.k_map);
    prefetch_tma_descriptor(&args.v_map);
    init_barriers(shared, args.cluster_size);
  }
  __syncthreads();
  if (args.cluster_size > 1)
    cluster_barrier();  // nobody arrives at a barrier, or writes to memory, of a CTA that is not there yet

  if (threadIdx.x < 128) {
    warpgroup_reg_dealloc<C::kProducerRegisters>();
    if (threadIdx.x >= 32) return;
    Producer<C>{args, shared}.run();
  } else {
    warpgroup_reg_alloc<C::kConsumerRegisters>();
    consume(args, shared);
  }
  if (args.cluster_size > 1) cluster_barrier();  // nor of a CTA that is gone. Threads that have returned do not count
}

}  // namespace fpsattn::sm90::forward
