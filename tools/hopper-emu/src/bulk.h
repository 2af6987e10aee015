// What the bulk asynchronous copies share: ranges in shared and global memory, marks of what is in flight, reductions.
#pragma once

#include "isa.h"
#include "tma.h"

namespace hemu {

enum ROp { R_NONE, R_ADD, R_MIN, R_MAX, R_INC, R_DEC, R_AND, R_OR, R_XOR };

void gmem_check(Launch* L, Warp* w, const Inst* in, u64 a, u32 n, bool write);
Cta* cta_of_shared(Warp& w, const Inst& in, u32 addr, u32& off, const char* what);
void smem_range(Warp& w, const Inst& in, Cta* c, u32 off, u32 n, const char* what);
void begin_load(Warp& w, const Inst& in, Cta* t, u32 off, u32 n, const char* what);
void end_load(Cta* t, u32 off, u32 n);
void begin_store(Cta* c, u32 off, u32 n);
void end_store(Cta* c, u32 off, u32 n);
void reduce_bytes(u8* g, const u8* s, u32 n, u32 op, u32 dt);
void queue_store(Warp& w, int l, std::shared_ptr<BulkStore> s);
u32 red_op(const PtxInst& p);
u32 red_type(const PtxInst& p);

// Of tma.cpp: the copies with a tensor map.
bool decode_tensor_copy(Builder& b, const PtxInst& p, Inst& in, bool reduce);

}  // namespace hemu
