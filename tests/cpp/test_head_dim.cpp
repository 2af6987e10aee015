// Head dimension 96: the kernels read and write 96 columns in the caller's strides. quantize, forward and backward give
// the bits that 128 columns with zeros in the last 32 give.
#include <gtest/gtest.h>

#include <algorithm>
#include <memory>

#include "fpsattn/launch.h"
#include "support/device.h"
#include "support/slot_table.h"
#include "support/token_data.h"

namespace fpsattn::test {
namespace {

constexpr int kDim = 96, kPaddedDim = 128;

struct HeadDimCase {
  std::string name;
  DType dtype;
  Memory memory;
  Granularity granularity;
  bool deterministic;
};

void PrintTo(const HeadDimCase& c, std::ostream* out) { *out << c.name; }

float value(int tensor, int b, int h, int s, int d) {
  Random random(((((tensor * 131ull + b) * 137 + h) * 100003 + s) * 139 + d) * 7919 + 29);
  return d < kDim ? random.normal() + (tensor == 1 ? d % 5 : 0) : 0.0f;
}

// One attention with its gradients, on q, k, v, grad_out of `head_dim` columns, of which the first 96 are the same.
struct Attention {
  Attention(const HeadDimCase& c, int head_dim)
      : table(make_slot_table({4, 6, 7}, {4, 6, 6}, 5)),
        size{1, 2, head_dim, table.num_tokens, table.num_blocks(), table.num_tiles()},
        q(tokens(c, 0)),
        k(tokens(c, 1)),
        v(tokens(c, 2)),
        grad_out(tokens(c, 3)),
        out(blank(c)),
        dq(blank(c)),
        dk(blank(c)),
        dv(blank(c)),
        token_of_slot(table.token_of_slot),
        tile_of_block(table.tile_of_block),
        tile_block_offsets(table.tile_block_offsets),
        q8(heads() * slots() * kPaddedDim),
        k8(q8.size()),
        v8t(heads() * size.num_blocks * (kPaddedDim + kVExtraRows) * kBlockSlots),
        q_scale(heads() * (c.granularity == Granularity::kToken ? slots() : size.num_blocks)),
        k_scale(q_scale.size()),
        v_scale(heads() * head_dim),
        k_mean(v_scale.size()),
        q_k_mean(heads() * size.num_tokens),
        lse(q_k_mean.size()),
        row_max(heads() * slots()),
        row_sum(row_max.size()),
        lists_of(dense(size.num_tiles, size.num_blocks)),
        counts_q(std::vector<int32_t>(size.num_blocks, size.num_blocks)),
        counts_kv(std::vector<int32_t>(size.num_tiles, size.num_blocks)) {
    quantize_step(c);
    forward_step(c);
    backward_step(c);
    EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess) << cudaGetErrorString(cudaGetLastError());
  }

  size_t heads() const { return static_cast<size_t>(size.batch) * size.heads; }
  size_t slots() const { return static_cast<size_t>(size.num_blocks) * kBlockSlots; }
  TokenData tokens(const HeadDimCase& c, int tensor) const {
    return TokenData(size, c.dtype, c.memory, [&](int b, int h, int s, int d) { return value(tensor, b, h, s, d); });
  }
  // Outputs lie in memory of the same kind: a fused one has neighbours that must stay as they are.
  TokenData blank(const HeadDimCase& c) const {
    return TokenData(size, c.dtype, c.memory, [](int, int, int, int) { return 77.0f; });
  }
  static std::vector<int32_t> dense(int rows, int blocks) {
    std::vector<int32_t> lists(static_cast<size_t>(std::max(rows, blocks)) * blocks);
    for (size_t i = 0; i < lists.size(); ++i) lists[i] = static_cast<int32_t>(i % blocks);
    return lists;
  }
  template <class Params>
  void operands(Params& p, const HeadDimCase& c) {
    p.size = size;
    p.q8 = q8.data(), p.k8 = k8.data(), p.v8t = v8t.data();
    p.q_scale = q_scale.data(), p.k_scale = k_scale.data(), p.v_scale = v_scale.data();
    p.row_max = row_max.data(), p.row_sum = row_sum.data();
    p.q_scale_per_token = p.k_scale_per_token = c.granularity == Granularity::kToken;
    p.softmax_scale = 0.1f;
    p.token_of_slot = token_of_slot.data(), p.tile_of_block = tile_of_block.data();
    p.kv = {counts_kv.data(), lists_of.data(), 1, 1, size.num_tiles, size.num_blocks};
    p.out = out.tensor();
  }
  template <class Params>
  void launch(Params& p, size_t (*bytes)(const Params&), void (*run)(const Params&, cudaStream_t)) {
    p.workspace_bytes = bytes(p);
    workspaces.push_back(std::make_unique<DeviceBuffer<uint8_t>>(p.workspace_bytes + 1));
    p.workspace = workspaces.back()->data();
    ASSERT_NO_THROW(run(p, nullptr));
  }
  void quantize_step(const HeadDimCase& c) {
    QuantizeParams p;
    p.size = size, p.dtype = c.dtype, p.granularity = c.granularity;
    p.q = q.tensor(), p.k = k.tensor(), p.v = v.tensor();
    p.token_of_slot = token_of_slot.data(), p.tile_block_offsets = tile_block_offsets.data();
    p.q8 = q8.data(), p.k8 = k8.data(), p.v8t = v8t.data();
    p.q_scale = q_scale.data(), p.k_scale = k_scale.data(), p.v_scale = v_scale.data();
    p.k_mean = k_mean.data(), p.q_k_mean = q_k_mean.data();
    launch(p, quantize_workspace_bytes, quantize);
  }
  void forward_step(const HeadDimCase& c) {
    ForwardParams p;
    operands(p, c);
    p.out_dtype = c.dtype;
    p.q_k_mean = q_k_mean.data();
    p.lse = lse.data();
    launch(p, forward_workspace_bytes, forward);
  }
  void backward_step(const HeadDimCase& c) {
    BackwardParams p;
    operands(p, c);
    p.dtype = c.dtype, p.deterministic = c.deterministic;
    p.q = {counts_q.data(), lists_of.data(), 1, 1, size.num_blocks, size.num_blocks};
    p.grad_out = grad_out.tensor(), p.dq = dq.tensor(), p.dk = dk.tensor(), p.dv = dv.tensor();
    launch(p, backward_workspace_bytes, backward);
  }

