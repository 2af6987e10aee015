// BF16/FP16 Q, K, V in token order to e4m3 in tile order.
//
//   s = rule(max |x| over the group)     x = q, k - k_mean, v       rule: scale_of_absmax in common/fp8.h
//   byte = e4m3(x / s)                   nearest even, saturating
//   group: a tile, a block of 128 slots, or a token (Q, K); a channel of all tokens (V: v_scale from statistics.h)
//
// Shapes     q, k, v (B, H, S, D), any strides; q8, k8 [B, H, num_blocks, 128, C]; v8t [B, H, num_blocks, C + 8, 128];
//            C = D, or 128 for D = 96: the columns between are codes of zeros, made in registers, read from nowhere
//            q_scale, k_scale [B, H, num_blocks(, 128)]; v_scale, k_mean [B, H, D]; q_k_mean [B, H, S];
//            q_block_sum, k_block_sum [B, H, num_blocks, D], if wanted: sums of a block's tokens, from the registers
// Grid       x = (tile or block, head, CTA of the cluster), y = role (V, K, Q), z = batch; C threads per CTA. Keys of
//            other heads or tokens than the queries: one launch for V and K, one for Q, each with its own sizes
// Layouts    a thread holds a patch, 16 slots x 8 channels in 64 registers (config.h, rows.h, columns.h)
//
// Pipeline   statistics (K mean, V absmax)  ->  finish  ->  this kernel
//            CTA of Q/K   load block | absmax | cta max | cluster max | scale, cast, store
//            CTA of V     load block | scale, cast, transpose in registers, store      no reduction, no barrier
//            Overlap comes from the 4 to 8 CTAs of an SM: while one waits for its loads another stores.
//
// A tile is shared by a cluster of CTAs, one block each, so that every input byte is read once. A tile of more blocks
// than CTAs (ceil(num_blocks / num_tiles) of them, at most 8) is read twice: each CTA walks its blocks for the maximum,
// keeps the last one in registers and walks back.
//
// Barriers   name             kind     arrives       waits                  phase flips
//            (cta max)        bar 0    the CTA       the CTA                once per CTA
//            exchange_open    cluster  active CTAs   before it sends        once; every CTA's `received` is initialised
//            received         mbarrier 1 + 4 bytes   the CTA                once; a maximum from every active CTA, itself
//                                      a CTA                                included. Sent by st.async: no memory barrier
//            CTAs without work exit at once: exited threads are not waited for, and nobody sends to them.
//
// Budget     registers 128 (64 patch, 8 mean, 16 row results, addresses), no spills; 4 (D=128) or 8 (D=64) CTAs per SM
//            in flight 16 loads of 16 bytes a thread, in every role: 128 KiB per SM
//            shared    one float per warp, one mbarrier and 8 floats, 8 C floats for the block sums
//            bytes     1.05 of the ideal counted under an emulator (tests/static/test_quantize_bytes.py, limit 1.10)
//            limit     memory, not yet measured on a GPU: 48 KiB a block are 2,600 clocks at 4.3 TB/s, 132 SMs and
//                      1.755 GHz; the ALU needs at most about 2,300 of them (an upper estimate): not far behind
//
// Invariants slot 0 of every block is valid; token_of_slot holds every token once (an index >= S traps); tile offsets
//            are blocks (one beyond num_blocks traps);
//            every byte of every output is written on every call.
#pragma once

#include "quantize/sm90/columns.h"
#include "quantize/sm90/rows.h"

namespace fpsattn::sm90::quantize {

template <class Config, class Source, class... MoreOfSource>
__device__ __forceinline__ void quantize_rows(const QuantizeParams& params, const WorkItem& work, bool is_query,
                                              MoreOfSource... more) {
  RowQuantizer<Config, Source> rows(params, work, is_query, more...);
  __shared__ float sums[kPatchRowsPerBlock * Config::kCodeDim];
  if constexpr (Config::kScope == GroupScope::kToken) {
    rows.load(work.first_block);
    rows.store_block_sum(work.first_block, sums);
    rows.store_per_token(work.first_block);
  } else {
    __shared__ float warp_maximum[Config::kThreads / 32];
    __shared__ __align__(8) uint8_t exchange_bytes[sizeof(ClusterMaximum)];  // CUTLASS's barriers have no constructor
    auto& exchange = reinterpret_cast<ClusterMaximum&>(exchange_bytes);
    if (work.step > 1) {
      open_exchange(exchange, work.active_ctas);
    }
    // Loads end a basic block, in both loops: ptxas would move uses of the first up between them, and wait there.
    int block = work.first_block;
    rows.load(block);
    float absmax = 0.0f;
#pragma unroll 1
    for (;;) {
      rows.store_block_sum(block, sums);
      absmax = rows.absmax(absmax);
      if (block + work.step >= work.end_block) {
        break;
      }
      block += work.step;
      rows.load(block);
    }
    absmax = cta_absmax<Config::kThreads>(absmax, warp_maximum);
    if (work.step > 1) {
      absmax = cluster_absmax(absmax, exchange, work.active_ctas);
    }
    const float scale = scale_of_absmax(absmax, params.pow2_scales);
#pragma unroll 1
    for (;;) {
      rows.store(block, scale);
      block -= work.step;
      if (block < work.first_block) {
        break;
      }
      rows.load(block);
    }
  }
}

template <class Config>
__device__ __forceinline__ void quantize_columns_of(const QuantizeParams& params, const WorkItem& work) {
  if (params.given_v_absmax != nullptr) {
    quantize_columns<Config, true>(params, work);
  } else {
    quantize_columns<Config, false>(params, work);
  }
}

template <class Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kMinCtas)
    quantize_kernel(const __grid_constant__ QuantizeParams params, const __grid_constant__ Plan plan) {
  const WorkItem work = work_item(params, plan);
  if (work.first_block >= work.end_block) {
    return;
  }
  switch (static_cast<Role>(blockIdx.y + plan.first_role)) {
    case Role::kV:
      quantize_columns_of<Config>(params, work);
      break;
    case Role::kK:
      quantize_rows<Config, RawRows<Config>>(params, work, false);
      break;
    case Role::kQ:
      quantize_rows<Config, RawRows<Config>>(params, work, true);
      break;
  }
}

}  // namespace fpsattn::sm90::quantize
