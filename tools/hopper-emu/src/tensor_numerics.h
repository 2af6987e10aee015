// Element types of the tensor cores, and how they multiply.
#pragma once

#include "isa.h"

namespace hemu {

enum MTy : u32 { M_F16, M_BF16, M_TF32, M_E4M3, M_E5M2, M_S8, M_U8, M_F32, M_S32, M_F64, M_B1, M_S4, M_U4 };
MTy mty(const std::string& s);
u32 esize(u32 t);
float to_f(u32 t, u32 raw);
void decode_row(u32 t, const u8* p, u32 n, float* out, u32 stride);
float truncated_dot(float acc, const float* a, const float* b, u32 k, u32 bstride);  // by definition, one element
void gemm16_any(float* C, const float* A, const float* B, u32 N, u32 K);
void truncated_gemm16(float* C, const float* A, const float* B, u32 N, u32 K);

}  // namespace hemu
