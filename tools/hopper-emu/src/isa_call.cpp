// Device-side builtins: printf, assert, malloc, free.
#include "isa.h"

namespace hemu {

namespace {

// ---- device builtins
std::string dev_str(u64 p) { return p ? std::string((const char*)p) : std::string("(null)"); }
u64 local_u64(Warp& w, int l, u32 off) {
  u64 v;
  memcpy(&v, w.local.data() + (size_t)l * w.k->local_bytes + off, 8);
  return v;
}
const u8* dev_ptr(Warp& w, int l, u64 a) {
  u32 t = (u32)(a >> 56);
  if (t == 2) return w.local.data() + (size_t)l * w.k->local_bytes + (u32)a;
  if (t == 1) return w.cta->smem.data() + (a & 0xffffff);
  return (const u8*)a;
}
void h_vprintf(Warp& w, const Inst& in, u32 m) {  // s[0],s[1] local offsets of the two parameters, s[2] return offset
  for_lanes(m, [&](int l) {
    std::string fmt = (const char*)dev_ptr(w, l, local_u64(w, l, in.s[0]));
    const u8* args = dev_ptr(w, l, local_u64(w, l, in.s[1]));
    size_t off = 0;
    std::string out;
    for (size_t i = 0; i < fmt.size(); i++) {
      if (fmt[i] != '%') {
        out += fmt[i];
        continue;
      }
      if (fmt[i + 1] == '%') {
        out += '%';
        i++;
        continue;
      }
      std::string spec = "%";
      size_t j = i + 1;
      int lng = 0;
      auto get_int = [&]() {
        off = (off + 3) & ~(size_t)3;
        int v;
        memcpy(&v, args + off, 4);
        off += 4;
        return v;
      };
      while (j < fmt.size() && strchr("-+ #0123456789.*hlzjt", fmt[j])) {
        if (fmt[j] == '*')
          spec += std::to_string(get_int());
        else {
          if (fmt[j] == 'l' || fmt[j] == 'z' || fmt[j] == 'j' || fmt[j] == 't')
            lng++;
          else if (fmt[j] != 'h')
            spec += fmt[j];
        }
        j++;
      }
      char c = j < fmt.size() ? fmt[j] : 'd';
      char buf[512];
      if (strchr("diuxXoc", c)) {
        if (lng) {
          off = (off + 7) & ~(size_t)7;
          long long v;
          memcpy(&v, args + off, 8);
          off += 8;
          spec += "ll";
          spec += c;
          snprintf(buf, sizeof buf, spec.c_str(), v);
        } else {
          int v = get_int();
          spec += c;
          snprintf(buf, sizeof buf, spec.c_str(), v);
        }
        out += buf;
      } else if (strchr("feEgGaA", c)) {
        off = (off + 7) & ~(size_t)7;
        double v;
        memcpy(&v, args + off, 8);
        off += 8;
        spec += c;
        snprintf(buf, sizeof buf, spec.c_str(), v);
        out += buf;
      } else if (c == 's') {
        off = (off + 7) & ~(size_t)7;
        u64 v;
        memcpy(&v, args + off, 8);
        off += 8;
        out += v ? (const char*)dev_ptr(w, l, v) : "(null)";
      } else if (c == 'p') {
        off = (off + 7) & ~(size_t)7;
        u64 v;
        memcpy(&v, args + off, 8);
        off += 8;
        snprintf(buf, sizeof buf, "0x%llx", (unsigned long long)v);
        out += buf;
      }
      i = j;
    }
    fputs(out.c_str(), stdout);
    if (in.s[2]) {
      int n = (int)out.size();
      memcpy(w.local.data() + (size_t)l * w.k->local_bytes + in.s[2], &n, 4);
    }
  });
  fflush(stdout);
}
void h_assertfail(Warp& w, const Inst& in, u32 m) {
  int l = ffs32(m);
  u32 line;
  memcpy(&line, w.local.data() + (size_t)l * w.k->local_bytes + in.s[2], 4);
  w.L->fatal(&w, &in, Cat::Other, 710, "device assertion failed: %s, %s:%u, function %s (lane %d)",
             dev_str((u64)dev_ptr(w, l, local_u64(w, l, in.s[0]))).c_str(),
             dev_str((u64)dev_ptr(w, l, local_u64(w, l, in.s[1]))).c_str(), line,
             dev_str((u64)dev_ptr(w, l, local_u64(w, l, in.s[3]))).c_str(), l);
}
void h_malloc(Warp& w, const Inst& in, u32 m) {
  for_lanes(m, [&](int l) {
    u64 n = local_u64(w, l, in.s[0]);
    u64 p = (u64)device_alloc(n, 0, "device malloc");
    memcpy(w.local.data() + (size_t)l * w.k->local_bytes + in.s[2], &p, 8);
  });
}
void h_free(Warp& w, const Inst& in, u32 m) {
  for_lanes(m, [&](int l) {
    u64 p = local_u64(w, l, in.s[0]);
    if (p) device_free((void*)p);
  });
}

}  // namespace

bool decode_call(Builder& b, const PtxInst& p, Inst& in) {
  const std::string& op = p.mods[0];
  auto set = [&](Handler h, Pipe pi) {
    in.fn = h;
    in.pipe = pi;
    return true;
  };
  if (op == "call") {
    const std::string& fn = p.ops[0].name;
    auto arg = [&](size_t i) -> u32 {
      auto it = b.local_off.find(p.args[i].name);
      if (it == b.local_off.end()) b.fail(p, "call argument is not a local parameter");
      return it->second;
    };
    u32 ret = p.rets.empty() ? 0 : b.local_off[p.rets[0].name];
    if (fn == "vprintf") {
      in.s[0] = arg(0);
      in.s[1] = arg(1);
      in.s[2] = ret;
      return set(&h_vprintf, Pipe::Other);
    }
    if (fn == "__assertfail") {
      for (u32 i = 0; i < 4; i++) in.s[i] = arg(i);
      return set(&h_assertfail, Pipe::Other);
    }
    if (fn == "malloc") {
      in.s[0] = arg(0);
      in.s[2] = ret;
      return set(&h_malloc, Pipe::Other);
    }
    if (fn == "free") {
      in.s[0] = arg(0);
      return set(&h_free, Pipe::Other);
    }
    return false;
  }
  return false;
}

}  // namespace hemu
