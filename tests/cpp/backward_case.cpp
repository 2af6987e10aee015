#include "backward_case.h"

#include <cstdlib>
#include <cstring>

#include "host_reference_quantize.h"

namespace fpsattn::test {
namespace {

ProblemSize size_of(const BackwardCase& c) {
  const SlotTable table = make_slot_table(c.grid, c.tile, c.text);
  return {c.batch, c.heads, c.head_dim, table.num_tokens, table.num_blocks(), table.num_tiles()};
}

// The emulator multiplies e4m3 exactly unless told otherwise; Hopper's accumulator keeps 13 fraction bits.
double accumulator_error() {
  cudaDeviceProp properties{};
  cudaGetDeviceProperties(&properties, 0);
  const char* options = std::getenv("HOPPER_EMU_OPTS");
  const bool exact = std::strstr(properties.name, "emu") != nullptr &&
                     (options == nullptr || std::strstr(options, "fp8-acc=truncated") == nullptr);
  return exact ? 0x1p-22 : 0x1p-12;
}

}  // namespace

TokenBuffer::TokenBuffer(const ProblemSize& size, Memory memory) : size_(size) {
  const int64_t dim = size.head_dim, heads = size.heads, tokens = size.num_tokens;
  switch (memory) {
    case Memory::kHnd:
      strides_ = {nullptr, heads * tokens * dim, tokens * dim, dim};
      break;
    case Memory::kNhd:
      strides_ = {nullptr, tokens * heads * dim, dim, heads * dim};
      break;
    case Memory::kFusedQkv:
      first_ = heads * dim;
      strides_ = {nullptr, tokens * 3 * heads * dim, dim, 3 * heads * dim};
      break;
  }
  device_ = std::make_unique<DeviceBuffer<uint16_t>>(size_t(size.batch) * strides_.stride_batch + 64);
  poison();
}

void TokenBuffer::poison() {
  const std::vector<uint16_t> values(device_->size(), kPoison);
  ASSERT_EQ(cudaMemcpy(device_->data(), values.data(), device_->bytes(), cudaMemcpyHostToDevice), cudaSuccess);
}

void TokenBuffer::fill(DType dtype, const std::function<float(int b, int h, int s, int d)>& value) {
  std::vector<uint16_t> bits(device_->size(), kPoison);
  for (int b = 0; b < size_.batch; ++b) {
    for (int h = 0; h < size_.heads; ++h) {
      for (int s = 0; s < size_.num_tokens; ++s) {
        for (int d = 0; d < size_.head_dim; ++d) {
          bits[offset(b, h, s, d)] = to_bits16(value(b, h, s, d), dtype);
        }
      }
    }
  }
  ASSERT_EQ(cudaMemcpy(device_->data(), bits.data(), device_->bytes(), cudaMemcpyHostToDevice), cudaSuccess);
}

TokenTensor TokenBuffer::tensor() const {
  TokenTensor tensor = strides_;
  tensor.data = device_->data() + first_;
  return tensor;
}

size_t TokenBuffer::offset(int b, int h, int s, int d) const {
  return first_ + b * strides_.stride_batch + h * strides_.stride_head + s * strides_.stride_token + d;
}

std::vector<uint16_t> TokenBuffer::read(const char* name, bool nan_expected) const {
  device_->check_guards(name);
  std::vector<uint16_t> memory = device_->to_host(), values;
  size_t unwritten = 0, stray = 0;
  for (int b = 0; b < size_.batch; ++b) {
    for (int h = 0; h < size_.heads; ++h) {
      for (int s = 0; s < size_.num_tokens; ++s) {
        for (int d = 0; d < size_.head_dim; ++d) {
          uint16_t& element = memory[offset(b, h, s, d)];
          values.push_back(element);
          unwritten += element == kPoison;
          element = kPoison;
        }
      }
    }
  }
  for (uint16_t element : memory) {
    stray += element != kPoison;
  }
  EXPECT_TRUE(unwritten == 0 || nan_expected) << name << ": " << unwritten << " elements were not written";
  EXPECT_EQ(stray, 0u) << name << ": elements outside of the tensor were written";
  return values;
}

BackwardRun::BackwardRun(const BackwardCase& c, const Poison& poison)
    : case_(c),
      table_(make_slot_table(c.grid, c.tile, c.text)),
      out_(size_of(c), c.memory),
      grad_out_(size_of(c), c.memory),
      dq_(size_of(c), c.memory),
      dk_(size_of(c), c.memory),
      dv_(size_of(c), c.memory) {
  params.size = size_of(c);
  params.dtype = c.dtype;
  params.softmax_scale = 1.0f / std::sqrt(static_cast<float>(c.head_dim));
  params.q_scale_per_token = params.k_scale_per_token = c.granularity == Granularity::kToken;
  make_lists();
  make_operands(poison);
  upload();
}

void BackwardRun::make_lists() {
  Random random(11);
  const int blocks = table_.num_blocks();
  for (int i = 0; i < case_.mask_batch * case_.mask_heads; ++i) {
    Lists lists(table_.num_tiles());
    for (int tile = 0; tile < table_.num_tiles(); ++tile) {
      const int first = table_.tile_block_offsets[tile];
      for (int j = 0; j < blocks; ++j) {
        const int block = (first + j) % blocks;
        const bool keep = case_.mask == Mask::kDense || (case_.mask == Mask::kOwnBlock && j == 0) ||
                          (case_.mask == Mask::kRandom && tile % 3 != 1 && block % 4 != 3 &&
                           (tile % 3 == 0 || j == 0) && random.below(4) != 0);
        if (keep) {
          lists[tile].push_back(block);
        }
      }
    }
    kv_lists_.push_back(lists);
  }
}

void BackwardRun::make_operands(const Poison& poison) {
  const ProblemSize& size = params.size;
  const auto value = [&](int tensor, int b, int h, int s, int d) {
    Random random(((((uint64_t(tensor) * 7 + b) * 11 + h) * 1000003 + s) * 257) + d);
    const float scale = tensor == 0 || tensor == 1 ? case_.magnitude : tensor == 2 ? 0.5f + 0.25f * (d % 5) : 1.0f;
    const float x = scale * random.normal() + (tensor == 2 ? 0.3f : 0.0f);
    return poison(from_bits16(to_bits16(x, case_.dtype), case_.dtype), tensor, b, h, s, d);
  };
  HostQuantizeInput input{size, &table_, case_.granularity, case_.pow2, {}, {}, {}, {}, {}};
  input.q = [&](int b, int h, int s, int d) { return value(0, b, h, s, d); };
  input.k = [&](int b, int h, int s, int d) { return value(1, b, h, s, d); };
  input.v = [&](int b, int h, int s, int d) { return value(2, b, h, s, d); };
  input.k_mean.assign(size_t(size.batch) * size.heads * size.head_dim, 0.0f);
  const HostQuantized quantized = reference_quantize(input);
  q8_ = quantized.q8, k8_ = quantized.k8, v8t_ = quantized.v8t;
  q_scale_ = quantized.q_scale, k_scale_ = quantized.k_scale, v_scale_ = quantized.v_scale;

  const int dim = size.head_dim;
  const size_t slots = table_.token_of_slot.size();
  for (int b = 0; b < size.batch; ++b) {
    for (int h = 0; h < size.heads; ++h) {
      const size_t head = size_t(b) * size.heads + h;
      HostHead in;
      in.dim = dim;
      in.table = &table_;
      in.kv = &kv_lists_[(case_.mask_batch == 1 ? 0 : b) * case_.mask_heads + (case_.mask_heads == 1 ? 0 : h)];
      in.softmax_scale = params.softmax_scale;
      in.k_scale_per_token = params.k_scale_per_token;
      in.v_scale.assign(v_scale_.begin() + head * dim, v_scale_.begin() + (head + 1) * dim);
      in.v.resize(slots * dim);
      for (size_t slot = 0; slot < slots; ++slot) {
        const size_t scale = params.q_scale_per_token ? head * slots + slot : (head * slots + slot) / kBlockSlots;
        in.q_scale.push_back(q_scale_[scale]);
        in.k_scale.push_back(k_scale_[scale]);
        const int token = table_.token_of_slot[slot];
        for (int d = 0; d < dim; ++d) {
          in.q.push_back(e4m3_to_float(q8_[(head * slots + slot) * dim + d]));
          in.k.push_back(e4m3_to_float(k8_[(head * slots + slot) * dim + d]));
          in.grad_out.push_back(token < 0 ? 0.0f : value(3, b, h, token, d));
        }
      }
      for (size_t block = 0; block < slots / kBlockSlots; ++block) {
        for (int d = 0; d < dim; ++d) {
          const uint8_t* row = &v8t_[((head * slots / kBlockSlots + block) * (dim + kVExtraRows) + d) * kBlockSlots];
          for (int p = 0; p < kBlockSlots; ++p) {
            in.v[(block * kBlockSlots + p / 16 * 16 + kVSlotOrder[p % 16]) * dim + d] = e4m3_to_float(row[p]);
          }
        }
      }
      heads_.push_back(std::move(in));
      forwards_.push_back(host_forward(heads_.back(), case_.dtype));
    }
  }
}

void BackwardRun::upload() {
  const ProblemSize& size = params.size;
  const auto bytes = [&](const std::vector<uint8_t>& values) {
    bytes_.push_back(std::make_unique<DeviceBuffer<uint8_t>>(values));
    return bytes_.back()->data();
  };
  const auto floats = [&](const std::vector<float>& values) {
    floats_.push_back(std::make_unique<DeviceBuffer<float>>(values));
    return floats_.back()->data();
  };
  const auto ints = [&](const std::vector<int32_t>& values) {
    ints_.push_back(std::make_unique<DeviceBuffer<int32_t>>(values));
    return ints_.back()->data();
  };
  const auto upload_lists = [&](const std::vector<Lists>& masks) {
    BlockLists lists;
    lists.batch = case_.mask_batch, lists.heads = case_.mask_heads;
    lists.rows = static_cast<int>(masks[0].size());
    lists.max_blocks = 1;
    std::vector<int32_t> counts, indices;
    for (const Lists& mask : masks) {
      for (const auto& list : mask) {
        lists.max_blocks = std::max(lists.max_blocks, static_cast<int>(list.size()));
      }
    }
    lists.max_blocks += case_.extra_columns;
    for (const Lists& mask : masks) {
      for (const auto& list : mask) {
        counts.push_back(static_cast<int>(list.size()));
        indices.insert(indices.end(), list.begin(), list.end());
        indices.resize(counts.size() * lists.max_blocks, 1 << 30);  // never to be read
      }
    }
    lists.num_blocks = ints(counts);
    lists.indices = ints(indices);
    return lists;
  };
  std::vector<Lists> transposed;
  for (const Lists& mask : kv_lists_) {
    Lists t(table_.num_blocks());
    for (int block = 0; block < table_.num_blocks(); ++block) {
      for (int32_t key : mask[table_.tile_of_block[block]]) {
        t[key].push_back(block);
      }
    }
    transposed.push_back(t);
  }
  params.kv = upload_lists(kv_lists_);
  params.q = upload_lists(transposed);

  std::vector<float> row_max, row_sum;
  for (const HostForward& f : forwards_) {
    row_max.insert(row_max.end(), f.row_max.begin(), f.row_max.end());
    row_sum.insert(row_sum.end(), f.row_sum.begin(), f.row_sum.end());
  }
  params.q8 = bytes(q8_), params.k8 = bytes(k8_), params.v8t = bytes(v8t_);
  params.q_scale = floats(q_scale_), params.k_scale = floats(k_scale_), params.v_scale = floats(v_scale_);
  params.row_max = floats(row_max), params.row_sum = floats(row_sum);
  params.token_of_slot = ints(table_.token_of_slot), params.tile_of_block = ints(table_.tile_of_block);

  std::vector<int> slot_of_token(size.num_tokens);
  for (size_t slot = 0; slot < table_.token_of_slot.size(); ++slot) {
    if (table_.token_of_slot[slot] >= 0) {
      slot_of_token[table_.token_of_slot[slot]] = static_cast<int>(slot);
    }
  }
  const auto element = [=](int s, int d) { return size_t(slot_of_token[s]) * size.head_dim + d; };
  out_.fill(case_.dtype, [&](int b, int h, int s, int d) { return forwards_[b * size.heads + h].out[element(s, d)]; });
  grad_out_.fill(case_.dtype,
                 [&](int b, int h, int s, int d) { return heads_[b * size.heads + h].grad_out[element(s, d)]; });
  params.out = out_.tensor(), params.grad_out = grad_out_.tensor();
  params.dq = dq_.tensor(), params.dk = dk_.tensor(), params.dv = dv_.tensor();
}

Gradients BackwardRun::launch(bool deterministic, bool nan_expected, int rounds) {
  for (TokenBuffer* gradient : {&dq_, &dk_, &dv_}) {
    gradient->poison();
  }
  params.deterministic = deterministic;
  params.workspace_bytes = backward_workspace_bytes(params) / rounds;
  DeviceBuffer<uint8_t> workspace(params.workspace_bytes, 0xff);  // NaN: whatever is read must have been written
  params.workspace = workspace.data();
  backward(params, nullptr);
  EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  workspace.check_guards("workspace");
  return {dq_.read("dq", nan_expected), dk_.read("dk", nan_expected), dv_.read("dv", nan_expected)};
}

// Per tensor and element: NaN where the reference has NaN; else |got - exact| at most twice the largest error of the
// same maths with BF16 roundings (FlashAttention's rule), plus one rounding of the result, plus the slack of that
// element. The relative L2 error is at most twice that of the BF16 maths, plus half a rounding step, plus the slack.
void BackwardRun::check(const Gradients& got) {
  const ProblemSize& size = params.size;
  const size_t per_head = size_t(size.num_tokens) * size.head_dim;
  const double step = case_.dtype == DType::kBFloat16 ? 0x1p-8 : 0x1p-10;
  const double tiny = case_.dtype == DType::kBFloat16 ? 0.0 : 0x1p-24;  // FP16's smallest step
  for (int head = 0; head < size.batch * size.heads; ++head) {
    const HostBackward want = host_backward(heads_[head], forwards_[head], accumulator_error());
    const struct {
      const char* name;
      const std::vector<uint16_t>& got;
      const std::vector<double>&exact, &low, &slack;
    } tensors[] = {{"dq", got.dq, want.exact.dq, want.low.dq, want.slack.dq},
                   {"dk", got.dk, want.exact.dk, want.low.dk, want.slack.dk},
                   {"dv", got.dv, want.exact.dv, want.low.dv, want.slack.dv}};
    for (const auto& t : tensors) {
      double low_max = 0, low_square = 0, square = 0, slack_square = 0, error_square = 0;
      for (size_t i = 0; i < t.exact.size(); ++i) {
        if (std::isfinite(t.exact[i])) {
          const double error = std::fabs(t.low[i] - t.exact[i]);
          low_max = std::max(low_max, error);
          low_square += error * error;
          square += t.exact[i] * t.exact[i];
          slack_square += t.slack[i] * t.slack[i];
        }
      }
      int reported = 0;
      for (size_t slot = 0; slot < table_.token_of_slot.size(); ++slot) {
        const int token = table_.token_of_slot[slot];
        for (int d = 0; token >= 0 && d < size.head_dim && reported < 3; ++d) {
          const size_t i = slot * size.head_dim + d;
          const double value = from_bits16(t.got[head * per_head + size_t(token) * size.head_dim + d], case_.dtype);
          const double error = std::fabs(value - t.exact[i]);
          const double bound = 2 * low_max + step * std::fabs(t.exact[i]) + t.slack[i] + tiny + 1e-30;
          if (std::isnan(t.exact[i]) != std::isnan(value) || (!std::isnan(value) && !(error <= bound))) {
            ++reported;
            ADD_FAILURE() << t.name << " head " << head << " token " << token << " d " << d << ": got " << value
                          << ", want " << t.exact[i] << ", error bound " << bound << " (BF16 maths " << low_max
                          << ", slack " << t.slack[i] << ")";
          }
          error_square += std::isnan(error) ? 0.0 : error * error;
        }
      }
      EXPECT_LE(std::sqrt(error_square), 2 * std::sqrt(low_square) + 0.5 * step * std::sqrt(square) +
                                             std::sqrt(slack_square) + tiny * std::sqrt(double(t.exact.size())) + 1e-30)
          << t.name << " head " << head << ": L2 error";
    }
  }
}

}  // namespace fpsattn::test
