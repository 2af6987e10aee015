// The part of the driver API that programs ask the runtime for; libcuda.so.1 depends on this library.
#include <cstdio>

#include "runtime_state.h"

using namespace hemu;

// ---------------------------------------------------------------- driver API subset (libcuda.so.1 depends on this library)
API CUresult cuInit(unsigned) { return CUDA_SUCCESS; }
API CUresult cuDriverGetVersion(int* v) {
  *v = 13000;
  return CUDA_SUCCESS;
}
API CUresult cuDeviceGet(CUdevice* d, int) {
  *d = 0;
  return CUDA_SUCCESS;
}
API CUresult cuDeviceGetCount(int* n) {
  *n = 1;
  return CUDA_SUCCESS;
}
API CUresult cuDeviceGetName(char* b, int n, CUdevice) {
  snprintf(b, (size_t)n, "NVIDIA H200 (hopper-emu)");
  return CUDA_SUCCESS;
}
API CUresult cuDeviceGetAttribute(int* v, CUdevice_attribute a, CUdevice d) {
  return (CUresult)cudaDeviceGetAttribute(v, (cudaDeviceAttr)a, d);
}
API CUresult cuCtxGetCurrent(CUcontext* c) {
  *c = (CUcontext)0x1;
  return CUDA_SUCCESS;
}
API CUresult cuCtxSetCurrent(CUcontext) { return CUDA_SUCCESS; }
API CUresult cuCtxGetDevice(CUdevice* d) {
  *d = 0;
  return CUDA_SUCCESS;
}
API CUresult cuDevicePrimaryCtxRetain(CUcontext* c, CUdevice) {
  *c = (CUcontext)0x1;
  return CUDA_SUCCESS;
}
API CUresult cuCtxSynchronize() { return (CUresult)cudaDeviceSynchronize(); }
API CUresult cuGetErrorString(CUresult e, const char** s) {
  *s = cudaGetErrorString((cudaError_t)e);
  return CUDA_SUCCESS;
}
API CUresult cuGetErrorName(CUresult e, const char** s) {
  *s = cudaGetErrorName((cudaError_t)e);
  return CUDA_SUCCESS;
}
API CUresult cuMemsetD8Async(CUdeviceptr d, unsigned char v, size_t n, CUstream) {
  return (CUresult)fill((void*)d, v, n);
}
API CUresult cuMemsetD16Async(CUdeviceptr d, unsigned short v, size_t n, CUstream) {
  for (size_t i = 0; i < n; i++) ((unsigned short*)d)[i] = v;
  return CUDA_SUCCESS;
}
API CUresult cuMemsetD32Async(CUdeviceptr d, unsigned v, size_t n, CUstream) {
  for (size_t i = 0; i < n; i++) ((unsigned*)d)[i] = v;
  return CUDA_SUCCESS;
}
API CUresult cuTensorMapEncodeTiled(CUtensorMap* m, CUtensorMapDataType dt, cuuint32_t rank, void* addr,
                                    const cuuint64_t* dims, const cuuint64_t* strides, const cuuint32_t* box,
                                    const cuuint32_t* es, CUtensorMapInterleave il, CUtensorMapSwizzle sw,
                                    CUtensorMapL2promotion l2, CUtensorMapFloatOOBfill oob) {
  if (!m || ((uintptr_t)m & 63)) {
    fprintf(stderr, "[hopper-emu] ERROR cuTensorMapEncodeTiled: tensor map pointer must be 64-byte aligned\n");
    return CUDA_ERROR_INVALID_VALUE;
  }
  std::string why;
  memset(m, 0, sizeof *m);
  int r =
      tma_encode((TmaDesc*)m, (int)dt, rank, addr, dims, strides, box, es, (int)il, (int)sw, (int)l2, (int)oob, why);
  if (r) {
    fprintf(stderr, "[hopper-emu] ERROR cuTensorMapEncodeTiled: %s\n", why.c_str());
    return CUDA_ERROR_INVALID_VALUE;
  }
  return CUDA_SUCCESS;
}
API CUresult cuTensorMapReplaceAddress(CUtensorMap* m, void* a) {
  auto* d = (TmaDesc*)m;
  if (d->magic != TmaDesc::kMagic || ((uintptr_t)a & 15)) return CUDA_ERROR_INVALID_VALUE;
  d->addr = (uint64_t)a;
  return CUDA_SUCCESS;
}
API CUresult hemu_im2col() __asm__("cuTensorMapEncodeIm2col");
API CUresult hemu_im2col() {
  fprintf(stderr, "[hopper-emu] ERROR: cuTensorMapEncodeIm2col is not supported\n");
  return CUDA_ERROR_NOT_SUPPORTED;
}
API CUresult cuGetProcAddress_v2(const char* name, void** fn, int, cuuint64_t, CUdriverProcAddressQueryResult* st);
static void* driver_lookup(const char* n) {
  static const std::map<std::string, void*> t = {
#define E(x) {#x, (void*)&x},
      E(cuInit) E(cuDriverGetVersion) E(cuDeviceGet) E(cuDeviceGetCount) E(cuDeviceGetName) E(cuDeviceGetAttribute)
          E(cuCtxGetCurrent) E(cuCtxSetCurrent) E(cuCtxGetDevice) E(cuDevicePrimaryCtxRetain) E(cuCtxSynchronize)
              E(cuGetErrorString) E(cuGetErrorName) E(cuMemsetD8Async) E(cuMemsetD16Async) E(cuMemsetD32Async)
                  E(cuTensorMapEncodeTiled)
                      E(cuTensorMapReplaceAddress){"cuTensorMapEncodeIm2col", (void*)&hemu_im2col},
      E(cuGetProcAddress_v2)
#undef E
  };
  auto it = t.find(n);
  if (it == t.end() && std::string(n) == "cuGetProcAddress") return (void*)&cuGetProcAddress_v2;
  return it == t.end() ? nullptr : it->second;
}
API CUresult cuGetProcAddress_v2(const char* name, void** fn, int, cuuint64_t, CUdriverProcAddressQueryResult* st) {
  *fn = driver_lookup(name);
  if (st) *st = *fn ? CU_GET_PROC_ADDRESS_SUCCESS : CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
  if (!*fn)
    fprintf(stderr,
            "[hopper-emu] ERROR: driver entry point %s is not implemented (a statically linked CUDA runtime cannot be "
            "emulated: link with -cudart shared)\n",
            name);
  return *fn ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}
API cudaError_t cudaGetDriverEntryPointByVersion(const char* n, void** fn, unsigned, unsigned long long,
                                                 cudaDriverEntryPointQueryResult* q) {
  *fn = driver_lookup(n);
  if (q) *q = *fn ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  if (!*fn) {
    fprintf(stderr, "[hopper-emu] ERROR: driver entry point %s is not implemented\n", n);
    return ret(cudaErrorSymbolNotFound);
  }
  return cudaSuccess;
}
extern "C" __attribute__((visibility("default"))) cudaError_t
cudaGetDriverEntryPoint(const char* n, void** fn, unsigned long long f, cudaDriverEntryPointQueryResult* q) {
  return cudaGetDriverEntryPointByVersion(n, fn, 13000, f, q);
}
