// Planted bugs. Each case must be detected (the program returns 0 when the launch failed or a report is expected on stderr).
#include <string>

#include "common.cuh"
#include "wgmma_wrappers.cuh"

__global__ void oob_global(int* p, int n) { p[n + threadIdx.x] = 1; }
__global__ void oob_read(const int* p, int* o, int n) { o[threadIdx.x] = p[n]; }
__global__ void misaligned(char* p) { *(int*)(p + 2) = 1; }
__global__ void oob_shared(int* o) {
  extern __shared__ int s[];
  s[threadIdx.x + 1] = 1;
  __syncthreads();
  o[threadIdx.x] = s[threadIdx.x];
}
__global__ void uninit_shared(int* o) {
  __shared__ int s[64];
  if (threadIdx.x < 32) s[threadIdx.x] = 1;
  __syncthreads();
  o[threadIdx.x] = s[threadIdx.x];
}
__global__ void deadlock_mbar() {
  __shared__ alignas(8) uint64_t b;
  if (threadIdx.x == 0) mbar_init(&b, 2);
  __syncthreads();
  if (threadIdx.x == 0) mbar_arrive(&b);
  mbar_wait(&b, 0);
}
__global__ void deadlock_bar() {
  if (threadIdx.x < 32)
    asm volatile("bar.sync 1, 64;");
  else
    asm volatile("bar.sync 2, 64;");
}
__global__ void wrong_phase(int* o) {
  __shared__ alignas(8) uint64_t b;
  if (threadIdx.x == 0) {
    mbar_init(&b, 1);
    mbar_arrive(&b);
  }
  __syncthreads();
  mbar_wait(&b, 1);
  o[0] = 1;
  mbar_wait(&b, 0);
  mbar_wait(&b, 1);
}
__global__ void over_arrive() {
  __shared__ alignas(8) uint64_t b;
  if (threadIdx.x == 0) {
    mbar_init(&b, 2);
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0], 3;" ::"r"(s32(&b)));
  }
}
__global__ void uninit_mbar() {
  __shared__ alignas(8) uint64_t b;
  if (threadIdx.x == 0) mbar_arrive(&b);
}
__global__ void tx_mismatch(const __grid_constant__ CUtensorMap m) {
  __shared__ alignas(1024) float s[1024];
  __shared__ alignas(8) uint64_t b;
  if (threadIdx.x == 0) {
    mbar_init(&b, 1);
    fence_init();
    mbar_expect(&b, 8192);
    tma_load_2d(s, &m, &b, 0, 0);
  }
  __syncthreads();
  mbar_wait(&b, 0);
}
__global__ void missing_wait(const __grid_constant__ CUtensorMap m,
                             float* o) {  // reads the tile without waiting for the barrier
  __shared__ alignas(1024) float s[1024];
  __shared__ alignas(8) uint64_t b;
  if (threadIdx.x == 0) {
    mbar_init(&b, 1);
    fence_init();
    mbar_expect(&b, 4096);
    tma_load_2d(s, &m, &b, 0, 0);
  }
  __syncthreads();
  o[threadIdx.x] = s[threadIdx.x];
  mbar_wait(&b, 0);
}
__global__ void store_no_fence(const __grid_constant__ CUtensorMap m) {
  __shared__ alignas(1024) float s[1024];
  for (int i = threadIdx.x; i < 1024; i += blockDim.x) s[i] = i;
  __syncthreads();
  if (threadIdx.x == 0) {
    tma_store_2d(&m, s, 0, 0);
    bulk_commit();
    bulk_wait0();
  }
}
__global__ void store_no_wait(const __grid_constant__ CUtensorMap m) {  // exits without waiting for the bulk group
  __shared__ alignas(1024) float s[1024];
  for (int i = threadIdx.x; i < 1024; i += blockDim.x) s[i] = i;
  fence_async();
  __syncthreads();
  if (threadIdx.x == 0) {
    tma_store_2d(&m, s, 0, 0);
    bulk_commit();
  }
}
template <int BUG>
__global__ void __launch_bounds__(128) wg(float* o) {
  __shared__ alignas(1024) __half a[64 * 64], b[64 * 64];
  for (int i = threadIdx.x; i < 4096; i += 128) {
    a[i] = __float2half(1.f);
    b[i] = __float2half(1.f);
  }
  if (BUG != 0) fence_async();
  __syncthreads();
  float d[32];
  for (int i = 0; i < 32; i++) d[i] = 0;
  if (BUG != 1) wg_fence();
  mma_f16_ss(d, make_desc(s32(a), 16, 1024, 1), make_desc(s32(b), 16, 1024, 1), 0);
  wg_commit();
  float early = 0;
  if (BUG == 2) asm volatile("add.f32 %0, %1, 0f3F800000;" : "=f"(early) : "f"(d[5]));
  if (BUG == 3) {
    a[threadIdx.x] = __float2half(5.f);
  }  // overwrites an operand in flight (visible as a wrong result in lazy mode)
  if (BUG != 4) wg_wait0();
  if (BUG == 3 && threadIdx.x == 0) o[200] = d[0];
  o[threadIdx.x] = d[0] + early;
}
__global__ void race(int* o) {
  __shared__ int s[64];
  s[threadIdx.x] = threadIdx.x;
  if (threadIdx.x < 32) __syncwarp();
  o[threadIdx.x] = s[63 - threadIdx.x];
}
__global__ void bad_multicast(const __grid_constant__ CUtensorMap m) {
  __shared__ alignas(1024) float s[1024];
  __shared__ alignas(8) uint64_t b;
  if (threadIdx.x == 0) {
    mbar_init(&b, 1);
    fence_init();
    mbar_expect(&b, 4096);
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, "
        "{%3, %4}], [%2], %5;" ::"r"(s32(s)),
        "l"(&m), "r"(s32(&b)), "r"(0), "r"(0), "h"((uint16_t)3)
        : "memory");
  }
}
__global__ void store_source_overwritten(
    const __grid_constant__ CUtensorMap m) {  // reuses the tile before wait_group.read
  __shared__ alignas(1024) float s[1024];
  for (int i = threadIdx.x; i < 1024; i += blockDim.x) s[i] = i;
  fence_async();
  __syncthreads();
  if (threadIdx.x == 0) {
    tma_store_2d(&m, s, 0, 0);
    bulk_commit();
  }
  __syncthreads();
  s[threadIdx.x] = 7;
  if (threadIdx.x == 0) bulk_wait0();
}
__global__ void load_not_waited(const __grid_constant__ CUtensorMap m) {
  __shared__ alignas(1024) float s[1024];
  __shared__ alignas(8) uint64_t b;
  if (threadIdx.x == 0) {
    mbar_init(&b, 1);
    fence_init();
    mbar_expect(&b, 4096);
    tma_load_2d(s, &m, &b, 0, 0);
  }
}
__global__ void __launch_bounds__(128)
    load_over_wgmma(const __grid_constant__ CUtensorMap m, float* o) {  // refills a stage while wgmma reads it
  __shared__ alignas(1024) __half a[64 * 64], b[64 * 64];
  __shared__ alignas(8) uint64_t bar;
  for (int i = threadIdx.x; i < 4096; i += 128) {
    a[i] = __float2half(1.f);
    b[i] = __float2half(1.f);
  }
  if (threadIdx.x == 0) {
    mbar_init(&bar, 1);
    fence_init();
  }
  fence_async();
  __syncthreads();
  float d[32];
  for (int i = 0; i < 32; i++) d[i] = 0;
  wg_fence();
  mma_f16_ss(d, make_desc(s32(a), 16, 1024, 1), make_desc(s32(b), 16, 1024, 1), 0);
  wg_commit();
  if (threadIdx.x == 0) {
    mbar_expect(&bar, 4096);
    tma_load_2d(b, &m, &bar, 0, 0);
  }
  wg_wait0();
  mbar_wait(&bar, 0);
  o[threadIdx.x] = d[0];
}
__global__ void double_cluster_arrive() {
  asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;");
}
template <bool kWait>
__global__ void __cluster_dims__(2) multicast_to_exited(const __grid_constant__ CUtensorMap m) {
  __shared__ alignas(1024) float s[1024];
  __shared__ alignas(8) uint64_t b;
  const bool loads = blockIdx.x == 0;
  if (threadIdx.x == 0) {
    mbar_init(&b, 1);
    fence_init();
  }
  asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
  if (loads && threadIdx.x == 0) {
    for (int i = 0; i < 3000; i++) asm volatile("");
    mbar_expect(&b, 4096);
    asm volatile(
        "{.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %0, 1;\n"
        "mbarrier.arrive.expect_tx.shared::cluster.b64 _, [remote], 4096;}" ::"r"(s32(&b))
        : "memory");
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
        "[%0], [%1, {%2, %2}], [%3], %4;" ::"r"(s32(s)),
        "l"(&m), "r"(0), "r"(s32(&b)), "h"((uint16_t)3)
        : "memory");
  }
  if (loads || kWait) mbar_wait(&b, 0);
  if (kWait) asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}
