// Backward, before the main kernels: operands in tile order and the facts of every query row. Memory-bound.
//
//   Q16, K16 = raw e4m3 values as BF16 (exact); 0 in padding slots    V~ = bf16(v8 * v_scale), transposed back from v8t
//   dO gathered to slot order as BF16; 0 in padding slots             delta = rowsum(dO * O), from the rounded dO
//   facts of a row (workspace.h), 64 rows of each after another; s_k per slot, whatever the granularity
//
// FP16 gradients are rounded to BF16 here (relative error 2^-9 per element): dS would not survive FP16's range.
// One CTA of 256 threads per block of 128 slots, of the queries and of K and V; D / 8 threads share a row. Bytes per
// element: 3 (e4m3) + 4 (O, dO) read, 8 written. Invariants: every byte of the workspace that a main kernel reads is
// written here on every call; tokens are < num_tokens (trapped on otherwise), for the kernels that follow, too: none of
// them starts after a trap.
#pragma once

#include "backward/sm90/config.h"
#include "backward/sm90/elementwise.h"
#include "common/device_check.h"
#include "common/element.h"

namespace fpsattn::sm90::backward {

inline constexpr int kPrepareThreads = 256;

// Eight elements of a token's row as FP32.
__device__ __forceinline__ void load_8(float (&x)[8], const TokenTensor& in, int64_t offset, bool fp16) {
  const uint4 bits = *reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(in.data) + offset);
  const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    x[i] = fp16 ? Float16::to_float(words[i / 2], i % 2) : BFloat16::to_float(words[i / 2], i % 2);
  }
}

// Eight e4m3 bytes to eight BF16.
__device__ __forceinline__ uint4 widen_8(uint2 bytes) {
  uint32_t w[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = e4m3x2_to_float2((i < 2 ? bytes.x : bytes.y) >> (16 * (i % 2)));
    w[i] = pack_bf16(pair.x, pair.y);
  }
  return make_uint4(w[0], w[1], w[2], w[3]);
}

// `head`: of the queries in the workspace.
template <int D>
__device__ __forceinline__ void prepare_queries(const Round& round, int head, int block) {
  const BackwardParams& params = round.params;
  const Side& side = round.queries;
  const bool fp16 = params.dtype == DType::kFloat16;
  constexpr int kRowThreads = D / 8;
  const int part = threadIdx.x % kRowThreads;
  const int all_heads = side.first_head + head, b = all_heads / side.heads, h = all_heads % side.heads;
  const int64_t head_block = int64_t(head) * side.num_blocks + block;
  const int64_t source_block = int64_t(all_heads) * side.num_blocks + block;
  const int32_t* tokens = slots_of(side.token_of_slot, all_heads) + block * kBlockSlots;
#pragma unroll 1
  for (int i = threadIdx.x / kRowThreads; i < kBlockSlots; i += kPrepareThreads / kRowThreads) {
    const int token = tokens[i];
    trap_if(token >= side.num_tokens);
    const int64_t slot = head_block * kBlockSlots + i;
    const int64_t source_slot = source_block * kBlockSlots + i;
    const int64_t element = slot * D + part * 8, source = source_slot * D + part * 8;
    uint4 q = make_uint4(0, 0, 0, 0), d_out = q;
    float delta = 0.0f;
    if (token >= 0) {
      float o[8] = {}, g[8] = {};
      if (part * 8 < params.size.head_dim) {
        load_8(o, params.out, token_offset(params.out, b, h, token) + part * 8, fp16);
        load_8(g, params.grad_out, token_offset(params.grad_out, b, h, token) + part * 8, fp16);
      }
      uint32_t w[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        w[e] = pack_bf16(g[2 * e], g[2 * e + 1]);
        delta = fmaf(__uint_as_float(w[e] << 16), o[2 * e], delta);
        delta = fmaf(__uint_as_float(w[e] & 0xffff0000u), o[2 * e + 1], delta);
      }
      d_out = make_uint4(w[0], w[1], w[2], w[3]);
      q = widen_8(*reinterpret_cast<const uint2*>(params.q8 + source));
    }
#pragma unroll
    for (int distance = kRowThreads / 2; distance > 0; distance /= 2) {
      delta += __shfl_xor_sync(0xffffffffu, delta, distance);
    }
    *reinterpret_cast<uint4*>(round.space.q + element) = q;
    *reinterpret_cast<uint4*>(round.space.d_out + element) = d_out;
    if (part == 0) {
      const float l = params.row_sum[source_slot], inverse_sum = token < 0 || l == 0.0f ? 0.0f : 1.0f / l;
      const float q_scale = params.q_scale[params.q_scale_per_token ? source_slot : source_block];
      float* facts = round.space.row_facts + slot / kQueryRows * kNumRowFacts * kQueryRows + slot % kQueryRows;
      facts[kQueryScale * kQueryRows] = q_scale;
      facts[kExponentShift * kQueryRows] = float(kProbabilityShift) - params.row_max[source_slot];
      facts[kInverseSum * kQueryRows] = inverse_sum;
      facts[kDelta * kQueryRows] = -delta * inverse_sum;
      facts[kScaledInverseSum * kQueryRows] = inverse_sum * q_scale;
      facts[kScaledDelta * kQueryRows] = -delta * inverse_sum * q_scale;
    }
  }
}

