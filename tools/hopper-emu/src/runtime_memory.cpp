// Device memory: allocation, copies, fills, symbols, pointer attributes.
#include <cstdio>

#include "runtime_state.h"

using namespace hemu;

namespace {
bool check_copy(const void* p, size_t n, const char* what, bool dst) {
  const Alloc* a = memory().find((uint64_t)p, 1);
  if (a && !memory().find((uint64_t)p, n ? n : 1)) {
    fprintf(
        stderr,
        "[hopper-emu] ERROR memory: %s: %s range of %zu bytes at %p crosses the end of its allocation (%llu bytes)\n",
        what, dst ? "destination" : "source", n, p, (unsigned long long)a->size);
    return false;
  }
  return true;
}
cudaError_t copy(void* d, const void* s, size_t n, const char* what) {
  Lock l(g_mu);
  if (auto e = sync_state()) return e;
  if (!n) return cudaSuccess;
  if (!d || !s) return ret(cudaErrorInvalidValue);
  if (!check_copy(d, n, what, true) || !check_copy(s, n, what, false)) return ret(cudaErrorInvalidValue);
  memmove(d, s, n);
  return cudaSuccess;
}
}  // namespace

namespace hemu {
cudaError_t fill(void* d, int v, size_t n) {
  Lock l(g_mu);
  if (auto e = sync_state()) return e;
  if (!check_copy(d, n, "cudaMemset", true)) return ret(cudaErrorInvalidValue);
  memset(d, v, n);
  return cudaSuccess;
}
}  // namespace hemu

namespace {
cudaError_t copy2d(void* d, size_t dp, const void* s, size_t sp, size_t w, size_t h) {
  Lock l(g_mu);
  if (auto e = sync_state()) return e;
  for (size_t i = 0; i < h; i++) {
    if (!check_copy((char*)d + i * dp, w, "cudaMemcpy2D", true) ||
        !check_copy((const char*)s + i * sp, w, "cudaMemcpy2D", false))
      return ret(cudaErrorInvalidValue);
    memmove((char*)d + i * dp, (const char*)s + i * sp, w);
  }
  return cudaSuccess;
}
cudaError_t sym_addr(const void* sym, uint64_t& a, size_t& n) {
  auto it = S_().vars.find(sym);
  if (it == S_().vars.end()) return cudaErrorInvalidSymbol;
  load_module(*it->second.mod);
  auto q = it->second.mod->globals.find(it->second.name);
  if (q == it->second.mod->globals.end()) return cudaErrorInvalidSymbol;
  a = q->second;
  n = it->second.size;
  return cudaSuccess;
}
}  // namespace

