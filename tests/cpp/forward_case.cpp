#include "forward_case.h"

#include <cstring>
#include <memory>
#include <numeric>

#include "fpsattn/launch.h"
#include "support/device.h"

namespace fpsattn::test {

std::ostream& operator<<(std::ostream& stream, const ForwardCase& test) { return stream << test.name; }

namespace {

std::vector<float> tokens_of(const ForwardCase& test, const ProblemSize& size, char what, uint64_t seed) {
  std::vector<float> x(static_cast<size_t>(size.batch) * size.heads * size.num_tokens * size.head_dim);
  Random random(seed * 1000 + what);
  for (size_t i = 0; i < x.size(); ++i) {
    const int d = static_cast<int>(i % size.head_dim), token = static_cast<int>(i / size.head_dim % size.num_tokens);
    const float value = test.generate ? test.generate(random, what, token, d) : random.normal();
    x[i] = from_bits16(to_bits16(value, DType::kBFloat16), DType::kBFloat16);
  }
  return x;
}

void make_lists(const ForwardCase& test, ForwardInputs& in, uint64_t seed) {
  in.mask_batch = test.mask_batch ? in.size.batch : 1;
  in.mask_heads = test.mask_heads ? in.size.heads : 1;
  in.max_blocks = in.size.num_blocks;
  Random random(seed + 77);
  for (int b = 0; b < in.mask_batch; ++b) {
    for (int h = 0; h < in.mask_heads; ++h) {
      for (int tile = 0; tile < in.size.num_tiles; ++tile) {
        std::vector<int32_t> order(in.size.num_blocks);
        std::iota(order.begin(), order.end(), 0);
        for (size_t i = order.size() - 1; i > 0; --i) std::swap(order[i], order[random.below(static_cast<int>(i) + 1)]);
        std::stable_partition(order.begin(), order.end(),
                              [&](int32_t block) { return in.table.tile_of_block[block] == tile; });
        in.num_blocks.push_back(std::min(test.length(b, h, tile), in.size.num_blocks));
        in.indices.insert(in.indices.end(), order.begin(), order.end());
      }
    }
  }
}

}  // namespace

ForwardInputs make_inputs(const ForwardCase& test, uint64_t seed) {
  ForwardInputs in;
  in.table = make_slot_table(test.grid, test.tile, test.text);
  in.size = {test.batch, test.heads, test.head_dim, in.table.num_tokens, in.table.num_blocks(), in.table.num_tiles()};
  in.softmax_scale = test.softmax_scale > 0 ? test.softmax_scale : 1.0f / std::sqrt(static_cast<float>(test.head_dim));
  in.scale_per_token = test.granularity == Granularity::kToken;
  in.with_q_k_mean = test.with_q_k_mean;
  in.q = tokens_of(test, in.size, 'q', seed);
  in.k = tokens_of(test, in.size, 'k', seed);
  in.v = tokens_of(test, in.size, 'v', seed);
  const auto reader = [&](const std::vector<float>& x) {
    return [&x, &in](int b, int h, int s, int d) { return x[in.token_row(b, h, s) * in.size.head_dim + d]; };
  };
  std::vector<float> mean(static_cast<size_t>(test.batch) * test.heads * test.head_dim, 0.0f);
  if (test.smooth_k) {
    for (size_t i = 0; i < in.k.size(); ++i) {
      mean[i / (static_cast<size_t>(in.size.num_tokens) * test.head_dim) * test.head_dim + i % test.head_dim] +=
          in.k[i] / in.size.num_tokens;
    }
  }
  in.data = reference_quantize(
      {in.size, &in.table, test.granularity, test.pow2, reader(in.q), reader(in.k), reader(in.v), mean, {}});
  make_lists(test, in, seed);
  return in;
}

namespace {

constexpr uint8_t kUnwritten = 0xee;

size_t element_bytes(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// A call on the device: operands uploaded, outputs between guard zones.
struct ForwardRun {
  const ProblemSize& size;
  const size_t groups, slots;
  const TokenTensor out;
  DeviceBuffer<uint8_t> out_memory;
  DeviceBuffer<uint8_t> q8, k8, v8t;
  DeviceBuffer<float> q_scale, k_scale, v_scale, q_k_mean;
  DeviceBuffer<int32_t> token_of_slot, tile_of_block, num_blocks, indices;
  DeviceBuffer<float> lse, row_max, row_sum;
  ForwardParams params;
  std::unique_ptr<DeviceBuffer<uint8_t>> workspace;

  static TokenTensor strides(const ProblemSize& size, OutMemory memory) {
    const int64_t dim = size.head_dim, tokens = size.num_tokens, heads = size.heads;
    const int64_t gap = memory == OutMemory::kPadded ? 8 : 0;
    if (memory == OutMemory::kHnd) return {nullptr, heads * tokens * dim, tokens * dim, dim};
    return {nullptr, tokens * heads * (dim + gap), dim + gap, heads * (dim + gap)};
  }

  ForwardRun(const ForwardInputs& in, DType out_dtype, OutMemory memory)
      : size(in.size),
        groups(static_cast<size_t>(size.batch) * size.heads),
        slots(static_cast<size_t>(size.num_blocks) * kBlockSlots),
        out(strides(size, memory)),
        out_memory(size.batch * out.stride_batch * element_bytes(out_dtype), kUnwritten),
        q8(in.data.q8),
        k8(in.data.k8),
        v8t(in.data.v8t),
        q_scale(in.data.q_scale),
        k_scale(in.data.k_scale),
        v_scale(in.data.v_scale),
        q_k_mean(std::vector<float>(in.data.q_k_mean.begin(), in.data.q_k_mean.end())),
        token_of_slot(in.table.token_of_slot),
        tile_of_block(in.table.tile_of_block),
        num_blocks(in.num_blocks),
        indices(in.indices),
        lse(groups * size.num_tokens),
        row_max(groups * slots),
        row_sum(groups * slots) {
    params.size = size;
    params.out_dtype = out_dtype;
    params.softmax_scale = in.softmax_scale;
    params.q_scale_per_token = params.k_scale_per_token = in.scale_per_token;
    params.q8 = q8.data();
    params.k8 = k8.data();
    params.v8t = v8t.data();
    params.q_scale = q_scale.data();
    params.k_scale = k_scale.data();
    params.v_scale = v_scale.data();
    params.q_k_mean = in.with_q_k_mean ? q_k_mean.data() : nullptr;
    params.token_of_slot = token_of_slot.data();
    params.tile_of_block = tile_of_block.data();
    params.kv = {num_blocks.data(), indices.data(), in.mask_batch, in.mask_heads, size.num_tiles, in.max_blocks};
    params.out = out;
    params.out.data = out_memory.data();
    params.lse = lse.data();
    params.row_max = row_max.data();
    params.row_sum = row_sum.data();
    workspace = std::make_unique<DeviceBuffer<uint8_t>>(forward_workspace_bytes(params));
    params.workspace = workspace->data();
    params.workspace_bytes = workspace->bytes();
  }
};

}  // namespace

bool launch_fails(const ForwardInputs& in) {
  const ForwardRun run(in, DType::kBFloat16, OutMemory::kNhd);
  try {
    forward(run.params, nullptr);
  } catch (const std::exception&) {  // where launches are synchronous
    return true;
  }
  return cudaDeviceSynchronize() != cudaSuccess;
}

ForwardOutputs run_forward(const ForwardInputs& in, DType out_dtype, OutMemory memory, const ForwardCall& call) {
  const ForwardRun run(in, out_dtype, memory);
  if (call) {
    call(run.params);
  } else {
    forward(run.params, nullptr);
  }
  EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);