// Position of slot s of a group of 16 in v8t: the inverse of kVSlotOrder. Bits b3 b2 b1 b0 -> position b2 b1 b3 b0.
__device__ __forceinline__ int v_position(int slot) {
  return (slot & ~15) | (slot & 6) << 1 | (slot & 8) >> 2 | (slot & 1);
}

// `head`: of K and V in the workspace.
template <int D>
__device__ __forceinline__ void prepare_keys(const Round& round, int head, int block) {
  const BackwardParams& params = round.params;
  const Side& side = round.keys;
  const int head_dim = params.size.head_dim;
  constexpr int kPitch = kBlockSlots + 4;  // bytes; columns of a quad land in different banks
  __shared__ __align__(16) uint8_t rows[D * kPitch];
  const int64_t all_heads = side.first_head + head;
  const int64_t source_block = all_heads * side.num_blocks + block;
  const uint8_t* source = params.v8t + source_block * (D + kVExtraRows) * kBlockSlots;
  const int32_t* tokens = slots_of(side.token_of_slot, all_heads) + block * kBlockSlots;
  for (int i = threadIdx.x; i < D * kBlockSlots / 4; i += kPrepareThreads) {
    const int d = i / (kBlockSlots / 4), word = i % (kBlockSlots / 4);
    *reinterpret_cast<uint32_t*>(rows + d * kPitch + word * 4) = reinterpret_cast<const uint32_t*>(source)[i];
  }
  __syncthreads();
  constexpr int kRowThreads = D / 8;
  const int d = threadIdx.x % kRowThreads * 8;
  float scale[8];
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    scale[e] = d < head_dim ? params.v_scale[all_heads * head_dim + d + e] : 1.0f;
  }
#pragma unroll 1
  for (int i = threadIdx.x / kRowThreads; i < kBlockSlots; i += kPrepareThreads / kRowThreads) {
    uint32_t w[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const uint8_t* pair = rows + (d + 2 * e) * kPitch + v_position(i);
      const float2 v = e4m3x2_to_float2(pair[0] | uint32_t(pair[kPitch]) << 8);
      w[e] = pack_bf16(v.x * scale[2 * e], v.y * scale[2 * e + 1]);
    }
    const int token = tokens[i];
    trap_if(token >= side.num_tokens);
    const int64_t slot = (int64_t(head) * side.num_blocks + block) * kBlockSlots + i;
    const int64_t source_slot = source_block * kBlockSlots + i;
    const uint2 k = token < 0 ? make_uint2(0, 0) : *reinterpret_cast<const uint2*>(params.k8 + source_slot * D + d);
    *reinterpret_cast<uint4*>(round.space.k + slot * D + d) = widen_8(k);
    *reinterpret_cast<uint4*>(round.space.v + slot * D + d) = make_uint4(w[0], w[1], w[2], w[3]);
    if (d == 0) {
      round.space.k_scale[slot] = params.k_scale[params.k_scale_per_token ? source_slot : source_block];
    }
  }
}

// Grid: x = block of queries and of keys, y = query head of the workspace.
template <int D>
__global__ void __launch_bounds__(kPrepareThreads) prepare_kernel(const __grid_constant__ Round round) {
  const int head = blockIdx.y, block = blockIdx.x, group = round.params.size.group;
  if (block < round.queries.num_blocks) {
    prepare_queries<D>(round, head, block);
  }
  if (block < round.keys.num_blocks && head % group == 0) {
    prepare_keys<D>(round, head / group, block);
  }
}

}  // namespace fpsattn::sm90::backward
