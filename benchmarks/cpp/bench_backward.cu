// Backward of Wan-sized problems under sliding tile windows: time of both modes, TFLOP/s over computed blocks.
//
//   bench_backward            Wan 480p and 720p, dense and windowed
//   bench_backward --small    one small shape, once: what an emulator can run (its times mean nothing)
//
// FLOPs counted: 10 * 128 * 128 * D per computed (query block, KV block) pair, five products, whatever a mode really
// executes (the deterministic one executes seven). Padding slots are computed and counted; `tflops_useful` counts
// attended token pairs only.
#include <cstring>
#include <memory>

#include "bench_common.h"
#include "fpsattn/block_mask.h"
#include "fpsattn/launch.h"
#include "fpsattn/tile_layout.h"

namespace fpsattn::bench {
namespace {

struct Case {
  const char* name;
  Int3 grid, tile, window;  // in tiles
  int heads;
  int head_dim;
};

__global__ void fill_bytes(uint8_t* data, size_t count) {  // e4m3 of magnitude 0.25 .. 7.5, either sign
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < count; i += size_t{gridDim.x} * blockDim.x) {
    const uint32_t hash = static_cast<uint32_t>(i * 2654435761u) >> 9;
    data[i] = static_cast<uint8_t>((hash & 0x80) | (0x28 + hash % 40));
  }
}

__global__ void fill_bf16(uint16_t* data, size_t count) {  // magnitude 0.0078 .. 2, either sign
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < count; i += size_t{gridDim.x} * blockDim.x) {
    const uint32_t hash = static_cast<uint32_t>(i * 2654435761u) >> 7;
    data[i] = static_cast<uint16_t>(0x3c00 | (hash & 0x83ff));
  }
}

__global__ void fill_value(float* data, size_t count, float value) {
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < count; i += size_t{gridDim.x} * blockDim.x) {
    data[i] = value;
  }
}

// Device memory of one case; everything lives until the case ends.
class Arena {
 public:
  template <class T>
  T* take(size_t count) {
    memory_.push_back(std::make_unique<Memory>(count * sizeof(T)));
    return memory_.back()->as<T>();
  }
  uint8_t* bytes(size_t count) {
    uint8_t* data = take<uint8_t>(count);
    fill_bytes<<<256, 256>>>(data, count);
    return data;
  }
  float* floats(size_t count, float value) {
    float* data = take<float>(count);
    fill_value<<<256, 256>>>(data, count, value);
    return data;
  }
  int32_t* ints(const std::vector<int32_t>& values) {
    int32_t* data = take<int32_t>(values.size());
    FPSATTN_CUDA_CHECK("bench", cudaMemcpy(data, values.data(), values.size() * 4, cudaMemcpyHostToDevice));
    return data;
  }
  BlockLists lists(const BlockListTable& table) {
    return {ints(table.num_blocks),       ints(table.indices),          1, 1,
            static_cast<int>(table.rows), static_cast<int>(table.width)};
  }
  TokenTensor tokens(const ProblemSize& size) {
    const int64_t row = int64_t{size.heads} * size.head_dim;
    uint16_t* data = take<uint16_t>(row * size.num_tokens);
    fill_bf16<<<256, 256>>>(data, row * size.num_tokens);
    return {data, row * size.num_tokens, size.head_dim, row};
  }

 private:
  std::vector<std::unique_ptr<Memory>> memory_;
};

