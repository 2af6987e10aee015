// The order of work items: heaviest (batch, head) first, in it the query blocks with the longest lists first, ties in
// index order.
//
// The forward kernel hands items out in this order as CTAs become free, so that the last ones to finish are short. With
// equal lists it is the natural order, which keeps neighbours, whose lists overlap, and heads together in L2. Ranks are
// counted in O(n^2), n = num_blocks (a few hundred): microseconds.
#include "forward/sm90/launch.h"
#include "fpsattn/status.h"

namespace fpsattn::sm90::forward {
namespace {

constexpr int kThreads = 1024;

struct ScheduleArguments {
  BlockLists kv;
  const int32_t* tile_of_block;
  int32_t num_blocks, batch, heads;
  int32_t *next_item, *head_order, *block_order;
  int64_t* load;  // [Bm, Hm]
};

__device__ int32_t list_length(const ScheduleArguments& args, int32_t lists, int32_t block) {
  return args.kv.num_blocks[static_cast<int64_t>(lists) * args.kv.rows + args.tile_of_block[block]];
}

// One CTA per (Bm, Hm): block_order.
__global__ void __launch_bounds__(kThreads) order_blocks(const ScheduleArguments args) {
  __shared__ int32_t length[kThreads];
  const int32_t lists = blockIdx.x, thread = threadIdx.x, n = args.num_blocks;
  if (lists == 0 && thread == 0) *args.next_item = 0;
  if (thread == 0) args.load[lists] = 0;
  __syncthreads();
  for (int32_t start = 0; start < n; start += kThreads) {
    const int32_t mine = start + thread;
    const int32_t my_length = mine < n ? list_length(args, lists, mine) : 0;
    if (mine < n)
      atomicAdd(reinterpret_cast<unsigned long long*>(args.load + lists), static_cast<unsigned long long>(my_length));
    int32_t rank = 0;
    for (int32_t other = 0; other < n; other += kThreads) {
      __syncthreads();
      if (other + thread < n) length[thread] = list_length(args, lists, other + thread);
      __syncthreads();
      const int32_t end = min(kThreads, n - other);
      for (int32_t i = 0; i < end; ++i) rank += length[i] > my_length || (length[i] == my_length && other + i < mine);
    }
    if (mine < n) args.block_order[static_cast<int64_t>(lists) * n + rank] = mine;
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
  const ScheduleArguments schedule{args.kv,       args.tile_of_block,  args.num_blocks,      batch,
                                   args.heads,    workspace.next_item, workspace.head_order, workspace.block_order,
                                   workspace.load};
  order_blocks<<<args.kv.batch * args.kv.heads, kThreads, 0, stream>>>(schedule);
  FPSATTN_CUDA_CHECK("forward: schedule of blocks", cudaGetLastError());
  order_heads<<<(batch * args.heads + kThreads - 1) / kThreads, kThreads, 0, stream>>>(schedule);
  FPSATTN_CUDA_CHECK("forward: schedule of heads", cudaGetLastError());
}

}  // namespace fpsattn::sm90::forward
