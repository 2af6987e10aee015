// TMA on the device: loads of tiles through tensor maps, bulk copies and reductions. One thread issues.
// Tensor maps are made on the host (tensor_map.h) and passed as `const __grid_constant__ CUtensorMap`.
#pragma once

#include <cute/arch/cluster_sm90.hpp>
#include <cute/arch/copy_sm90_desc.hpp>
#include <cute/arch/copy_sm90_tma.hpp>

#include "common/sm90/mbarrier.h"
#include "common/sm90/tile.h"

namespace fpsattn::sm90 {

using CacheHint = cute::TMA::CacheHintSm90;  // of L2: EVICT_NORMAL, EVICT_FIRST, EVICT_LAST
using cute::prefetch_tma_descriptor;

// Rows row .. row + Tile::kRows - 1 of the matrix of `map` (tile_map<Tile>) to shared memory, aligned to
// Tile::kAlignment. `full` receives Tile::kBytes.
template <class Tile>
__device__ __forceinline__ void load_tile(typename Tile::Element* shared, const CUtensorMap& map, Mbarrier& full,
                                          int32_t row, CacheHint hint = CacheHint::EVICT_NORMAL) {
  if constexpr (Tile::kPanels == 1) {
    cute::SM90_TMA_LOAD_2D::copy(&map, full.pointer(), static_cast<uint64_t>(hint), shared, 0, row);
  } else {
    cute::SM90_TMA_LOAD_3D::copy(&map, full.pointer(), static_cast<uint64_t>(hint), shared, 0, row, 0);
  }
}

// The same to the same place of every CTA of `ctas` (a bit each), each of which gets Tile::kBytes at its own `full`.
template <class Tile>
__device__ __forceinline__ void load_tile_multicast(typename Tile::Element* shared, const CUtensorMap& map,
                                                    Mbarrier& full, uint16_t ctas, int32_t row,
                                                    CacheHint hint = CacheHint::EVICT_NORMAL) {
  if constexpr (Tile::kPanels == 1) {
    cute::SM90_TMA_LOAD_MULTICAST_2D::copy(&map, full.pointer(), ctas, static_cast<uint64_t>(hint), shared, 0, row);
  } else {
    cute::SM90_TMA_LOAD_MULTICAST_3D::copy(&map, full.pointer(), ctas, static_cast<uint64_t>(hint), shared, 0, row, 0);
  }
}

// Contiguous bytes (addresses and size multiples of 16) to shared memory.
__device__ __forceinline__ void bulk_load(void* shared, const void* global, uint32_t bytes, Mbarrier& full) {
  cute::SM90_BULK_COPY_G2S::copy(global, full.pointer(), shared, bytes);
}

__device__ __forceinline__ void bulk_load_multicast(void* shared, const void* global, uint32_t bytes, Mbarrier& full,
                                                    uint16_t ctas) {
  bulk_load_multicast(shared_address(shared), global, bytes, shared_address(&full), ctas);
}

// A word to `shared` of CTA `rank`, whose `full` receives 4 bytes.
template <class Word>
__device__ __forceinline__ void store_async_at(uint32_t rank, Word& shared, Word value, Mbarrier& full) {
  static_assert(sizeof(Word) == 4);
  compiler_fence();
  cute::store_shared_remote(reinterpret_cast<const uint32_t&>(value), shared_address(&shared), shared_address(&full),
                            rank);
}

// Bulk stores and reductions (bulk_reduce_add in ptx.h) read shared memory that generic stores filled:
// fence_async_shared() and a barrier come first. Then bulk_commit() closes a group; bulk_wait_read<n>(): at most n
// groups still read shared memory.
__device__ __forceinline__ void bulk_reduce_add(float* global, const float* shared, uint32_t bytes) {
  bulk_reduce_add(global, shared_address(shared), bytes);
}
__device__ __forceinline__ void bulk_commit() {
  compiler_fence();
  cute::tma_store_arrive();
}
template <int kPending>
__device__ __forceinline__ void bulk_wait_read() {
  cute::tma_store_wait<kPending>();
}

}  // namespace fpsattn::sm90
