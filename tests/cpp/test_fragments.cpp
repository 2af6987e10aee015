// Who holds what: the claims of common/sm90/fragments.h, and the slot order of V that follows from them, against the
// layouts that CuTe gives for the same instructions.
#include <gtest/gtest.h>

#include <algorithm>
#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <vector>

#include "backward/sm90/products.h"
#include "common/sm90/fragments.h"
#include "common/sm90/tile.h"
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

// The products of the backward are TiledMMAs over both warpgroups. Register i of a thread, in the order that its fragment
// is indexed and packed:
template <class Mma, int kRows, int kColumns>
bool accumulator_is(const Mma& mma, bool split_rows) {
  const auto all = cute::make_identity_tensor(cute::Shape<cute::Int<kRows>, cute::Int<kColumns>>{});
  for (int thread = 0; thread < 2 * kThreads; ++thread) {
    const auto mine = mma.get_slice(thread).partition_C(all);
    const int warpgroup = thread / kThreads, columns = split_rows ? kColumns : kColumns / 2;
    for (int i = 0; i < columns / 2; ++i) {
      const Element wanted{accumulator_row(thread % kThreads, i) + (split_rows ? kRows / 2 * warpgroup : 0),
                           accumulator_column(thread % kThreads, i) + (split_rows ? 0 : columns * warpgroup)};
      if (!(Element{cute::get<0>(mine(i)), cute::get<1>(mine(i))} == wanted)) return false;
    }
    if (static_cast<int>(cute::size(mine)) != columns / 2) return false;
  }
  return true;
}

// ... of an accumulator, shifted by `rotation` registers, is what the A operand of the next product wants.
template <class Scores, class Gradient, int kColumns>
bool packs_into_operand(int rotation) {
  const auto all = cute::make_identity_tensor(cute::Shape<cute::Int<128>, cute::Int<kColumns>>{});
  for (int thread = 0; thread < 2 * kThreads; ++thread) {
    const auto held = Scores{}.get_slice(thread).partition_C(all);
    const auto wanted = Gradient{}.get_slice(thread).partition_A(all);
    const int registers = static_cast<int>(cute::size(held));
    if (registers != static_cast<int>(cute::size(wanted))) return false;
    for (int i = 0; i < registers; ++i) {
      if (held((i + rotation) % registers) != wanted(i)) return false;
    }
  }
  return true;
}

TEST(Fragments, ProductsOfTheBackward) {
  using namespace backward;
  EXPECT_TRUE((accumulator_is<SharedMma<E4m3, 64, SplitRows>, 128, 64>({}, true)));    // S^T
  EXPECT_TRUE((accumulator_is<SharedMma<Bf16, 128, SplitRows>, 128, 128>({}, true)));  // dP of the dQ kernel
  EXPECT_TRUE((accumulator_is<RegisterMma<128>, 128, 128>({}, true)));                 // dK, dV, dQ
  EXPECT_TRUE((accumulator_is<SharedMma<Bf16, 64, SplitColumns, Major::MN>, 64, 128>({}, false)));  // dQ, fast mode
  EXPECT_FALSE((accumulator_is<SharedMma<Bf16, 64, SplitColumns, Major::MN>, 64, 128>({}, true)));
  EXPECT_TRUE((packs_into_operand<SharedMma<E4m3, 64, SplitRows>, RegisterMma<64>, 64>(0)));
  EXPECT_TRUE((packs_into_operand<SharedMma<Bf16, 128, SplitRows>, RegisterMma<128>, 128>(0)));
  for (int rotation : {1, 2, 4, 8}) {
    EXPECT_FALSE((packs_into_operand<SharedMma<E4m3, 64, SplitRows>, RegisterMma<64>, 64>(rotation))) << rotation;
  }
}

// Elements whose place is not what TMA's swizzle says (CUDA programming guide: 16-byte chunks of a row are exchanged by the
// number of its 128-byte line, modulo 8, or 4 where rows have 64 bytes).
template <class Tile>
int misplaced() {
  constexpr int kSize = sizeof(typename Tile::Element), kRowBytes = Tile::kPanelColumns * kSize;
  int wrong = 0;
  for (int row = 0; row < Tile::kRows; ++row) {
    for (int column = 0; column < Tile::kColumns; ++column) {
      const int line = column / Tile::kPanelColumns * Tile::kRows + row;
      const int byte = line * kRowBytes + column % Tile::kPanelColumns * kSize;
      const int swizzled = byte ^ (byte >> 7 & (kRowBytes == 128 ? 7 : 3)) << 4;
      wrong += Tile::index(row, column) != swizzled / kSize;
    }
  }
  return wrong;
}

TEST(Tiles, AnElementLiesWhereTmaPutsIt) {
  EXPECT_EQ((misplaced<Tile<E4m3, 128, 128>>()), 0);
  EXPECT_EQ((misplaced<Tile<E4m3, 64, 64>>()), 0);
  EXPECT_EQ((misplaced<Tile<Bf16, 128, 64>>()), 0);
  EXPECT_EQ((misplaced<Tile<Bf16, 64, 128>>()), 0);      // two panels
  EXPECT_EQ((misplaced<Tile<Bf16, 128, 64, 32>>()), 0);  // of 64 bytes
}

// The backward takes the place of (key + 8 half, 8 group + query) apart like this.
TEST(Tiles, TheSwizzleIsLinearInTheBitsOfAnIndex) {
  using Ds = Tile<Bf16, 128, 64>;
  for (int key = 0; key < 120; ++key) {
    for (int i = 0; i < 64; ++i) {
      const int query = i % 4 * 2, group = i / 4 % 8, half = i / 32;
      EXPECT_EQ((Ds::index(key, query) ^ Ds::index(0, 8 * group)) + Ds::index(8 * half, 0),
                Ds::index(key + 8 * half, 8 * group + query));
    }
  }
}

}  // namespace
}  // namespace fpsattn::test
