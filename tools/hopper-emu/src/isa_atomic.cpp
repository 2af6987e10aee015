// Atomics and reductions.
#include "isa_mem.h"

namespace hemu {

namespace {

// ---- atomics
enum AOp : u32 { A_ADD, A_MIN, A_MAX, A_INC, A_DEC, A_CAS, A_EXCH, A_AND, A_OR, A_XOR };
enum ATy : u32 {
  AT_U32,
  AT_S32,
  AT_U64,
  AT_S64,
  AT_F32,
  AT_F64,
  AT_F16,
  AT_BF16,
  AT_F16X2,
  AT_BF16X2,
  AT_U16,
  AT_B128
};
static u64 atom_eval(u32 op, u32 ty, u64 old, u64 b, u64 c) {
  auto fop = [&](auto x, auto y) {
    using T = decltype(x);
    switch (op) {
      case A_ADD:
        return (T)(x + y);
      case A_MIN:
        return x != x ? y : y != y ? x : std::min(x, y);
      case A_MAX:
        return x != x ? y : y != y ? x : std::max(x, y);
    }
    return y;
  };
  switch (op) {
    case A_EXCH:
      return b;
    case A_CAS:
      return old == b ? c : old;
    case A_AND:
      return old & b;
    case A_OR:
      return old | b;
    case A_XOR:
      return old ^ b;
  }
  switch (ty) {
    case AT_U32: {
      u32 o = (u32)old, x = (u32)b;
      switch (op) {
        case A_ADD:
          return (u32)(o + x);
        case A_MIN:
          return std::min(o, x);
        case A_MAX:
          return std::max(o, x);
        case A_INC:
          return o >= x ? 0 : o + 1;
        case A_DEC:
          return (o == 0 || o > x) ? x : o - 1;
      }
      break;
    }
    case AT_S32: {
      s32 o = (s32)old, x = (s32)b;
      switch (op) {
        case A_ADD:
          return (u32)(o + x);
        case A_MIN:
          return (u32)std::min(o, x);
        case A_MAX:
          return (u32)std::max(o, x);
      }
      break;
    }
    case AT_U64:
      switch (op) {
        case A_ADD:
          return old + b;
        case A_MIN:
          return std::min(old, b);
        case A_MAX:
          return std::max(old, b);
      }
      break;
    case AT_S64:
      switch (op) {
        case A_ADD:
          return old + b;
        case A_MIN:
          return (u64)std::min((s64)old, (s64)b);
        case A_MAX:
          return (u64)std::max((s64)old, (s64)b);
      }
      break;
    case AT_F32:
      return f2u(fop(u2f((u32)old), u2f((u32)b)));
    case AT_F64: {
      double x, y;
      memcpy(&x, &old, 8);
      memcpy(&y, &b, 8);
      double r = fop(x, y);
      u64 o;
      memcpy(&o, &r, 8);
      return o;
    }
    case AT_F16:
      return float_to_half(fop(half_to_float((u16)old), half_to_float((u16)b)));
    case AT_BF16:
      return float_to_bf16(fop(bf16_to_float((u16)old), bf16_to_float((u16)b)));
    case AT_F16X2:
      return float_to_half(fop(half_to_float((u16)old), half_to_float((u16)b))) |
             ((u64)float_to_half(fop(half_to_float((u16)(old >> 16)), half_to_float((u16)(b >> 16)))) << 16);
    case AT_BF16X2:
      return float_to_bf16(fop(bf16_to_float((u16)old), bf16_to_float((u16)b))) |
             ((u64)float_to_bf16(fop(bf16_to_float((u16)(old >> 16)), bf16_to_float((u16)(b >> 16)))) << 16);
  }
  return b;
}
// s[0] space, s[1] bytes, s[2] op, s[3] type, s[4] vector count, s[5] has dest; o[0] addr base; vec: [dest x nv][b x nv][c]
void h_atom(Warp& w, const Inst& in, u32 m) {
  u32 ms = in.s[1], nv = in.s[4], tot = ms * nv;
  const Opnd *dv = in.vec, *bv = in.vec + nv, *cv = in.vec + 2 * nv;
  Launch& L = *w.L;
  for_lanes(m, [&](int l) {
    u64 a = in.o[0].bits == 32 ? (u32)(lane_u64(w, in.o[0], l) + (u64)in.imm) : lane_u64(w, in.o[0], l) + (u64)in.imm;
    u32 sp = in.s[0];
    if (sp == SP_GENERIC) {
      u32 t = (u32)(a >> 56);
      sp = t == 1 ? SP_SHARED : t == 2 ? SP_LOCAL : SP_GLOBAL;
      if (sp != SP_GLOBAL) a &= 0xffffffff;
    }
    u8* p;
    if (sp == SP_SHARED) {
      SharedRef r = shared_ref(w, in, (u32)a, tot, (u32)l, true);
      p = r.cta->smem.data() + r.off;
      if (Options::get().check_uninit) shadow_read(w, in, r.cta, r.off, tot, (u32)l);
      shadow_generic_write(w, in, r.cta, r.off, tot, (u32)l);
    } else if (sp == SP_LOCAL)
      p = local_ptr(w, in, a, tot, l);
    else {
      p = global_ptr(w, in, a, tot, (u32)l, true);
      if (L.stats_on) L.st.gst += tot;
    }
    for (u32 v = 0; v < nv; v++) {
      u64 old = 0;
      memcpy(&old, p + v * ms, ms);
      u64 bb = lane_u64(w, bv[v], l), cc = in.s[2] == A_CAS ? lane_u64(w, cv[v], l) : 0;
      if (ms < 8) {
        bb &= (1ull << (8 * ms)) - 1;
        cc &= (1ull << (8 * ms)) - 1;
      }
      u64 nw = atom_eval(in.s[2], in.s[3], old, bb, cc);
      if (ms < 8) nw &= (1ull << (8 * ms)) - 1;
      if (nw != old) L.activity++;
      memcpy(p + v * ms, &nw, ms);
      if (in.s[5] && !(dv[v].flags & OF_SINK)) set_lane_u64(w, dv[v], l, old);
    }
  });
}

}  // namespace

bool decode_atomic(Builder& b, const PtxInst& p, Inst& in) {
  const std::string& op = p.mods[0];
  if (op == "atom" || op == "red") {
    if (p.has("async")) return false;
    bool red = op == "red";
    const std::string& ty = p.mods.back();
    static const std::map<std::string, u32> ops = {{"add", A_ADD}, {"min", A_MIN}, {"max", A_MAX},   {"inc", A_INC},
                                                   {"dec", A_DEC}, {"cas", A_CAS}, {"exch", A_EXCH}, {"and", A_AND},
                                                   {"or", A_OR},   {"xor", A_XOR}};
    static const std::map<std::string, u32> tys = {
        {"u32", AT_U32},     {"b32", AT_U32},       {"s32", AT_S32}, {"u64", AT_U64}, {"b64", AT_U64},
        {"s64", AT_S64},     {"f32", AT_F32},       {"f64", AT_F64}, {"f16", AT_F16}, {"bf16", AT_BF16},
        {"f16x2", AT_F16X2}, {"bf16x2", AT_BF16X2}, {"b16", AT_U16}, {"u16", AT_U16}};
    bool found = false;
    for (auto& s : p.mods) {
      auto it = ops.find(s);
      if (it != ops.end()) {
        in.s[2] = it->second;
        found = true;
      }
    }
    auto it = tys.find(ty);
    if (!found || it == tys.end()) return false;
    in.s[3] = it->second;
    in.s[1] = type_bytes(ty);
    in.s[4] = p.has("v2") ? 2 : p.has("v4") ? 4 : p.has("v8") ? 8 : 1;
    in.s[5] = !red;
    in.s[0] = space_of(p);
    size_t ai = red ? 0 : 1;
    b.addr(p, p.ops[ai], in, 0);
    in.n = 1;
    u32 nv = in.s[4];
    in.vec = b.vec(3 * nv);
    in.nvec = 3 * nv;
    char fp = ty == "f32" ? 'f' : ty == "f64" ? 'd' : 0;
    u8 bits = (u8)std::max<u32>(16, in.s[1] * 8);
    auto elem = [&](const PtxOperand& o, u32 i) -> const PtxOperand& { return o.kind == OpK::VEC ? o.sub[i] : o; };
    for (u32 i = 0; i < nv; i++) {
      if (!red)
        in.vec[i] = b.dst(p, elem(p.ops[0], i));
      else
        in.vec[i].flags = OF_SINK;
      in.vec[nv + i] = b.src(p, elem(p.ops[ai + 1], i), bits, fp);
      if (in.s[2] == A_CAS)
        in.vec[2 * nv + i] = b.src(p, elem(p.ops[ai + 2], i), bits, fp);
      else
        in.vec[2 * nv + i].flags = OF_SINK;
    }
    in.fn = &h_atom;
    in.pipe = in.s[0] == SP_SHARED ? Pipe::LsuShared : Pipe::LsuGlobal;
    return true;
  }
  return false;
}

}  // namespace hemu
