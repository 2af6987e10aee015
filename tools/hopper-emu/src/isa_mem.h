// What memory instructions share.
#pragma once

#include "isa.h"

namespace hemu {

enum Space : u32 { SP_GENERIC, SP_GLOBAL, SP_SHARED, SP_LOCAL, SP_PARAM_CONST };
Space space_of(const PtxInst& p);
u8* local_ptr(Warp& w, const Inst& in, u64 off, u32 bytes, int lane);
void reg_store_from(Warp& w, const Opnd& o, int l, const u8* p, u32 ms, bool sg);
void reg_load_to(Warp& w, const Opnd& o, int l, u8* p, u32 ms);
void count_banks(Warp& w, u32 m, const u32* addr, u32 bytes, u64& wave, u64& conf);

}  // namespace hemu
