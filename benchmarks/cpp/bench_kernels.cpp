// Microbenchmarks of the C++ library without torch: quantize, forward and backward as a user of libfpsattn launches them.
//
//   bench_kernels [--smoke] [--json]      ctest -L benchmark -V
//
// A line per kernel and shape: milliseconds (minimum, median, maximum of 20 launches after 3), GB/s of the bytes that have
// to move or TFLOP/s over computed blocks. --smoke: one small odd grid, launched once, for machines whose times mean
// nothing; ctest chooses it under the emulator. --json: a JSON object a line. Exit status: 0; 1 if an output is not finite or
// is all zeros; 2 usage; 77 without an sm_90 device.
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "fpsattn/block_mask.h"
#include "fpsattn/launch.h"
#include "fpsattn/status.h"
#include "fpsattn/tile_layout.h"

namespace {

using namespace fpsattn;

void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw Error(std::string(what) + ": " + cudaGetErrorString(status));
}

template <class T>
class Device {
 public:
  explicit Device(size_t count = 0) { resize(count); }
  explicit Device(const std::vector<T>& values) : Device(values.size()) {
    check(cudaMemcpy(data, values.data(), size * sizeof(T), cudaMemcpyHostToDevice), "copy to the device");
  }
  ~Device() { cudaFree(data); }
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

  void resize(size_t count) {
    cudaFree(data);
    data = nullptr;
    size = count;
    if (count > 0) check(cudaMalloc(&data, count * sizeof(T)), "cudaMalloc");
  }
  std::vector<T> head(size_t count) const {
    std::vector<T> values(std::min(count, size));
    check(cudaMemcpy(values.data(), data, values.size() * sizeof(T), cudaMemcpyDeviceToHost), "copy to the host");
    return values;
  }

  T* data = nullptr;
  size_t size = 0;
};

struct Shape {
  const char* name;
  Int3 grid;
  int heads, head_dim;
};
constexpr Shape kShapes[] = {{"wan-14b-720p", {21, 45, 80}, 40, 128}, {"d64-480p", {13, 30, 52}, 24, 64}};
constexpr Shape kSmoke[] = {{"smoke", {5, 13, 17}, 2, 128}, {"smoke-d64", {5, 13, 17}, 2, 64}};
constexpr double kWindow = 0.58;  // of each axis: about the published density of 0.194

