// What the bulk asynchronous copies share (bulk.h), and the waits for them.
#include "bulk.h"

#include <algorithm>

namespace hemu {

void gmem_check(Launch* L, Warp* w, const Inst* in, u64 a, u32 n, bool write) {
  if (!Options::get().check_mem) return;
  if (memory().find(a, n)) return;
  global_ptr(*w, *in, a, n, 0, write);
  (void)L;
}

Cta* cta_of_shared(Warp& w, const Inst& in, u32 addr, u32& off, const char* what) {
  u32 r = addr >> 24;
  off = addr & 0xffffff;
  if (!r) return w.cta;
  if (r - 1 >= w.cta->cl->ctas.size())
    w.L->fatal(&w, &in, Cat::Memory, 700, "%s: shared::cluster address 0x%08x names a CTA outside the cluster", what,
               addr);
  return w.cta->cl->ctas[r - 1].get();
}
void smem_range(Warp& w, const Inst& in, Cta* c, u32 off, u32 n, const char* what) {
  if (c != w.cta && c->live_warps == 0)
    w.L->report(&w, &in, Cat::Memory, true, "%s: the shared memory of CTA rank %u after that CTA exited", what, c->rank);
  if (off < c->smem_base || off + n > c->smem_end)
    w.L->fatal(&w, &in, Cat::Memory, 700, "%s: shared range [%u,%u) outside the CTA's shared memory [%u,%u)", what, off,
               off + n, c->smem_base, c->smem_end);
}

void begin_load(Warp& w, const Inst& in, Cta* t, u32 off, u32 n, const char* what) {
  if (!Options::get().check_proxy) return;
  check_overwrite(w.L, &w, &in, t, off, n, what);
  if (t->loads_pending)
    for (u32 i = off / 4; i <= (off + n - 1) / 4; i++)
      if (t->shadow[i].bar & SC_LOADING) {
        w.L->report(&w, &in, Cat::Proxy, true,
                    "%s into shared memory offset %u, already the destination of an in-flight copy", what,
                    i * 4 - t->smem_base);
        break;
      }
  t->loads_pending++;
  shadow_mark(t, off, n, SC_LOADING, true);
}
void end_load(Cta* t, u32 off, u32 n) {
  if (Options::get().check_proxy) {
    t->loads_pending--;
    shadow_mark(t, off, n, SC_LOADING, false);
  }
  shadow_async_write(t, off, n);
}
// Bulk-store sources are marked from issue until they have been read.
void begin_store(Cta* c, u32 off, u32 n) {
  c->stores_pending++;
  shadow_mark(c, off, n, SC_STORING, true);
}
void end_store(Cta* c, u32 off, u32 n) {
  if (c->stores_pending) c->stores_pending--;
  shadow_mark(c, off, n, SC_STORING, false);
}

namespace {
template <class T, class F>
void apply(u8* g, const u8* s, u32 n, F f) {
  for (u32 i = 0; i + sizeof(T) <= n; i += sizeof(T)) {
    T a, b;
    memcpy(&a, g + i, sizeof(T));
    memcpy(&b, s + i, sizeof(T));
    a = f(a, b);
    memcpy(g + i, &a, sizeof(T));
  }
}
}  // namespace

void reduce_bytes(u8* g, const u8* s, u32 n, u32 op, u32 dt) {
  auto num = [&](auto tag) {
    using T = decltype(tag);
    switch (op) {
      case R_ADD:
        apply<T>(g, s, n, [](T a, T b) { return (T)(a + b); });
        break;
      case R_MIN:
        apply<T>(g, s, n, [](T a, T b) { return std::min(a, b); });
        break;
      case R_MAX:
        apply<T>(g, s, n, [](T a, T b) { return std::max(a, b); });
        break;
      default:
        break;
    }
  };
  switch (op) {
    case R_AND:
      apply<u8>(g, s, n, [](u8 a, u8 b) { return (u8)(a & b); });
      return;
    case R_OR:
      apply<u8>(g, s, n, [](u8 a, u8 b) { return (u8)(a | b); });
      return;
    case R_XOR:
      apply<u8>(g, s, n, [](u8 a, u8 b) { return (u8)(a ^ b); });
      return;
    case R_INC:
      apply<u32>(g, s, n, [](u32 a, u32 b) { return a >= b ? 0u : a + 1; });
      return;
    case R_DEC:
      apply<u32>(g, s, n, [](u32 a, u32 b) { return (a == 0 || a > b) ? b : a - 1; });
      return;
  }
  auto h = [&](auto from, auto to) {
    apply<u16>(g, s, n, [&](u16 a, u16 b) {
      float x = from(a), y = from(b);
      return (u16)to(op == R_ADD ? x + y : op == R_MIN ? std::min(x, y) : std::max(x, y));
    });
  };
  switch (dt) {
    case DT_U8:
      num(u8{});
      break;
    case DT_U16:
      num(u16{});
      break;
    case DT_U32:
      num(u32{});
      break;
    case DT_S32:
      num(s32{});
      break;
    case DT_U64:
      num(u64{});
      break;
    case DT_S64:
      num(s64{});
      break;
    case DT_F32:
    case DT_F32_FTZ:
    case DT_TF32:
    case DT_TF32_FTZ:
      num(float{});
      break;
    case DT_F64:
      num(double{});
      break;
    case DT_F16:
      h([](u16 v) { return half_to_float(v); }, [](float f) { return float_to_half(f); });
      break;
    case DT_BF16:
      h([](u16 v) { return bf16_to_float(v); }, [](float f) { return float_to_bf16(f); });
      break;
  }
}
void queue_store(Warp& w, int l, std::shared_ptr<BulkStore> s) {
  auto& st = w.bulk[l];
  st.open.push_back(s);
  if (Options::get().async == AsyncMode::Eager) {
    s->read(*s);
    s->read_done = true;
    s->write(*s);
    s->write_done = true;
    return;
  }
  if (Options::get().async == AsyncMode::Random) {
    w.L->schedule_async(w.cta->cl, [s]() {
      if (!s->read_done) {
        s->read(*s);
        s->read_done = true;
      } else
        return;
    });
  }
}
u32 red_op(const PtxInst& p) {
  static const std::map<std::string, u32> t = {{"add", R_ADD}, {"min", R_MIN}, {"max", R_MAX}, {"inc", R_INC},
                                               {"dec", R_DEC}, {"and", R_AND}, {"or", R_OR},   {"xor", R_XOR}};
  for (auto& s : p.mods) {
    auto it = t.find(s);
    if (it != t.end()) return it->second;
  }
  return R_NONE;
}
u32 red_type(const PtxInst& p) {
  static const std::map<std::string, u32> t = {{"u32", DT_U32}, {"s32", DT_S32},   {"u64", DT_U64}, {"s64", DT_S64},
                                               {"f16", DT_F16}, {"bf16", DT_BF16}, {"f32", DT_F32}, {"f64", DT_F64},
                                               {"b32", DT_U32}, {"b64", DT_U64}};
  auto it = t.find(p.mods.back());
  return it == t.end() ? (u32)DT_U8 : it->second;
}
void bulk_wait(Warp& w, int lane, uint32_t keep, bool read_only) {
  auto it = w.bulk.find(lane);
  if (it == w.bulk.end()) return;
  auto& g = it->second.groups;
  size_t n = g.size() > keep ? g.size() - keep : 0;
  for (size_t i = 0; i < n; i++)
    for (auto& s : g[i]) {
      if (!s->read_done) {
        s->read(*s);
        s->read_done = true;
      }
      if (!read_only && !s->write_done) {
        s->write(*s);
        s->write_done = true;
      }
    }
  if (!read_only)
    while (n--) g.pop_front();
}
void cp_async_wait(Warp& w, uint32_t keep) {
  while (w.cp_groups.size() > keep) {
    for (auto& o : w.cp_groups.front()) o.run();
    w.cp_groups.pop_front();
  }
}

}  // namespace hemu
