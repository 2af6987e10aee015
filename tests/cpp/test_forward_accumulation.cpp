// The FP8 tensor cores keep few mantissa bits. Neither the row sum nor O may be biased by it by more than 0.1 %: run
// with the emulator's
// --fp8-acc=truncated, or on a GPU.
#include "forward_case.h"
#include "support/device.h"

namespace fpsattn::test {
namespace {

class ForwardAccumulation : public testing::TestWithParam<int> {};
INSTANTIATE_TEST_SUITE_P(HeadDims, ForwardAccumulation, testing::Values(64, 128));

TEST_P(ForwardAccumulation, LongRowsAreNotBiased) {
  FPSATTN_SKIP_WITHOUT_DEVICE();
  ForwardCase test;
  test.grid = {4, 24, 32}, test.tile = {4, 8, 4}, test.head_dim = GetParam();  // 24 blocks, 3072 keys
  test.length = [](int, int, int tile) { return tile == 3 ? 24 : 0; };
  test.generate = [](Random& r, char what, int, int) { return what == 'v' ? 0.3f + r.normal() : r.normal(); };
  const ForwardInputs in = make_inputs(test);
  const ForwardReference reference = reference_forward(in);
  const ForwardOutputs got = run_forward(in);
  double ratio = 0.0, projection = 0.0, square = 0.0;
  for (int slot = 3 * kBlockSlots; slot < 4 * kBlockSlots; ++slot) {
    ratio += got.row_sum[slot] * std::exp2(got.row_max[slot] - reference.row_max[slot]) / reference.row_sum[slot] /
             kBlockSlots;
    const size_t row = in.table.token_of_slot[slot];
    for (int d = 0; d < GetParam(); ++d) {
      projection += got.out[row * GetParam() + d] * reference.out[row * GetParam() + d];
      square += reference.out[row * GetParam() + d] * reference.out[row * GetParam() + d];
    }
  }
  EXPECT_NEAR(ratio, 1.0, 1e-3) << "row sums";
  EXPECT_NEAR(projection / square, 1.0, 1e-3) << "O";
}

}  // namespace
}  // namespace fpsattn::test
