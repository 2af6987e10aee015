// fpsattn::quantize against the host reference, bit for bit.
#include "quantize_case.h"

namespace fpsattn::test {
namespace {

class Quantize : public testing::TestWithParam<QuantizeCase> {};

TEST_P(Quantize, EqualsTheHostReference) {
  FPSATTN_SKIP_WITHOUT_DEVICE();
  QuantizeRun(GetParam()).check_twice();
}

// Every combination of granularity, head dimension and dtype, on a grid with clipped tiles of 2, 1 and odd sizes, and
// text.
std::vector<QuantizeCase> product_cases() {
  std::vector<QuantizeCase> cases;
  for (Granularity granularity : {Granularity::kTile, Granularity::kBlock, Granularity::kToken}) {
    for (int head_dim : {64, 96, 128}) {
      for (DType dtype : {DType::kBFloat16, DType::kFloat16}) {
        QuantizeCase c;
        c.name = std::string(granularity == Granularity::kTile    ? "tile"
                             : granularity == Granularity::kBlock ? "block"
                                                                  : "token") +
                 "_d" + std::to_string(head_dim) + (dtype == DType::kBFloat16 ? "_bf16" : "_fp16");
        c.grid = {5, 7, 11};
        c.tile = {3, 7, 8};  // 168 tokens: 2 blocks; clipped to 112, 63, 42
        c.text = 5;
        c.head_dim = head_dim;
        c.dtype = dtype;
        c.granularity = granularity;
        cases.push_back(c);
      }
    }
  }
  return cases;
}

QuantizeCase variant(const std::string& name, const std::function<void(QuantizeCase&)>& change) {
  QuantizeCase c;
  c.name = name;
  c.grid = {4, 6, 7};
  c.tile = {4, 6, 6};  // 144 and 24 tokens
  c.heads = 1;
  change(c);
  return c;
}

std::vector<QuantizeCase> single_cases() {
  using C = QuantizeCase;
  return {
      variant("one_token",
              [](C& c) {
                c.grid = {1, 1, 1};
                c.tile = {1, 1, 1};
                c.heads = 3;
              }),
      variant("block_minus_one",
              [](C& c) {
                c.grid = {1, 1, 127};
                c.tile = {1, 1, 127};
              }),
      variant("one_block",
              [](C& c) {
                c.grid = {2, 8, 8};
                c.tile = {2, 8, 8};
              }),
      variant("block_plus_one",
              [](C& c) {
                c.grid = {3, 1, 43};
                c.tile = {3, 1, 43};
              }),
      variant("batch_3_heads_5",
              [](C& c) {
                c.batch = 3;
                c.heads = 5;
                c.head_dim = 64;
              }),
      variant("hnd",
              [](C& c) {
                c.memory = Memory::kHnd;
                c.batch = 2;
                c.heads = 2;
              }),
      variant("fused_qkv",
              [](C& c) {
                c.memory = Memory::kFusedQkv;
                c.batch = 2;
                c.heads = 2;
              }),
      variant("text_only_tail",
              [](C& c) {
                c.grid = {1, 2, 3};
                c.tile = {1, 2, 3};
                c.text = 513;
                c.head_dim = 64;
              }),
      variant("tiles_of_3_blocks",
              [](C& c) {
                c.grid = {5, 8, 9};
                c.tile = {5, 8, 9};
                c.text = 7;
              }),
      variant("tiles_of_4_blocks",
              [](C& c) {
                c.grid = {8, 8, 15};
                c.tile = {8, 8, 8};
                c.head_dim = 64;
              }),
      variant("tile_of_10_blocks",
              [](C& c) {
                c.grid = {9, 11, 12};
                c.tile = {9, 11, 12};
                c.head_dim = 64;
              }),
      variant("uneven_tiles",
              [](C& c) {
                c.grid = {9, 5, 13};
                c.tile = {8, 5, 12};
                c.head_dim = 64;
              }),  // 4, 1, 1, 1 blocks: read twice
      variant("mean_given",
              [](C& c) {
                c.mean = Mean::kGiven;
                c.heads = 3;
              }),
      variant("mean_given_token_fp16",
              [](C& c) {
                c.mean = Mean::kGiven;
                c.granularity = Granularity::kToken;
                c.dtype = DType::kFloat16;
              }),
      variant("mean_off",
              [](C& c) {
                c.mean = Mean::kOff;
                c.heads = 3;
              }),
      variant("mean_of_every_7th", [](C& c) { c.k_mean_stride = 7; }),
      variant("mean_of_first_token", [](C& c) { c.k_mean_stride = 1000; }),
      variant("mean_of_many_parts",
              [](C& c) {
                c.grid = {8, 13, 17};
                c.tile = {8, 8, 8};
                c.head_dim = 64;
              }),  // 1768 rows: 4 parts
      variant("pow2_tile", [](C& c) { c.pow2 = true; }),
      variant("without_block_sums", [](C& c) { c.block_sums = false; }),
      variant("pow2_token",
              [](C& c) {
                c.pow2 = true;
                c.granularity = Granularity::kToken;
                c.head_dim = 64;
              }),
      variant("delayed_v",
              [](C& c) {
                c.given_v_absmax = true;
                c.heads = 2;
              }),
      variant("delayed_v_pow2_fp16",
              [](C& c) {
                c.given_v_absmax = true;
                c.pow2 = true;
                c.dtype = DType::kFloat16;
                c.head_dim = 64;
              }),
      variant("nothing_computed",
              [](C& c) {
                c.given_v_absmax = true;
                c.mean = Mean::kGiven;
              }),
      variant("outliers",
              [](C& c) {
                c.values = Values::kOutliers;
                c.granularity = Granularity::kBlock;
              }),
      variant("ties_tile",
              [](C& c) {
                c.values = Values::kTies;
                c.mean = Mean::kGiven;
              }),
      variant("ties_token_fp16",
              [](C& c) {
                c.values = Values::kTies;
                c.mean = Mean::kOff;
                c.dtype = DType::kFloat16;
                c.granularity = Granularity::kToken;
              }),
      variant("tiny",
              [](C& c) {
                c.values = Values::kTiny;
                c.mean = Mean::kOff;
                c.granularity = Granularity::kToken;
              }),
      variant("tiny_tile_pow2",
              [](C& c) {
                c.values = Values::kTiny;
                c.pow2 = true;
              }),
      variant("huge",
              [](C& c) {
                c.values = Values::kHuge;
                c.mean = Mean::kOff;
              }),
      variant("huge_delayed_v",
              [](C& c) {
                c.values = Values::kHuge;
                c.given_v_absmax = true;
                c.mean = Mean::kOff;
              }),
      variant("zeros_tile",
              [](C& c) {
                c.values = Values::kZeros;
                c.heads = 2;
                c.mean = Mean::kOff;
              }),
      variant("zeros_token",
              [](C& c) {
                c.values = Values::kZeros;
                c.heads = 2;
                c.mean = Mean::kOff;
                c.granularity = Granularity::kToken;
              }),
  };
}

std::string case_name(const testing::TestParamInfo<QuantizeCase>& info) { return info.param.name; }
INSTANTIATE_TEST_SUITE_P(Product, Quantize, testing::ValuesIn(product_cases()), case_name);
INSTANTIATE_TEST_SUITE_P(Single, Quantize, testing::ValuesIn(single_cases()), case_name);

// NaN or Inf in one element makes its whole group NaN and no other.
class QuantizeNonFinite : public testing::TestWithParam<std::tuple<Granularity, float>> {};

TEST_P(QuantizeNonFinite, StaysInItsGroup) {
  FPSATTN_SKIP_WITHOUT_DEVICE();
  const auto [granularity, bad] = GetParam();
  QuantizeCase c = variant("non_finite", [](QuantizeCase& c) { c.mean = Mean::kOff; });
  c.granularity = granularity;
  c.heads = 2;
  QuantizeRun run(c, [bad = bad](float x, int tensor, int, int h, int s, int d) {
    const bool hit = h == 1 && s == 50 + tensor && d == 3 + tensor;
    return hit ? bad : x;
  });
  run.check_twice();
  const std::vector<float> v_scale = run.v_scale.to_host();
  EXPECT_TRUE(std::isnan(v_scale[c.head_dim + 5]));
  EXPECT_EQ(std::count_if(v_scale.begin(), v_scale.end(), [](float s) { return std::isnan(s); }), 1);
  const std::vector<float> q_scale = run.q_scale.to_host();
  const int64_t groups = granularity == Granularity::kTile ? 2 : 1;  // the tile has two blocks
  EXPECT_EQ(std::count_if(q_scale.begin(), q_scale.end(), [](float s) { return std::isnan(s); }), groups);
}
INSTANTIATE_TEST_SUITE_P(All, QuantizeNonFinite,
                         testing::Combine(testing::Values(Granularity::kTile, Granularity::kBlock, Granularity::kToken),
                                          testing::Values(NAN, INFINITY, -INFINITY)));

TEST(QuantizeSpecial, InfiniteKeyWithSmoothingMakesItsHeadNaN) {
  FPSATTN_SKIP_WITHOUT_DEVICE();
  QuantizeRun run(
      variant("inf_mean", [](QuantizeCase& c) { c.heads = 2; }),
      [](float x, int tensor, int, int h, int s, int) { return tensor == 1 && h == 0 && s == 7 ? INFINITY : x; });
  run.check_twice();
}

// Saturation must not turn an Inf into a number, even where V's scale was given and says nothing of it.
TEST(QuantizeSpecial, InfiniteValueWithDelayedScaleStaysNonFinite) {
  FPSATTN_SKIP_WITHOUT_DEVICE();
  QuantizeRun run(
      variant("inf_delayed", [](QuantizeCase& c) { c.given_v_absmax = true; }),
      [](float x, int tensor, int, int, int s, int d) { return tensor == 2 && s == 9 && d == 77 ? -INFINITY : x; });
  run.check_twice();
  const std::vector<uint8_t> v8t = run.v8t.to_host();
  EXPECT_EQ(std::count_if(v8t.begin(), v8t.end(), [](uint8_t b) { return (b & 0x7f) == 0x7f; }), 1);
}

// A table may list tokens in any order, and tiles need not be boxes.
TEST(QuantizeSpecial, AnyPermutationOfTokens) {
  FPSATTN_SKIP_WITHOUT_DEVICE();
  QuantizeCase c = variant("permutation", [](QuantizeCase& c) {
    c.head_dim = 64;
    c.heads = 2;
  });
  QuantizeRun run(c);
  std::vector<int32_t> tokens(run.table.num_tokens);
  for (int i = 0; i < run.table.num_tokens; ++i) {
    tokens[i] = (i * 53 + 11) % run.table.num_tokens;  // 53 and 168 have no common factor
  }
  run.table = SlotTable();
  run.table.add_tile({tokens.begin(), tokens.begin() + 129});
  run.table.add_tile({tokens.begin() + 129, tokens.end()});
  ASSERT_EQ(run.table.token_of_slot.size(), run.token_of_slot.size());
  cudaMemcpy(run.token_of_slot.data(), run.table.token_of_slot.data(), run.token_of_slot.bytes(),
             cudaMemcpyHostToDevice);
  run.check_twice();
}

// Two heads 2^31 + 8 elements apart: element offsets do not fit in 32 bits.
TEST(QuantizeSpecial, OffsetsBeyond32Bits) {
  FPSATTN_SKIP_WITHOUT_DEVICE();
  QuantizeCase c = variant("far", [](QuantizeCase& c) {
    c.heads = 2;
    c.head_dim = 64;
    c.memory = Memory::kHnd;
  });
  QuantizeRun run(c);
  constexpr int64_t kFar = (int64_t{1} << 31) + 8;
  uint16_t* memory = nullptr;
  const size_t head_bytes = static_cast<size_t>(run.params.size.num_tokens) * c.head_dim * 2;
  if (cudaMalloc(&memory, kFar * 2 + head_bytes) != cudaSuccess) {
    GTEST_SKIP() << "no 4.3 GB of device memory";
  }
  const auto* source = static_cast<const uint16_t*>(run.params.v.data);
  cudaMemcpy(memory, source, head_bytes, cudaMemcpyDeviceToDevice);
  cudaMemcpy(memory + kFar, source + run.params.v.stride_head, head_bytes, cudaMemcpyDeviceToDevice);
  run.params.v.data = memory;
  run.params.v.stride_head = kFar;
  run.check_twice();
  cudaFree(memory);
}

}  // namespace
}  // namespace fpsattn::test
