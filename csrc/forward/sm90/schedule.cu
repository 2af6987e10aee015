// The order of work items: heaviest (batch, head) first; in it, for a launch with clusters, the pairs of query blocks of
// one tile, then the query blocks without a partner; of these the longest lists first. Lists whose lengths (heads whose
// loads) agree in the four leading bits count as equal, and keep their index order.
//
// The forward kernel hands items out in this order as CTAs become free, so that the last ones to finish are short.
// A head's items follow each other, so that its K and V stay in L2; in it neighbours, whose lists overlap, run together
// as far as their lengths are alike (benchmarks/work_order.py counts the bytes). Both orders are counting sorts: O(num_blocks) and O(B H).
#include "common/device_check.h"
#include "forward/sm90/instances.h"
#include "fpsattn/status.h"

namespace fpsattn::sm90::forward {
namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / 32;
constexpr int kClasses = 256;        // of 32-bit lengths
constexpr int kKeys = 2 * kClasses;  // of query blocks: pairs, then those without a partner; or classes of 64-bit loads

struct ScheduleArguments {
  BlockLists kv;
  const int32_t* tile_of_block;
  int32_t num_blocks, batch, heads;
  bool pairs;  // wanted
  Workspace workspace;
};

// Grows with n; what agrees in its four leading bits shares a class.
__device__ int32_t class_of(uint64_t n) {
  const int32_t dropped = n < 16 ? 0 : 60 - __clzll(n);
  return 8 * dropped + static_cast<int32_t>(n >> dropped);
}

// Inclusive scan over the threads of the CTA by an associative operation. All threads.
template <class Operation>
__device__ int32_t block_scan(int32_t x, const Operation& operation) {
  __shared__ int32_t warp_total[kWarps];
  const int32_t thread = threadIdx.x, lane = thread % 32;
  const auto warp_scan = [&](int32_t value) {
    for (int distance = 1; distance < 32; distance *= 2) {
      const int32_t other = __shfl_up_sync(~0u, value, distance);
      if (lane >= distance) value = operation(value, other);
    }
    return value;
  };
  x = warp_scan(x);
  if (lane == 31) warp_total[thread / 32] = x;
  __syncthreads();
  if (thread < 32) warp_total[lane] = warp_scan(warp_total[lane]);
  __syncthreads();
  if (thread >= 32) x = operation(x, warp_total[thread / 32 - 1]);
  __syncthreads();  // warp_total may be overwritten
  return x;
}

// A stable counting sort of 0 .. n - 1, in one CTA. key(start): the key of start + threadIdx.x, called by all threads for
// start = 0, kThreads, ... and twice. place(position, i): where i comes to lie. Afterwards place_of[k] is the number
// of elements with keys up to k. All threads count; then chunk after chunk is placed by one warp, which needs no order
// among warps to keep ties in index order.
template <class Key, class Place>
__device__ void counting_sort(int32_t n, int32_t (&place_of)[kKeys], const Key& key, const Place& place) {
  __shared__ int32_t chunk[kThreads];  // keys at hand
  const int32_t thread = threadIdx.x;
  static_assert(kKeys <= kThreads);
  if (thread < kKeys) place_of[thread] = 0;
  __syncthreads();
  for (int32_t start = 0; start < n; start += kThreads) {
    const int32_t own = key(start);
    if (start + thread < n) atomicAdd(place_of + own, 1);
  }
  __syncthreads();

  // Counts -> how many elements stand before each key
  const int32_t count = thread < kKeys ? place_of[thread] : 0;
  const int32_t upto = block_scan(count, [](int32_t a, int32_t b) { return a + b; });
  if (thread < kKeys) place_of[thread] = upto - count;
  __syncthreads();

  for (int32_t start = 0; start < n; start += kThreads) {
    chunk[thread] = key(start);
    __syncthreads();
    for (int32_t first = 0; thread < 32 && start + first < n && first < kThreads; first += 32) {
      const int32_t i = start + first + thread;
      const int32_t own_key = i < n ? chunk[first + thread] : -1;
      const uint32_t equals = __match_any_sync(~0u, own_key);
      const int32_t rank = __popc(equals & ((1u << thread) - 1));
      const int32_t position = i < n ? place_of[own_key] + rank : 0;
      __syncwarp();
      if (i < n && rank == 0) place_of[own_key] += __popc(equals);
      __syncwarp();
      if (i < n) place(position, i);
    }
    __syncthreads();
  }
}

// One CTA per (Bm, Hm): block_order, and the load of its heads.
__global__ void __launch_bounds__(kThreads) order_blocks(const ScheduleArguments args) {
  __shared__ int32_t place_of[kKeys];
  const int32_t lists = blockIdx.x, thread = threadIdx.x, n = args.num_blocks;
  const Workspace& workspace = args.workspace;
  const auto tile_of = [&](int32_t block) {
    const int32_t tile = args.tile_of_block[block];
    trap_if(tile < 0 || tile >= args.kv.rows);
    return tile;
  };
  const auto length_of = [&](int32_t tile) {
    const int32_t length = args.kv.num_blocks[static_cast<int64_t>(lists) * args.kv.rows + tile];
    trap_if(length < 0 || length > args.kv.max_blocks);
    return length;
  };

  unsigned long long load = 0;
  for (int32_t block = thread; block < n; block += kThreads) load += length_of(tile_of(block));
  __shared__ int32_t run;  // where the tile of the last block seen begins
  if (thread == 0) workspace.load[lists] = run = 0;
  __syncthreads();
  atomicAdd(reinterpret_cast<unsigned long long*>(workspace.load + lists), load);

  const auto key = [&](int32_t start) {
    const int32_t block = start + thread;
    const bool exists = block < n;
    const int32_t tile = exists ? tile_of(block) : -1;
    bool alone = true;
    if (args.pairs) {  // blocks 2 i and 2 i + 1 of a tile are a pair
      const bool begins = exists && (block == 0 || tile_of(block - 1) != tile);
      const int32_t begin = block_scan(begins       ? block
                                       : start == 0 ? 0
                                                    : run,
                                       [](int32_t a, int32_t b) { return max(a, b); });
      if (thread == kThreads - 1) run = begin;
      __syncthreads();
      alone = (block - begin) % 2 == 0 && !(block + 1 < n && tile_of(block + 1) == tile);
    }
    return exists ? kClasses - 1 - class_of(length_of(tile)) + (alone ? kClasses : 0) : 0;
  };
  QueryBlock* const order = workspace.block_order + static_cast<int64_t>(lists) * n;
  const auto place = [&](int32_t position, int32_t block) {
    const int32_t tile = tile_of(block);
    order[position] = QueryBlock{block, tile, length_of(tile), 0};
  };
  counting_sort(n, place_of, key, place);
  if (lists == 0 && thread == 0) {
    *workspace.next_pair = *workspace.next_single = 0;
    *workspace.num_pairs = place_of[kClasses - 1] / 2;
  }
}

// One CTA: head_order, from the loads.
__global__ void __launch_bounds__(kThreads) order_heads(const ScheduleArguments args) {
  __shared__ int32_t place_of[kKeys];
  const int32_t thread = threadIdx.x;
  const int64_t* const loads = args.workspace.load;
  const int32_t n = args.batch * args.heads;
  const auto key = [&](int32_t start) {
    const int32_t i = start + thread;
    if (i >= n) return 0;
    return kKeys - 1 - class_of(loads[list_head(args.kv, i / args.heads, i % args.heads)]);
  };
  counting_sort(n, place_of, key, [&](int32_t position, int32_t i) { args.workspace.head_order[position] = i; });
}

}  // namespace

void launch_schedule(const Arguments& args, const Workspace& workspace, cudaStream_t stream) {
  const ScheduleArguments schedule{args.kv,    args.tile_of_block,    args.num_blocks, args.batch_heads / args.heads,
                                   args.heads, args.cluster_size > 1, workspace};
  order_blocks<<<args.kv.batch * args.kv.heads, kThreads, 0, stream>>>(schedule);
  FPSATTN_CUDA_CHECK("forward: schedule of blocks", cudaGetLastError());
  order_heads<<<1, kThreads, 0, stream>>>(schedule);
  FPSATTN_CUDA_CHECK("forward: schedule of heads", cudaGetLastError());
}

}  // namespace fpsattn::sm90::forward
