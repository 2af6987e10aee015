// Tensor maps: what cuTensorMapEncodeTiled accepts.
#include "tma.h"

#include <cstring>

namespace hemu {

uint32_t tma_elem_bytes(uint8_t t) {
  static const uint32_t b[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4};
  return t < 13 ? b[t] : 0;
}

int tma_encode(TmaDesc* d, int dtype, uint32_t rank, void* addr, const uint64_t* dims, const uint64_t* strides,
               const uint32_t* box, const uint32_t* estr, int interleave, int swizzle, int l2, int oob,
               std::string& why) {
  auto bad = [&](const std::string& s) {
    why = s;
    return 1;
  };
  uint32_t es = dtype >= 0 ? tma_elem_bytes((uint8_t)dtype) : 0;
  if (!es) return bad("unsupported tensor data type " + std::to_string(dtype));
  if (rank < 1 || rank > 5) return bad("rank must be 1..5");
  if (interleave != 0) return bad("interleaved layouts are not supported");
  if ((uint64_t)addr & 15) return bad("global address is not 16-byte aligned");
  if (swizzle < 0 || swizzle > 3) return bad("unsupported swizzle mode");
  memset(d, 0, 128);
  d->magic = TmaDesc::kMagic;
  d->dtype = (uint8_t)dtype;
  d->rank = (uint8_t)rank;
  d->swizzle = (uint8_t)swizzle;
  d->l2 = (uint8_t)l2;
  d->oob = (uint8_t)oob;
  d->addr = (uint64_t)addr;
  for (uint32_t i = 0; i < rank; i++) {
    if (dims[i] == 0 || dims[i] > (1ull << 32)) return bad("globalDim[" + std::to_string(i) + "] out of range");
    if (box[i] == 0 || box[i] > 256)
      return bad("boxDim[" + std::to_string(i) + "]=" + std::to_string(box[i]) + " must be in [1,256]");
    if (estr[i] == 0 || estr[i] > 8) return bad("elementStrides must be in [1,8]");
    d->dim_m1[i] = (uint32_t)(dims[i] - 1);
    d->box[i] = (uint16_t)box[i];
    d->estr[i] = (uint8_t)estr[i];
    if (i + 1 < rank) {
      if (strides[i] & 15)
        return bad("globalStrides[" + std::to_string(i) + "]=" + std::to_string(strides[i]) +
                   " is not a multiple of 16");
      if (strides[i] >= (1ull << 40)) return bad("globalStrides out of range");
      d->stride[i] = strides[i];
    }
  }
  uint64_t inner = (uint64_t)box[0] * es;
  if (inner & 15)
    return bad("inner box dimension (" + std::to_string(inner) + " bytes) must be a multiple of 16 bytes");
  static const uint32_t span[] = {0, 32, 64, 128};
  if (swizzle && inner > span[swizzle])
    return bad("inner box dimension (" + std::to_string(inner) + " bytes) exceeds the swizzle span");
  return 0;
}

}  // namespace hemu