  const ProblemSize& size = in.size;
  const TokenTensor& out = run.out;
  run.out_memory.check_guards("out");
  run.lse.check_guards("lse");
  run.row_max.check_guards("row_max");
  run.row_sum.check_guards("row_sum");
  run.workspace->check_guards("workspace");
  ForwardOutputs result;
  result.lse = run.lse.to_host();
  result.row_max = run.row_max.to_host();
  result.row_sum = run.row_sum.to_host();
  std::vector<uint8_t> bytes = run.out_memory.to_host();
  const size_t width = element_bytes(out_dtype);
  for (int b = 0; b < size.batch; ++b) {
    for (int h = 0; h < size.heads; ++h) {
      for (int s = 0; s < size.num_tokens; ++s) {
        for (int d = 0; d < size.head_dim; ++d) {
          uint8_t* element = &bytes[width * (b * out.stride_batch + h * out.stride_head + s * out.stride_token + d)];
          uint32_t bits = 0;
          std::memcpy(&bits, element, width);
          float value;
          std::memcpy(&value, &bits, sizeof value);
          result.out_bits.push_back(bits);
          result.out.push_back(width == 4 ? value : from_bits16(bits, out_dtype));
          std::memset(element, kUnwritten, width);
        }
      }
    }
  }
  for (size_t i = 0; i < bytes.size(); ++i) {  // what is left are gaps
    if (bytes[i] != kUnwritten) {
      ADD_FAILURE() << "out: byte " << i << " between the rows was written";
      break;
    }
  }
  return result;
}

double relative_l1(const std::vector<float>& a, const std::vector<double>& b) {
  double difference = 0.0, total = 0.0;
  for (size_t i = 0; i < a.size(); ++i) difference += std::fabs(a[i] - b[i]), total += std::fabs(b[i]);
  return difference / total;
}

int count_mismatches(const ForwardInputs& in, const ForwardOutputs& got, DType out_dtype, bool report) {
  const ForwardReference ref = reference_forward(in, device_fp8_sum());
  const ProblemSize& size = in.size;
  const int dim = size.head_dim, slots = size.num_blocks * kBlockSlots;
  const double rounding = out_dtype == DType::kBFloat16  ? 0x1.02p-8  // half an ulp of the output, and FP32 noise
                          : out_dtype == DType::kFloat16 ? 0x1.02p-11
                                                         : 0x1p-21;
  const double tiny = out_dtype == DType::kFloat16 ? 0x1p-25 : 1e-30;
  int bad = 0;
  const auto fail = [&](const char* what, size_t i, double value, double wanted, double allowed) {
    if (++bad <= 5 && report)
      ADD_FAILURE() << what << "[" << i << "] is " << value << ", expected " << wanted << " +- " << allowed;
  };
  const auto check = [&](const char* what, size_t i, double value, double wanted, double allowed) {
    if (std::isnan(wanted) ? !std::isnan(value) : !(std::fabs(value - wanted) <= allowed || value == wanted))
      fail(what, i, value, wanted, allowed);
  };
  for (int g = 0; g < size.batch * size.heads; ++g) {
    for (int slot = 0; slot < slots; ++slot) {
      const size_t i = static_cast<size_t>(g) * slots + slot;
      const int token = in.table.token_of_slot[slot];
      // A maximum on an integer, give or take a rounding, may be rounded up to the next: sums then halve, O and lse
      // barely move.
      const bool shifted = ref.max_uncertain[i] && got.row_max[i] == ref.row_max[i] + 1;
      if (!(ref.max_uncertain[i] && std::fabs(got.row_max[i] - ref.row_max[i]) <= 1))
        check("row_max", i, got.row_max[i], ref.row_max[i], 0.0);
      const double slack = ref.max_uncertain[i] ? 0.01 : 0.0;  // subnormal P round differently after a shift
      if (!ref.max_uncertain[i] || shifted) {
        check("row_sum", i, got.row_sum[i] * (shifted ? 2 : 1), ref.row_sum[i],
              ref.sum_allowance[i] + (1e-6 + slack) * ref.row_sum[i]);
      }
      if (token < 0) continue;
      const size_t row = static_cast<size_t>(g) * size.num_tokens + token;
      const double sum = ref.row_sum[i];
      const double lse_allowance =
          sum > 0 ? ref.sum_allowance[i] / sum * 1.1 + slack + 1e-6 * (1 + std::fabs(ref.lse[row])) : 0.0;
      check("lse", row, got.lse[row], ref.lse[row], lse_allowance);
      for (int d = 0; d < dim; ++d) {
        const size_t e = row * dim + d;
        const double scale = in.data.v_scale[static_cast<size_t>(g) * dim + d];
        const double allowed =
            ref.out_allowance[e] * 1.1 + rounding * std::fabs(ref.out[e]) + tiny + (1e-6 + slack) * scale * 448;
        check("out", e, got.out[e], ref.out[e], allowed);
      }
    }
  }
  return bad;
}

void expect_matches_reference(const ForwardInputs& in, const ForwardOutputs& got, DType out_dtype) {
  EXPECT_EQ(count_mismatches(in, got, out_dtype, true), 0) << "wrong values in all";
}

}  // namespace fpsattn::test
