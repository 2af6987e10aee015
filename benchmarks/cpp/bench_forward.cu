// The attention forward alone (operands already quantized) on Wan shapes at several densities: one line of JSON per
// density.
//
//   bench_forward            Wan2.1-14B 720p, 1.3B 480p, and both with D = 64
//   bench_forward --small    one small shape, once: what an emulator can run (its times mean nothing)
//
// TFLOP/s count computed blocks only (4 * 128 * 128 * D per query block, KV block and head). of_ideal: time relative to
// dense, divided by the density of blocks; 1 is ideal.
#include <cmath>
#include <cstring>
#include <memory>

#include "bench_common.h"
#include "fpsattn/launch.h"
#include "support/slot_table.h"

namespace fpsattn::bench {
namespace {

struct Case {
  const char* name;
  std::array<int, 3> grid, tile;
  int heads, head_dim;
};

// e4m3 bytes of magnitude 2^-3 .. 15 and either sign, roughly log-uniform; rows D.. of V^T are set apart below.
__global__ void fill_bytes(uint8_t* data, size_t count) {
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < count; i += size_t{gridDim.x} * blockDim.x) {
    const uint32_t hash = static_cast<uint32_t>(i * 2654435761u) ^ static_cast<uint32_t>(i >> 7) * 40503u;
    data[i] = static_cast<uint8_t>((hash & 0x80) | (0x20 + (hash >> 9) % 56));
  }
}

__global__ void fill_extra_rows(uint8_t* v8t, int head_dim, size_t blocks) {
  for (size_t b = blockIdx.x; b < blocks; b += gridDim.x) {
    uint8_t* rows = v8t + (b * (head_dim + kVExtraRows) + head_dim) * kBlockSlots;
    for (int i = threadIdx.x; i < kVExtraRows * kBlockSlots; i += blockDim.x) rows[i] = i < kBlockSlots ? 0x38 : 0;
  }
}

__global__ void fill_floats(float* data, size_t count, float value) {
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < count; i += size_t{gridDim.x} * blockDim.x)
    data[i] = value;
}

struct Table : Memory {
  explicit Table(const std::vector<int32_t>& values) : Memory(values.size() * 4) {
    FPSATTN_CUDA_CHECK("bench", cudaMemcpy(as<void>(), values.data(), bytes(), cudaMemcpyHostToDevice));
  }
};

void run(const Case& c, const std::vector<double>& densities, int repeats) {
  const test::SlotTable table = test::make_slot_table(c.grid, c.tile);
  const int blocks = table.num_blocks(), tiles = table.num_tiles();
  const size_t items = static_cast<size_t>(c.heads) * blocks, slots = items * kBlockSlots, dim = c.head_dim;
  Memory q8(slots * dim), k8(slots * dim), v8t(slots * (dim + kVExtraRows));
  for (Memory* bytes : {&q8, &k8, &v8t}) fill_bytes<<<1024, 256>>>(bytes->as<uint8_t>(), bytes->bytes());
  fill_extra_rows<<<1024, 128>>>(v8t.as<uint8_t>(), c.head_dim, items);
  Memory q_scale(items * 4), k_scale(items * 4), v_scale(c.heads * dim * 4), q_k_mean(slots * 4);
  fill_floats<<<64, 256>>>(q_scale.as<float>(), items, 0.1f);
  fill_floats<<<64, 256>>>(k_scale.as<float>(), items, 0.1f);
  fill_floats<<<64, 256>>>(v_scale.as<float>(), c.heads * dim, 0.1f);
  fill_floats<<<64, 256>>>(q_k_mean.as<float>(), slots, 0.0f);
  const Table token_of_slot(table.token_of_slot), tile_of_block(table.tile_of_block);
  Memory out(size_t{2} * c.heads * table.num_tokens * dim), lse(slots * 4), row_max(slots * 4), row_sum(slots * 4);

  std::vector<int32_t> order(static_cast<size_t>(tiles) *
                             blocks);  // own tile first, then the following blocks, cyclically
  for (int tile = 0; tile < tiles; ++tile) {
    for (int i = 0; i < blocks; ++i)
      order[static_cast<size_t>(tile) * blocks + i] = (table.tile_block_offsets[tile] + i) % blocks;
  }
  const Table indices(order);
  std::vector<int> lengths;
  std::vector<std::unique_ptr<Table>> counts;
  for (const double density : densities) {
    lengths.push_back(std::max(1, static_cast<int>(std::lround(density * blocks))));
    counts.push_back(std::make_unique<Table>(std::vector<int32_t>(tiles, lengths.back())));
  }

  ForwardParams params;
  params.size = {1, c.heads, c.head_dim, table.num_tokens, blocks, tiles};
  params.softmax_scale = 1.0f / std::sqrt(static_cast<float>(c.head_dim));
  params.q8 = q8.as<uint8_t>();
  params.k8 = k8.as<uint8_t>();
  params.v8t = v8t.as<uint8_t>();
  params.q_scale = q_scale.as<float>();
  params.k_scale = k_scale.as<float>();
  params.v_scale = v_scale.as<float>();
  params.q_k_mean = q_k_mean.as<float>();
  params.token_of_slot = token_of_slot.as<int32_t>();
  params.tile_of_block = tile_of_block.as<int32_t>();
  params.kv = {nullptr, indices.as<int32_t>(), 1, 1, tiles, blocks};
  const int64_t row = static_cast<int64_t>(c.heads) * c.head_dim;
  params.out = {out.as<void>(), row * table.num_tokens, c.head_dim, row};
  params.lse = lse.as<float>();
  params.row_max = row_max.as<float>();
  params.row_sum = row_sum.as<float>();
  Memory workspace(forward_workspace_bytes(params));
  params.workspace = workspace.as<void>();
  params.workspace_bytes = workspace.bytes();

  std::vector<std::function<void(int)>> calls;
  for (size_t i = 0; i < densities.size(); ++i) {
    calls.push_back([&, i](int) {
      params.kv.num_blocks = counts[i]->as<int32_t>();
      forward(params, nullptr);
    });
  }
  const std::vector<Timing> times = time_interleaved(calls, repeats, repeats > 1 ? 2 : 0);
  for (size_t i = 0; i < densities.size(); ++i) {
    const double flop = 4.0 * kBlockSlots * kBlockSlots * dim * items * lengths[i];
    JsonLine()
        .add("bench", "forward")
        .add("case", c.name)
        .add("device", device_name())
        .add("tokens", table.num_tokens)
        .add("heads", c.heads)
        .add("head_dim", c.head_dim)
        .add("density", densities[i])
        .add("kv_blocks_per_row", lengths[i])
        .add("repeats", repeats)
        .add("ms", times[i])
        .add("tflops", flop / times[i].median_ms * 1e-9)
        .add("of_ideal", times[i].median_ms / times[0].median_ms * lengths[0] / lengths[i])
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
    bench::run({"small", {7, 9, 8}, {7, 9, 4}, 2, 128}, {1.0, 0.5}, 1);
    return 0;
  }
  for (const int head_dim : {128, 64}) {
    bench::run({"wan_14b_720p", {21, 45, 80}, {7, 9, 4}, 40, head_dim}, {1.0, 0.5, 0.3, 0.194, 0.1}, 10);
    bench::run({"wan_1.3b_480p", {21, 30, 52}, {7, 9, 6}, 12, head_dim}, {1.0, 0.5, 0.3, 0.194, 0.1}, 20);
  }
  return 0;
}
