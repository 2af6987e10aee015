// Launches: registration of kernels, launch configurations, function attributes, occupancy.
#include <chrono>
#include <cstdio>

#include "runtime_state.h"

using namespace hemu;

namespace {

struct CallCfg {
  dim3 grid, block;
  size_t smem;
  cudaStream_t stream;
};
thread_local std::vector<CallCfg> t_cfg;
cudaError_t do_launch(FuncRec* f, dim3 grid, dim3 block, void** args, size_t smem, const uint32_t* cluster_attr) {
  auto& s = S_();
  if (s.sticky != cudaSuccess) return ret(s.sticky);
  cudaError_t err = cudaErrorUnknown;
  Kernel* k = get_kernel(f, err);
  if (!k) return ret(err);
  auto bad = [&](cudaError_t e, const char* why) {
    fprintf(stderr, "[hopper-emu] ERROR launch: %s (kernel %s)\n", why, k->pretty.c_str());
    return ret(e);
  };
  uint64_t threads = (uint64_t)block.x * block.y * block.z;
  if (!threads || threads > 1024 || block.z > 64) return bad(cudaErrorInvalidConfiguration, "invalid block dimensions");
  if (!grid.x || !grid.y || !grid.z || grid.y > 65535 || grid.z > 65535)
    return bad(cudaErrorInvalidConfiguration, "invalid grid dimensions");
  uint64_t mx = (uint64_t)k->func->maxntid[0] * std::max(1u, k->func->maxntid[1]) * std::max(1u, k->func->maxntid[2]);
  if (mx && threads > mx)
    return bad(cudaErrorInvalidValue, "block has more threads than the kernel's __launch_bounds__");
  if (smem > (size_t)f->max_dyn)
    return bad(cudaErrorInvalidValue,
               "dynamic shared memory exceeds the limit (cudaFuncAttributeMaxDynamicSharedMemorySize not raised?)");
  if (smem + k->static_smem > 232448) return bad(cudaErrorInvalidValue, "shared memory exceeds 227 KB");
  Launch L;
  L.k = k;
  L.grid[0] = grid.x;
  L.grid[1] = grid.y;
  L.grid[2] = grid.z;
  L.block[0] = block.x;
  L.block[1] = block.y;
  L.block[2] = block.z;
  uint32_t cl[3] = {1, 1, 1};
  if (k->func->reqcluster[0])
    for (int i = 0; i < 3; i++) cl[i] = std::max(1u, k->func->reqcluster[i]);
  if (cluster_attr && cluster_attr[0]) {
    for (int i = 0; i < 3; i++) {
      if (k->func->reqcluster[0] && cl[i] != cluster_attr[i])
        return bad(cudaErrorInvalidValue, "cluster attribute differs from __cluster_dims__");
      cl[i] = cluster_attr[i];
    }
  }
  uint32_t cs = cl[0] * cl[1] * cl[2];
  if (cs > 16 || (cs > 8 && !f->non_portable)) return bad(cudaErrorInvalidClusterSize, "cluster size not allowed");
  for (int i = 0; i < 3; i++) {
    L.cluster[i] = cl[i];
    if (L.grid[i] % cl[i])
      return bad(cudaErrorInvalidConfiguration, "grid is not a multiple of the cluster dimensions");
  }
  L.dyn_smem = (uint32_t)smem;
  L.params = f->params;
  for (size_t i = 0; i < k->params.size(); i++) {
    if (!args || !args[i]) return bad(cudaErrorInvalidValue, "missing kernel argument");
    memcpy(f->params + k->param_off[i], args[i], k->params[i].size);
  }
  L.launch_id = ++s.launches;
  L.stats_on = !Options::get().stats.empty() && (Options::get().kernel_filter.empty() ||
                                                 k->pretty.find(Options::get().kernel_filter) != std::string::npos);
  auto t0 = std::chrono::steady_clock::now();
  cudaError_t e = cudaSuccess;
  try {
    L.run();
  } catch (LaunchError& le) {
    e = (cudaError_t)le.code;
  } catch (std::exception& x) {
    fprintf(stderr, "[hopper-emu] internal error: %s\n", x.what());
    e = cudaErrorUnknown;
  }
  double sec = std::chrono::duration<double>(std::chrono::steady_clock::now() - t0).count();
  if (L.stats_on) stats_record(L, sec);
  if (Options::get().verbose)
    fprintf(stderr, "[hopper-emu] %s <<<(%u,%u,%u),(%u,%u,%u),%zu>>> %.3f s, %llu warp instructions\n",
            k->pretty.substr(0, 100).c_str(), grid.x, grid.y, grid.z, block.x, block.y, block.z, smem, sec,
            (unsigned long long)L.executed);
  if (e == cudaSuccess && (L.errors || L.warnings)) {
    fprintf(stderr, "[hopper-emu] kernel %s: %d error reports, %d warnings\n", k->pretty.substr(0, 120).c_str(),
            L.errors, L.warnings);
    if (L.errors && Options::get().fail_on_report) e = cudaErrorLaunchFailure;
  }
  if (e != cudaSuccess) {
    s.sticky = e;
    s.last = e;
  }
  return cudaSuccess;
}
int occupancy(FuncRec* f, int threads, size_t dyn) {
  cudaError_t e;
  Kernel* k = get_kernel(f, e);
  if (!k || threads <= 0) return 0;
  int warps = (threads + 31) / 32;
  int by_t = 64 / warps, by_b = 32;
  size_t sm = k->static_smem + dyn + 1024;
  int by_s = (int)(233472 / sm);
  int regs = std::min<int>(255, 65536 / (warps * 32) / (int)std::max(1u, k->func->minctas)) & ~7;
  int est = std::min<int>(regs, ((int)k->max_live32 + 7) & ~7);
  int by_r = 65536 / std::max(1, est * warps * 32);
  return std::max(0, std::min(std::min(by_t, by_b), std::min(by_s, by_r)));
}
}  // namespace

