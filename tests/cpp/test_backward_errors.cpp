// What fpsattn::backward says about bad parameters. Nothing is launched: no device is needed.
#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <string>

#include "fpsattn/launch.h"
#include "fpsattn/status.h"
#include "fpsattn/tile_layout.h"

namespace fpsattn::test {
namespace {

alignas(16) char fake_memory[64];

BackwardParams good_params() {
  BackwardParams p;
  p.size = {2, 3, 128, 200, 2, 1};
  p.softmax_scale = 0.125f;
  void* any = fake_memory;
  p.q8 = p.k8 = p.v8t = static_cast<uint8_t*>(any);
  p.q_scale = p.k_scale = p.v_scale = p.row_max = p.row_sum = static_cast<float*>(any);
  p.token_of_slot = p.tile_of_block = static_cast<int32_t*>(any);
  const int32_t* ints = static_cast<int32_t*>(any);
  p.kv = {ints, ints, 1, 1, 1, 2};
  p.q = {ints, ints, 1, 1, 2, 2};
  p.out = p.grad_out = p.dq = p.dk = p.dv = {any, 0, 0, 0};
  p.workspace = any;
  p.workspace_bytes = backward_workspace_bytes(p);
  return p;
}

struct BadCase {
  const char* text;  // part of the message
  std::function<void(BackwardParams&)> spoil;
};

TEST(BackwardErrors, NameTheArgumentAndWhatWasWanted) {
  const BadCase cases[] = {
      {"backward: head_dim is 80, expected 64, 96 or 128", [](auto& p) { p.size.head_dim = 80; }},
      {"backward: batch is 0, expected 1..65535", [](auto& p) { p.size.batch = 0; }},
      {"backward: heads is 0", [](auto& p) { p.size.heads = 0; }},
      {"backward: num_tokens is 0", [](auto& p) { p.size.num_tokens = 0; }},
      {"backward: batch * heads is 4294836225, expected at most", [](auto& p) { p.size.batch = p.size.heads = 65535; }},
      {"backward: group is 2, expected a divisor of heads (3)", [](auto& p) { p.size.group = 2; }},
      {"backward: q.rows is 2, expected kv_blocks (3)", [](auto& p) { p.size.kv_blocks = 3; }},
      {"backward: kv_tokens is 9, kv_blocks 0 and kv_token_of_slot null", [](auto& p) { p.size.kv_tokens = 9; }},
      {"backward: dtype is 7", [](auto& p) { p.dtype = static_cast<DType>(7); }},
      {"backward: dtype is 2", [](auto& p) { p.dtype = DType::kFloat32; }},  // of forward's output only
      {"backward: softmax_scale is nan, expected a positive finite number", [](auto& p) { p.softmax_scale = NAN; }},
      {"backward: softmax_scale is 0, expected a positive", [](auto& p) { p.softmax_scale = 0.0f; }},
      {"backward: softmax_scale is -0.5, expected a positive", [](auto& p) { p.softmax_scale = -0.5f; }},
      {"backward: q8 is null", [](auto& p) { p.q8 = nullptr; }},
      {"backward: k8 is at", [](auto& p) { p.k8 += 8; }},
      {"backward: v8t is null", [](auto& p) { p.v8t = nullptr; }},
      {"backward: q_scale is null", [](auto& p) { p.q_scale = nullptr; }},
      {"backward: k_scale is null", [](auto& p) { p.k_scale = nullptr; }},
      {"backward: v_scale is null", [](auto& p) { p.v_scale = nullptr; }},
      {"backward: row_max is null", [](auto& p) { p.row_max = nullptr; }},
      {"backward: row_sum is null", [](auto& p) { p.row_sum = nullptr; }},
      {"backward: token_of_slot is null", [](auto& p) { p.token_of_slot = nullptr; }},
      {"backward: tile_of_block is null", [](auto& p) { p.tile_of_block = nullptr; }},
      {"backward: kv.num_blocks is null", [](auto& p) { p.kv.num_blocks = nullptr; }},
      {"backward: kv.indices is null", [](auto& p) { p.kv.indices = nullptr; }},
      {"backward: kv.batch is 3, expected 1 or batch (2)", [](auto& p) { p.kv.batch = 3; }},
      {"backward: kv.heads is 2, expected 1 or heads (3)", [](auto& p) { p.kv.heads = 2; }},
      {"backward: kv.rows is 2, expected num_tiles (1): a row per query tile", [](auto& p) { p.kv.rows = 2; }},
      {"backward: kv.max_blocks is -1, expected at least 0", [](auto& p) { p.kv.max_blocks = -1; }},
      {"backward: q.num_blocks is null", [](auto& p) { p.q.num_blocks = nullptr; }},
      {"backward: q.rows is 1, expected num_blocks (2): a row per KV block", [](auto& p) { p.q.rows = 1; }},
      {"backward: out is null", [](auto& p) { p.out.data = nullptr; }},
      {"backward: grad_out is null", [](auto& p) { p.grad_out.data = nullptr; }},
      {"backward: dq is at", [](auto& p) { p.dq.data = fake_memory + 1; }},
      {"backward: grad_out is at", [](auto& p) { p.grad_out.data = fake_memory + 2; }},
      {"with strides (0, 0, 132, 1), expected a 16-byte aligned pointer", [](auto& p) { p.dv.stride_token = 132; }},
      {"backward: dk is null", [](auto& p) { p.dk.data = nullptr; }},
      {"backward: dv is null", [](auto& p) { p.dv.data = nullptr; }},
      {"backward: workspace is null", [](auto& p) { p.workspace = nullptr; }},
      {"backward: workspace is at", [](auto& p) { p.workspace = fake_memory + 8; }},
      {"backward: workspace_bytes is 16, expected at least", [](auto& p) { p.workspace_bytes = 16; }},
  };
  for (const BadCase& bad : cases) {
    BackwardParams params = good_params();
    bad.spoil(params);
    try {
      backward(params, nullptr);
      ADD_FAILURE() << "no error, expected: " << bad.text;
    } catch (const Error& error) {
      EXPECT_NE(std::string(error.what()).find(bad.text), std::string::npos)
          << error.what() << "\nexpected: " << bad.text;
    }
  }
}

TEST(BackwardErrors, WorkspaceIsWhatTheDocumentationSays) {
  BackwardParams params = good_params();
  const size_t rows = 2 * 3 * 2 * 128;
  EXPECT_EQ(backward_workspace_bytes(params), rows * (128 * 8 + 28 + 128 * 4));
  params.deterministic = true;
  EXPECT_EQ(backward_workspace_bytes(params), rows * (128 * 8 + 28));
}

// Wan 14B at 720p and 81 frames: 2 GB would do, and batches cost nothing.
TEST(BackwardErrors, WorkspaceOfALargeModelIsBounded) {
  const TileLayout layout = plan({21, 45, 80});
  BackwardParams params = good_params();
  for (int batch : {1, 2}) {
    for (bool deterministic : {true, false}) {
      params.size = {batch, 40, 128, layout.num_tokens, layout.num_blocks, layout.num_tiles};
      params.kv.rows = params.size.num_tiles, params.q.rows = params.size.num_blocks;
      params.deterministic = deterministic;
      const size_t bytes = backward_workspace_bytes(params);
      EXPECT_LE(bytes, size_t{1} << 30);
      EXPECT_GE(bytes, size_t{1} << 29) << "rounds of few heads: many tails";
      RecordProperty("bytes", std::to_string(bytes));
    }
  }
}

TEST(BackwardErrors, OneHeadOfAnySizeIsAccepted) {
  BackwardParams params = good_params();
  params.size = {1, 2, 128, 1 << 22, 1 << 15, 1 << 15};
  params.kv.rows = params.size.num_tiles, params.q.rows = params.size.num_blocks;
  params.deterministic = true;
  EXPECT_EQ(backward_workspace_bytes(params), (size_t{1} << 22) * (128 * 8 + 28));
}

}  // namespace
}  // namespace fpsattn::test
