// Comparisons, predicate logic, selection.
#include "isa_alu.h"

namespace hemu {
namespace {

// predicate logic: s[0] op 0 and 1 or 2 xor 3 not 4 mov
void h_pred(Warp& w, const Inst& in, u32 m) {
  u32& d = *D<u32>(w, in.o[0]);
  u32 a = pred_mask(w, in.o[1]), b = in.n > 2 ? pred_mask(w, in.o[2]) : 0, r = 0;
  switch (in.s[0]) {
    case 0:
      r = a & b;
      break;
    case 1:
      r = a | b;
      break;
    case 2:
      r = a ^ b;
      break;
    case 3:
      r = ~a;
      break;
    case 4:
      r = a;
      break;
  }
  d = (d & ~m) | (r & m);
}

enum Cmp { EQ, NE, LT, LE, GT, GE, EQU, NEU, LTU, LEU, GTU, GEU, NUM, NANC };
template <class T, int C>
static inline bool cmp(T a, T b) {
  switch (C) {
    case EQ:
      return a == b;
    case NE:
      return std::is_floating_point_v<T> ? (a < b || a > b) : a != b;
    case LT:
      return a < b;
    case LE:
      return a <= b;
    case GT:
      return a > b;
    case GE:
      return a >= b;
    case EQU:
      return !(a < b || a > b);
    case NEU:
      return a != b;
    case LTU:
      return !(a >= b);
    case LEU:
      return !(a > b);
    case GTU:
      return !(a <= b);
    case GEU:
      return !(a < b);
    case NUM:
      return a == a && b == b;
    case NANC:
      return a != a || b != b;
  }
  return false;
}

// s[0]: combine 0 none,1 and,2 or,3 xor ; s[1]: has second dest; s[2]: ftz; s[3] half kind 0 none 1 f16 2 bf16; s[4]: set dtype 0 none(setp) 1 u32/s32 2 f32
template <class T, int C, int HK>
void h_setp(Warp& w, const Inst& in, u32 m) {
  u32 r = 0;
  if constexpr (HK == 0) {
    const T* a = S<T>(w, in.o[2]);
    const T* b = S<T>(w, in.o[3]);
    if (sizeof(T) == 4 && std::is_floating_point_v<T> && in.s[2]) {
      for (int i = 0; i < 32; i++) r |= (u32)cmp<float, C>(ftz((float)a[i]), ftz((float)b[i])) << i;
    } else {
      u8 t[32];
#pragma GCC ivdep
      for (int i = 0; i < 32; i++) t[i] = cmp<T, C>(a[i], b[i]);
      for (int g = 0; g < 4; g++) {
        u64 v;
        memcpy(&v, t + g * 8, 8);
        r |= (u32)((v * 0x0102040810204080ull) >> 56) << (8 * g);
      }
    }
  } else {
    for_lanes(m, [&](int i) {
      r |= (u32)cmp<float, C>((float)h2d((u16)lane_u64(w, in.o[2], i), HK == 2),
                              (float)h2d((u16)lane_u64(w, in.o[3], i), HK == 2))
           << i;
    });
  }
  u32 q = ~r;
  if (in.s[0]) {
    u32 c = pred_mask(w, in.o[4]);
    if (in.s[0] == 1) {
      r &= c;
      q &= c;
    } else if (in.s[0] == 2) {
      r |= c;
      q |= c;
    } else {
      r ^= c;
      q ^= c;
    }
  }
  if (in.s[4]) {
    for_lanes(m, [&](int i) {
      bool t = (r >> i) & 1;
      set_lane_u64(w, in.o[0], i, t ? (in.s[4] == 2 ? 0x3f800000u : 0xffffffffu) : 0);
    });
    return;
  }
  if (!(in.o[0].flags & OF_SINK)) {
    u32& d = *D<u32>(w, in.o[0]);
    d = (d & ~m) | (r & m);
  }
  if (in.s[1]) {
    u32& d = *D<u32>(w, in.o[1]);
    d = (d & ~m) | (q & m);
  }
}

template <class T, int HK>
Handler setp_for(int c) {
  switch (c) {
#define X(n) \
  case n:    \
    return &h_setp<T, n, HK>;
    X(EQ) X(NE) X(LT) X(LE) X(GT) X(GE) X(EQU) X(NEU) X(LTU) X(LEU) X(GTU) X(GEU) X(NUM) X(NANC)
#undef X
  }
  return nullptr;
}

int cmp_code(const std::string& s, bool is_signed_or_f) {
  static const std::map<std::string, int> t = {{"eq", EQ},   {"ne", NE},   {"lt", LT},   {"le", LE},   {"gt", GT},
                                               {"ge", GE},   {"lo", LT},   {"ls", LE},   {"hi", GT},   {"hs", GE},
                                               {"equ", EQU}, {"neu", NEU}, {"ltu", LTU}, {"leu", LEU}, {"gtu", GTU},
                                               {"geu", GEU}, {"num", NUM}, {"nan", NANC}};
  (void)is_signed_or_f;
  auto it = t.find(s);
  return it == t.end() ? -1 : it->second;
}

// packed half setp/set: s[5]=bf, s[6]=cmp, s[4] 0: setp p|q ; 3: set packed f16x2 result; 4: set u32-mask style per half
void h_setp_half2(Warp& w, const Inst& in, u32 m) {
  u32 r0 = 0, r1 = 0;
  auto c1 = [&](float a, float b) {
    switch (in.s[6]) {
#define X(n) \
  case n:    \
    return cmp<float, n>(a, b);
      X(EQ) X(NE) X(LT) X(LE) X(GT) X(GE) X(EQU) X(NEU) X(LTU) X(LEU) X(GTU) X(GEU) X(NUM) X(NANC)
#undef X
    }
    return false;
  };
  for_lanes(m, [&](int i) {
    u32 a = (u32)lane_u64(w, in.o[2], i), b = (u32)lane_u64(w, in.o[3], i);
    r0 |= (u32)c1((float)h2d((u16)a, in.s[5]), (float)h2d((u16)b, in.s[5])) << i;
    r1 |= (u32)c1((float)h2d((u16)(a >> 16), in.s[5]), (float)h2d((u16)(b >> 16), in.s[5])) << i;
  });
  if (in.s[0]) {
    u32 c = pred_mask(w, in.o[4]);
    if (in.s[0] == 1) {
      r0 &= c;
      r1 &= c;
    } else if (in.s[0] == 2) {
      r0 |= c;
      r1 |= c;
    } else {
      r0 ^= c;
      r1 ^= c;
    }
  }
  if (in.s[4] == 0) {
    if (!(in.o[0].flags & OF_SINK)) {
      u32& d = *D<u32>(w, in.o[0]);
      d = (d & ~m) | (r0 & m);
    }
    if (in.s[1]) {
      u32& d = *D<u32>(w, in.o[1]);
      d = (d & ~m) | (r1 & m);
    }
  } else {
    u32 one = in.s[4] == 4 ? 0xffff : (in.s[5] ? 0x3f80 : 0x3c00);
    for_lanes(m, [&](int i) {
      set_lane_u64(w, in.o[0], i, (((r0 >> i) & 1) ? one : 0) | ((((r1 >> i) & 1) ? one : 0) << 16));
    });
  }
}

template <class T>
void h_selp(Warp& w, const Inst& in, u32 m) {
  T* d = D<T>(w, in.o[0]);
  const T *a = S<T>(w, in.o[1]), *b = S<T>(w, in.o[2]);
  u32 p = pred_mask(w, in.o[3]);
#pragma GCC ivdep
  for (int i = 0; i < 32; i++) {
    T r = ((p >> i) & 1) ? a[i] : b[i];
    d[i] = ((m >> i) & 1) ? r : d[i];
  }
}

template <class T>
void h_slct(Warp& w, const Inst& in, u32 m) {
  T* d = D<T>(w, in.o[0]);
  const T *a = S<T>(w, in.o[1]), *b = S<T>(w, in.o[2]);
  const u32* c = S<u32>(w, in.o[3]);
  for_lanes(m, [&](int i) {
    bool ge = in.s[0] ? (u2f(c[i]) >= 0.f) : ((s32)c[i] >= 0);
    d[i] = ge ? a[i] : b[i];
  });
}

}  // namespace

bool AluDecoder::decode_compare() {
  if (ty == "pred" && (op == "and" || op == "or" || op == "xor" || op == "not" || op == "mov")) {
    in.o[0] = b.dst(p, p.ops[0]);
    for (size_t i = 1; i < p.ops.size(); i++) in.o[i] = b.src(p, p.ops[i], 1);
    in.n = (u8)p.ops.size();
    in.s[0] = op == "and" ? 0 : op == "or" ? 1 : op == "xor" ? 2 : op == "not" ? 3 : 4;
    return set(&h_pred, Pipe::Alu);
  }
  if (op == "setp" || op == "set") {
    bool isset = op == "set";
    std::string aty = ty;
    std::string dty;
    if (isset) dty = p.mods[p.mods.size() - 2];
    int c = cmp_code(p.mods[1], false);
    if (c < 0) return false;
    in.o[0] = b.dst(p, p.ops[0]);
    if (p.ops[0].kind == OpK::SINK) in.o[0].flags |= OF_SINK;
    if (p.ops[0].reg2 >= 0) {
      in.s[1] = 1;
      in.o[1] = b.regop(p.ops[0].reg2, OF_DEF);
    }
    char fp = aty == "f32" ? 'f' : aty == "f64" ? 'd' : aty == "f16" ? 'h' : aty == "bf16" ? 'b' : 0;
    u8 ab = (u8)(type_bytes(aty) * 8);
    in.o[2] = b.src(p, p.ops[1], ab, fp);
    in.o[3] = b.src(p, p.ops[2], ab, fp);
    in.n = 4;
    if (p.ops.size() > 3) {
      in.o[4] = b.src(p, p.ops[3], 1);
      in.n = 5;
      in.s[0] = p.has("and") ? 1 : p.has("or") ? 2 : 3;
    }
    in.s[2] = p.has("ftz");
    if (isset) in.s[4] = dty == "f32" ? 2 : 1;
    if (aty == "f16x2" || aty == "bf16x2") {
      in.s[5] = aty[0] == 'b';
      in.s[6] = (u32)c;
      if (isset) in.s[4] = (dty == "u32" || dty == "s32") ? 4 : 3;
      return set(&h_setp_half2, Pipe::Half);
    }
    if (isset && (aty == "f16" || aty == "bf16") && dty[0] != 'u' && dty[0] != 's') return false;
    Handler h = nullptr;
    if (aty == "u16" || aty == "b16")
      h = setp_for<u16, 0>(c);
    else if (aty == "s16")
      h = setp_for<s16, 0>(c);
    else if (aty == "u32" || aty == "b32")
      h = setp_for<u32, 0>(c);
    else if (aty == "s32")
      h = setp_for<s32, 0>(c);
    else if (aty == "u64" || aty == "b64")
      h = setp_for<u64, 0>(c);
    else if (aty == "s64")
      h = setp_for<s64, 0>(c);
    else if (aty == "f32")
      h = setp_for<float, 0>(c);
    else if (aty == "f64")
      h = setp_for<double, 0>(c);
    else if (aty == "f16")
      h = setp_for<u16, 1>(c);
    else if (aty == "bf16")
      h = setp_for<u16, 2>(c);
    return set(h, aty == "f64" ? Pipe::Fp64 : Pipe::Alu);
  }
  if (op == "selp") {
    in.o[0] = b.dst(p, p.ops[0]);
    char fp = f32 ? 'f' : f64 ? 'd' : 0;
    in.o[1] = b.src(p, p.ops[1], bits, fp);
    in.o[2] = b.src(p, p.ops[2], bits, fp);
    in.o[3] = b.src(p, p.ops[3], 1);
    in.n = 4;
    if (bits == 16) return set(&h_selp<u16>, Pipe::Alu);
    if (bits == 32) return set(&h_selp<u32>, Pipe::Alu);
    if (bits == 64) return set(&h_selp<u64>, Pipe::Alu);
    return false;
  }
  if (op == "slct") {
    in.o[0] = b.dst(p, p.ops[0]);
    std::string dty = p.mods[p.mods.size() - 2];
    u8 db = (u8)(type_bytes(dty) * 8);
    in.o[1] = b.src(p, p.ops[1], db, dty == "f32" ? 'f' : dty == "f64" ? 'd' : 0);
    in.o[2] = b.src(p, p.ops[2], db, dty == "f32" ? 'f' : dty == "f64" ? 'd' : 0);
    in.o[3] = b.src(p, p.ops[3], 32, f32 ? 'f' : 0);
    in.n = 4;
    in.s[0] = f32;
    return set(db == 32 ? &h_slct<u32> : db == 64 ? &h_slct<u64> : &h_slct<u16>, Pipe::Alu);
  }
  return false;
}

}  // namespace hemu
