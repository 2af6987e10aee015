// The forward kernel against the host reference: shapes, lists, scales, extreme values.
#include "forward_case.h"
#include "support/device.h"

namespace fpsattn::test {
namespace {

class Forward : public testing::TestWithParam<ForwardCase> {};

TEST_P(Forward, MatchesReference) {
  FPSATTN_SKIP_WITHOUT_DEVICE();
  const ForwardCase& test = GetParam();
  const ForwardInputs inputs = make_inputs(test);
  expect_matches_reference(inputs, run_forward(inputs, test.out_dtype, test.memory), test.out_dtype);
}

std::vector<ForwardCase> cases() {
  std::vector<ForwardCase> list;
  const auto add = [&](const std::string& name, const std::function<void(ForwardCase&)>& change) {
    for (const int dim : {128, 64}) {
      ForwardCase test;
      test.name = name + "_d" + std::to_string(dim);
      test.head_dim = dim;
      change(test);
      list.push_back(test);
    }
  };
  add("one_token", [](ForwardCase& t) { t.grid = {1, 1, 1}, t.tile = {1, 1, 1}; });
  add("one_block", [](ForwardCase& t) { t.grid = {2, 8, 8}, t.tile = {2, 8, 8}; });
  add("dense", [](ForwardCase& t) { t.heads = 2; });
  add("clipped_odd_grid", [](ForwardCase& t) { t.grid = {3, 7, 11}, t.tile = {3, 4, 5}, t.memory = OutMemory::kHnd; });
  add("tiles_of_3_blocks_and_text",
      [](ForwardCase& t) { t.grid = {5, 7, 13}, t.tile = {5, 7, 9}, t.text = 77, t.out_dtype = DType::kFloat16; });
  add("tiles_of_5_blocks",
      [](ForwardCase& t) { t.grid = {4, 10, 16}, t.tile = {4, 10, 15}, t.memory = OutMemory::kPadded; });
  add("fp32_output", [](ForwardCase& t) {  // empty rows too
    t.grid = {3, 7, 11}, t.tile = {3, 4, 5}, t.heads = 3, t.memory = OutMemory::kPadded, t.out_dtype = DType::kFloat32;
    t.length = [](int, int, int tile) { return tile % 4; };
  });
  add("list_lengths_per_batch_and_head", [](ForwardCase& t) {
    t.grid = {3, 10, 11}, t.tile = {3, 5, 4}, t.batch = 2, t.heads = 2, t.mask_batch = t.mask_heads = true;
    t.length = [](int b, int h, int tile) { return (tile * 3 + h + 2 * b) % 6; };  // 0 and 1 included
  });
  add("lists_per_batch", [](ForwardCase& t) {
    t.batch = 2, t.heads = 2, t.mask_batch = true;
    t.length = [](int b, int, int tile) { return 1 + (tile + b) % 2; };
  });
  add("lists_per_head", [](ForwardCase& t) {
    t.batch = 2, t.heads = 2, t.mask_heads = true;
    t.length = [](int, int h, int) { return 2 - h; };
  });
  add("block_scales", [](ForwardCase& t) { t.granularity = Granularity::kBlock, t.heads = 2, t.grid = {3, 9, 10}; });
  add("token_scales", [](ForwardCase& t) {
    t.granularity = Granularity::kToken, t.heads = 2, t.grid = {3, 9, 10}, t.tile = {3, 9, 5};
  });
  add("pow2_scales_without_smoothing",
      [](ForwardCase& t) { t.pow2 = true, t.smooth_k = false, t.with_q_k_mean = false; });
  add("promotion_1200_keys", [](ForwardCase& t) {
    t.grid = {4, 15, 20}, t.tile = {4, 5, 5};
    t.length = [](int, int, int tile) { return tile % 4 == 0 ? 1 << 30 : 1; };
  });
  add("huge_scores", [](ForwardCase& t) { t.softmax_scale = 40.0f; });  // logits to +-1e4
  add("constant_rows", [](ForwardCase& t) {
    t.generate = [](Random& r, char what, int, int d) {
      return what == 'v' ? r.normal() : what == 'q' ? 0.5f : d % 3 - 1.0f;
    };
  });
  add("equal_keys", [](ForwardCase& t) {
    t.smooth_k = false;
    t.generate = [](Random& r, char what, int, int d) { return what == 'k' ? 0.25f * (d % 7) - 0.5f : r.normal(); };
  });
  add("dominant_key", [](ForwardCase& t) {
    t.generate = [](Random& r, char what, int token, int d) {
      return what == 'q'                   ? 1.0f + 0.1f * r.normal()
             : what == 'k' && token == 137 ? 6.0f
                                           : r.normal() * (what == 'k' && d > 99 ? 0 : 1);
    };
  });
  add("rising_maxima", [](ForwardCase& t) {  // the maximum moves in every block
    t.smooth_k = false;
    t.generate = [](Random& r, char what, int token, int) {
      return what == 'v' ? r.normal() : what == 'q' ? 1.0f : 0.01f * token + 0.1f * r.normal();
    };
  });
  add("negative_maxima",
      [](ForwardCase& t) {  // blocks of scores around -1.4, -0.9, -0.8 and -0.2 times sqrt(D)
        t.smooth_k = false, t.grid = {1, 25, 40}, t.tile = {1, 5, 20};
        t.length = [](int, int, int tile) { return 2 + tile % 7; };
        t.generate = [](Random& r, char what, int token, int) {
          if (what != 'k') return what == 'v' ? r.normal() : 1.0f;
          const int step = token / 200;
          return (step % 2 ? -0.9f : 0.3f * step - 1.4f) + 0.05f * r.normal();
        };
      });
  return list;
}

// What the comparison allows for lost bits and roundings must not hide a fault: each of these is found, however the
// device adds.
class ForwardPlanted : public testing::TestWithParam<int> {};
INSTANTIATE_TEST_SUITE_P(HeadDims, ForwardPlanted, testing::Values(64, 128));

TEST_P(ForwardPlanted, FaultsAreFound) {
  FPSATTN_SKIP_WITHOUT_DEVICE();
  ForwardCase test;
  test.grid = {3, 9, 10}, test.tile = {3, 9, 4}, test.head_dim = GetParam();
  const ForwardInputs in = make_inputs(test);
  const size_t v_row = kBlockSlots, ones = GetParam() * v_row;
  const struct {
    const char* name;
    std::function<void(ForwardInputs&)> spoil;
  } faults[] = {
      {"v_scale 3 % high",
       [](ForwardInputs& x) {
         for (float& s : x.data.v_scale) s *= 1.03f;
       }},
      {"k_scale of one block 3 % high", [](ForwardInputs& x) { x.data.k_scale[1] *= 1.03f; }},
      {"softmax_scale 1 % high", [](ForwardInputs& x) { x.softmax_scale *= 1.01f; }},
      {"slots of V in raster order",
       [&](ForwardInputs& x) {
         for (size_t row = 0; row < x.data.v8t.size(); row += 16) {
           const std::vector<uint8_t> old(x.data.v8t.begin() + row, x.data.v8t.begin() + row + 16);
           for (int i = 0; i < 16; ++i) x.data.v8t[row + kVSlotOrder[i]] = old[i];
         }
       }},
      {"one key left out of one block's row sums", [&](ForwardInputs& x) { x.data.v8t[ones] = 0; }},
      {"a block visited twice, another not at all",
       [](ForwardInputs& x) {
         for (int r = 0; r < x.size.num_tiles; ++r) x.indices[r * x.max_blocks + 1] = x.indices[r * x.max_blocks];
       }},
      {"one key's value in one channel negated", [&](ForwardInputs& x) { x.data.v8t[5 * v_row] ^= 0x80; }},
      {"q . k_mean left out of lse", [](ForwardInputs& x) { x.with_q_k_mean = false; }},
  };
  EXPECT_EQ(count_mismatches(in, run_forward(in), test.out_dtype, true), 0);
  for (const auto& fault : faults) {
    ForwardInputs spoilt = in;
    fault.spoil(spoilt);
    EXPECT_GT(count_mismatches(in, run_forward(spoilt), test.out_dtype, false), 0) << fault.name;
  }
}

INSTANTIATE_TEST_SUITE_P(Cases, Forward, testing::ValuesIn(cases()), [](const auto& info) { return info.param.name; });

}  // namespace
}  // namespace fpsattn::test