  SlotTable table;
  ProblemSize size;
  TokenData q, k, v, grad_out, out, dq, dk, dv;
  DeviceBuffer<int32_t> token_of_slot, tile_of_block, tile_block_offsets;
  DeviceBuffer<uint8_t> q8, k8, v8t;
  DeviceBuffer<float> q_scale, k_scale, v_scale, k_mean, q_k_mean, lse, row_max, row_sum;
  DeviceBuffer<int32_t> lists_of, counts_q, counts_kv;
  std::vector<std::unique_ptr<DeviceBuffer<uint8_t>>> workspaces;
};

// Columns 0..95 of every row of `a` are those of `b`, and what lies between the rows of `a` is untouched.
void expect_same_rows(const char* name, const ProblemSize& size, const TokenData& a, const TokenData& b) {
  const std::vector<uint16_t> before = a.host_bits(), after = a.device_bits(), padded = b.device_bits();
  std::vector<bool> is_row(before.size());
  for (int batch = 0; batch < size.batch; ++batch) {
    for (int h = 0; h < size.heads; ++h) {
      for (int s = 0; s < size.num_tokens; ++s) {
        for (int d = 0; d < kDim; ++d) {
          const size_t i = a.offset(batch, h, s, d);
          is_row[i] = true;
          ASSERT_EQ(after[i], padded[b.offset(batch, h, s, d)]) << name << " of token " << s << ", column " << d;
        }
      }
    }
  }
  for (size_t i = 0; i < before.size(); ++i) {
    ASSERT_TRUE(is_row[i] || before[i] == after[i]) << name << ": element " << i << " is of no row, but was written";
  }
}

class HeadDim : public testing::TestWithParam<HeadDimCase> {};

TEST_P(HeadDim, HasTheBitsOfThePaddedOne) {
  FPSATTN_SKIP_WITHOUT_DEVICE();
  const Attention narrow(GetParam(), kDim), wide(GetParam(), kPaddedDim);
  EXPECT_EQ(narrow.q8.to_host(), wide.q8.to_host());
  EXPECT_EQ(narrow.k8.to_host(), wide.k8.to_host());
  EXPECT_EQ(narrow.v8t.to_host(), wide.v8t.to_host());
  EXPECT_EQ(narrow.q_scale.to_host(), wide.q_scale.to_host());
  EXPECT_EQ(narrow.k_scale.to_host(), wide.k_scale.to_host());
  EXPECT_EQ(narrow.q_k_mean.to_host(), wide.q_k_mean.to_host());
  EXPECT_EQ(narrow.lse.to_host(), wide.lse.to_host());
  EXPECT_EQ(narrow.row_max.to_host(), wide.row_max.to_host());
  EXPECT_EQ(narrow.row_sum.to_host(), wide.row_sum.to_host());
  expect_same_rows("out", narrow.size, narrow.out, wide.out);
  if (GetParam().deterministic) expect_same_rows("dq", narrow.size, narrow.dq, wide.dq);
  expect_same_rows("dk", narrow.size, narrow.dk, wide.dk);
  expect_same_rows("dv", narrow.size, narrow.dv, wide.dv);
}

INSTANTIATE_TEST_SUITE_P(
    All, HeadDim,
    testing::Values(HeadDimCase{"fused_tile", DType::kBFloat16, Memory::kFusedQkv, Granularity::kTile, true},
                    HeadDimCase{"hnd_token_fast", DType::kFloat16, Memory::kHnd, Granularity::kToken, false}),
    [](const auto& info) { return info.param.name; });

}  // namespace
}  // namespace fpsattn::test