// ---------------------------------------------------------------- memory
static cudaError_t alloc(void** p, size_t n, int kind) {
  Lock l(g_mu);
  if (auto e = sync_state()) return e;
  if (!p) return ret(cudaErrorInvalidValue);
  if (!n) {
    *p = nullptr;
    return cudaSuccess;
  }
  *p = device_alloc(n, kind, "");
  return *p ? cudaSuccess : ret(cudaErrorMemoryAllocation);
}
static cudaError_t release(void* p) {
  Lock l(g_mu);
  if (!p) return cudaSuccess;
  int r = device_free(p);
  if (r == 1) {
    fprintf(stderr, "[hopper-emu] ERROR memory: free of %p, which is not an allocation\n", p);
    return ret(cudaErrorInvalidValue);
  }
  if (r == 2) {
    S_().sticky = cudaErrorIllegalAddress;
    return ret(cudaErrorIllegalAddress);
  }
  return sync_state();
}
API cudaError_t cudaMalloc(void** p, size_t n) { return alloc(p, n, 0); }
API cudaError_t cudaMallocAsync(void** p, size_t n, cudaStream_t) { return alloc(p, n, 0); }
API cudaError_t cudaMallocFromPoolAsync(void** p, size_t n, cudaMemPool_t, cudaStream_t) { return alloc(p, n, 0); }
API cudaError_t cudaMallocManaged(void** p, size_t n, unsigned) { return alloc(p, n, 5); }
API cudaError_t cudaMallocHost(void** p, size_t n) { return alloc(p, n, 1); }
API cudaError_t cudaHostAlloc(void** p, size_t n, unsigned) { return alloc(p, n, 1); }
API cudaError_t cudaMallocPitch(void** p, size_t* pitch, size_t w, size_t h) {
  *pitch = (w + 511) & ~(size_t)511;
  return alloc(p, *pitch * h, 0);
}
API cudaError_t cudaFree(void* p) { return release(p); }
API cudaError_t cudaFreeAsync(void* p, cudaStream_t) { return release(p); }
API cudaError_t cudaFreeHost(void* p) { return release(p); }
API cudaError_t cudaHostRegister(void* p, size_t n, unsigned) {
  Lock l(g_mu);
  memory().add((uint64_t)p, n, 1, "registered");
  return cudaSuccess;
}
API cudaError_t cudaHostUnregister(void* p) {
  Lock l(g_mu);
  memory().remove((uint64_t)p);
  return cudaSuccess;
}
API cudaError_t cudaHostGetDevicePointer(void** d, void* h, unsigned) {
  *d = h;
  return cudaSuccess;
}
API cudaError_t cudaMemGetInfo(size_t* f, size_t* t) {
  *t = 150754820096ull;
  *f = *t - (4ull << 30);
  return cudaSuccess;
}
API cudaError_t cudaMemcpy(void* d, const void* s, size_t n, cudaMemcpyKind) { return copy(d, s, n, "cudaMemcpy"); }
API cudaError_t cudaMemcpyAsync(void* d, const void* s, size_t n, cudaMemcpyKind, cudaStream_t) {
  return copy(d, s, n, "cudaMemcpyAsync");
}
API cudaError_t cudaMemcpyPeer(void* d, int, const void* s, int, size_t n) { return copy(d, s, n, "cudaMemcpyPeer"); }
API cudaError_t cudaMemcpy2D(void* d, size_t dp, const void* s, size_t sp, size_t w, size_t h, cudaMemcpyKind) {
  return copy2d(d, dp, s, sp, w, h);
}
API cudaError_t cudaMemcpy2DAsync(void* d, size_t dp, const void* s, size_t sp, size_t w, size_t h, cudaMemcpyKind,
                                  cudaStream_t) {
  return copy2d(d, dp, s, sp, w, h);
}
API cudaError_t cudaMemset(void* d, int v, size_t n) { return fill(d, v, n); }
API cudaError_t cudaMemsetAsync(void* d, int v, size_t n, cudaStream_t) { return fill(d, v, n); }
API cudaError_t cudaMemset2D(void* d, size_t p, int v, size_t w, size_t h) {
  for (size_t i = 0; i < h; i++)
    if (auto e = fill((char*)d + i * p, v, w)) return e;
  return cudaSuccess;
}
API cudaError_t cudaMemset2DAsync(void* d, size_t p, int v, size_t w, size_t h, cudaStream_t) {
  return cudaMemset2D(d, p, v, w, h);
}
API cudaError_t cudaMemcpyToSymbol(const void* sym, const void* s, size_t n, size_t off, cudaMemcpyKind) {
  Lock l(g_mu);
  uint64_t a;
  size_t sz;
  if (auto e = sym_addr(sym, a, sz)) return ret(e);
  return copy((char*)a + off, s, n, "cudaMemcpyToSymbol");
}
API cudaError_t cudaMemcpyToSymbolAsync(const void* sym, const void* s, size_t n, size_t off, cudaMemcpyKind k,
                                        cudaStream_t) {
  return cudaMemcpyToSymbol(sym, s, n, off, k);
}
API cudaError_t cudaMemcpyFromSymbol(void* d, const void* sym, size_t n, size_t off, cudaMemcpyKind) {
  Lock l(g_mu);
  uint64_t a;
  size_t sz;
  if (auto e = sym_addr(sym, a, sz)) return ret(e);
  return copy(d, (char*)a + off, n, "cudaMemcpyFromSymbol");
}
API cudaError_t cudaMemcpyFromSymbolAsync(void* d, const void* sym, size_t n, size_t off, cudaMemcpyKind k,
                                          cudaStream_t) {
  return cudaMemcpyFromSymbol(d, sym, n, off, k);
}
API cudaError_t cudaGetSymbolAddress(void** p, const void* sym) {
  Lock l(g_mu);
  uint64_t a;
  size_t n;
  if (auto e = sym_addr(sym, a, n)) return ret(e);
  *p = (void*)a;
  return cudaSuccess;
}
API cudaError_t cudaGetSymbolSize(size_t* p, const void* sym) {
  Lock l(g_mu);
  uint64_t a;
  size_t n;
  if (auto e = sym_addr(sym, a, n)) return ret(e);
  *p = n;
  return cudaSuccess;
}
API cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* a, const void* p) {
  Lock l(g_mu);
  memset(a, 0, sizeof *a);
  const Alloc* al = memory().find((uint64_t)p, 1);
  a->device = 0;
  if (!al) {
    a->type = Options::get().allow_host_pointers ? cudaMemoryTypeDevice : cudaMemoryTypeUnregistered;
    a->devicePointer = Options::get().allow_host_pointers ? (void*)p : nullptr;
    a->hostPointer = (void*)p;
    return cudaSuccess;
  }
  a->type = al->kind == 1 ? cudaMemoryTypeHost : al->kind == 5 ? cudaMemoryTypeManaged : cudaMemoryTypeDevice;
  a->devicePointer = (void*)p;
  a->hostPointer = al->kind == 1 || al->kind == 5 ? (void*)p : nullptr;
  return cudaSuccess;
}
