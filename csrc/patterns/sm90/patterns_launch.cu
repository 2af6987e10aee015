// Launches. Every instance of the kernels is compiled here.
#include <cuda_runtime.h>

#include "fpsattn/status.h"
#include "patterns/sm90/launch.h"
#include "patterns/sm90/select_kernel.h"
#include "patterns/sm90/transpose_kernel.h"

namespace fpsattn::sm90::patterns {
namespace {

unsigned ctas(int64_t warps) { return static_cast<unsigned>((warps + kWarps - 1) / kWarps); }

int words_of(const TransposeParams& params) { return (params.num_blocks + 31) / 32; }

template <int kPerLane>
void launch_select(const SelectParams& params, cudaStream_t stream) {
  const int64_t rows = static_cast<int64_t>(params.lists) * params.num_tiles;
  select_kernel<kPerLane><<<ctas(rows), kWarps * 32, 0, stream>>>(params);
  FPSATTN_CUDA_CHECK("select_blocks: kernel", cudaGetLastError());
}

}  // namespace

void launch(const SelectParams& params, cudaStream_t stream) {
  if (params.num_blocks <= 8 * 32) return launch_select<8>(params, stream);
  if (params.num_blocks <= 20 * 32) return launch_select<20>(params, stream);  // Wan at 720p, 81 frames: 600
  if (params.num_blocks <= 48 * 32) return launch_select<48>(params, stream);
  launch_select<kMaxSelectBlocks / 32>(params, stream);
}

size_t workspace_bytes(const TransposeParams& params) {
  return sizeof(uint32_t) * params.kv.batch * params.kv.heads * params.kv.rows * words_of(params);
}

void launch(const TransposeParams& params, cudaStream_t stream) {
  const int words = words_of(params);
  const int64_t lists = static_cast<int64_t>(params.kv.batch) * params.kv.heads;
  uint32_t* const bits = static_cast<uint32_t*>(params.workspace);
  bits_kernel<<<ctas(lists * params.kv.rows), kWarps * 32, 0, stream>>>(params, bits, words);
  FPSATTN_CUDA_CHECK("transpose_blocks: bits kernel", cudaGetLastError());
  transpose_kernel<<<ctas(lists * words), kWarps * 32, 0, stream>>>(params, bits, words);
  FPSATTN_CUDA_CHECK("transpose_blocks: kernel", cudaGetLastError());
}

}  // namespace fpsattn::sm90::patterns
