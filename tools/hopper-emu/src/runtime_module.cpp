// Modules: PTX out of fat binaries, global variables, kernels.
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>

#include "runtime_state.h"

namespace hemu {

std::recursive_mutex g_mu;

State& S_() {
  static State* s = [] {
    atexit([] { stats_write(); });
    return new State();
  }();
  return *s;
}

cudaError_t ret(cudaError_t e) {
  if (e != cudaSuccess) S_().last = e;
  return e;
}
cudaError_t sync_state() {
  auto& s = S_();
  if (s.sticky != cudaSuccess) {
    s.last = s.sticky;
    return s.sticky;
  }
  return cudaSuccess;
}

namespace {
// ---------------------------------------------------------------- fat binaries
// The decompressors are looked up when a compressed image is met: nearly every Linux has their libraries, few their headers.
template <class F>
F* library_function(const char* library, const char* name, std::string& err) {
  void* handle = dlopen(library, RTLD_NOW | RTLD_LOCAL);
  F* function = handle ? (F*)dlsym(handle, name) : nullptr;
  if (!function)
    err = std::string("the fat binary is compressed, and ") + library +
          " is not on this machine: install it, or compile with nvcc --no-compress";
  return function;
}
bool decompress_zstd(const uint8_t* in, size_t n, std::string& out, std::string& err) {
  auto* decompress =
      library_function<size_t(void*, size_t, const void*, size_t)>("libzstd.so.1", "ZSTD_decompress", err);
  auto* is_error = library_function<unsigned(size_t)>("libzstd.so.1", "ZSTD_isError", err);
  auto* error_name = library_function<const char*(size_t)>("libzstd.so.1", "ZSTD_getErrorName", err);
  if (!decompress || !is_error || !error_name) return false;
  size_t size = decompress(out.data(), out.size(), in, n);
  if (is_error(size)) {
    err = std::string("zstd: ") + error_name(size);
    return false;
  }
  out.resize(size);
  return true;
}
bool decompress_lz4(const uint8_t* in, size_t n, std::string& out, std::string& err) {
  auto* decompress = library_function<int(const char*, char*, int, int)>("liblz4.so.1", "LZ4_decompress_safe", err);
  if (!decompress) return false;
  int size = decompress((const char*)in, out.data(), (int)n, (int)out.size());
  if (size < 0) {
    err = "lz4 decompression failed";
    return false;
  }
  out.resize((size_t)size);
  return true;
}
struct FatWrapper {
  uint32_t magic, version;
  const uint8_t* data;
  void* extra;
};
std::string extract_ptx(const void* wrapper, std::string& err) {
  const FatWrapper* w = (const FatWrapper*)wrapper;
  if (w->magic != 0x466243b1) {
    err = "unknown fat binary wrapper";
    return "";
  }
  const uint8_t* d = w->data;
  uint32_t magic;
  memcpy(&magic, d, 4);
  if (magic != 0xBA55ED50) {
    err = "unknown fat binary format";
    return "";
  }
  uint16_t hs;
  uint64_t fs;
  memcpy(&hs, d + 6, 2);
  memcpy(&fs, d + 8, 8);
  const uint8_t *p = d + hs, *end = p + fs;
  std::string best;
  uint32_t best_arch = 0;
  while (p + 64 <= end) {
    uint16_t kind;
    uint32_t ehs, csize, arch;
    uint64_t size, usize, flags;
    memcpy(&kind, p, 2);
    memcpy(&ehs, p + 4, 4);
    memcpy(&size, p + 8, 8);
    memcpy(&csize, p + 16, 4);
    memcpy(&arch, p + 28, 4);
    memcpy(&flags, p + 40, 8);
    memcpy(&usize, p + 56, 8);
    if (kind == 1 && arch <= 90 && arch >= best_arch) {
      const uint8_t* body = p + ehs;
      size_t clen = csize ? csize : size;
      uint32_t m;
      memcpy(&m, body, 4);
      std::string t;
      if (m == 0xFD2FB528) {
        t.resize(usize);
        if (!decompress_zstd(body, clen, t, err)) {
          p += ehs + size;
          continue;
        }
      } else if (flags & 0x2000) {
        t.resize(usize);
        if (!decompress_lz4(body, clen, t, err)) {
          p += ehs + size;
          continue;
        }
      } else
        t.assign((const char*)body, size);
      while (!t.empty() && t.back() == 0) t.pop_back();
      best = t;
      best_arch = arch;
    }
    p += ehs + size;
  }
  if (best.empty() && err.empty())
    err = "no PTX image in the fat binary (compile with -gencode arch=compute_90a,code=[compute_90a,sm_90a])";
  return best;
}
}  // namespace

void load_module(Module& m) {
  if (m.parsed) return;
  m.parsed = true;
  std::string t = extract_ptx(m.wrapper, m.error);
  if (t.empty()) return;
  if (const char* dump = getenv("HOPPER_EMU_DUMP_PTX")) {
    static int n = 0;
    FILE* f = fopen((std::string(dump) + "." + std::to_string(n++) + ".ptx").c_str(), "w");
    if (f) {
      fwrite(t.data(), 1, t.size(), f);
      fclose(f);
    }
  }
  try {
    m.ptx = parse_ptx(std::move(t));
  } catch (std::exception& e) {
    m.error = e.what();
    fprintf(stderr, "[hopper-emu] ERROR: %s\n", e.what());
    return;
  }
  for (auto& v : m.ptx->vars) {
    if (v.space == "shared" || v.is_extern) continue;
    uint64_t a = (uint64_t)device_alloc(std::max<uint64_t>(v.size, 1), v.space == "const" ? 3 : 2, v.name.c_str());
    memset((void*)a, 0, v.size);
    memcpy((void*)a, v.init.data(), std::min<size_t>(v.init.size(), v.size));
    m.globals[v.name] = a;
    m.sizes[v.name] = v.size;
  }
  for (auto& v : m.ptx->vars)
    for (auto& r : v.relocs) {
      auto it = m.globals.find(r.sym);
      uint64_t x = it == m.globals.end() ? 0 : it->second + (uint64_t)r.add;
      memcpy((void*)(m.globals[v.name] + r.off), &x, std::min<int>(8, r.bytes));
    }
}
Kernel* get_kernel(FuncRec* f, cudaError_t& err) {
  if (f->kernel) return f->kernel.get();
  load_module(*f->mod);
  if (!f->mod->ptx) {
    fprintf(stderr, "[hopper-emu] ERROR: kernel %s: %s\n", demangle(f->name).c_str(), f->mod->error.c_str());
    err = cudaErrorNoKernelImageForDevice;
    return nullptr;
  }
  auto it = f->mod->ptx->funcs.find(f->name);
  if (it == f->mod->ptx->funcs.end() || !it->second->has_body) {
    fprintf(stderr, "[hopper-emu] ERROR: kernel %s not found in PTX\n", f->name.c_str());
    err = cudaErrorInvalidDeviceFunction;
    return nullptr;
  }
  Module* m = f->mod;
  size_t pb = 1;
  for (auto& p : it->second->params) {
    size_t al = std::max<size_t>(1, p.align);
    pb = (pb + al - 1) / al * al + p.size;
  }
  f->params = (uint8_t*)device_alloc(pb + 64, 4, "kernel parameters");
  try {
    f->kernel = build_kernel(m->ptx.get(), it->second.get(), [m, f](const std::string& n) -> uint64_t {
      if (n == "@param") return (uint64_t)f->params;
      auto q = m->globals.find(n);
      return q == m->globals.end() ? 0 : q->second;
    });
  } catch (std::exception& e) {
    fprintf(stderr, "[hopper-emu] ERROR: %s\n    in kernel %s\n", e.what(), demangle(f->name).c_str());
    err = S_().sticky = cudaErrorNotSupported;
    return nullptr;
  }
  if (Options::get().verbose)
    fprintf(stderr,
            "[hopper-emu] kernel %s: %zu PTX instructions, %u bytes of registers per warp, ~%u live 32-bit registers, "
            "%u static smem, %u local bytes\n",
            f->kernel->pretty.c_str(), f->kernel->code.size(), f->kernel->reg_bytes, f->kernel->max_live32,
            f->kernel->static_smem, f->kernel->local_bytes);
  return f->kernel.get();
}
FuncRec* find_func(const void* p) {
  auto& s = S_();
  auto it = s.funcs.find(p);
  if (it != s.funcs.end()) return it->second;
  for (auto& f : s.all)
    if (f.get() == p) return f.get();
  return nullptr;
}

}  // namespace hemu
