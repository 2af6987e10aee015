// Every parameter check of fpsattn::forward: the text says what came and what was wanted. No device needed: checks come
// first.
#include <gtest/gtest.h>

#include <cmath>
#include <functional>

#include "fpsattn/launch.h"
#include "fpsattn/status.h"

namespace fpsattn::test {
namespace {

alignas(16) char memory[64];

template <class T>
T* at(int offset = 0) {
  return reinterpret_cast<T*>(memory + offset);
}

ForwardParams good_params() {
  ForwardParams params;
  params.size = {2, 4, 128, 500, 4, 2};
  params.softmax_scale = 0.1f;
  params.q8 = params.k8 = params.v8t = at<uint8_t>();
  params.q_scale = params.k_scale = params.v_scale = at<float>();
  params.token_of_slot = params.tile_of_block = at<int32_t>();
  params.kv = {at<int32_t>(), at<int32_t>(), 1, 1, 2, 4};
  params.out = {memory, 4 * 500 * 128, 128, 4 * 128};
  params.lse = params.row_max = params.row_sum = at<float>();
  params.workspace = memory;
  params.workspace_bytes = forward_workspace_bytes(params);
  return params;
}

struct Case {
  const char* name;
  std::function<void(ForwardParams&)> spoil;
  const char* text;
};

class ForwardErrors : public testing::TestWithParam<Case> {};

TEST_P(ForwardErrors, SayWhatIsWrong) {
  ForwardParams params = good_params();
  GetParam().spoil(params);
  try {
    forward(params, nullptr);
    FAIL() << "no error";
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find(GetParam().text), std::string::npos) << error.what();
    EXPECT_EQ(std::string(error.what()).find("fpsattn.forward: "), 0u) << error.what();
  }
}

const Case kCases[] = {
    {"head_dim", [](ForwardParams& p) { p.size.head_dim = 80; }, "head_dim is 80, expected 64, 96 or 128"},
    {"blocks", [](ForwardParams& p) { p.size.num_blocks = 3; }, "num_blocks is 3"},
    {"group", [](ForwardParams& p) { p.size.group = 3; }, "group is 3, expected a divisor of heads (4)"},
    {"key_coordinates", [](ForwardParams& p) { p.size.kv_blocks = 2000000; },
     "batch * heads * num_blocks is 16000000, expected at most"},
    {"coordinates", [](ForwardParams& p) { p.size.num_blocks = 2000000; },
     "batch * heads * num_blocks is 16000000, expected at most"},
    {"kv_batch", [](ForwardParams& p) { p.kv.batch = 3; }, "kv.batch is 3, expected 1 or batch (2)"},
    {"kv_heads", [](ForwardParams& p) { p.kv.heads = 2; }, "kv.heads is 2, expected 1 or heads (4)"},
    {"kv_rows", [](ForwardParams& p) { p.kv.rows = 4; }, "kv.rows is 4, expected num_tiles (2)"},
    {"kv_max_blocks", [](ForwardParams& p) { p.kv.max_blocks = -1; }, "kv.max_blocks is -1"},
    {"kv_num_blocks", [](ForwardParams& p) { p.kv.num_blocks = nullptr; }, "kv.num_blocks is null"},
    {"kv_indices", [](ForwardParams& p) { p.kv.indices = nullptr; }, "kv.indices is null"},
    {"scale_zero", [](ForwardParams& p) { p.softmax_scale = 0.0f; },
     "softmax_scale is 0, expected a positive finite number"},
    {"scale_nan", [](ForwardParams& p) { p.softmax_scale = NAN; }, "softmax_scale is nan"},
    {"out_dtype", [](ForwardParams& p) { p.out_dtype = static_cast<DType>(3); },
     "out_dtype is 3, expected 0 (bfloat16), 1 (float16) or 2 (float32)"},
    {"q8", [](ForwardParams& p) { p.q8 = nullptr; }, "q8 is null"},
    {"k8", [](ForwardParams& p) { p.k8 = at<uint8_t>(8); }, "expected 16-byte alignment"},
    {"v8t", [](ForwardParams& p) { p.v8t = nullptr; }, "v8t is null"},
    {"q_scale", [](ForwardParams& p) { p.q_scale = nullptr; }, "q_scale is null"},
    {"k_scale", [](ForwardParams& p) { p.k_scale_per_token = true, p.k_scale = at<float>(4); }, "k_scale is at"},
    {"v_scale", [](ForwardParams& p) { p.v_scale = nullptr; }, "v_scale is null"},
    {"token_of_slot", [](ForwardParams& p) { p.token_of_slot = nullptr; }, "token_of_slot is null"},
    {"tile_of_block", [](ForwardParams& p) { p.tile_of_block = nullptr; }, "tile_of_block is null"},
    {"out", [](ForwardParams& p) { p.out.data = nullptr; }, "out is null"},
    {"out_strides", [](ForwardParams& p) { p.out.stride_token = 129; }, "strides that are multiples of 8"},
    {"lse", [](ForwardParams& p) { p.lse = nullptr; }, "lse is null"},
    {"row_max", [](ForwardParams& p) { p.row_max = nullptr; }, "row_max is null"},
    {"row_sum", [](ForwardParams& p) { p.row_sum = nullptr; }, "row_sum is null"},
    {"workspace", [](ForwardParams& p) { p.workspace = nullptr; }, "workspace is null"},
    {"workspace_bytes", [](ForwardParams& p) { p.workspace_bytes -= 1; }, "workspace_bytes is"},
};

INSTANTIATE_TEST_SUITE_P(Checks, ForwardErrors, testing::ValuesIn(kCases),
                         [](const auto& info) { return info.param.name; });

}  // namespace
}  // namespace fpsattn::test
