// Tiles in shared memory. Each is one CuTe layout, from which follow the matrix descriptor and the steps of its WGMMAs
// (mma.h), its tensor map (tensor_map.h) and its load (tma.h): a swizzle or a stride is written here and nowhere else.
#pragma once

#include <cutlass/bfloat16.h>
#include <cutlass/float8.h>

#include <cstdint>
#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <cute/swizzle_layout.hpp>

namespace fpsattn::sm90 {

using E4m3 = cutlass::float_e4m3_t;
using Bf16 = cutlass::bfloat16_t;
using Major = cute::SM90::GMMA::Major;

inline constexpr int kSwizzleBytes = 128;  // the widest swizzle: 8 rows of 128 bytes

// kRows x kColumns elements, each row contiguous, in panels of kPanelColumns columns: [panel][row][column in panel],
// swizzled over the width of a panel. A panel is as wide as the widest swizzle allows unless said otherwise. Read by
// WGMMA as it stands (K-major: columns are summed over) or, 16-bit elements, transposed (MN-major: rows are summed
// over).
template <class Element_, int kRows_, int kColumns_,
          int kPanelColumns_ =
              (kColumns_ * int(sizeof(Element_)) < kSwizzleBytes ? kColumns_ : kSwizzleBytes / int(sizeof(Element_)))>
struct Tile {
  using Element = Element_;
  static constexpr int kRows = kRows_, kColumns = kColumns_, kPanelColumns = kPanelColumns_;
  static constexpr int kPanels = kColumns / kPanelColumns;
  static constexpr int kElements = kRows * kColumns;
  static constexpr uint32_t kBytes = kElements * sizeof(Element);
  static constexpr uint32_t kAlignment = 8 * kPanelColumns * sizeof(Element);  // of the swizzle pattern

 private:
  static constexpr int kPanelBytes = kPanelColumns * sizeof(Element);
  static_assert(kPanelBytes == 128 || kPanelBytes == 64, "a panel row is as wide as a swizzle");
  static_assert(kColumns % kPanelColumns == 0 && kRows % 8 == 0);
  using Atom = std::conditional_t<kPanelBytes == 128, cute::SM90::GMMA::Layout_K_SW128_Atom<Element>,
                                  cute::SM90::GMMA::Layout_K_SW64_Atom<Element>>;

 public:
  using Layout = decltype(cute::tile_to_shape(Atom{}, cute::Shape<cute::Int<kRows>, cute::Int<kColumns>>{}));
  using Swizzle = decltype(Layout{}.layout_a());
  // The same memory as a matrix of kColumns x kRows
  using Transposed = decltype(cute::make_composed_layout(Layout{}.layout_a(), Layout{}.offset(),
                                                         cute::select<1, 0>(Layout{}.layout_b())));

  // Descriptor of the K-major WGMMA operand that begins at the first element.
  __device__ __forceinline__ static uint64_t descriptor(const void* tile) {
    using namespace cute;
    constexpr int kInstruction = 32 / sizeof(Element);  // K of an instruction: 32 bytes
    const auto pointer = make_smem_ptr(static_cast<const Element*>(tile));
    return SM90::GMMA::make_gmma_desc<Major::K>(local_tile(make_tensor(pointer, Layout{}),
                                                           Shape<Int<kRows>, Int<kInstruction>>{},
                                                           make_coord(_0{}, _0{})))
        .desc_;
  }

  // How far the operand that begins at (row, column) is from the first, in units of a descriptor's address (16 bytes).
  static constexpr uint64_t step(int row, int column) {
    return static_cast<uint64_t>(Layout{}.layout_b()(row, column)) * sizeof(Element) / 16;
  }

  // Where element (row, column) lies, in elements from the first: for threads that read or write the tile.
  // (Layout's own swizzle counts bytes, whatever the element.)
  __host__ __device__ static constexpr int index(int row, int column) {
    return cute::as_position_independent_swizzle_layout(Layout{})(row, column);
  }
};

}  // namespace fpsattn::sm90
