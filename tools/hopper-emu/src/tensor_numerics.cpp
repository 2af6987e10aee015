// Element types of the tensor cores, and how they multiply.
#include "tensor_numerics.h"

#include <algorithm>

namespace hemu {

MTy mty(const std::string& s) {
  static const std::map<std::string, MTy> t = {{"f16", M_F16},   {"bf16", M_BF16}, {"tf32", M_TF32}, {"e4m3", M_E4M3},
                                               {"e5m2", M_E5M2}, {"s8", M_S8},     {"u8", M_U8},     {"f32", M_F32},
                                               {"s32", M_S32},   {"f64", M_F64}};
  auto it = t.find(s);
  return it == t.end() ? M_B1 : it->second;
}
u32 esize(u32 t) { return t == M_F16 || t == M_BF16 ? 2 : t == M_TF32 || t == M_F32 || t == M_S32 ? 4 : 1; }
float to_f(u32 t, u32 raw) {
  switch (t) {
    case M_F16:
      return half_to_float((u16)raw);
    case M_BF16:
      return bf16_to_float((u16)raw);
    case M_TF32:
      return u2f(raw & ~0x1fffu);
    case M_E4M3:
      return g_e4m3[raw & 255];
    case M_E5M2:
      return g_e5m2[raw & 255];
    case M_S8:
      return (float)(int8_t)raw;
    case M_U8:
      return (float)(u8)raw;
  }
  return u2f(raw);
}
void decode_row(u32 t, const u8* p, u32 n, float* out, u32 stride) {
  switch (t) {
    case M_E4M3:
      for (u32 i = 0; i < n; i++) out[i * stride] = g_e4m3[p[i]];
      break;
    case M_E5M2:
      for (u32 i = 0; i < n; i++) out[i * stride] = g_e5m2[p[i]];
      break;
    case M_S8:
      for (u32 i = 0; i < n; i++) out[i * stride] = (float)(int8_t)p[i];
      break;
    case M_U8:
      for (u32 i = 0; i < n; i++) out[i * stride] = (float)p[i];
      break;
    case M_F16:
      for (u32 i = 0; i < n; i++) {
        u16 v;
        memcpy(&v, p + 2 * i, 2);
        out[i * stride] = half_to_float(v);
      }
      break;
    case M_BF16:
      for (u32 i = 0; i < n; i++) {
        u16 v;
        memcpy(&v, p + 2 * i, 2);
        out[i * stride] = bf16_to_float(v);
      }
      break;
    case M_TF32:
      for (u32 i = 0; i < n; i++) {
        u32 v;
        memcpy(&v, p + 4 * i, 4);
        out[i * stride] = u2f(v & ~0x1fffu);
      }
      break;
  }
}

// Products are summed with each term aligned to the largest exponent and cut to 13 fraction bits below it.
float truncated_dot(float acc, const float* a, const float* b, u32 k, u32 bstride) {
  u32 emax = f2u(acc) & 0x7f800000u;
  float pr[64];
  bool special = false;
  for (u32 i = 0; i < k; i++) {
    pr[i] = a[i] * b[i * bstride];
    u32 e = f2u(pr[i]) & 0x7f800000u;
    if (e > emax) emax = e;
  }
  if (emax == 0x7f800000u) special = true;
  if (special || emax == 0) {
    float s = acc;
    for (u32 i = 0; i < k; i++) s += pr[i];
    return s;
  }
  int e = (int)(emax >> 23) - 127;
  float unit = std::ldexp(1.f, std::max(e - 13, -149)), inv = std::ldexp(1.f, std::min(-(e - 13), 127));
  float sum = std::trunc(acc * inv);
  for (u32 i = 0; i < k; i++) sum += std::trunc(pr[i] * inv);
  float r = sum * unit;
  return u2f(f2u(r) & ~0x3ffu);  // FP22-style accumulator: 13 mantissa bits
}

// C[16][N] += A[16][K] * B[K][N]
template <int N>
__attribute__((noinline)) void gemm16(float* C, const float* A, const float* B, u32 K, u32 n_off, u32 ldn) {
  for (int m = 0; m < 16; m += 4) {
    float c[4][N];
    for (int r = 0; r < 4; r++)
      for (int j = 0; j < N; j++) c[r][j] = C[(m + r) * ldn + n_off + j];
    for (u32 k = 0; k < K; k++) {
      const float* b = B + k * ldn + n_off;
      for (int r = 0; r < 4; r++) {
        float a = A[(m + r) * K + k];
        for (int j = 0; j < N; j++) c[r][j] = __builtin_fmaf(a, b[j], c[r][j]);
      }
    }
    for (int r = 0; r < 4; r++)
      for (int j = 0; j < N; j++) C[(m + r) * ldn + n_off + j] = c[r][j];
  }
}
void gemm16_any(float* C, const float* A, const float* B, u32 N, u32 K) {
  u32 n = 0;
  while (N - n >= 64) {
    gemm16<64>(C, A, B, K, n, N);
    n += 64;
  }
  while (N - n >= 32) {
    gemm16<32>(C, A, B, K, n, N);
    n += 32;
  }
  while (N - n >= 16) {
    gemm16<16>(C, A, B, K, n, N);
    n += 16;
  }
  while (N - n >= 8) {
    gemm16<8>(C, A, B, K, n, N);
    n += 8;
  }
}

}  // namespace hemu
