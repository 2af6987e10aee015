// Element types of the tensor cores, and how they multiply.
#include "tensor_numerics.h"

#include <algorithm>
#include <type_traits>

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

// C[16][N] += A[16][K] * B[K][N], each element as truncated_dot does it.
template <int N>
__attribute__((noinline)) void truncated16(float* C, const float* A, const float* B, u32 K, u32 n_off, u32 ldn) {
  for (int m = 0; m < 16; m++, A += K) {
    float *c = C + m * ldn + n_off, inv[N], unit[N], sum[N];
    u32 emax[N];
    for (int j = 0; j < N; j++) emax[j] = f2u(c[j]) & 0x7f800000u;
    for (u32 k = 0; k < K; k++) {
      const float* b = B + k * ldn + n_off;
      for (int j = 0; j < N; j++) emax[j] = std::max(emax[j], f2u(A[k] * b[j]) & 0x7f800000u);
    }
    for (int j = 0; j < N; j++) {
      const int e = (int)(emax[j] >> 23) - 127 - 13;
      unit[j] = u2f(e >= -126 ? (u32)(e + 127) << 23 : 1u << (e + 149 > 0 ? e + 149 : 0));
      inv[j] = u2f((u32)(std::min(-e, 127) + 127) << 23);
      sum[j] = std::trunc(c[j] * inv[j]);
    }
    for (u32 k = 0; k < K; k++) {
      const float* b = B + k * ldn + n_off;
      for (int j = 0; j < N; j++) sum[j] += std::trunc(A[k] * b[j] * inv[j]);
    }
    for (int j = 0; j < N; j++) {
      const bool usual = emax[j] != 0 && emax[j] != 0x7f800000u;
      c[j] = usual ? u2f(f2u(sum[j] * unit[j]) & ~0x3ffu) : truncated_dot(c[j], A, B + n_off + j, K, ldn);
    }
  }
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
// part(width, first column) until all N columns, a multiple of 8, had their turn.
template <class Part>
void by_columns(u32 N, Part part) {
  for (u32 n = 0; n < N;) {
    const u32 left = N - n;
    if (left >= 64) {
      part(std::integral_constant<int, 64>{}, n), n += 64;
    } else if (left >= 32) {
      part(std::integral_constant<int, 32>{}, n), n += 32;
    } else if (left >= 16) {
      part(std::integral_constant<int, 16>{}, n), n += 16;
    } else {
      part(std::integral_constant<int, 8>{}, n), n += 8;
    }
  }
}
void gemm16_any(float* C, const float* A, const float* B, u32 N, u32 K) {
  by_columns(N, [&](auto width, u32 n) { gemm16<width>(C, A, B, K, n, N); });
}
void truncated_gemm16(float* C, const float* A, const float* B, u32 N, u32 K) {
  by_columns(N, [&](auto width, u32 n) { truncated16<width>(C, A, B, K, n, N); });
}

}  // namespace hemu
