// What fpsattn::quantize says about bad parameters. Nothing is launched: no device is needed.
#include <gtest/gtest.h>

#include <functional>
#include <string>

#include "fpsattn/launch.h"
#include "fpsattn/status.h"

namespace fpsattn::test {
namespace {

alignas(16) char fake_memory[64];

QuantizeParams good_params() {
  QuantizeParams p;
  p.size = {1, 2, 128, 200, 2, 1};
  void* any = fake_memory;
  p.q = p.k = p.v = {any, 0, 0, 0};
  p.token_of_slot = p.tile_block_offsets = static_cast<int32_t*>(any);
  p.q8 = p.k8 = p.v8t = static_cast<uint8_t*>(any);
  p.q_scale = p.k_scale = p.v_scale = p.k_mean = p.q_k_mean = static_cast<float*>(any);
  p.workspace = any;
  p.workspace_bytes = quantize_workspace_bytes(p);
  return p;
}

struct BadCase {
  const char* text;  // part of the message
  std::function<void(QuantizeParams&)> spoil;
};

TEST(QuantizeErrors, NameTheArgumentAndWhatWasWanted) {
  const BadCase cases[] = {
      {"quantize: head_dim is 80, expected 64, 96 or 128", [](auto& p) { p.size.head_dim = 80; }},
      {"quantize: batch is 0, expected 1..65535", [](auto& p) { p.size.batch = 0; }},
      {"quantize: heads is -1", [](auto& p) { p.size.heads = -1; }},
      {"quantize: num_tokens is 0", [](auto& p) { p.size.num_tokens = 0; }},
      {"quantize: num_tiles is 0", [](auto& p) { p.size.num_tiles = 0; }},
      {"quantize: num_blocks is 2, expected at least num_tiles (3)", [](auto& p) { p.size.num_tiles = 3; }},
      {"quantize: num_blocks is 2, too few for num_tokens 257", [](auto& p) { p.size.num_tokens = 257; }},
      {"quantize: group is 3, expected a divisor of heads (2)", [](auto& p) { p.size.group = 3; }},
      {"quantize: kv_tokens, kv_blocks, kv_tiles are 0, -1, 0, expected 0", [](auto& p) { p.size.kv_blocks = -1; }},
      {"quantize: kv_blocks is 1, too few for kv_tokens 129",
       [](auto& p) { p.size.kv_tokens = 129, p.size.kv_blocks = 1; }},
      {"quantize: kv_tokens is 5, kv_blocks 0 and kv_token_of_slot null, expected all or none",
       [](auto& p) { p.size.kv_tokens = 5; }},
      {"quantize: kv_tiles is 0 and kv_blocks 2, expected both or none",
       [](auto& p) { p.size.kv_tokens = 5, p.size.kv_blocks = 2, p.kv_token_of_slot = p.token_of_slot; }},
      {"quantize: token_of_slot differs from head to head, and K has fewer",
       [](auto& p) { p.size.group = 2, p.token_of_slot.stride = 256; }},
      {"quantize: num_blocks is 16777216: slot numbers", [](auto& p) { p.size.num_blocks = 1 << 24; }},
      {"quantize: dtype is 7", [](auto& p) { p.dtype = static_cast<DType>(7); }},
      {"quantize: granularity is 3", [](auto& p) { p.granularity = static_cast<Granularity>(3); }},
      {"quantize: k_mean_stride is 0, expected at least 1", [](auto& p) { p.k_mean_stride = 0; }},
      {"quantize: q is null", [](auto& p) { p.q.data = nullptr; }},
      {"quantize: k is null", [](auto& p) { p.k.data = nullptr; }},
      {"quantize: v is at", [](auto& p) { p.v.data = fake_memory + 1; }},
      {"expected a 16-byte aligned pointer and strides that are multiples of 8",
       [](auto& p) { p.q.data = fake_memory + 2; }},
      {"with strides (0, 0, 132, 1), expected", [](auto& p) { p.k.stride_token = 132; }},
      {"with strides (0, 4, 0, 1), expected", [](auto& p) { p.v.stride_head = 4; }},
      {"with strides (1, 0, 0, 1), expected", [](auto& p) { p.q.stride_batch = 1; }},
      {"quantize: k has a token stride of 1073741832 elements, expected at most 1073741823: make it contiguous",
       [](auto& p) { p.k.stride_token = (1 << 30) + 8; }},
      {"quantize: token_of_slot is at", [](auto& p) { p.token_of_slot.data += 1; }},
      {"quantize: tile_block_offsets is null", [](auto& p) { p.tile_block_offsets = nullptr; }},
      {"quantize: q8 is at", [](auto& p) { p.q8 += 8; }},
      {"quantize: k8 is null", [](auto& p) { p.k8 = nullptr; }},
      {"quantize: v8t is null", [](auto& p) { p.v8t = nullptr; }},
      {"quantize: q_scale is null", [](auto& p) { p.q_scale = nullptr; }},
      {"quantize: k_scale is null", [](auto& p) { p.k_scale = nullptr; }},
      {"quantize: v_scale is null", [](auto& p) { p.v_scale = nullptr; }},
      {"quantize: k_mean is null", [](auto& p) { p.k_mean = nullptr; }},
      {"quantize: q_k_mean is null", [](auto& p) { p.q_k_mean = nullptr; }},
      {"quantize: workspace is null", [](auto& p) { p.workspace = nullptr; }},
      {"quantize: workspace_bytes is 16, expected at least 2048", [](auto& p) { p.workspace_bytes = 16; }},
  };
  for (const BadCase& bad : cases) {
    QuantizeParams params = good_params();
    bad.spoil(params);
    try {
      quantize(params, nullptr);
      ADD_FAILURE() << "accepted: " << bad.text;
    } catch (const Error& error) {
      EXPECT_NE(std::string(error.what()).find(bad.text), std::string::npos)
          << "got '" << error.what() << "', want '" << bad.text << "'";
    }
  }
}

// The workspace size is asked for before anything is launched: it divides by sizes that may be zero.
TEST(QuantizeErrors, WorkspaceSizeChecksSizesFirst) {
  const BadCase cases[] = {
      {"quantize: num_tiles is 0, expected at least 1", [](auto& p) { p.size.num_tiles = 0; }},
      {"quantize: num_blocks is 0", [](auto& p) { p.size.num_blocks = 0; }},
      {"quantize: k_mean_stride is 0, expected at least 1", [](auto& p) { p.k_mean_stride = 0; }},
      {"quantize: head_dim is 0", [](auto& p) { p.size.head_dim = 0; }},
  };
  for (const BadCase& bad : cases) {
    QuantizeParams params = good_params();
    bad.spoil(params);
    try {
      quantize_workspace_bytes(params);
      ADD_FAILURE() << "accepted: " << bad.text;
    } catch (const Error& error) {
      EXPECT_NE(std::string(error.what()).find(bad.text), std::string::npos) << error.what();
    }
  }
}

TEST(QuantizeErrors, WorkspaceIsOnlyNeededForWhatIsComputed) {
  QuantizeParams params = good_params();
  EXPECT_EQ(quantize_workspace_bytes(params), 2u * 2 * 128 * 4);  // 2 heads, one part of K and of V, D floats
  params.smooth_k = false;
  EXPECT_EQ(quantize_workspace_bytes(params), 2u * 128 * 4);
  params.given_v_absmax = reinterpret_cast<float*>(fake_memory);
  EXPECT_EQ(quantize_workspace_bytes(params), 0u);
}

}  // namespace
}  // namespace fpsattn::test
