#include "quantize_case.h"

#include <cstdio>

namespace fpsattn::test {
namespace {

ProblemSize size_of(const QuantizeCase& c, const SlotTable& table) {
  ProblemSize size;
  size.batch = c.batch;
  size.heads = c.heads;
  size.head_dim = c.head_dim;
  size.num_tokens = table.num_tokens;
  size.num_blocks = table.num_blocks();
  size.num_tiles = table.num_tiles();
  return size;
}

// A value of the kind that the case asks for; the same for the same arguments.
float generate(const QuantizeCase& c, int tensor, int b, int h, int s, int d) {
  Random random(((((tensor * 131ull + b) * 137 + h) * 100003 + s) * 139 + d) * 7919 + 17);
  const float normal = random.normal();
  switch (c.values) {
    case Values::kNormal:
      return tensor == 1 ? normal + 3.0f * ((d * 37 + h) % 11 - 5) : tensor == 2 ? normal * (1 + d % 7) : normal;
    case Values::kOutliers:
      return random.below(100) == 0 ? 100.0f * normal : normal;
    case Values::kTies: {
      if (d == 0) {
        return tensor == 2 && s != 0 ? 0.0f : 448.0f;
      }
      const uint8_t byte = static_cast<uint8_t>(random.below(0x7e));
      const float midpoint = 0.5f * (e4m3_to_float(byte) + e4m3_to_float(byte + 1));
      const bool exact = random.below(4) == 0;  // some representable values among the midpoints
      const float x = tensor == 2 && s == 0 ? 448.0f : exact ? e4m3_to_float(byte) : midpoint;
      return random.below(2) ? -x : x;
    }
    case Values::kTiny:
      return normal * std::ldexp(1.0f, -96 - 3 * (s % 13));
    case Values::kHuge:
      return normal * (c.dtype == DType::kBFloat16 ? 5.0e37f : 9.0e3f);
    case Values::kZeros:
      return s % 5 == 0 || d % 9 == 4 || (tensor < 2 && h == 0) ? (d % 2 ? -0.0f : 0.0f) : normal;
  }
  return normal;
}

TokenData make_data(const QuantizeCase& c, const SlotTable& table, int tensor, const QuantizeRun::Poison& poison) {
  return TokenData(size_of(c, table), c.dtype, c.memory, [&](int b, int h, int s, int d) {
    return poison(generate(c, tensor, b, h, s, d), tensor, b, h, s, d);
  });
}

std::vector<float> given_mean(const QuantizeCase& c) {
  std::vector<float> mean(static_cast<size_t>(c.batch) * c.heads * c.head_dim);
  Random random(99);
  for (float& x : mean) {
    // Zero keeps the midpoints of Values::kTies midpoints; otherwise 24-bit numbers.
    x = c.values == Values::kTies ? 0.0f : 15.0f * random.normal();
  }
  return mean;
}

// Delayed scaling: some channels saturate, some have room, one is zero, one is far below the smallest scale.
std::vector<float> given_absmax(const QuantizeCase& c) {
  std::vector<float> absmax(static_cast<size_t>(c.batch) * c.heads * c.head_dim);
  for (size_t i = 0; i < absmax.size(); ++i) {
    absmax[i] = 0.25f + 1.7f * (i % 5);
  }
  absmax[1] = 0.0f;
  absmax[2] = 1e-36f;
  return absmax;
}

}  // namespace

int64_t first_byte_difference(const std::vector<uint8_t>& a, const std::vector<uint8_t>& b) {
  if (a.size() != b.size()) {
    return 0;
  }
  for (size_t i = 0; i < a.size(); ++i) {
    if (a[i] != b[i] && !((a[i] & 0x7f) == 0x7f && (b[i] & 0x7f) == 0x7f)) {
      return static_cast<int64_t>(i);
    }
  }
  return -1;
}

void expect_same_bytes(const char* name, const std::vector<uint8_t>& got, const std::vector<uint8_t>& want) {
  const int64_t i = first_byte_difference(got, want);
  if (i >= 0) {
    ADD_FAILURE() << name << ": sizes " << got.size() << " and " << want.size() << ", first difference at byte " << i
                  << ": got " << static_cast<int>(got[i]) << ", want " << static_cast<int>(want[i]);
  }
}

void expect_same_floats(const char* name, const std::vector<float>& got, const std::vector<float>& want) {
  ASSERT_EQ(got.size(), want.size()) << name;
  for (size_t i = 0; i < got.size(); ++i) {
    ASSERT_TRUE(bits_of(got[i]) == bits_of(want[i]) || (std::isnan(got[i]) && std::isnan(want[i])))
        << name << "[" << i << "]: got " << got[i] << ", want " << want[i];
  }
}

QuantizeRun::QuantizeRun(const QuantizeCase& c, const Poison& poison)
    : table(make_slot_table(c.grid, c.tile, c.text)),
      q(make_data(c, table, 0, poison)),
      k(make_data(c, table, 1, poison)),
      v(make_data(c, table, 2, poison)),
      token_of_slot(table.token_of_slot),
      tile_block_offsets(table.tile_block_offsets),
      given_k_mean(given_mean(c)),
      given_v_absmax(given_absmax(c)),
      q8(static_cast<size_t>(c.batch) * c.heads * table.token_of_slot.size() * code_dim(c.head_dim)),
      k8(q8.size()),
      v8t(static_cast<size_t>(c.batch) * c.heads * table.token_of_slot.size() * (code_dim(c.head_dim) + kVExtraRows)),
      q_scale(static_cast<size_t>(c.batch) * c.heads *
              (c.granularity == Granularity::kToken ? table.token_of_slot.size() : table.num_blocks())),
      k_scale(q_scale.size()),
      v_scale(static_cast<size_t>(c.batch) * c.heads * c.head_dim),
      k_mean(v_scale.size()),
      q_k_mean(static_cast<size_t>(c.batch) * c.heads * table.num_tokens),
      q_block_sum(static_cast<size_t>(c.batch) * c.heads * table.num_blocks() * c.head_dim),
      k_block_sum(q_block_sum.size()),
      workspace([&] {
        params.size = size_of(c, table);
        params.smooth_k = c.mean != Mean::kOff;
        params.k_mean_stride = c.k_mean_stride;
        params.given_k_mean = c.mean == Mean::kGiven ? given_k_mean.data() : nullptr;
        params.given_v_absmax = c.given_v_absmax ? given_v_absmax.data() : nullptr;
        return quantize_workspace_bytes(params) + 1;
      }()),
      case_(c) {
  params.dtype = c.dtype;
  params.granularity = c.granularity;
  params.pow2_scales = c.pow2;
  params.q = q.tensor();
  params.k = k.tensor();
  params.v = v.tensor();
  params.token_of_slot = token_of_slot.data();
  params.tile_block_offsets = tile_block_offsets.data();
  params.q8 = q8.data();
  params.k8 = k8.data();
  params.v8t = v8t.data();
  params.q_scale = q_scale.data();
  params.k_scale = k_scale.data();
  params.v_scale = v_scale.data();
  params.k_mean = k_mean.data();
  params.q_k_mean = q_k_mean.data();
  params.q_block_sum = c.block_sums ? q_block_sum.data() : nullptr;
  params.k_block_sum = c.block_sums ? k_block_sum.data() : nullptr;
  params.workspace = workspace.data();
  params.workspace_bytes = workspace.bytes() - 1;
}

void QuantizeRun::launch() {
  ASSERT_NO_THROW(quantize(params, nullptr));
  ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess) << cudaGetErrorString(cudaGetLastError());
  host_k_mean = k_mean.to_host();
  if (case_.given_v_absmax) {
    host_v_absmax = given_v_absmax.to_host();
  }
}

