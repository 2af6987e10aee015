// Who holds what: the claims of common/sm90/fragments.h, and the slot order of V that follows from them, against the
// layouts that CuTe gives for the same instructions.
#include <gtest/gtest.h>

#include <algorithm>
#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <vector>

#include "common/sm90/fragments.h"
#include "fpsattn/params.h"

namespace fpsattn::test {
namespace {

using namespace sm90;
namespace gmma = cute::SM90::GMMA;
constexpr int kThreads = 128, kRows = 64;

struct Element {
  int row, column;
  bool operator==(const Element& other) const { return row == other.row && column == other.column; }
};

// CuTe maps (thread, value) to row + 64 * column.
template <class Layout>
Element element_of(const Layout& layout, int thread, int value) {
  const int index = layout(thread, value);
  return {index % kRows, index / kRows};
}

template <int N>
void expect_accumulator() {
  for (int thread = 0; thread < kThreads; ++thread) {
    for (int i = 0; i < N / 2; ++i) {
      const Element element{accumulator_row(thread, i), accumulator_column(thread, i)};
      ASSERT_TRUE(element == element_of(gmma::CLayout_64xN<N>{}, thread, i))
          << "N " << N << " thread " << thread << " " << i;
    }
  }
}

TEST(Fragments, AccumulatorOwner) {
  expect_accumulator<32>();
  expect_accumulator<64>();
  expect_accumulator<72>();
  expect_accumulator<128>();
  expect_accumulator<136>();
}

// Whether scores packed to bytes are the A operand of P V when V has its slots in `order`: everything a thread puts
// into the instruction's row and position must be the score of that row and of the slot that V has at that position.
bool feeds_pv(const std::vector<int>& order) {
  for (int thread = 0; thread < kThreads; ++thread) {
    for (int i = 0; i < kBlockSlots / 8; ++i) {
      for (int b = 0; b < 4; ++b) {
        const int source = accumulator_of_byte(i, b);
        const Element score{accumulator_row(thread, source), accumulator_column(thread, source)};
        const Element operand = element_of(gmma::ALayout_64x32{}, thread, 4 * (i % 4) + b);
        const int position = 32 * (i / 4) + operand.column;
        const Element wanted{operand.row, position / 16 * 16 + order[position % 16]};
        if (!(score == wanted)) return false;
      }
    }
  }
  return true;
}

TEST(Fragments, PackedScoresAreTheOperandOfPvInTheSlotOrderOfV) {
  const std::vector<int> order(kVSlotOrder, kVSlotOrder + 16);
  EXPECT_TRUE(feeds_pv(order));
  std::vector<int> rotated = order;
  std::rotate(rotated.begin(), rotated.begin() + 1, rotated.end());
  EXPECT_FALSE(feeds_pv(rotated));
  std::vector<int> swapped = order;
  std::swap(swapped[2], swapped[3]);
  EXPECT_FALSE(feeds_pv(swapped));
}

TEST(Fragments, EveryScoreIsPackedOnce) {
  std::vector<int> uses(kBlockSlots / 2);
  for (int i = 0; i < kBlockSlots / 8; ++i) {
    for (int b = 0; b < 4; ++b) ++uses[accumulator_of_byte(i, b)];
  }
  EXPECT_EQ(uses, std::vector<int>(kBlockSlots / 2, 1));
}

TEST(Fragments, AccumulatorPackedTo16BitsIsAnAOperandAsItStands) {
  for (int thread = 0; thread < kThreads; ++thread) {
    for (int i = 0; i < kBlockSlots / 4; ++i) {
      for (int b = 0; b < 2; ++b) {
        const int source = accumulator_of_half(i, b);
        const Element held{accumulator_row(thread, source), accumulator_column(thread, source)};
        const Element operand = element_of(gmma::ALayout_64x16{}, thread, 2 * (i % 4) + b);
        ASSERT_TRUE((held == Element{operand.row, 16 * (i / 4) + operand.column})) << thread << " " << i << " " << b;
      }
    }
  }
}

}  // namespace
}  // namespace fpsattn::test
