// From the state of a list's rows to global memory: O in token order, lse, row_max, row_sum. Each warp works alone on
// its 16 rows.
#pragma once

#include <cute/arch/copy_sm90.hpp>

#include "common/numeric.h"
#include "forward/sm90/arguments.h"
#include "forward/sm90/mainloop.h"

namespace fpsattn::sm90::forward {

template <class C>
struct Epilogue {
  static constexpr int kChunks = C::kHeadDim / 8;    // 16-byte chunks of an output row
  static constexpr int kRowsPerPass = 32 / kChunks;  // rows that a warp stores with one instruction: 2 or 4
  static constexpr int kRowBytes = C::kHeadDim * 2;

  const Arguments& args;
  Storage<C>& shared;
  const uint32_t lane = threadIdx.x % 32;
  const uint32_t warp = threadIdx.x / 32 - 4;  // among the consumer warps; its rows are 16 warp .. 16 warp + 15

  // Before the rows are there: q . k_mean of rows g and g + 8, in lanes q = 0; it comes from global memory.
  __device__ void load_q_k_mean(const WorkItem& item, const int32_t (&tokens)[kBlockSlots], float (&mean)[2]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int32_t token = tokens[16 * warp + lane / 4 + 8 * half];
      mean[half] = 0.0f;
      if (args.q_k_mean != nullptr && lane % 4 == 0 && token >= 0)
        mean[half] = args.q_k_mean[static_cast<int64_t>(item.batch_head) * args.num_tokens + token];
    }
  }

  __device__ void store(const WorkItem& item, const int32_t (&tokens)[kBlockSlots], const float* v_scale,
                        const float (&q_k_mean)[2], const RowState<C>& state) const {
    float sum[2], m[2], inverse[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      sum[half] = __shfl_sync(~0u, state.sum[half], lane & ~3u);
      m[half] = isnan(sum[half]) ? sum[half] : state.max[half];  // fmaxf dropped the NaN that made the sum NaN
      inverse[half] = 1.0f / sum[half];
    }
    const auto value = [&](int chunk, int half) {  // columns 8 chunk + 2 q and the next of O
      const float2 scale = *reinterpret_cast<const float2*>(v_scale + 8 * chunk + 2 * (lane % 4));
      return float2{state.out[4 * chunk + 2 * half] * scale.x * inverse[half],
                    state.out[4 * chunk + 2 * half + 1] * scale.y * inverse[half]};
    };
    if (args.out_dtype == DType::kFloat32) {
      store_rows(item, tokens, value);
    } else {
      stage_rows(value);
      __syncwarp();
      copy_rows(item, tokens);
    }
    store_statistics(item, tokens, m, sum, q_k_mean);
    __syncwarp();  // the staging rows may be overwritten
  }

  // A row with an empty list: O = 0, lse = -inf, row_max = row_sum = 0.
  __device__ void store_empty(const WorkItem& item, const int32_t (&tokens)[kBlockSlots]) const {
    const float zeros[2] = {0.0f, 0.0f};
    if (args.out_dtype == DType::kFloat32) {
      store_rows(item, tokens, [](int, int) { return float2{0.0f, 0.0f}; });
    } else {
      for (int i = lane; i < 16 * kChunks; i += 32) reinterpret_cast<uint4*>(shared.out[warp])[i] = uint4{0, 0, 0, 0};
      __syncwarp();
      copy_rows(item, tokens);
    }
    store_statistics(item, tokens, zeros, zeros, zeros);
    __syncwarp();
  }

 private:
  // Chunk c of row r lies at chunk c ^ (r % 8): stmatrix writes 8 rows of one chunk without bank conflicts.
  __device__ uint8_t* staged(uint32_t row, uint32_t chunk) const {
    return shared.out[warp] + row * kRowBytes + ((chunk ^ (row & 7)) << 4);
  }

