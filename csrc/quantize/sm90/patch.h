// Loading a patch: 16 slots x 8 channels, gathered through token_of_slot.
#pragma once

#include <cstdint>

#include "common/device_check.h"
#include "quantize/sm90/config.h"

namespace fpsattn::sm90::quantization {

struct Patch {
  uint4 row[kPatchSlots];  // 8 channels each, two to a register

  template <class Element>
  __device__ __forceinline__ float value(int slot, int channel) const {
    const uint4& r = row[slot];
    const int word = channel / 2;
    return Element::to_float(word == 0 ? r.x : word == 1 ? r.y : word == 2 ? r.z : r.w, channel % 2);
  }

  // Between two uses: the compiler would keep the 128 FP32 values of the first one alive for the second, and spill. Converting
  // again costs one instruction each.
  __device__ __forceinline__ void forget_conversions() {
#pragma unroll
    for (int i = 0; i < kPatchSlots; ++i) {
      asm volatile("" : "+r"(row[i].x), "+r"(row[i].y), "+r"(row[i].z), "+r"(row[i].w));
    }
  }
};

// 8 channels of all the tokens of one (batch, head).
struct TokenRows {
  const uint16_t* base;  // token 0
  int64_t stride_token;
  bool aligned;  // 16-byte loads are legal (has_aligned_rows); else 2-byte loads, slow but right

  __device__ __forceinline__ uint4 load(int token) const {
    const uint16_t* source = base + token * stride_token;
    if (aligned) {
      return __ldg(reinterpret_cast<const uint4*>(source));
    }
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      words[i] = __ldg(source + 2 * i) | (static_cast<uint32_t>(__ldg(source + 2 * i + 1)) << 16);
    }
    return make_uint4(words[0], words[1], words[2], words[3]);
  }
};

__device__ __forceinline__ TokenRows token_rows(const TokenTensor& tensor, bool aligned, int batch, int head, int chunk) {
  const uint16_t* data = static_cast<const uint16_t*>(tensor.data);
  return {data + batch * tensor.stride_batch + head * tensor.stride_head + chunk * kPatchChannels, tensor.stride_token, aligned};
}

// The tokens of 16 consecutive slots, -1 in padding.
__device__ __forceinline__ void load_tokens(int (&tokens)[kPatchSlots], const int32_t* token_of_slot, int num_tokens) {
#pragma unroll
  for (int i = 0; i < kPatchSlots; i += 4) {
    const int4 four = __ldg(reinterpret_cast<const int4*>(token_of_slot + i));
    tokens[i] = four.x;
    tokens[i + 1] = four.y;
    tokens[i + 2] = four.z;
    tokens[i + 3] = four.w;
  }
#pragma unroll
  for (int i = 0; i < kPatchSlots; ++i) {
    trap_if(tokens[i] >= num_tokens);
  }
}

// A padding slot repeats slot 0 of its block, which is valid: it changes no maximum and ends up with that slot's bytes.
__device__ __forceinline__ void load_repeating(Patch& patch, const TokenRows& rows, const int (&tokens)[kPatchSlots],
                                               int first_token_of_block) {
#pragma unroll
  for (int i = 0; i < kPatchSlots; ++i) {
    patch.row[i] = rows.load(tokens[i] < 0 ? first_token_of_block : tokens[i]);
  }
}

// A padding slot is zero.
__device__ __forceinline__ void load_zero_filled(Patch& patch, const TokenRows& rows, const int (&tokens)[kPatchSlots]) {
#pragma unroll
  for (int i = 0; i < kPatchSlots; ++i) {
    patch.row[i] = make_uint4(0, 0, 0, 0);
    if (tokens[i] >= 0) {
      patch.row[i] = rows.load(tokens[i]);
    }
  }
}

}  // namespace fpsattn::sm90::quantization
