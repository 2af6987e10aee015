// What the kernels are told: plain structs of device pointers, sizes and strides. No torch, no CuTe.
//
// Words (docs/layout.md has them all): a *slot* is a position in tiled order, slot = block * 128 + i; a *block* is 128
// slots; a *tile* owns whole consecutive blocks, valid slots first, so slot 0 of every block is valid.
// Strides are in elements and 64 bit: B * S * H * D may exceed 2^31.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fpsattn {

// Head dimensions. The kernels multiply e4m3 operands of code_dim(D) columns; those beyond D are zeros that quantize
// appends, which change nothing (docs/numerics.md).
constexpr bool is_head_dim(int64_t dim) { return dim == 64 || dim == 96 || dim == 128; }
constexpr int code_dim(int head_dim) { return head_dim <= 64 ? 64 : 128; }

inline constexpr int kBlockSlots = 128;      // slots of a block
inline constexpr int kVExtraRows = 8;        // rows C..C+7 of v8t: one row of ones in valid slots, seven of zeros
inline constexpr float kE4m3Max = 448.0f;    // largest finite e4m3
inline constexpr int kProbabilityShift = 8;  // P = e4m3(2^(x - m + 8)): at most 256, so it cannot saturate

// The first so many slots of every block take P from integer arithmetic, the others from 2^x (docs/numerics.md, step 4).
// A multiple of 32, a k step of P V. Below 128: the slots after them carry a NaN to the output.
constexpr int code_slots(int /*head_dim*/) { return 96; }

enum class DType : int { kBFloat16 = 0, kFloat16 = 1, kFloat32 = 2 };  // kFloat32: the output of forward only
enum class Granularity : int { kTile = 0, kBlock = 1, kToken = 2 };    // what shares one FP8 scale of Q and of K

// One of q, k, v, out or a gradient: logical shape (B, H, S, D), unit stride in D.
struct TokenTensor {
  void* data = nullptr;
  int64_t stride_batch = 0;
  int64_t stride_head = 0;
  int64_t stride_token = 0;
};

// Largest stride_token, either way, of the inputs of quantize: a byte offset of one token from the next fits 32 bits.
inline constexpr int64_t kMaxTokenStride = INT32_MAX / 2;

// Which token lies in a slot: int32 [num_blocks * 128], -1 in padding.
struct SlotTable {
  const int32_t* data = nullptr;
  int64_t stride = 0;  // from the table of one (batch, head) to that of the next; 0: one table for all

  SlotTable() = default;
  SlotTable(const int32_t* table, int64_t table_stride = 0) : data(table), stride(table_stride) {}
};

struct ProblemSize {
  int batch = 0;
  int heads = 0;
  int head_dim = 0;    // D: 64, 96 or 128. Below, C = code_dim(D)
  int num_tokens = 0;  // S: video and text tokens together
  int num_blocks = 0;
  int num_tiles = 0;

  // K and V. Query head h attends their head h / group: below, Hk = H / group. Where they have other tokens than the
  // queries: how many, in how many blocks and tiles (tiles: only quantize asks); 0: as the queries. Sk, KB below.
  int group = 1;
  int kv_tokens = 0;
  int kv_blocks = 0;
  int kv_tiles = 0;

  int key_heads() const { return heads / group; }
  int key_tokens() const { return kv_tokens > 0 ? kv_tokens : num_tokens; }
  int key_blocks() const { return kv_blocks > 0 ? kv_blocks : num_blocks; }
};

struct QuantizeParams {
  ProblemSize size;
  DType dtype = DType::kBFloat16;
  Granularity granularity = Granularity::kTile;
  bool smooth_k = true;      // subtract k_mean from every key before the scale is taken
  bool pow2_scales = false;  // round every scale up to a power of two
  int k_mean_stride = 1;     // the mean is taken over tokens 0, n, 2n, ...

  TokenTensor q, k, v;
  SlotTable token_of_slot;
  const int32_t* tile_block_offsets = nullptr;  // [num_tiles + 1], first block of each tile
  SlotTable kv_token_of_slot;                   // of K and V; null: those of the queries
  const int32_t* kv_tile_block_offsets = nullptr;

  const float* given_k_mean = nullptr;    // [B, Hk, D] or null: computed
  const float* given_v_absmax = nullptr;  // [B, Hk, D] or null: computed. Delayed scaling: |v| above it saturates