  // The thread's part of O, acc * v_scale / sum, is value(chunk, half); columns beyond D stay here.
  //
  // FP32 straight to token order: the quad of a row writes a chunk, 32 bytes, a whole sector.
  template <class Value>
  __device__ void store_rows(const WorkItem& item, const int32_t (&tokens)[kBlockSlots], const Value& value) const {
    const int32_t batch = item.batch_head / args.heads, head = item.batch_head % args.heads;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int32_t token = tokens[16 * warp + lane / 4 + 8 * half];
      if (token < 0) continue;
      float* row = static_cast<float*>(args.out.data) + token_offset(args.out, batch, head, token) + 2 * (lane % 4);
#pragma unroll
      for (int chunk = 0; chunk < kChunks; ++chunk) {
        if (8 * chunk < args.head_dim) *reinterpret_cast<float2*>(row + 8 * chunk) = value(chunk, half);
      }
    }
  }

  // 16 bit to the warp's staging rows.
  template <class Value>
  __device__ void stage_rows(const Value& value) const {
#pragma unroll
    for (int pair = 0; pair < kChunks / 2; ++pair) {
      uint32_t words[4];  // chunk 2 pair: rows g, g + 8; chunk 2 pair + 1: rows g, g + 8
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 columns = value(2 * pair + i / 2, i % 2);
        words[i] = pack_16bit(columns.x, columns.y, args.out_dtype == DType::kFloat16);
      }
      // Lane i gives the address of row i % 8 of matrix i / 8; matrices are the four words above.
      uint8_t* row = staged(lane % 8 + 8 * (lane / 8 % 2), 2 * pair + lane / 16);
      cute::SM90_U32x4_STSM_N::copy(words[0], words[1], words[2], words[3], *reinterpret_cast<cute::uint128_t*>(row));
    }
  }

  // Staging rows to token order, whole rows at a time, 16 bytes per lane; columns beyond D stay here.
  __device__ void copy_rows(const WorkItem& item, const int32_t (&tokens)[kBlockSlots]) const {
    const int32_t batch = item.batch_head / args.heads, head = item.batch_head % args.heads;
    uint8_t* base = static_cast<uint8_t*>(args.out.data) + 2 * token_offset(args.out, batch, head, 0);
#pragma unroll
    for (int pass = 0; pass < 16 / kRowsPerPass; ++pass) {
      const uint32_t row = pass * kRowsPerPass + lane / kChunks, chunk = lane % kChunks;
      const int32_t token = tokens[16 * warp + row];
      if (token >= 0 && 8 * chunk < args.head_dim) {
        *reinterpret_cast<uint4*>(base + 2 * (token * args.out.stride_token) + 16 * chunk) =
            *reinterpret_cast<const uint4*>(staged(row, chunk));
      }
    }
  }

  // m, sum: of rows g and g + 8, known to every lane of the quad.
  __device__ void store_statistics(const WorkItem& item, const int32_t (&tokens)[kBlockSlots], const float (&m)[2],
                                   const float (&sum)[2], const float (&q_k_mean)[2]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t row = lane / 4 + 8 * half;
      const int32_t token = tokens[16 * warp + row];
      if (lane % 4 != 0) continue;
      const bool padding = token < 0;
      const int64_t slot =
          (static_cast<int64_t>(item.batch_head) * args.num_blocks + item.q_block) * kBlockSlots + 16 * warp + row;
      args.row_max[slot] = padding ? 0.0f : m[half];
      args.row_sum[slot] = padding ? 0.0f : sum[half];
      if (padding) continue;
      float lse = (m[half] - kProbabilityShift + __log2f(sum[half])) *
                  static_cast<float>(kLn2);  // sum = 0 of an empty row: -inf
      if (args.q_k_mean != nullptr) lse += args.softmax_scale * q_k_mean[half];
      args.lse[static_cast<int64_t>(item.batch_head) * args.num_tokens + token] = lse;
    }
  }
};

}  // namespace fpsattn::sm90::forward
