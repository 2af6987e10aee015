// Checks of the ops' tensors, metadata only: nothing waits for the device. python/fpsattention/ops/checks*.py have the
// same ones for the CPU kernels, where values are checked too. All throw fpsattn::Error with the op, the argument, what
// came, what was wanted.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>
#include <type_traits>

#include "fpsattn/params.h"
#include "fpsattn/status.h"

namespace fpsattn {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string dtype_name(ScalarType type) { return torch::headeronly::toString(type); }

inline std::string shape_text(const Tensor& x) {
  std::string text = "(";
  for (int64_t i = 0; i < x.dim(); ++i) text += (i ? ", " : "") + std::to_string(x.size(i));
  return text + ")";
}

inline int int_of(const char* op, const char* name, int64_t value) {
  FPSATTN_CHECK(value >= INT32_MIN && value <= INT32_MAX, op, ": ", name, " is ", value, ", expected 32 bits");
  return static_cast<int>(value);
}

// kAnySize matches every size.
inline constexpr int64_t kAnySize = -1;

inline void check_shape(const char* op, const char* name, const Tensor& x, std::initializer_list<int64_t> want) {
  bool same = x.dim() == static_cast<int64_t>(want.size());
  std::string text;
  int64_t i = 0;
  for (const int64_t size : want) {
    same = same && (size == kAnySize || x.size(i) == size);
    text += (i++ ? ", " : "") + (size == kAnySize ? std::string("any") : std::to_string(size));
  }
  FPSATTN_CHECK(same, op, ": ", name, " has shape ", shape_text(x), ", expected (", text, ")");
}

inline void check_dtype(const char* op, const char* name, const Tensor& x, ScalarType want) {
  FPSATTN_CHECK(x.scalar_type() == want, op, ": ", name, " has dtype ", dtype_name(x.scalar_type()), ", expected ",
                dtype_name(want));
}

inline void check_same_device(const char* op, const char* name, const Tensor& x, const Tensor& like) {
  FPSATTN_CHECK(x.is_cuda() == like.is_cuda() && x.get_device_index() == like.get_device_index(), op, ": ", name,
                " is on another device than the first argument: move all tensors to one device");
}

// A contiguous tensor of a given dtype and shape on the device of `like`.
inline void check_buffer(const char* op, const char* name, const Tensor& x, const Tensor& like, ScalarType type,
                         std::initializer_list<int64_t> shape) {
  check_same_device(op, name, x, like);
  check_dtype(op, name, x, type);
  check_shape(op, name, x, shape);
  FPSATTN_CHECK(x.is_contiguous(), op, ": ", name, " is not contiguous: pass ", name, ".contiguous()");
}

template <class T>
T* data(const Tensor& x) {
  return static_cast<T*>(x.data_ptr());
}

// The dtype of what the kernels know as float, int32_t, uint8_t (codes).
template <class T>
inline constexpr ScalarType kScalarType = std::is_same_v<T, float>     ? ScalarType::Float
                                          : std::is_same_v<T, int32_t> ? ScalarType::Int
                                                                       : ScalarType::Float8_e4m3fn;

// The memory of a checked input.
template <class T>
const T* input(const char* op, const char* name, const Tensor& x, const Tensor& like,
               std::initializer_list<int64_t> shape) {
  check_buffer(op, name, x, like, kScalarType<T>, shape);
  return data<const T>(x);
}

inline DType kernel_dtype(const char* op, const char* name, ScalarType type) {
  FPSATTN_CHECK(type == ScalarType::BFloat16 || type == ScalarType::Half, op, ": ", name, " has dtype ",
                dtype_name(type), ", the sm_90a kernels take BFloat16 or Half");
  return type == ScalarType::Half ? DType::kFloat16 : DType::kBFloat16;
}

// Of the output of forward.
inline DType kernel_out_dtype(const char* op, const char* name, ScalarType type) {
  if (type == ScalarType::Float) return DType::kFloat32;
  FPSATTN_CHECK(type == ScalarType::BFloat16 || type == ScalarType::Half, op, ": ", name, " is ", dtype_name(type),
                ", expected BFloat16, Half or Float");
  return kernel_dtype(op, name, type);
}

// (B, H, S, D) with unit stride in D.
inline TokenTensor token_tensor(const char* op, const char* name, const Tensor& x) {
  FPSATTN_CHECK(x.dim() == 4, op, ": ", name, " has shape ", shape_text(x), ", expected (B, H, S, D)");
  FPSATTN_CHECK(x.stride(3) == 1, op, ": ", name, " has stride ", x.stride(3), " in D, expected 1: pass ", name,
                ".contiguous()");
  return {x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)};
}

// Block lists "<kind>_num_blocks [Bm, Hm, rows]" and "<kind>_indices [Bm, Hm, rows, max]".
inline BlockLists block_lists(const char* op, const char* kind, const Tensor& counts, const Tensor& indices,
                              const Tensor& like, int64_t batch, int64_t heads, int64_t rows) {
  const std::string counts_name = std::string(kind) + "_num_blocks", indices_name = std::string(kind) + "_indices";
  FPSATTN_CHECK(counts.dim() == 3 && indices.dim() == 4, op, ": ", counts_name, " has shape ", shape_text(counts),
                " and ", indices_name, " ", shape_text(indices), ", expected [Bm, Hm, rows] and [Bm, Hm, rows, max]");
  FPSATTN_CHECK((counts.size(0) == 1 || counts.size(0) == batch) && (counts.size(1) == 1 || counts.size(1) == heads),
                op, ": ", counts_name, " has shape ", shape_text(counts), ", expected (", batch, " or 1, ", heads,
                " or 1, ", rows, ")");
  BlockLists lists;
  lists.num_blocks = input<int32_t>(op, counts_name.c_str(), counts, like, {counts.size(0), counts.size(1), rows});
  lists.indices =
      input<int32_t>(op, indices_name.c_str(), indices, like, {counts.size(0), counts.size(1), rows, indices.size(3)});
  lists.batch = static_cast<int>(counts.size(0));
  lists.heads = static_cast<int>(counts.size(1));
  lists.rows = static_cast<int>(rows);
  lists.max_blocks = static_cast<int>(indices.size(3));
  return lists;
}

}  // namespace fpsattn