// A computed mean within the error of an FP32 sum in any order: count * 2^-24 of the mean magnitude.
void QuantizeRun::check_mean() {
  if (case_.mean != Mean::kComputed) {
    const std::vector<float> want =
        case_.mean == Mean::kGiven ? given_k_mean.to_host() : std::vector<float>(k_mean.size(), 0.0f);
    expect_same_floats("k_mean", host_k_mean, want);
    return;
  }
  for (size_t i = 0; i < host_k_mean.size(); ++i) {
    const int d = i % params.size.head_dim, h = i / params.size.head_dim % params.size.heads,
              b = i / params.size.head_dim / params.size.heads;
    double sum = 0.0, magnitude = 0.0;
    int count = 0;
    for (int s = 0; s < params.size.num_tokens; s += params.k_mean_stride, ++count) {
      sum += k.value(b, h, s, d);
      magnitude += std::fabs(k.value(b, h, s, d));
    }
    if (std::isfinite(sum)) {
      ASSERT_NEAR(host_k_mean[i], sum / count, (count + 2) * 0x1p-24 * magnitude / count + 0x1p-149)
          << "k_mean[" << i << "]";
    } else {
      ASSERT_FALSE(std::isfinite(host_k_mean[i])) << "k_mean[" << i << "]";
    }
  }
}

