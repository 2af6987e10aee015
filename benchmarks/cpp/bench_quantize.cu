// Quantization of Wan-sized inputs: time, ideal bytes, GB/s, and the ratio to a device-to-device copy of the same run.
//
//   bench_quantize            the Wan 480p and 720p shapes
//   bench_quantize --small    one small shape, once: what an emulator can run and count (its times mean nothing)
//
// Ideal bytes: Q, K, V read once, their e4m3 outputs written once, plus one more read of V (absmax) and of the K
// subsample (mean).
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
  int heads;
  int head_dim;
  Granularity granularity;
};

__global__ void fill_kernel(uint16_t* data, size_t count) {
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < count; i += size_t{gridDim.x} * blockDim.x) {
    const uint32_t hash = static_cast<uint32_t>(i * 2654435761u) >> 7;
    data[i] = static_cast<uint16_t>(0x3c00 | (hash & 0x83ff));  // BF16 of magnitude 0.0078 .. 2, either sign
  }
}

constexpr int kMeanStride = 8;

void run(const Case& c, int repeats) {
  const test::SlotTable table = test::make_slot_table(c.grid, c.tile);
  QuantizeParams params;
  params.size = {1, c.heads, c.head_dim, table.num_tokens, table.num_blocks(), table.num_tiles()};
  params.granularity = c.granularity;
  params.k_mean_stride = kMeanStride;
  const size_t row = static_cast<size_t>(c.heads) * c.head_dim;
  const size_t elements = row * table.num_tokens, slots = table.token_of_slot.size();

  const int sets = rotation_sets(3 * elements * 2);
  std::vector<std::unique_ptr<Memory>> inputs;
  for (int i = 0; i < 3 * sets; ++i) {
    inputs.push_back(std::make_unique<Memory>(elements * 2));
    fill_kernel<<<256, 256>>>(inputs.back()->as<uint16_t>(), elements);
  }
  Memory token_of_slot(slots * 4), offsets(table.tile_block_offsets.size() * 4);
  FPSATTN_CUDA_CHECK(
      "bench", cudaMemcpy(token_of_slot.as<void>(), table.token_of_slot.data(), slots * 4, cudaMemcpyHostToDevice));
  FPSATTN_CUDA_CHECK("bench", cudaMemcpy(offsets.as<void>(), table.tile_block_offsets.data(), offsets.bytes(),
                                         cudaMemcpyHostToDevice));
  Memory q8(row * slots), k8(row * slots), v8t(row / c.head_dim * (c.head_dim + kVExtraRows) * slots);
  Memory q_scale(c.heads * slots * 4), k_scale(c.heads * slots * 4), v_scale(row * 4), k_mean(row * 4),
      q_k_mean(c.heads * slots * 4);
  Memory workspace(quantize_workspace_bytes(params));
  params.token_of_slot = token_of_slot.as<int32_t>();
  params.tile_block_offsets = offsets.as<int32_t>();
  params.q8 = q8.as<uint8_t>();
  params.k8 = k8.as<uint8_t>();
  params.v8t = v8t.as<uint8_t>();
  params.q_scale = q_scale.as<float>();
  params.k_scale = k_scale.as<float>();
  params.v_scale = v_scale.as<float>();
  params.k_mean = k_mean.as<float>();
  params.q_k_mean = q_k_mean.as<float>();
  params.workspace = workspace.as<void>();
  params.workspace_bytes = workspace.bytes();

  const auto input = [&](int set, int which) {
    return TokenTensor{inputs[3 * set + which]->as<void>(), static_cast<int64_t>(elements), c.head_dim,
                       static_cast<int64_t>(row)};
  };
  const auto quantize_once = [&](int i) {
    params.q = input(i % sets, 0);
    params.k = input(i % sets, 1);
    params.v = input(i % sets, 2);
    quantize(params, nullptr);
  };
  // The yardstick reads and writes as many bytes of each kind in all: half of the ideal bytes each way.
  const double ideal = elements * (3 * 3 + 2 + 2.0 / kMeanStride);
  const size_t copied = std::min<size_t>(static_cast<size_t>(ideal / 2), elements * 2);
  Memory copy_target(copied);
  const auto copy_once = [&](int i) {
    FPSATTN_CUDA_CHECK("bench", cudaMemcpyAsync(copy_target.as<void>(), inputs[(3 * i + 1) % (3 * sets)]->as<void>(),
                                                copied, cudaMemcpyDeviceToDevice, nullptr));
  };
  const std::vector<Timing> times = time_interleaved({quantize_once, copy_once}, repeats, repeats > 1 ? 3 : 0);
  const double gb_per_s = ideal / times[0].median_ms * 1e-6, copy_gb_per_s = 2.0 * copied / times[1].median_ms * 1e-6;
  JsonLine()
      .add("bench", "quantize")
      .add("case", c.name)
      .add("device", device_name())
      .add("tokens", table.num_tokens)
      .add("slots", slots)
      .add("heads", c.heads)
      .add("head_dim", c.head_dim)
      .add("granularity", static_cast<int>(c.granularity))
      .add("k_mean_stride", kMeanStride)
      .add("repeats", repeats)
      .add("ms", times[0])
      .add("ideal_bytes", ideal)
      .add("gb_per_s", gb_per_s)
      .add("copy_ms", times[1])
      .add("copy_gb_per_s", copy_gb_per_s)
      .add("of_copy", gb_per_s / copy_gb_per_s)
      .print();
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
    bench::run({"small", {7, 9, 8}, {7, 9, 4}, 2, 128, Granularity::kTile}, 1);
    return 0;
  }
  for (int heads : {12, 40}) {
    for (Granularity granularity : {Granularity::kTile, Granularity::kToken}) {
      bench::run({"wan_480p", {21, 30, 52}, {7, 9, 6}, heads, 128, granularity}, 50);
      bench::run({"wan_720p", {21, 45, 80}, {7, 9, 4}, heads, 128, granularity}, 50);
    }
  }
  return 0;
}
