// Loading a patch: 16 slots x 8 channels, gathered through token_of_slot.
#pragma once

#include <cstdint>

#include "common/device_check.h"
#include "common/indexing.h"
#include "common/sm90/ptx.h"
#include "quantize/sm90/config.h"

namespace fpsattn::sm90::quantize {

struct Patch {
  uint4 row[kPatchSlots];  // 8 channels each, two to a register

  template <class Element>
  __device__ __forceinline__ float value(int slot, int channel) const {
    const uint4& r = row[slot];
    const int word = channel / 2;
    return Element::to_float(word == 0 ? r.x : word == 1 ? r.y : word == 2 ? r.z : r.w, channel % 2);
  }

  // Between two uses: the compiler would keep the 128 FP32 values of the first one alive for the second, and spill.
  // Converting again costs one instruction each.
  __device__ __forceinline__ void forget_conversions() {
#pragma unroll
    for (int i = 0; i < kPatchSlots; ++i) {
      asm volatile("" : "+r"(row[i].x), "+r"(row[i].y), "+r"(row[i].z), "+r"(row[i].w));
    }
  }
};

// 8 channels of all the tokens of one (batch, head).
struct TokenRows {
  const char* base;      // token 0, 16-byte aligned, as every token (the launcher checks it)
  int32_t stride_bytes;  // from token to token: 32 bit, so that an address is one multiply-add

  __device__ __forceinline__ uint4 load(int token) const {
    return load_uncached(multiply_add(token, stride_bytes, base));
  }
};

__device__ __forceinline__ TokenRows token_rows(const TokenTensor& tensor, int batch, int head, int chunk) {
  const uint16_t* data =
      static_cast<const uint16_t*>(tensor.data) + token_offset(tensor, batch, head, 0) + chunk * kPatchChannels;
  return {reinterpret_cast<const char*>(data), static_cast<int32_t>(2 * tensor.stride_token)};
}

// The first kCount of 8 FP32 values, 16-byte aligned.
template <int kCount = kPatchChannels>
__device__ __forceinline__ void load_floats(float (&x)[kPatchChannels], const float* from) {
#pragma unroll
  for (int i = 0; i < kCount; i += 4) {
    const float4 four = __ldg(reinterpret_cast<const float4*>(from + i));
    x[i] = four.x, x[i + 1] = four.y, x[i + 2] = four.z, x[i + 3] = four.w;
  }
}

// 8 packed channels as FP32.
template <class Config>
__device__ __forceinline__ void unpack(float (&x)[kPatchChannels], const uint4& packed) {
  const uint32_t words[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
  for (int c = 0; c < kPatchChannels; ++c) x[c] = Config::Element::to_float(words[c / 2], c % 2);
}

// The tokens of 16 consecutive slots, -1 in padding.
__device__ __forceinline__ void load_tokens(int (&tokens)[kPatchSlots], const int32_t* token_of_slot) {
#pragma unroll
  for (int i = 0; i < kPatchSlots; i += 4) {
    const int4 four = __ldg(reinterpret_cast<const int4*>(token_of_slot + i));
    tokens[i] = four.x, tokens[i + 1] = four.y, tokens[i + 2] = four.z, tokens[i + 3] = four.w;
  }
}

// A padding slot repeats slot 0 of its block, which is valid. In Q and K it changes no maximum and ends up with that
// slot's bytes, as specified; V masks it out. A chunk beyond the row (kHeadDim < kCodeDim) is zeros.
template <class Config>
__device__ __forceinline__ void load_patch(Patch& patch, const TokenRows& rows, int chunk,
                                           const int (&tokens)[kPatchSlots], int first_token_of_block, int num_tokens) {
  int largest = tokens[0];
#pragma unroll
  for (int i = 1; i < kPatchSlots; ++i) largest = max(largest, tokens[i]);
  if (Config::has_chunk(chunk)) {
#pragma unroll
    for (int i = 0; i < kPatchSlots; ++i) patch.row[i] = rows.load(tokens[i] < 0 ? first_token_of_block : tokens[i]);
  } else {
#pragma unroll
    for (int i = 0; i < kPatchSlots; ++i) patch.row[i] = make_uint4(0, 0, 0, 0);
  }
  trap_if(largest >= num_tokens);  // behind the loads, in front of every use
  __syncwarp();                    // after a trap ptxas takes no warp for converged, and doubles every shuffle
}

}  // namespace fpsattn::sm90::quantize
