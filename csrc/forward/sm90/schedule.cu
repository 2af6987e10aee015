// The order of work items: heaviest (batch, head) first, in it the query blocks with the longest lists first, ties in
// index order.
//
// The forward kernel hands items out in this order as CTAs become free, so that the last ones to finish are short.
// With equal lists it is the natural order, which keeps neighbours, whose lists overlap, and heads together in L2.
// Query blocks are sorted by counting, in O(num_blocks); heads are ranked in O((B H)^2 / 1024) per thread, of which
// there are B H.
#include "common/device_check.h"
#include "forward/sm90/instances.h"
#include "fpsattn/status.h"

namespace fpsattn::sm90::forward {
namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / 32;
constexpr int kClasses = 4096;  // of list lengths, longest first: 16 KB of counters
constexpr int kClassesPerThread = kClasses / kThreads;

struct ScheduleArguments {
  BlockLists kv;
  const int32_t* tile_of_block;
  int32_t num_blocks, batch, heads;
  int32_t class_shift;  // lists share a class where length >> class_shift agrees: 0 up to 4095 blocks
  int32_t *next_item, *head_order, *block_order;
  int64_t* load;  // [Bm, Hm]
};

__device__ int32_t list_length(const ScheduleArguments& args, int32_t lists, int32_t block) {
  const int32_t tile = args.tile_of_block[block];
  trap_if(tile < 0 || tile >= args.kv.rows);
  const int32_t length = args.kv.num_blocks[static_cast<int64_t>(lists) * args.kv.rows + tile];
  trap_if(length < 0 || length > args.kv.max_blocks);
  return length;
}

__device__ int32_t class_of(const ScheduleArguments& args, int32_t length) {
  return kClasses - 1 - (length >> args.class_shift);
}

// Counts of classes -> how many blocks stand before each class. All threads.
__device__ void exclusive_scan(int32_t (&counts)[kClasses]) {
  __shared__ int32_t warp_total[kWarps];
  const int32_t thread = threadIdx.x, lane = thread % 32;
  int32_t own = 0;
  for (int i = 0; i < kClassesPerThread; ++i) own += counts[thread * kClassesPerThread + i];
  const auto inclusive = [lane](int32_t x) {
    for (int distance = 1; distance < 32; distance *= 2) {
      const int32_t other = __shfl_up_sync(~0u, x, distance);
      if (lane >= distance) x += other;
    }
    return x;
  };
  const int32_t in_warp = inclusive(own);
  if (lane == 31) warp_total[thread / 32] = in_warp;
  __syncthreads();
  if (thread < 32) warp_total[lane] = inclusive(warp_total[lane]);
  __syncthreads();
  int32_t before = in_warp - own + (thread < 32 ? 0 : warp_total[thread / 32 - 1]);
  for (int i = 0; i < kClassesPerThread; ++i) {
    int32_t& entry = counts[thread * kClassesPerThread + i];
    const int32_t count = entry;
    entry = before;
    before += count;
  }
  __syncthreads();
}

// One CTA per (Bm, Hm): block_order, and the load of its heads. A stable counting sort: all threads count; then chunk
// after chunk of blocks is placed by one warp, which needs no order among warps to keep ties in index order.
__global__ void __launch_bounds__(kThreads) order_blocks(const ScheduleArguments args) {
  __shared__ int32_t place[kClasses];  // counts, then the place of the next block of each class
  __shared__ int32_t chunk[kThreads];  // classes of the blocks at hand
  const int32_t lists = blockIdx.x, thread = threadIdx.x, n = args.num_blocks;
  if (lists == 0 && thread == 0) *args.next_item = 0;
  if (thread == 0) args.load[lists] = 0;
  for (int i = thread; i < kClasses; i += kThreads) place[i] = 0;
  __syncthreads();
  unsigned long long load = 0;
  for (int32_t block = thread; block < n; block += kThreads) {
    const int32_t length = list_length(args, lists, block);
    load += length;
    atomicAdd(place + class_of(args, length), 1);
  }
  atomicAdd(reinterpret_cast<unsigned long long*>(args.load + lists), load);
  __syncthreads();
  exclusive_scan(place);

  int32_t* order = args.block_order + static_cast<int64_t>(lists) * n;
  for (int32_t start = 0; start < n; start += kThreads) {
    if (start + thread < n) chunk[thread] = class_of(args, list_length(args, lists, start + thread));
    __syncthreads();
    for (int32_t first = 0; thread < 32 && start + first < n && first < kThreads; first += 32) {
      const int32_t block = start + first + thread;
      const int32_t own_class = block < n ? chunk[first + thread] : -1;
      const uint32_t equals = __match_any_sync(~0u, own_class);
      const int32_t rank = __popc(equals & ((1u << thread) - 1));
      const int32_t position = block < n ? place[own_class] + rank : 0;
      __syncwarp();
      if (block < n && rank == 0) place[own_class] += __popc(equals);
      __syncwarp();
      if (block < n) order[position] = block;
    }
    __syncthreads();
  }
}

// head_order, from the loads.
__global__ void __launch_bounds__(kThreads) order_heads(const ScheduleArguments args) {
  const int32_t n = args.batch * args.heads;
  for (int32_t mine = blockIdx.x * kThreads + threadIdx.x; mine < n; mine += gridDim.x * kThreads) {
    const int64_t load = args.load[list_head(args.kv, mine / args.heads, mine % args.heads)];
    int32_t rank = 0;
    for (int32_t i = 0; i < n; ++i) {
      const int64_t other = args.load[list_head(args.kv, i / args.heads, i % args.heads)];
      rank += other > load || (other == load && i < mine);
    }
    args.head_order[rank] = mine;
  }
}

}  // namespace

void launch_schedule(const Arguments& args, const Workspace& workspace, int batch, cudaStream_t stream) {
  int32_t class_shift = 0;
  while (args.kv.max_blocks >> class_shift >= kClasses) ++class_shift;
  const ScheduleArguments schedule{args.kv,
                                   args.tile_of_block,
                                   args.num_blocks,
                                   batch,
                                   args.heads,
                                   class_shift,
                                   workspace.next_item,
                                   workspace.head_order,
                                   workspace.block_order,
                                   workspace.load};
  order_blocks<<<args.kv.batch * args.kv.heads, kThreads, 0, stream>>>(schedule);
  FPSATTN_CUDA_CHECK("forward: schedule of blocks", cudaGetLastError());
  order_heads<<<(batch * args.heads + kThreads - 1) / kThreads, kThreads, 0, stream>>>(schedule);
  FPSATTN_CUDA_CHECK("forward: schedule of heads", cudaGetLastError());
}

}  // namespace fpsattn::sm90::forward