void run(const Case& c, int repeats) {
  const TileLayout layout = plan(c.grid, c.tile);
  const BlockListTable kv = sliding_tile_lists(layout, c.window);
  const BlockListView view{kv.num_blocks.data(), kv.indices.data(), 1, 1, kv.rows, kv.width};
  const BlockListTable transposed = transpose_lists(view, layout.tile_block_offsets.data(), layout.num_tiles);

  Arena arena;
  BackwardParams params;
  params.size = {1, c.heads, c.head_dim, layout.num_tokens, layout.num_blocks, layout.num_tiles};
  params.softmax_scale = 1.0f / 64;
  const size_t slots = size_t(c.heads) * layout.num_slots;
  params.q8 = arena.bytes(slots * c.head_dim);
  params.k8 = arena.bytes(slots * c.head_dim);
  params.v8t = arena.bytes(slots * (c.head_dim + kVExtraRows));
  params.q_scale = arena.floats(size_t(c.heads) * layout.num_blocks, 0.125f);
  params.k_scale = arena.floats(size_t(c.heads) * layout.num_blocks, 0.125f);
  params.v_scale = arena.floats(size_t(c.heads) * c.head_dim, 0.25f);
  params.row_max = arena.floats(slots, 4.0f);
  params.row_sum = arena.floats(slots, 4096.0f);
  params.token_of_slot = arena.ints(layout.token_of_slot);
  params.tile_of_block = arena.ints(layout.tile_of_block);
  params.kv = arena.lists(kv);
  params.q = arena.lists(transposed);
  params.out = arena.tokens(params.size);
  params.grad_out = arena.tokens(params.size);
  params.dq = arena.tokens(params.size);
  params.dk = arena.tokens(params.size);
  params.dv = arena.tokens(params.size);
  params.workspace_bytes = backward_workspace_bytes(params);  // fast mode: the larger of the two
  params.workspace = arena.take<uint8_t>(params.workspace_bytes);

  const auto mode = [&](bool deterministic) {
    return [&params, deterministic](int) {
      BackwardParams p = params;
      p.deterministic = deterministic;
      backward(p, nullptr);
    };
  };
  const std::vector<Timing> times = time_interleaved({mode(false), mode(true)}, repeats, repeats > 1 ? 3 : 0);

  double block_pairs = 0, token_pairs = 0;
  for (int tile = 0; tile < layout.num_tiles; ++tile) {
    double keys = 0;
    for (int i = 0; i < kv.num_blocks[tile]; ++i) {
      const int block = kv.indices[tile * kv.width + i];
      for (int slot = block * kBlockSlots; slot < (block + 1) * kBlockSlots; ++slot) {
        keys += layout.token_of_slot[slot] >= 0;
      }
    }
    block_pairs +=
        double(kv.num_blocks[tile]) * (layout.tile_block_offsets[tile + 1] - layout.tile_block_offsets[tile]);
    token_pairs += keys * layout.tile_tokens[tile];
  }
  const double flops = 10.0 * c.head_dim * c.heads * block_pairs * kBlockSlots * kBlockSlots;
  const double useful = 10.0 * c.head_dim * c.heads * token_pairs;
  for (int i = 0; i < 2; ++i) {
    JsonLine()
        .add("bench", "backward")
        .add("case", c.name)
        .add("mode", i == 0 ? "fast" : "deterministic")
        .add("device", device_name())
        .add("tokens", layout.num_tokens)
        .add("heads", c.heads)
        .add("head_dim", c.head_dim)
        .add("density", token_pairs / layout.num_tokens / layout.num_tokens)
        .add("workspace_bytes", params.workspace_bytes)
        .add("repeats", repeats)
        .add("ms", times[i])
        .add("tflops", flops / times[i].median_ms * 1e-9)
        .add("tflops_useful", useful / times[i].median_ms * 1e-9)
        .print();
  }
}

}  // namespace
}  // namespace fpsattn::bench

int main(int argc, char** argv) {
  using namespace fpsattn;
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::printf("skipped: no CUDA device\n");
    return 77;  // ctest's SKIP_RETURN_CODE
  }
  if (argc > 1 && std::strcmp(argv[1], "--small") == 0) {
    bench::run({"small", {3, 8, 12}, {3, 8, 4}, {1, 1, 2}, 1, 64}, 1);
    return 0;
  }
  const int heads = 12;  // of Wan 1.3B; Wan 14B has 40: the same per head
  bench::run({"wan_480p_dense", {21, 30, 52}, {7, 9, 6}, {3, 4, 9}, heads, 128}, 10);
  bench::run({"wan_720p_dense", {21, 45, 80}, {7, 9, 4}, {3, 5, 20}, heads, 128}, 5);
  bench::run({"wan_720p_window_3_3_6", {21, 45, 80}, {7, 9, 4}, {3, 3, 6}, heads, 128}, 20);  // density about 0.18
  bench::run({"wan_720p_window_2_3_5", {21, 45, 80}, {7, 9, 4}, {2, 3, 5}, heads, 128}, 20);  // about 0.10
  bench::run({"wan_720p_d64", {21, 45, 80}, {7, 9, 4}, {3, 3, 6}, heads, 64}, 20);
  return 0;
}