float from_bfloat16(uint16_t bits) {
  const uint32_t wide = uint32_t{bits} << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

// N(0, 1), rounded towards zero to BF16; a period of at most 2^20 + 7 elements, which no stride of a tensor divides.
std::vector<uint16_t> random_bfloat16(size_t count, int seed) {
  std::mt19937 engine(seed);
  std::normal_distribution<float> normal;
  std::vector<uint16_t> values(count);
  const size_t period = std::min<size_t>(count, (1 << 20) + 7);
  for (size_t i = 0; i < count; ++i) {
    if (i >= period) {
      values[i] = values[i - period];
      continue;
    }
    const float x = normal(engine);
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    values[i] = static_cast<uint16_t>(bits >> 16);
  }
  return values;
}

void expect_values(const char* what, const std::vector<float>& values) {
  bool finite = true, zeros = true;
  for (float x : values) finite = finite && std::isfinite(x), zeros = zeros && x == 0.0f;
  if (!finite || zeros) throw Error(std::string(what) + (finite ? " is all zeros" : " is not finite"));
}

void expect_values(const char* what, const std::vector<uint16_t>& bits) {
  std::vector<float> values;
  for (uint16_t word : bits) values.push_back(from_bfloat16(word));
  expect_values(what, values);
}

struct Options {
  bool smoke = false, json = false;
};

// Launches, times, prints. `amount`: bytes or floating-point operations of one launch.
void measure(const Options& options, const Shape& shape, const std::string& name, double density, double amount,
             const char* unit, const std::function<void()>& launch) {
  const int warm_up = options.smoke ? 0 : 3, repeats = options.smoke ? 1 : 20;
  cudaEvent_t begin, end;
  check(cudaEventCreate(&begin), "event");
  check(cudaEventCreate(&end), "event");
  std::vector<float> ms;
  for (int i = 0; i < warm_up + repeats; ++i) {
    check(cudaEventRecord(begin), "event");
    launch();
    check(cudaEventRecord(end), "event");
    check(cudaEventSynchronize(end), name.c_str());
    float elapsed = 0.0f;
    check(cudaEventElapsedTime(&elapsed, begin, end), "event");
    if (i >= warm_up) ms.push_back(elapsed);
  }
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  std::sort(ms.begin(), ms.end());
  const double median = ms[ms.size() / 2], rate = amount / median / (unit[0] == 'G' ? 1e6 : 1e9);
  if (options.json) {
    std::printf("{\"kernel\": \"%s\", \"shape\": \"%s\", \"density\": %.4f, \"timings_meaningless\": %s, ",
                name.c_str(), shape.name, density, options.smoke ? "true" : "false");
    std::printf("\"ms\": {\"min\": %.6f, \"median\": %.6f, \"max\": %.6f}, \"rate\": %.3f, \"unit\": \"%s\"}\n",
                ms.front(), median, ms.back(), options.smoke ? 0.0 : rate, unit);
  } else if (options.smoke) {
    std::printf("%-12s %-22s density %.3f  ran, not timed\n", shape.name, name.c_str(), density);
  } else {
    std::printf("%-12s %-22s density %.3f  %8.4f %8.4f %8.4f ms  %7.1f %s\n", shape.name, name.c_str(), density,
                ms.front(), median, ms.back(), rate, unit);
  }
  std::fflush(stdout);
}

void run(const Options& options, const Shape& shape) {
  const TileLayout layout = plan(shape.grid);
  const size_t groups = shape.heads, tokens = layout.num_tokens, slots = layout.num_slots, dim = shape.head_dim;
  const size_t elements = groups * tokens * dim, code = code_dim(shape.head_dim);
  const ProblemSize size{1, shape.heads, shape.head_dim, layout.num_tokens, layout.num_blocks, layout.num_tiles};
  const auto tensor = [&](uint16_t* data) {  // (B, S, H, D)
    return TokenTensor{data, static_cast<int64_t>(elements), static_cast<int64_t>(dim),
                       static_cast<int64_t>(groups * dim)};
  };
  const Device<uint16_t> q(random_bfloat16(elements, 1)), k(random_bfloat16(elements, 2)),
      v(random_bfloat16(elements, 3));
  const Device<int32_t> token_of_slot(layout.token_of_slot), tile_of_block(layout.tile_of_block);
  const Device<int32_t> tile_block_offsets(layout.tile_block_offsets);
  const Device<uint8_t> q8(groups * slots * code), k8(groups * slots * code),
      v8t(groups * layout.num_blocks * (code + kVExtraRows) * kBlockSlots);
  const Device<float> q_scale(groups * layout.num_blocks), k_scale(groups * layout.num_blocks), v_scale(groups * dim);
  const Device<float> k_mean(groups * dim), q_k_mean(groups * tokens);

  QuantizeParams quantizing;
  quantizing.size = size;
  quantizing.pow2_scales = true;  // what a backward wants
  quantizing.k_mean_stride = 8;
  quantizing.q = tensor(q.data), quantizing.k = tensor(k.data), quantizing.v = tensor(v.data);
  quantizing.token_of_slot = token_of_slot.data;
  quantizing.tile_block_offsets = tile_block_offsets.data;
  quantizing.q8 = q8.data, quantizing.k8 = k8.data, quantizing.v8t = v8t.data;
  quantizing.q_scale = q_scale.data, quantizing.k_scale = k_scale.data, quantizing.v_scale = v_scale.data;
  quantizing.k_mean = k_mean.data, quantizing.q_k_mean = q_k_mean.data;
  Device<uint8_t> workspace(quantize_workspace_bytes(quantizing));
  quantizing.workspace = workspace.data, quantizing.workspace_bytes = workspace.size;
  // Q, K, V read once and written as e4m3; V read once more for its maxima, an eighth of K for its mean.
  const double moved = elements * (3 * (2.0 + 1.0) + 2.0 + 2.0 / quantizing.k_mean_stride);
  measure(options, shape, "quantize", 1.0, moved, "GB/s", [&] { quantize(quantizing, nullptr); });
  expect_values("q_scale", q_scale.head(4096));

  const Device<uint16_t> out(elements), grad_out(random_bfloat16(elements, 4)), dq(elements), dk(elements),
      dv(elements);
  const Device<float> lse(groups * tokens), row_max(groups * slots), row_sum(groups * slots);
  Int3 window;
  for (int axis = 0; axis < 3; ++axis)
    window[axis] = std::max(1, static_cast<int>(std::lround(kWindow * layout.tile_grid[axis])));
  for (const Int3& tiles : {layout.tile_grid, window}) {
    const BlockListTable kv = sliding_tile_lists(layout, tiles);
    const BlockListTable transposed =
        transpose_lists({kv.num_blocks.data(), kv.indices.data(), 1, 1, kv.rows, kv.width},
                        layout.tile_block_offsets.data(), layout.num_tiles);
    double pairs = 0.0;
    for (int tile : layout.tile_of_block) pairs += kv.num_blocks[tile];
    const double density = pairs / layout.num_blocks / layout.num_blocks;
    const double flops = 4.0 * kBlockSlots * kBlockSlots * dim * groups * pairs;
    const Device<int32_t> counts(kv.num_blocks), indices(kv.indices), q_counts(transposed.num_blocks),
        q_indices(transposed.indices);

    ForwardParams forwarding;
    forwarding.size = size;
    forwarding.softmax_scale = 1.0f / std::sqrt(static_cast<float>(dim));
    forwarding.q8 = q8.data, forwarding.k8 = k8.data, forwarding.v8t = v8t.data;
    forwarding.q_scale = q_scale.data, forwarding.k_scale = k_scale.data, forwarding.v_scale = v_scale.data;
    forwarding.q_k_mean = q_k_mean.data;
    forwarding.token_of_slot = token_of_slot.data, forwarding.tile_of_block = tile_of_block.data;
    forwarding.kv = {counts.data, indices.data, 1, 1, static_cast<int>(kv.rows), static_cast<int>(kv.width)};
    forwarding.out = tensor(out.data);
    forwarding.lse = lse.data, forwarding.row_max = row_max.data, forwarding.row_sum = row_sum.data;
    workspace.resize(forward_workspace_bytes(forwarding));
    forwarding.workspace = workspace.data, forwarding.workspace_bytes = workspace.size;
    measure(options, shape, "forward", density, flops, "TFLOP/s", [&] { forward(forwarding, nullptr); });
    expect_values("out", out.head(1 << 16));
    expect_values("lse", lse.head(1 << 16));

    for (const bool deterministic : {false, true}) {
      BackwardParams params;
      params.size = size;
      params.softmax_scale = forwarding.softmax_scale;
      params.deterministic = deterministic;
      params.q8 = q8.data, params.k8 = k8.data, params.v8t = v8t.data;
      params.q_scale = q_scale.data, params.k_scale = k_scale.data, params.v_scale = v_scale.data;
      params.row_max = row_max.data, params.row_sum = row_sum.data;
      params.token_of_slot = token_of_slot.data, params.tile_of_block = tile_of_block.data;
      params.kv = forwarding.kv;
      params.q = {
          q_counts.data, q_indices.data, 1, 1, static_cast<int>(transposed.rows), static_cast<int>(transposed.width)};
      params.out = tensor(out.data), params.grad_out = tensor(grad_out.data);
      params.dq = tensor(dq.data), params.dk = tensor(dk.data), params.dv = tensor(dv.data);
      workspace.resize(backward_workspace_bytes(params));
      params.workspace = workspace.data, params.workspace_bytes = workspace.size;
      // Five products against two; what a mode executes beyond that does not count.
      measure(options, shape, deterministic ? "backward deterministic" : "backward", density, 2.5 * flops, "TFLOP/s",
              [&] { backward(params, nullptr); });
      for (const auto* gradient : {&dq, &dk, &dv}) expect_values("a gradient", gradient->head(1 << 16));
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  Options options;
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    if (argument == "--smoke") {
      options.smoke = true;
    } else if (argument == "--json") {
      options.json = true;
    } else {
      std::fprintf(stderr, "bench_kernels: %s came, --smoke or --json was wanted\n", argv[i]);
      return 2;
    }
  }
  int count = 0, major = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0 ||
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0) != cudaSuccess || major != 9) {
    std::puts("bench_kernels: skipped, needs an sm_90 GPU or the emulator");
    return 77;
  }
  try {
    if (options.smoke) {
      for (const Shape& shape : kSmoke) run(options, shape);
    } else {
      for (const Shape& shape : kShapes) run(options, shape);
    }
  } catch (const std::exception& error) {
    std::fprintf(stderr, "bench_kernels: %s\n", error.what());
    return 1;
  }
  return 0;
}
