// State of the emulated CUDA runtime, shared by its entry points (runtime_*.cpp, driver_api.cpp).
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <mutex>

#include "isa.h"
#include "stats.h"
#include "tma.h"

#define API extern "C" __attribute__((visibility("default")))

namespace hemu {

extern std::recursive_mutex g_mu;
using Lock = std::lock_guard<std::recursive_mutex>;

struct Module {
  const void* wrapper = nullptr;
  bool parsed = false;
  std::unique_ptr<PtxModule> ptx;
  std::string error;
  std::unordered_map<std::string, uint64_t> globals;
  std::unordered_map<std::string, uint64_t> sizes;
};
struct FuncRec {
  uint32_t magic = 0x48454d55;
  Module* mod = nullptr;
  std::string name;
  const void* host = nullptr;
  std::unique_ptr<Kernel> kernel;
  uint8_t* params = nullptr;
  int max_dyn = 49152;
  bool non_portable = false;
  uint32_t req_cluster[3] = {0, 0, 0};
};
struct VarRec {
  Module* mod;
  std::string name;
  size_t size;
};
struct State {
  std::vector<std::unique_ptr<Module>> mods;
  std::unordered_map<const void*, FuncRec*> funcs;
  std::vector<std::unique_ptr<FuncRec>> all;
  std::unordered_map<const void*, VarRec> vars;
  cudaError_t sticky = cudaSuccess, last = cudaSuccess;
  uint64_t launches = 0;
  int device = 0;
};
State& S_();

// Notes an error as the last one, and returns it.
cudaError_t ret(cudaError_t e);
// The error that a failed launch left for all that follows.
cudaError_t sync_state();

// The kernel behind a function, decoded when first asked for; nullptr, with `err` set and a message, where that fails.
Kernel* get_kernel(FuncRec* f, cudaError_t& err);
void load_module(Module& m);
FuncRec* find_func(const void* p);
cudaError_t fill(void* d, int v, size_t n);

}  // namespace hemu