// ---------------------------------------------------------------- registration
API void** __cudaRegisterFatBinary(void* fc) {
  Lock l(g_mu);
  auto m = std::make_unique<Module>();
  m->wrapper = fc;
  S_().mods.push_back(std::move(m));
  return (void**)S_().mods.back().get();
}
API void __cudaRegisterFatBinaryEnd(void**) {}
API void __cudaUnregisterFatBinary(void**) {}
API char __cudaInitModule(void**) { return 1; }
API void __cudaRegisterFunction(void** h, const char* hostFun, char*, const char* deviceName, int, uint3*, uint3*,
                                dim3*, dim3*, int*) {
  Lock l(g_mu);
  auto f = std::make_unique<FuncRec>();
  f->mod = (Module*)h;
  f->name = deviceName;
  f->host = hostFun;
  S_().funcs[hostFun] = f.get();
  S_().all.push_back(std::move(f));
}
API void __cudaRegisterVar(void** h, char* hostVar, char*, const char* deviceName, int, size_t size, int, int) {
  Lock l(g_mu);
  S_().vars[hostVar] = VarRec{(Module*)h, deviceName, size};
}
API cudaError_t __cudaGetKernel(cudaKernel_t* k, const void* fn) {
  Lock l(g_mu);
  FuncRec* f = find_func(fn);
  if (!f) return ret(cudaErrorInvalidDeviceFunction);
  *k = (cudaKernel_t)f;
  return cudaSuccess;
}
API cudaError_t cudaGetKernel(cudaKernel_t* k, const void* fn) { return __cudaGetKernel(k, fn); }
API cudaError_t cudaGetFuncBySymbol(cudaFunction_t* k, const void* fn) { return __cudaGetKernel((cudaKernel_t*)k, fn); }
API unsigned __cudaPushCallConfiguration(dim3 g, dim3 b, size_t smem, struct CUstream_st* st) {
  t_cfg.push_back({g, b, smem, st});
  return 0;
}
API cudaError_t __cudaPopCallConfiguration(dim3* g, dim3* b, size_t* smem, void* st) {
  if (t_cfg.empty()) return cudaErrorMissingConfiguration;
  auto c = t_cfg.back();
  t_cfg.pop_back();
  *g = c.grid;
  *b = c.block;
  *smem = c.smem;
  if (st) *(cudaStream_t*)st = c.stream;
  return cudaSuccess;
}
API cudaError_t cudaLaunchKernel(const void* fn, dim3 g, dim3 b, void** args, size_t smem, cudaStream_t) {
  Lock l(g_mu);
  FuncRec* f = find_func(fn);
  if (!f) {
    fprintf(stderr, "[hopper-emu] ERROR: launch of an unregistered function\n");
    return ret(cudaErrorInvalidDeviceFunction);
  }
  return do_launch(f, g, b, args, smem, nullptr);
}
API cudaError_t __cudaLaunchKernel(cudaKernel_t k, dim3 g, dim3 b, void** args, size_t smem, cudaStream_t st) {
  return cudaLaunchKernel((const void*)k, g, b, args, smem, st);
}
API cudaError_t cudaLaunchCooperativeKernel(const void* fn, dim3 g, dim3 b, void** args, size_t smem, cudaStream_t st) {
  return cudaLaunchKernel(fn, g, b, args, smem, st);
}
API cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* c, const void* fn, void** args) {
  Lock l(g_mu);
  FuncRec* f = find_func(fn);
  if (!f) return ret(cudaErrorInvalidDeviceFunction);
  uint32_t cl[3] = {0, 0, 0};
  for (unsigned i = 0; i < c->numAttrs; i++)
    if (c->attrs[i].id == cudaLaunchAttributeClusterDimension) {
      cl[0] = c->attrs[i].val.clusterDim.x;
      cl[1] = c->attrs[i].val.clusterDim.y;
      cl[2] = c->attrs[i].val.clusterDim.z;
    }
  return do_launch(f, c->gridDim, c->blockDim, args, c->dynamicSmemBytes, cl);
}
API cudaError_t __cudaLaunchKernelExC(const cudaLaunchConfig_t* c, const void* fn, void** args) {
  return cudaLaunchKernelExC(c, fn, args);
}

