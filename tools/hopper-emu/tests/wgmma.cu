// wgmma: element types, swizzle modes, register A, transposed operands, against a CPU reference.
#include "common.cuh"
#include "wgmma_wrappers.cuh"

// One 64x64xKB tile per run: K is 128 bytes, i.e. four k-steps of 32 bytes.
// Operands are given as dense row-major [64][128 bytes] (K-major) arrays.
__device__ uint32_t kmajor_off(int r, int byte, int sw) {  // physical byte offset inside the tile
  int chunk = byte / 16, rest = byte % 16;
  if (sw == 1) {
    uint32_t o = r * 128 + chunk * 16;
    o ^= ((o >> 7) & 7) << 4;
    return o + rest;
  }
  if (sw == 2) {
    uint32_t t = chunk / 4;
    uint32_t o = t * 64 * 64 + r * 64 + (chunk % 4) * 16;
    o ^= ((o >> 7) & 3) << 4;
    return o + rest;
  }
  if (sw == 3) {
    uint32_t t = chunk / 2;
    uint32_t o = t * 64 * 32 + r * 32 + (chunk % 2) * 16;
    o ^= ((o >> 7) & 1) << 4;
    return o + rest;
  }
  return (r / 8) * 128 + (r % 8) * 16 + chunk * 1024 + rest;  // no swizzle: LBO 1024, SBO 128
}
__device__ uint64_t kdesc(uint32_t base, int step, int sw) {
  if (sw == 1) return make_desc(base + step * 32, 16, 1024, 1);
  if (sw == 2) return make_desc(base + (step / 2) * 4096 + (step % 2) * 32, 16, 512, 2);
  if (sw == 3) return make_desc(base + step * 2048, 16, 256, 3);
  return make_desc(base + step * 2048, 1024, 128, 0);
}
enum { F16, BF16, E4M3, E5M2, S8, TF32, F16_RS, E4M3_RS, F16_TB, F16_TA };
template <int MODE>
__global__ void __launch_bounds__(128) k(const uint8_t* A, const uint8_t* B, float* out, int sw) {
  __shared__ alignas(1024) uint8_t sa[8192], sb[8192];
  for (int i = threadIdx.x; i < 8192; i += 128) {
    int r = i / 128, b = i % 128;
    if (MODE == F16_TB || MODE == F16_TA) {
      // the transposed operand is stored MN-major: 64 x 64 f16, rows indexed by k, 128-byte rows of 64 mn values, 128B swizzle
      int e = b / 2, byte = b & 1;  // element k = e of row r
      uint32_t o = e * 128 + (r / 8) * 16;
      o ^= ((o >> 7) & 7) << 4;
      uint32_t mo = o + (r % 8) * 2 + byte;
      (MODE == F16_TB ? sb : sa)[mo] = (MODE == F16_TB ? B : A)[i];
      (MODE == F16_TB ? sa : sb)[kmajor_off(r, b, sw)] = (MODE == F16_TB ? A : B)[i];
    } else {
      sa[kmajor_off(r, b, sw)] = A[i];
      sb[kmajor_off(r, b, sw)] = B[i];
    }
  }
  fence_async();
  __syncthreads();
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float d[32];
  int di[32];
  for (int i = 0; i < 32; i++) {
    d[i] = 0;
    di[i] = 0;
  }
  uint32_t ar[4][4];
  for (int s = 0; s < 4; s++)
    for (int i = 0; i < 4; i++) {
      int row = warp * 16 + lane / 4 + 8 * (i & 1), kb = s * 32 + (lane % 4) * 4 + 16 * (i >> 1);
      ar[s][i] = *(const uint32_t*)(A + row * 128 + kb);
    }
  wg_fence();
  for (int s = 0; s < 4; s++) {
    uint64_t da = kdesc(s32(sa), s, sw), db = kdesc(s32(sb), s, sw);
    if (MODE == F16) mma_f16_ss(d, da, db, s > 0);
    if (MODE == BF16) mma_bf16_ss(d, da, db, s > 0);
    if (MODE == E4M3) mma_e4m3_ss(d, da, db, s > 0);
    if (MODE == E5M2) mma_e5m2_ss(d, da, db, s > 0);
    if (MODE == S8) mma_s8_ss(di, da, db, s > 0);
    if (MODE == TF32) mma_tf32_ss(d, da, db, s > 0);
    if (MODE == F16_RS) mma_f16_rs(d, ar[s], db, s > 0);
    if (MODE == E4M3_RS) mma_e4m3_rs(d, ar[s], db, s > 0);
    if (MODE == F16_TB) mma_f16_ss_tb(d, da, make_desc(s32(sb) + s * 16 * 128, 1024, 1024, 1), s > 0);
    if (MODE == F16_TA) mma_f16_ss_ta(d, make_desc(s32(sa) + s * 16 * 128, 1024, 1024, 1), db, s > 0);
  }
  wg_commit();
  wg_wait0();
  for (int i = 0; i < 32; i++) {
    int row = warp * 16 + lane / 4 + 8 * ((i >> 1) & 1), col = (i / 4) * 8 + (lane % 4) * 2 + (i & 1);
    out[row * 64 + col] = MODE == S8 ? (float)di[i] : d[i];
  }
}
static float dec(int mode, const uint8_t* p, int k, bool isB) {
  switch (mode) {
    case BF16: {
      uint16_t h;
      memcpy(&h, p + 2 * k, 2);
      uint32_t u = (uint32_t)h << 16;
      float f;
      memcpy(&f, &u, 4);
      return f;
    }
    case E4M3:
    case E4M3_RS: {
      __nv_fp8_e4m3 x;
      x.__x = p[k];
      return (float)x;
    }
    case E5M2: {
      if (isB) {
        __nv_fp8_e4m3 x;
        x.__x = p[k];
        return (float)x;
      }
      __nv_fp8_e5m2 x;
      x.__x = p[k];
      return (float)x;
    }
    case S8:
      return (float)(int8_t)p[k];
    case TF32: {
      uint32_t u;
      memcpy(&u, p + 4 * k, 4);
      u &= ~0x1fffu;
      float f;
      memcpy(&f, &u, 4);
      return f;
    }
    default: {
      __half h;
      memcpy(&h, p + 2 * k, 2);
      return __half2float(h);
    }
  }
}
template <int MODE>
void run(const char* name, int sw) {
  std::vector<uint8_t> A(8192), B(8192);
  srand(MODE * 7 + sw);
  for (int i = 0; i < 8192; i++) {
    A[i] = rand();
    B[i] = rand();
  }
  int es = MODE == TF32 ? 4 : (MODE == E4M3 || MODE == E5M2 || MODE == S8 || MODE == E4M3_RS) ? 1 : 2, K = 128 / es;
  for (auto* v : {&A, &B})
    for (int i = 0; i < 64 * K; i++) {
      float f = (float)(rand() % 2001 - 1000) / 500.f;
      if (MODE == BF16) {
        __nv_bfloat16 h = __float2bfloat16(f);
        memcpy(v->data() + 2 * i, &h, 2);
      } else if (es == 2) {
        __half h = __float2half(f);
        memcpy(v->data() + 2 * i, &h, 2);
      } else if (es == 4)
        memcpy(v->data() + 4 * i, &f, 4);
      else if (MODE == E4M3 || MODE == E4M3_RS || (MODE == E5M2 && v == &B))
        (*v)[i] = __nv_fp8_e4m3(f).__x;
      else if (MODE == E5M2)
        (*v)[i] = __nv_fp8_e5m2(f).__x;
    }
  uint8_t *dA, *dB;
  float* dO;
  CK(cudaMalloc(&dA, 8192));
  CK(cudaMalloc(&dB, 8192));
  CK(cudaMalloc(&dO, 64 * 64 * 4));
  CK(cudaMemcpy(dA, A.data(), 8192, cudaMemcpyHostToDevice));
  CK(cudaMemcpy(dB, B.data(), 8192, cudaMemcpyHostToDevice));
  k<MODE><<<1, 128>>>(dA, dB, dO, sw);
  CK(cudaDeviceSynchronize());
  std::vector<float> o(4096);
  CK(cudaMemcpy(o.data(), dO, 16384, cudaMemcpyDeviceToHost));
  double worst = 0;
  for (int m = 0; m < 64; m++)
    for (int n = 0; n < 64; n++) {
      double r = 0, ab = 0;
      for (int kk = 0; kk < K; kk++) {
        double x = (double)dec(MODE, &A[m * 128], kk, false) * dec(MODE, &B[n * 128], kk, true);
        r += x;
        ab += std::fabs(x);
      }
      worst = std::max(worst, std::fabs(r - o[m * 64 + n]) / (ab + 1e-30));
    }
  EXPECT(worst < (getenv("ACC_TOL") ? atof(getenv("ACC_TOL")) : 1e-5), "%s swizzle %d relative error %g", name, sw,
         worst);
  cudaFree(dA);
  cudaFree(dB);
  cudaFree(dO);
}
int main() {
  for (int sw = 0; sw < 4; sw++) {
    run<F16>("f16", sw);
    run<BF16>("bf16", sw);
    run<E4M3>("e4m3", sw);
    run<E5M2>("e5m2", sw);
    run<S8>("s8", sw);
    run<TF32>("tf32", sw);
    run<F16_RS>("f16 register A", sw);
    run<E4M3_RS>("e4m3 register A", sw);
    run<F16_TB>("f16 transposed B", sw);
    run<F16_TA>("f16 transposed A", sw);
  }
  printf(g_fail ? "t_wgmma FAILED (%d)\n" : "t_wgmma ok\n", g_fail);
  return g_fail != 0;
}
