// Where kernels and launchers find a list of a block mask, and a row of a (B, H, S, D) tensor.
#pragma once

#include <cstdint>

#include "fpsattn/params.h"

#ifdef __CUDACC__
#define FPSATTN_HOST_DEVICE __host__ __device__
#else
#define FPSATTN_HOST_DEVICE
#endif

namespace fpsattn {

// Which of the Bm * Hm tables of lists (batch, head) follows.
FPSATTN_HOST_DEVICE inline int64_t list_head(const BlockLists& lists, int32_t batch, int32_t head) {
  return static_cast<int64_t>(lists.batch == 1 ? 0 : batch) * lists.heads + (lists.heads == 1 ? 0 : head);
}

// The row of num_blocks, and of indices, that `row` of (batch, head) is.
FPSATTN_HOST_DEVICE inline int64_t list_row(const BlockLists& lists, int32_t batch, int32_t head, int32_t row) {
  return list_head(lists, batch, head) * lists.rows + row;
}

// The table of a (batch, head): batch_head = batch * heads + head.
FPSATTN_HOST_DEVICE inline const int32_t* slots_of(const SlotTable& table, int64_t batch_head) {
  return table.data + batch_head * table.stride;
}

// Elements from the first of a tensor to the row of a token.
FPSATTN_HOST_DEVICE inline int64_t token_offset(const TokenTensor& tensor, int32_t batch, int32_t head, int32_t token) {
  return batch * tensor.stride_batch + head * tensor.stride_head + token * tensor.stride_token;
}

}  // namespace fpsattn
