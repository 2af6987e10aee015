// Host-side checks that every launch function shares. All throw fpsattn::Error: operation, argument, what came, what
// was wanted. None synchronizes; contents of device memory are the caller's promise (params.h says which).
#pragma once

#include <cuda_runtime_api.h>

#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <string>

#include "fpsattn/params.h"
#include "fpsattn/status.h"

namespace fpsattn {

inline constexpr int kPointerAlignment = 16;  // of every buffer that kernels read or write 16 bytes at a time

inline constexpr const char* kHeadDims = "64, 96 or 128";  // is_head_dim, in words

inline void check_size(const char* op, const ProblemSize& size) {
  FPSATTN_CHECK(is_head_dim(size.head_dim), op, ": head_dim is ", size.head_dim, ", expected ", kHeadDims);
  FPSATTN_CHECK(size.batch >= 1 && size.batch <= 65535, op, ": batch is ", size.batch, ", expected 1..65535");
  FPSATTN_CHECK(size.heads >= 1 && size.heads <= 65535, op, ": heads is ", size.heads, ", expected 1..65535");
  FPSATTN_CHECK(size.num_tokens >= 1, op, ": num_tokens is ", size.num_tokens, ", expected at least 1");
  FPSATTN_CHECK(size.num_tiles >= 1, op, ": num_tiles is ", size.num_tiles, ", expected at least 1");
  FPSATTN_CHECK(size.num_blocks >= size.num_tiles, op, ": num_blocks is ", size.num_blocks,
                ", expected at least num_tiles (", size.num_tiles, "): every tile owns whole blocks");
  FPSATTN_CHECK(int64_t{size.num_blocks} * kBlockSlots >= size.num_tokens, op, ": num_blocks is ", size.num_blocks,
                ", too few for num_tokens ", size.num_tokens, " at 128 slots a block");
  FPSATTN_CHECK(size.group >= 1 && size.heads % size.group == 0, op, ": group is ", size.group,
                ", expected a divisor of heads (", size.heads, ")");
  FPSATTN_CHECK(size.kv_tokens >= 0 && size.kv_blocks >= 0 && size.kv_tiles >= 0, op,
                ": kv_tokens, kv_blocks, kv_tiles are ", size.kv_tokens, ", ", size.kv_blocks, ", ", size.kv_tiles,
                ", expected 0 (as the queries) or more");
  FPSATTN_CHECK(int64_t{size.key_blocks()} * kBlockSlots >= size.kv_tokens, op, ": kv_blocks is ", size.kv_blocks,
                ", too few for kv_tokens ", size.kv_tokens, " at 128 slots a block");
  const int most = size.num_blocks > size.key_blocks() ? size.num_blocks : size.key_blocks();
  FPSATTN_CHECK(int64_t{most} * kBlockSlots <= INT32_MAX, op, ": num_blocks is ", most,
                ": slot numbers are 32 bit, at most ", INT32_MAX / kBlockSlots, " blocks");
}

// Not null, and aligned for vector accesses.
inline void check_pointer(const char* op, const char* name, const void* pointer, int alignment = kPointerAlignment) {
  FPSATTN_CHECK(pointer != nullptr, op, ": ", name, " is null, expected a device pointer");
  FPSATTN_CHECK(reinterpret_cast<uintptr_t>(pointer) % alignment == 0, op, ": ", name, " is at ", pointer,
                ", expected ", alignment, "-byte alignment");
}

struct NamedPointer {
  const char* name;
  const void* pointer;
};
inline void check_pointers(const char* op, int alignment, std::initializer_list<NamedPointer> pointers) {
  for (const auto& [name, pointer] : pointers) check_pointer(op, name, pointer, alignment);
}

// True where 16-byte accesses to every row of a (B, H, S, D) tensor of 16-bit elements are legal; more than wider ones need.
inline bool has_aligned_rows(const TokenTensor& tensor) {
  constexpr int kElements = kPointerAlignment / 2;
  return reinterpret_cast<uintptr_t>(tensor.data) % kPointerAlignment == 0 && tensor.stride_batch % kElements == 0 &&
         tensor.stride_head % kElements == 0 && tensor.stride_token % kElements == 0;
}

// Tables of the queries and, where sizes say that keys have their own, of the keys.
template <class Params>
void check_slot_tables(const char* op, const Params& params, int alignment) {
  check_pointer(op, "token_of_slot", params.token_of_slot.data, alignment);
  const bool own_size = params.size.kv_tokens > 0, own_table = params.kv_token_of_slot.data != nullptr;
  FPSATTN_CHECK(own_size == (params.size.kv_blocks > 0) && own_size == own_table, op, ": kv_tokens is ",
                params.size.kv_tokens, ", kv_blocks ", params.size.kv_blocks, " and kv_token_of_slot ",
                own_table ? "given" : "null", ", expected all or none of them");
  if (own_table) check_pointer(op, "kv_token_of_slot", params.kv_token_of_slot.data, alignment);
  FPSATTN_CHECK(own_table || params.size.group == 1 || params.token_of_slot.stride == 0, op,
                ": token_of_slot differs from head to head, and K has fewer of them: kv_token_of_slot is missing");
}

inline void check_tensor(const char* op, const char* name, const TokenTensor& tensor, bool require_aligned_rows) {
  check_pointer(op, name, tensor.data, 2);
  FPSATTN_CHECK(!require_aligned_rows || has_aligned_rows(tensor), op, ": ", name, " is at ", tensor.data,
                " with strides (", tensor.stride_batch, ", ", tensor.stride_head, ", ", tensor.stride_token,
                ", 1), expected a 16-byte aligned pointer and strides that are multiples of 8: make it contiguous");
}

inline void check_workspace(const char* op, const void* workspace, size_t bytes, size_t needed) {
  if (needed > 0) {
    check_pointer(op, "workspace", workspace);
    FPSATTN_CHECK(bytes >= needed, op, ": workspace_bytes is ", bytes, ", expected at least ", needed, " (", op,
                  "_workspace_bytes)");
  }
}

// Sizes of a block mask with `rows` rows, which ProblemSize calls `rows_name`; a row stands for a `row_is`. A list may
// be longer than num_blocks: nothing but its entries is read.
inline void check_lists(const char* op, const char* name, const BlockLists& lists, const ProblemSize& size, int rows,
                        const char* rows_name, const char* row_is) {
  FPSATTN_CHECK(lists.batch == 1 || lists.batch == size.batch, op, ": ", name, ".batch is ", lists.batch,
                ", expected 1 or batch (", size.batch, ")");
  FPSATTN_CHECK(lists.heads == 1 || lists.heads == size.heads, op, ": ", name, ".heads is ", lists.heads,
                ", expected 1 or heads (", size.heads, ")");
  FPSATTN_CHECK(lists.rows == rows, op, ": ", name, ".rows is ", lists.rows, ", expected ", rows_name, " (", rows,
                "): a row per ", row_is);
  FPSATTN_CHECK(lists.max_blocks >= 0, op, ": ", name, ".max_blocks is ", lists.max_blocks, ", expected at least 0");
}

inline void check_list_pointers(const char* op, const std::string& name, const BlockLists& lists) {
  check_pointer(op, (name + ".num_blocks").c_str(), lists.num_blocks, sizeof(int32_t));
  if (lists.max_blocks > 0) check_pointer(op, (name + ".indices").c_str(), lists.indices, sizeof(int32_t));
}

inline void check_softmax_scale(const char* op, float scale) {
  FPSATTN_CHECK(std::isfinite(scale) && scale > 0.0f, op, ": softmax_scale is ", scale,
                ", expected a positive finite number");
}

inline void check_dtype(const char* op, const char* name, DType dtype) {
  FPSATTN_CHECK(dtype == DType::kBFloat16 || dtype == DType::kFloat16, op, ": ", name, " is ", static_cast<int>(dtype),
                ", expected 0 (bfloat16) or 1 (float16)");
}

inline void check_out_dtype(const char* op, const char* name, DType dtype) {
  FPSATTN_CHECK(dtype == DType::kBFloat16 || dtype == DType::kFloat16 || dtype == DType::kFloat32, op, ": ", name,
                " is ", static_cast<int>(dtype), ", expected 0 (bfloat16), 1 (float16) or 2 (float32)");
}

// What kernels exist for: csrc/<op>/<op>.cpp picks by it, code of one lives in csrc/<op>/<architecture>.
enum class Architecture { kSm90 };

// Of the current device; throws where there are no kernels for it.
inline Architecture device_architecture(const char* op) {
  int device = 0, major = 0, minor = 0;
  FPSATTN_CUDA_CHECK(op, cudaGetDevice(&device));
  FPSATTN_CUDA_CHECK(op, cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  FPSATTN_CUDA_CHECK(op, cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
  FPSATTN_CHECK(major == 9 && minor == 0, op, ": device ", device, " has compute capability ", major, ".", minor,
                ", expected 9.0 (Hopper: H100, H200, H20): these kernels are sm_90a code");
  return Architecture::kSm90;
}

}  // namespace fpsattn