// ---------------------------------------------------------------- function attributes
API cudaError_t cudaFuncSetAttribute(const void* fn, cudaFuncAttribute a, int v) {
  Lock l(g_mu);
  FuncRec* f = find_func(fn);
  if (!f) return ret(cudaErrorInvalidDeviceFunction);
  if (a == cudaFuncAttributeMaxDynamicSharedMemorySize) {
    cudaError_t e = cudaSuccess;
    Kernel* k = get_kernel(f, e);
    if (!k) return ret(e);
    if (v < 0 || v + (int)k->static_smem > 232448) {
      fprintf(stderr,
              "[hopper-emu] ERROR: MaxDynamicSharedMemorySize %d + %u static bytes exceeds 232448 (kernel %s)\n", v,
              k->static_smem, k->pretty.c_str());
      return ret(cudaErrorInvalidValue);
    }
    f->max_dyn = v;
  } else if (a == cudaFuncAttributeNonPortableClusterSizeAllowed)
    f->non_portable = v;
  return cudaSuccess;
}
API cudaError_t cudaFuncSetCacheConfig(const void*, cudaFuncCache) { return cudaSuccess; }
API cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* a, const void* fn) {
  Lock l(g_mu);
  FuncRec* f = find_func(fn);
  if (!f) return ret(cudaErrorInvalidDeviceFunction);
  cudaError_t e = cudaSuccess;
  Kernel* k = get_kernel(f, e);
  if (!k) return ret(e);
  memset(a, 0, sizeof *a);
  uint32_t mt = k->func->maxntid[0]
                    ? k->func->maxntid[0] * std::max(1u, k->func->maxntid[1]) * std::max(1u, k->func->maxntid[2])
                    : 1024;
  a->sharedSizeBytes = k->static_smem;
  a->localSizeBytes = k->local_bytes > 16 ? k->local_bytes : 0;
  a->maxThreadsPerBlock = (int)mt;
  int cap = std::min<int>(255, 65536 / (int)((mt + 31) / 32 * 32) / (int)std::max(1u, k->func->minctas)) & ~7;
  a->numRegs = std::min<int>(cap, ((int)k->max_live32 + 7) & ~7);
  a->ptxVersion = 90;
  a->binaryVersion = 90;
  a->maxDynamicSharedSizeBytes = f->max_dyn;
  a->preferredShmemCarveout = -1;
  return cudaSuccess;
}
API cudaError_t cudaFuncGetName(const char** n, const void* fn) {
  FuncRec* f = find_func(fn);
  if (!f) return ret(cudaErrorInvalidDeviceFunction);
  *n = f->name.c_str();
  return cudaSuccess;
}
API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* n, const void* fn, int bs, size_t dyn,
                                                                       unsigned) {
  Lock l(g_mu);
  FuncRec* f = find_func(fn);
  if (!f) return ret(cudaErrorInvalidDeviceFunction);
  *n = occupancy(f, bs, dyn);
  return cudaSuccess;
}
API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* n, const void* fn, int bs, size_t dyn) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(n, fn, bs, dyn, 0);
}
API cudaError_t cudaOccupancyMaxActiveClusters(int* n, const void* fn, const cudaLaunchConfig_t* c) {
  Lock l(g_mu);
  FuncRec* f = find_func(fn);
  if (!f) return ret(cudaErrorInvalidDeviceFunction);
  int cs = 1;
  for (unsigned i = 0; i < c->numAttrs; i++)
    if (c->attrs[i].id == cudaLaunchAttributeClusterDimension)
      cs = (int)(c->attrs[i].val.clusterDim.x * c->attrs[i].val.clusterDim.y * c->attrs[i].val.clusterDim.z);
  *n = occupancy(f, (int)(c->blockDim.x * c->blockDim.y * c->blockDim.z), c->dynamicSmemBytes) * Options::get().sms /
       std::max(1, cs);
  return cudaSuccess;
}
API cudaError_t cudaOccupancyMaxPotentialClusterSize(int* n, const void* fn, const cudaLaunchConfig_t*) {
  FuncRec* f = find_func(fn);
  *n = f && f->non_portable ? 16 : 8;
  return cudaSuccess;
}
API cudaError_t cudaOccupancyAvailableDynamicSMemPerBlock(size_t* n, const void*, int blocks, int) {
  *n = std::min<size_t>(232448, 233472 / (size_t)std::max(1, blocks) - 1024);
  return cudaSuccess;
}