void QuantizeRun::check() {
  check_mean();
  HostQuantizeInput in{params.size, &table, params.granularity, params.pow2_scales, {},
                       {},          {},     host_k_mean,        host_v_absmax};
  in.q = [&](int b, int h, int s, int d) { return q.value(b, h, s, d); };
  in.k = [&](int b, int h, int s, int d) { return k.value(b, h, s, d); };
  in.v = [&](int b, int h, int s, int d) { return v.value(b, h, s, d); };
  const HostQuantized want = reference_quantize(in);
  expect_same_floats("q_scale", q_scale.to_host(), want.q_scale);
  expect_same_floats("k_scale", k_scale.to_host(), want.k_scale);
  expect_same_floats("v_scale", v_scale.to_host(), want.v_scale);
  expect_same_bytes("q8", q8.to_host(), want.q8);
  expect_same_bytes("k8", k8.to_host(), want.k8);
  expect_same_bytes("v8t", v8t.to_host(), want.v8t);
  if (case_.block_sums) {
    expect_same_floats("q_block_sum", q_block_sum.to_host(), want.q_block_sum);
    expect_same_floats("k_block_sum", k_block_sum.to_host(), want.k_block_sum);
  }
  const std::vector<float> dots = q_k_mean.to_host();
  for (size_t i = 0; i < dots.size(); ++i) {
    if (std::isfinite(want.q_k_mean[i])) {
      ASSERT_NEAR(dots[i], want.q_k_mean[i],
                  0x1p-24 * (params.size.head_dim + 1) * want.q_k_mean_magnitude[i] + 0x1p-149)
          << "q_k_mean[" << i << "]";
    } else {
      ASSERT_FALSE(std::isfinite(dots[i])) << "q_k_mean[" << i << "]";
    }
  }
  q8.check_guards("q8");
  k8.check_guards("k8");
  v8t.check_guards("v8t");
  q_scale.check_guards("q_scale");
  k_scale.check_guards("k_scale");
  v_scale.check_guards("v_scale");
  k_mean.check_guards("k_mean");
  q_k_mean.check_guards("q_k_mean");
  q_block_sum.check_guards("q_block_sum");
  k_block_sum.check_guards("k_block_sum");
  workspace.check_guards("workspace");
}

void QuantizeRun::check_twice() {
  launch();
  if (testing::Test::HasFatalFailure()) {
    return;
  }
  check();
  const auto snapshot = [&] {
    return std::tuple(q8.to_host(), k8.to_host(), v8t.to_host(), q_scale.to_host(), k_scale.to_host(),
                      v_scale.to_host(), k_mean.to_host(), q_k_mean.to_host());
  };
  const auto first = snapshot();
  for (const auto* bytes : {&q8, &k8, &v8t}) {
    cudaMemset(bytes->data(), 0x11, bytes->bytes());
  }
  for (const auto* floats : {&q_scale, &k_scale, &v_scale, &k_mean, &q_k_mean}) {
    cudaMemset(floats->data(), 0x11, floats->bytes());
  }
  launch();
  const auto second = snapshot();
  expect_same_bytes("q8 of a second call", std::get<0>(second), std::get<0>(first));
  expect_same_bytes("k8 of a second call", std::get<1>(second), std::get<1>(first));
  expect_same_bytes("v8t of a second call", std::get<2>(second), std::get<2>(first));
  expect_same_floats("q_scale of a second call", std::get<3>(second), std::get<3>(first));
  expect_same_floats("k_scale of a second call", std::get<4>(second), std::get<4>(first));
  expect_same_floats("v_scale of a second call", std::get<5>(second), std::get<5>(first));
  expect_same_floats("k_mean of a second call", std::get<6>(second), std::get<6>(first));
  expect_same_floats("q_k_mean of a second call", std::get<7>(second), std::get<7>(first));
}

}  // namespace fpsattn::test
