// Role V: a channel of the block becomes a row of 128 e4m3 bytes, slots permuted within each 16 (kVSlotOrder).
//
// Thread t holds slots 16 g .. 16 g + 15, channels 8 c .. 8 c + 7, with g = t % 8, c = t / 8: a patch holds all 16
// slots of its channels, so the transpose is a choice of registers; 8 neighbouring lanes store one whole 128-byte row
// of v8t, 16 bytes each. Loads touch 64 consecutive bytes of a token per warp, whole sectors.
#pragma once

#include "common/fp8.h"
#include "quantize/sm90/patch.h"
#include "quantize/sm90/work.h"

namespace fpsattn::sm90::quantize {

inline constexpr uint32_t kE4m3One = 0x38;

// kGivenScale: the scale may be smaller than the values need (delayed scaling), quotients saturate.
template <class Config, bool kGivenScale>
__device__ __forceinline__ void quantize_columns(const QuantizeParams& params, const WorkItem& work) {
  const int group = threadIdx.x % kPatchRowsPerBlock;
  const int chunk = threadIdx.x / kPatchRowsPerBlock;
  const int64_t batch_head = work.batch_head(params);
  const TokenRows rows = token_rows(params.v, work.batch, work.head, chunk);
  const float* scales = params.v_scale + batch_head * Config::kHeadDim + chunk * kPatchChannels;

  for (int block = work.first_block; block < work.end_block; block += work.step) {
    Patch patch;
    uint32_t valid[4] = {};  // 0xff in the byte of a valid slot, in v8t's order
    {
      int tokens[kPatchSlots];
      const int32_t* slots = slots_of(params.token_of_slot, batch_head) + static_cast<int64_t>(block) * kBlockSlots;
      load_tokens(tokens, slots + group * kPatchSlots);
      load_patch<Config>(patch, rows, chunk, tokens, __ldg(slots), params.size.num_tokens);
#pragma unroll
      for (int p = 0; p < kPatchSlots; ++p) {
        valid[p / 4] |= (tokens[slot_at_position(p)] >= 0 ? 0xffu : 0u) << (p % 4 * 8);
      }
    }
    uint8_t* out = params.v8t +
                   (batch_head * params.size.num_blocks + block) * (Config::kCodeDim + kVExtraRows) * kBlockSlots +
                   group * kPatchSlots;
#pragma unroll
    for (int c = 0; c < kPatchChannels; ++c) {
      const Divisor by = Divisor::of(Config::has_chunk(chunk) ? __ldg(scales + c) : 1.0f);
      uint32_t words[4];
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        float x[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float value = patch.template value<typename Config::Element>(slot_at_position(4 * w + i), c);
          x[i] = kGivenScale ? by.divide_saturating(value) : by.divide(value);
        }
        words[w] = to_e4m3x4(x[0], x[1], x[2], x[3]) & valid[w];  // padding is 0, under a NaN scale too
      }
      *reinterpret_cast<uint4*>(out + (chunk * kPatchChannels + c) * kBlockSlots) =
          make_uint4(words[0], words[1], words[2], words[3]);
    }
    if (chunk < kVExtraRows) {  // rows C .. C+7: ones in valid slots, then zeros
      const uint32_t one = chunk == 0 ? kE4m3One * 0x01010101u : 0u;
      *reinterpret_cast<uint4*>(out + (Config::kCodeDim + chunk) * kBlockSlots) =
          make_uint4(valid[0] & one, valid[1] & one, valid[2] & one, valid[3] & one);
    }
  }
}

}  // namespace fpsattn::sm90::quantize
