// The FP8 tensor cores keep few mantissa bits. Run with the emulator's --fp8-acc=truncated, or on a GPU: neither the
// row sum nor O may be biased by it by more than 0.1 %, and by 0.25 % where scores are peaked or V is mostly its mean.
#include "forward_case.h"
#include "support/device.h"

namespace fpsattn::test {
namespace {

// Head dimension, mean of V (of spread 1), spread of Q and K.
class ForwardAccumulation : public testing::TestWithParam<std::tuple<int, float, float>> {};
INSTANTIATE_TEST_SUITE_P(Cases, ForwardAccumulation,
                         testing::Combine(testing::Values(64, 128), testing::Values(0.0f, 0.3f, 2.0f),
                                          testing::Values(0.3f, 1.0f, 1.7f)));

TEST_P(ForwardAccumulation, LongRowsAreNotBiased) {
  FPSATTN_SKIP_WITHOUT_DEVICE();
  const auto [head_dim, mean, spread] = GetParam();
  ForwardCase test;
  test.grid = {4, 24, 32}, test.tile = {4, 8, 4}, test.head_dim = head_dim;  // 24 blocks, 3072 keys
  test.length = [](int, int, int tile) { return tile == 3 ? 24 : 0; };
  test.generate = [mean = mean, spread = spread](Random& r, char what, int, int) {
    return what == 'v' ? mean + r.normal() : spread * r.normal();
  };
  const ForwardInputs in = make_inputs(test);
  const ForwardReference reference = reference_forward(in, Fp8Sum::kExact);
  const ForwardOutputs got = run_forward(in);
  double ratio = 0.0, projection = 0.0, square = 0.0;
  for (int slot = 3 * kBlockSlots; slot < 4 * kBlockSlots; ++slot) {
    ratio += got.row_sum[slot] * std::exp2(got.row_max[slot] - reference.row_max[slot]) / reference.row_sum[slot] /
             kBlockSlots;
    const size_t row = in.table.token_of_slot[slot];
    for (int d = 0; d < head_dim; ++d) {
      projection += got.out[row * head_dim + d] * reference.out[row * head_dim + d];
      square += reference.out[row * head_dim + d] * reference.out[row * head_dim + d];
    }
  }
  const double bound = mean > 1.0f || spread > 1.0f ? 2.5e-3 : 1e-3;
  EXPECT_NEAR(ratio, 1.0, bound) << "row sums";
  EXPECT_NEAR(projection / square, 1.0, bound) << "O";
}

}  // namespace
}  // namespace fpsattn::test
