// The products of the backward kernels: CuTe's TiledMMA and gemm on tiles (common/sm90/tile.h), over the two consumer
// warpgroups. A product is issued by all threads of a warpgroup and is asynchronous (common/sm90/mma.h says how to use
// it).
#pragma once

#include <cute/algorithm/clear.hpp>
#include <cute/algorithm/gemm.hpp>
#include <cute/atom/mma_atom.hpp>

#include "backward/sm90/config.h"
#include "common/sm90/mma.h"

namespace fpsattn::sm90::backward {

// Who does what: each warpgroup takes 64 of 128 rows of the product, or half of its columns.
using SplitRows = cute::Layout<cute::Shape<cute::Int<kConsumerWarpgroups>, cute::_1, cute::_1>>;
using SplitColumns = cute::Layout<cute::Shape<cute::_1, cute::Int<kConsumerWarpgroups>, cute::_1>>;

template <class Element, int N>  // of an instruction: 64 x N, 32 bytes of each operand
using InstructionShape = cute::Shape<cute::_64, cute::Int<N>, cute::Int<32 / int(sizeof(Element))>>;

// A and B in shared memory, N columns per warpgroup.
template <class Element, int N, class Split, Major kMajor = Major::K>
using SharedMma = decltype(cute::make_tiled_mma(
    cute::SM90::GMMA::ss_op_selector<Element, Element, float, InstructionShape<Element, N>, kMajor, kMajor>(),
    Split{}));

// A in registers (BF16), B in shared memory and summed over its rows.
template <int N>
using RegisterMma = decltype(cute::make_tiled_mma(
    cute::SM90::GMMA::rs_op_selector<Bf16, Bf16, float, InstructionShape<Bf16, N>, Major::K, Major::MN>(),
    SplitRows{}));

// A tile as gemm reads it: K-major, or (Transposed) MN-major.
template <class Tile>
__device__ __forceinline__ auto operand(const typename Tile::Element* tile) {
  return cute::make_tensor(cute::make_smem_ptr(tile), typename Tile::Layout{});
}
template <class Tile>
__device__ __forceinline__ auto transposed_operand(const typename Tile::Element* tile) {
  return cute::make_tensor(cute::make_smem_ptr(tile), typename Tile::Transposed{});
}

// Registers of a thread: an FP32 accumulator of rows x columns; the A operand of a RegisterMma, as packed pairs. In
// both, pair i of a thread holds the same elements (tests/cpp/test_fragments.cpp), so an accumulator packed in place
// is an A operand, without a shuffle.
template <class Mma, int kRows, int kColumns>
using Accumulator = decltype(cute::partition_fragment_C(Mma{}, cute::Shape<cute::Int<kRows>, cute::Int<kColumns>>{}));
template <class Mma, int kRows, int kColumns>
using RegisterOperand = decltype(cute::make_tensor<Bf16>(
    cute::partition_shape_A(Mma{}, cute::Shape<cute::Int<kRows>, cute::Int<kColumns>>{})));

template <class Engine, class Layout>
__device__ __forceinline__ void keep_registers(cute::Tensor<Engine, Layout>& registers) {
  cute::warpgroup_fence_operand(registers);
}

// CuTe's DescriptorIterator, but it adds to all 64 bits: adding to 32 of them costs a move per WGMMA, of the other half.
struct Descriptors {
  using value_type = uint64_t;
  using element_type = uint64_t;
  using reference = uint64_t;
  uint64_t first;

  __device__ __forceinline__ constexpr uint64_t operator*() const { return first; }
  __device__ __forceinline__ constexpr uint64_t operator[](int i) const { return first + i; }
  __device__ __forceinline__ constexpr Descriptors operator+(int i) const { return {first + i}; }
};
template <class Register>
__device__ __forceinline__ constexpr Descriptors recast_ptr(const Descriptors& descriptors) {
  static_assert(cute::is_same_v<Register, uint64_t>);
  return descriptors;
}

// The A or B operand of a warpgroup's share of a product. `shared`: operand<Tile>() or transposed_operand<Tile>().
template <class Mma, class Shared>
__device__ __forceinline__ auto fragment_a(int warpgroup, const Shared& shared) {
  const auto fragment = Mma{}.get_slice(warpgroup * kWarpgroupThreads).partition_fragment_A(shared);
  return cute::make_tensor(Descriptors{fragment.data().desc_}, fragment.layout());
}
template <class Mma, class Shared>
__device__ __forceinline__ auto fragment_b(int warpgroup, const Shared& shared) {
  const auto fragment = Mma{}.get_slice(warpgroup * kWarpgroupThreads).partition_fragment_B(shared);
  return cute::make_tensor(Descriptors{fragment.data().desc_}, fragment.layout());
}

// d = a b, or d += a b: fragments of a TiledMMA. The flag is a constant, so that no instruction reads it.
template <class Mma, bool kAccumulate, class A, class B, class D>
__device__ __forceinline__ void multiply(const A& a, const B& b, D& d) {
  Mma mma;
  using cute::SM90::GMMA::ScaleOut;
  constexpr int kSteps = decltype(cute::size<2>(a))::value;
  static_assert(kSteps == decltype(cute::size<2>(b))::value);
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
    mma.accumulate_ = kAccumulate || k > 0 ? ScaleOut::One : ScaleOut::Zero;
    cute::gemm(mma, a(cute::_, cute::_, k), b(cute::_, cute::_, k), d);
  }
}

}  // namespace fpsattn::sm90::backward