__global__ void setmaxnreg_bad() { asm volatile("setmaxnreg.inc.sync.aligned.u32 240;"); }

int main(int argc, char** argv) {
  if (argc < 2) return 2;
  std::string c = argv[1];
  int* p;
  float* f;
  CK(cudaMalloc(&p, 1024));
  CK(cudaMalloc(&f, 8192));
  for (int i = 0; i < 2048; i++) f[i] = 1.f;
  CUtensorMap m = make_map(f, CU_TENSOR_MAP_DATA_TYPE_FLOAT32, 4, 32, 64, 32, 32, CU_TENSOR_MAP_SWIZZLE_NONE);
  bool wrong = false;
  if (c == "oob_global")
    oob_global<<<1, 32>>>(p, 256);
  else if (c == "oob_read")
    oob_read<<<1, 32>>>(p, p, 256);
  else if (c == "misaligned")
    misaligned<<<1, 1>>>((char*)p);
  else if (c == "oob_shared")
    oob_shared<<<1, 32, 128>>>(p);
  else if (c == "uninit_shared")
    uninit_shared<<<1, 64>>>(p);
  else if (c == "deadlock_mbar")
    deadlock_mbar<<<1, 64>>>();
  else if (c == "deadlock_bar")
    deadlock_bar<<<1, 64>>>();
  else if (c == "wrong_phase")
    wrong_phase<<<1, 32>>>(p);
  else if (c == "over_arrive")
    over_arrive<<<1, 32>>>();
  else if (c == "uninit_mbar")
    uninit_mbar<<<1, 32>>>();
  else if (c == "tx_mismatch")
    tx_mismatch<<<1, 32>>>(m);
  else if (c == "missing_wait") {
    float* o = (float*)p;
    missing_wait<<<1, 64>>>(m, o);
    for (int i = 0; i < 64; i++) wrong |= !(o[i] == 1.f);
  } else if (c == "store_no_fence")
    store_no_fence<<<1, 64>>>(m);
  else if (c == "store_no_wait")
    store_no_wait<<<1, 64>>>(m);
  else if (c == "wgmma_no_proxy_fence")
    wg<0><<<1, 128>>>(f);
  else if (c == "wgmma_no_fence")
    wg<1><<<1, 128>>>(f);
  else if (c == "acc_touched")
    wg<2><<<1, 128>>>(f);
  else if (c == "operand_overwritten") {
    wg<3><<<1, 128>>>(f);
    wrong = f[200] != 16.f;
  } else if (c == "wgmma_no_wait")
    wg<4><<<1, 128>>>(f);
  else if (c == "race")
    race<<<1, 64>>>(p);
  else if (c == "bad_multicast")
    bad_multicast<<<1, 32>>>(m);
  else if (c == "store_source_overwritten")
    store_source_overwritten<<<1, 64>>>(m);
  else if (c == "load_not_waited")
    load_not_waited<<<1, 64>>>(m);
  else if (c == "load_over_wgmma")
    load_over_wgmma<<<1, 128>>>(m, (float*)p);
  else if (c == "double_cluster_arrive")
    double_cluster_arrive<<<1, 64>>>();
  else if (c == "multicast_to_exited")
    multicast_to_exited<false><<<2, 32>>>(m);
  else if (c == "multicast_ok")
    multicast_to_exited<true><<<2, 32>>>(m);
  else if (c == "setmaxnreg")
    setmaxnreg_bad<<<1, 512>>>();
  else if (c == "wgmma_ok")
    wg<5><<<1, 128>>>(f);
  else
    return 2;
  cudaError_t e = cudaDeviceSynchronize();
  printf("%s: %s%s\n", c.c_str(), e == cudaSuccess ? "launch succeeded" : cudaGetErrorName(e),
         wrong ? ", wrong result" : "");
  return e != cudaSuccess || wrong ? 0 : 1;
}
