// fpsattn::backward against the host reference, both modes.
#include <gtest/gtest-spi.h>

#include "backward_case.h"

namespace fpsattn::test {
namespace {

class Backward : public testing::TestWithParam<BackwardCase> {};

TEST_P(Backward, DeterministicModeEqualsTheHostReferenceAndRepeatsItsBits) {
  FPSATTN_SKIP_WITHOUT_DEVICE();
  BackwardRun run(GetParam());
  const Gradients first = run.launch(true);
  run.check(first);
  EXPECT_TRUE(run.launch(true) == first) << "other bits on a second run";
}

TEST_P(Backward, FastModeEqualsTheHostReference) {
  FPSATTN_SKIP_WITHOUT_DEVICE();
  BackwardRun run(GetParam());
  run.check(run.launch(false));
}

// A workspace for two of five heads, and for one: the same bits in deterministic mode.
TEST(BackwardWorkspace, LessOfItMeansMoreRounds) {
  FPSATTN_SKIP_WITHOUT_DEVICE();
  BackwardCase c;
  c.grid = {4, 6, 14};
  c.heads = c.mask_heads = 5;
  c.mask = Mask::kRandom;
  c.head_dim = 64;
  c.granularity = Granularity::kToken;
  BackwardRun run(c);
  const Gradients at_once = run.launch(true);
  run.check(at_once);
  for (int rounds : {2, 5}) EXPECT_TRUE(run.launch(true, false, rounds) == at_once) << rounds;
  run.check(run.launch(false, false, 2));
}

BackwardCase variant(const std::string& name, const std::function<void(BackwardCase&)>& change) {
  BackwardCase c;
  c.name = name;
  change(c);
  return c;
}

std::vector<BackwardCase> cases() {
  using C = BackwardCase;
  return {
      variant("dense_d128", [](C&) {}),
      variant("dense_d64", [](C& c) { c.head_dim = 64; }),
      variant("one_token",
              [](C& c) {
                c.grid = {1, 1, 1};
                c.tile = {1, 1, 1};
                c.heads = 2;
              }),
      variant("one_block",
              [](C& c) {
                c.grid = {2, 8, 8};
                c.tile = {2, 8, 8};
                c.head_dim = 64;
              }),
      variant("block_plus_one",
              [](C& c) {
                c.grid = {3, 1, 43};
                c.tile = {3, 1, 43};
                c.head_dim = 64;
              }),
      variant("primes_and_text",
              [](C& c) {
                c.grid = {3, 5, 11};
                c.tile = {3, 5, 7};
                c.text = 13;
              }),
      variant("long_lists_d64",
              [](C& c) {
                c.grid = {5, 7, 11};
                c.tile = {3, 7, 8};
                c.text = 5;
                c.head_dim = 64;
              }),
      variant("per_token", [](C& c) { c.granularity = Granularity::kToken; }),
      variant("per_token_scales_of_any_value",
              [](C& c) {
                c.granularity = Granularity::kToken;
                c.pow2 = false;
                c.head_dim = 64;
              }),
      variant("per_block_scales_of_any_value",
              [](C& c) {
                c.granularity = Granularity::kBlock;
                c.pow2 = false;
              }),
      variant("random_lists",
              [](C& c) {
                c.grid = {4, 6, 26};
                c.mask = Mask::kRandom;
                c.heads = 2;
                c.head_dim = 64;
              }),
      variant("masks_of_heads",
              [](C& c) {
                c.mask = Mask::kRandom;
                c.heads = c.mask_heads = 3;
              }),
      variant("masks_of_batches",
              [](C& c) {
                c.mask = Mask::kRandom;
                c.batch = c.mask_batch = 2;
                c.heads = 2;
                c.head_dim = 64;
              }),
      variant("mask_of_everyone",
              [](C& c) {
                c.mask = Mask::kRandom;
                c.batch = 2;
                c.heads = 2;
                c.head_dim = 64;
              }),
      variant("lists_wider_than_there_are_blocks",
              [](C& c) {
                c.mask = Mask::kRandom;
                c.extra_columns = 19;
                c.heads = c.mask_heads = 2;
                c.head_dim = 64;
              }),
      variant("own_block_only",
              [](C& c) {
                c.mask = Mask::kOwnBlock;
                c.text = 3;
              }),
      variant("all_rows_empty", [](C& c) { c.mask = Mask::kEmpty; }),
      variant("fp16", [](C& c) { c.dtype = DType::kFloat16; }),
      variant("hnd",
              [](C& c) {
                c.memory = Memory::kHnd;
                c.batch = 2;
                c.heads = 2;
                c.head_dim = 64;
              }),
      variant("fused_qkv",
              [](C& c) {
                c.memory = Memory::kFusedQkv;
                c.heads = 2;
              }),
      variant("fused_qkv_fp16",
              [](C& c) {
                c.memory = Memory::kFusedQkv;
                c.heads = 2;
                c.head_dim = 64;
                c.dtype = DType::kFloat16;
              }),
      variant("peaked_softmax", [](C& c) { c.magnitude = 3.0f; }),
      variant("flat_softmax",
              [](C& c) {
                c.magnitude = 0.0f;
                c.head_dim = 64;
              }),
  };
}

INSTANTIATE_TEST_SUITE_P(, Backward, testing::ValuesIn(cases()), [](const auto& info) { return info.param.name; });

// A NaN or an Inf goes where the formulas carry it, and nowhere else. Two heads: the other one stays finite.
TEST(BackwardNan, GoesWhereTheFormulasCarryIt) {
  FPSATTN_SKIP_WITHOUT_DEVICE();
  BackwardCase c;
  c.heads = 2;
  c.head_dim = 64;
  c.mask = Mask::kOwnBlock;
  for (int tensor = 0; tensor < 4; ++tensor) {
    for (bool deterministic : {true, false}) {
      SCOPED_TRACE(testing::Message() << "tensor " << tensor << (deterministic ? " deterministic" : " fast"));
      BackwardRun run(c, [=](float x, int which, int, int h, int s, int d) {
        return which == tensor && h == 0 && s == 5 && d == 3 ? NAN : x;
      });
      const Gradients got = run.launch(deterministic, /*nan_expected=*/true);
      run.check(got);
      size_t nans = 0;
      for (uint16_t bits : got.dk) {
        nans += std::isnan(from_bits16(bits, DType::kBFloat16));
      }
      EXPECT_GT(nans, 0u) << "the NaN was lost";
    }
  }
}

// The check itself: a gradient that is off by a sixteenth anywhere is found.
TEST(BackwardCheck, FindsAPlantedError) {
  FPSATTN_SKIP_WITHOUT_DEVICE();
  BackwardCase c;
  c.head_dim = 64;
  BackwardRun run(c);
  Gradients got = run.launch(true);
  size_t largest = 0;
  for (size_t i = 0; i < got.dk.size(); ++i) {
    if ((got.dk[i] & 0x7fff) > (got.dk[largest] & 0x7fff)) {
      largest = i;
    }
  }
  got.dk[largest] += 8;  // 8 of 128 steps of BF16
  testing::TestPartResultArray failures;
  {
    testing::ScopedFakeTestPartResultReporter reporter(&failures);
    run.check(got);
  }
  EXPECT_GT(failures.size(), 0);
}

}  // namespace
}  // namespace fpsattn::test
