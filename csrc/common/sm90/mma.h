// WGMMA: CuTe's instruction atoms on register arrays.
//
// D (64 x N, FP32, registers) = A (64 x K) B^T + (accumulate ? D : 0), K = 32 for e4m3 and 16 for BF16. A comes from
// shared memory (ss) or from registers (rs), B always from shared memory; operands are descriptors of Tile (tile.h). A
// thread (w = warp of the warpgroup, g = lane / 4, q = lane % 4) owns
//     of D, register 4 * group + 2 * half + pair:            row 16 w + g + 8 half, column 8 group + 2 q + pair
//     of an 8-bit A, register 2 * high + half, byte b:       row 16 w + g + 8 half, k = 16 high + 4 q + b
//     of a 16-bit A, register 2 * high + half, half word b:  row 16 w + g + 8 half, k = 8 high + 2 q + b
// fragments.h has these as functions; tests/cpp/test_fragments.cpp proves them, and what the kernels build on them,
// against CuTe's layouts.
//
// How to use: write operands; fence_async_shared() if generic stores wrote shared memory; warpgroup_arrive(); issue;
// warpgroup_commit_batch(); warpgroup_wait<n>() until at most n groups are in flight; keep_registers(d) before D is
// read and after D is written by hand. ptxas serializes (C7510, C7514, ...; the build then fails) when accumulators
// are touched between issue and wait, when they may be read before they were ever written (C7515), when a batch sits
// behind a branch, and (C7513) when the registers of an A operand are written before a wait has retired the group that
// reads them.
#pragma once

#include <cute/arch/mma_sm90_gmma.hpp>
// N = 72 and 136. By itself: CUTE_SM90_EXTENDED_MMA_SHAPES_ENABLED would add traits and selectors of every N, and 6 s
// to the compile time of each file.
#include <cute/arch/mma_sm90_gmma_ext.hpp>
#include <utility>

#include "common/sm90/tile.h"

namespace fpsattn::sm90 {

using cute::warpgroup_arrive;
using cute::warpgroup_commit_batch;
using cute::warpgroup_wait;

// Pins registers at this point of the program: the compiler may move no access of theirs across it.
template <class Register, int kRegisters>
__device__ __forceinline__ void keep_registers(Register (&registers)[kRegisters]) {
#pragma unroll
  for (int i = 0; i < kRegisters; ++i) cute::warpgroup_fence_operand(registers[i]);
}

namespace detail {

template <class SsAtom, class RsAtom, int kRegisters>
struct MmaOfAtoms {
  __device__ __forceinline__ static void ss(float (&d)[kRegisters], uint64_t desc_a, uint64_t desc_b, bool accumulate) {
    issue<SsAtom>(d, accumulate, std::make_index_sequence<kRegisters>{}, desc_a, desc_b);
  }
  __device__ __forceinline__ static void rs(float (&d)[kRegisters], const uint32_t* a, uint64_t desc_b,
                                            bool accumulate) {
    issue<RsAtom>(d, accumulate, std::make_index_sequence<kRegisters>{}, a[0], a[1], a[2], a[3], desc_b);
  }

 private:
  template <class Atom, size_t... kIndex, class... Operands>
  __device__ __forceinline__ static void issue(float (&d)[kRegisters], bool accumulate, std::index_sequence<kIndex...>,
                                               Operands... operands) {
    Atom::fma(operands..., d[kIndex]...,
              accumulate ? cute::SM90::GMMA::ScaleOut::One : cute::SM90::GMMA::ScaleOut::Zero);
  }
};

}  // namespace detail

// The instructions of the forward: Mma<E4m3, N>::ss(d, a, b, accumulate) and ::rs, operands K-major. (The backward's
// products are CuTe's TiledMMA, backward/sm90/products.h.)
template <class Element, int N>
struct Mma;

#define FPSATTN_E4M3_MMA(N)                                                                       \
  template <>                                                                                     \
  struct Mma<E4m3, N> : detail::MmaOfAtoms<cute::SM90::GMMA::MMA_64x##N##x32_F32E4M3E4M3_SS_TN<>, \
                                           cute::SM90::GMMA::MMA_64x##N##x32_F32E4M3E4M3_RS_TN<>, N / 2> {}
FPSATTN_E4M3_MMA(72);
FPSATTN_E4M3_MMA(128);
FPSATTN_E4M3_MMA(136);
#undef FPSATTN_E4M3_MMA

}  // namespace fpsattn::sm90