  uint8_t* q8 = nullptr;         // e4m3 [B, H, num_blocks, 128, C]
  uint8_t* k8 = nullptr;         // e4m3 [B, Hk, KB, 128, C]
  uint8_t* v8t = nullptr;        // e4m3 [B, Hk, KB, C + 8, 128], slots permuted inside each 16 (kVSlotOrder)
  float* q_scale = nullptr;      // [B, H, num_blocks] (tile, block) or [B, H, num_blocks, 128] (token)
  float* k_scale = nullptr;      // likewise, Hk and KB
  float* v_scale = nullptr;      // [B, Hk, D]
  float* k_mean = nullptr;       // [B, Hk, D]: the mean that was used; zeros without smooth_k
  float* q_k_mean = nullptr;     // [B, H, S]: q . k_mean of every token; zeros without smooth_k
  float* q_block_sum = nullptr;  // [B, H, num_blocks, D] or null: sum of the block's tokens of q, FP32
  float* k_block_sum = nullptr;  // [B, Hk, KB, D] or null: likewise of k, nothing subtracted

  void* workspace = nullptr;  // quantize_workspace_bytes(params), 16-byte aligned
  size_t workspace_bytes = 0;
};

// Position p of a group of 16 in v8t holds slot kVSlotOrder[p] of that group: the accumulator fragment of QK^T, packed
// to e4m3, then already is the A operand of PV (lane q owns columns 8j + 2q, 8j + 2q + 1; an 8-bit A fragment wants
// 4q..4q+3).
inline constexpr int kVSlotOrder[16] = {0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15};

// A block mask, a row per query tile; columns are KV blocks, visited in list order.
struct BlockLists {
  const int32_t* num_blocks = nullptr;  // [Bm, Hm, rows]
  const int32_t* indices = nullptr;     // [Bm, Hm, rows, max_blocks]
  int batch = 1;                        // Bm: 1 or B
  int heads = 1;                        // Hm: 1 or H
  int rows = 0;
  int max_blocks = 0;
};

struct ForwardParams {
  ProblemSize size;
  DType out_dtype = DType::kBFloat16;  // kFloat32: not rounded, for parts that are merged
  float softmax_scale = 0.0f;
  bool q_scale_per_token = false;
  bool k_scale_per_token = false;

  const uint8_t* q8 = nullptr;
  const uint8_t* k8 = nullptr;
  const uint8_t* v8t = nullptr;
  const float* q_scale = nullptr;
  const float* k_scale = nullptr;
  const float* v_scale = nullptr;
  const float* q_k_mean = nullptr;         // [B, H, S] or null; lse += softmax_scale * q_k_mean
  SlotTable token_of_slot;                 // of the queries
  const int32_t* tile_of_block = nullptr;  // [num_blocks]: row of the lists that a query block follows
  BlockLists kv;                           // rows = num_tiles

  TokenTensor out;
  float* lse = nullptr;  // [B, H, S] natural log; -inf for an empty row
  float* row_max =
      nullptr;  // [B, H, num_blocks * 128] integer m in log2 units; 0 for an empty row and in padding slots
  float* row_sum = nullptr;  // [B, H, num_blocks * 128] sum of the quantized P; 0 for an empty row and in padding slots

  void* workspace = nullptr;  // forward_workspace_bytes(params), 16-byte aligned
  size_t workspace_bytes = 0;
};

struct BackwardParams {
  ProblemSize size;
  DType dtype = DType::kBFloat16;  // of out, grad_out, dq, dk, dv
  float softmax_scale = 0.0f;
  bool q_scale_per_token = false;
  bool k_scale_per_token = false;
  bool deterministic = false;

  const uint8_t* q8 = nullptr;
  const uint8_t* k8 = nullptr;
  const uint8_t* v8t = nullptr;
  const float* q_scale = nullptr;
  const float* k_scale = nullptr;
  const float* v_scale = nullptr;
  const float* row_max = nullptr;
  const float* row_sum = nullptr;
  SlotTable token_of_slot;
  SlotTable kv_token_of_slot;  // of K and V; null: those of the queries
  const int32_t* tile_of_block = nullptr;
  BlockLists kv;  // rows = num_tiles (query tiles), entries KV blocks
  BlockLists q;   // the transpose: rows = KB (KV blocks), entries query *blocks*

  TokenTensor out, grad_out, dq, dk, dv;

  // 16-byte aligned. backward_workspace_bytes(params), at most 2^30 bytes unless one head needs more; or less, down to
  // what it is for one batch and one head: then more rounds of kernels run, over fewer heads each.
  void* workspace = nullptr;
  size_t workspace_bytes = 0;
};

// The table of K and V.
template <class Params>
const SlotTable& key_slots(const Params& params) {
  return params.kv_token_of_slot.data != nullptr ? params.kv_token_of_slot : params.token_of_slot;
}

}  // namespace fpsattn
