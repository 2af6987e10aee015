// Bit fields, permutations, shifts of pairs, counts.
#include "isa_alu.h"

namespace hemu {
namespace {

// ---- bit field
template <class T>
void h_bfe(Warp& w, const Inst& in, u32 m) {
  T* d = D<T>(w, in.o[0]);
  const T* a = S<T>(w, in.o[1]);
  const u32 *b = S<u32>(w, in.o[2]), *c = S<u32>(w, in.o[3]);
  constexpr int msb = sizeof(T) * 8 - 1;
  using U = std::make_unsigned_t<T>;
  for_lanes(m, [&](int i) {
    int pos = b[i] & 0xff, len = c[i] & 0xff;
    U sbit = 0;
    if (std::is_signed_v<T> && len) sbit = ((U)a[i] >> std::min(pos + len - 1, msb)) & 1;
    U r = 0;
    if (pos <= msb) r = (U)a[i] >> pos;
    int eff = std::min(len, std::max(0, msb + 1 - pos));
    if (len == 0)
      r = 0;
    else if (eff <= msb) {
      U mk = eff >= msb + 1 ? ~(U)0 : (((U)1 << eff) - 1);
      r &= mk;
      if (sbit) r |= ~mk;
    }
    d[i] = (T)r;
  });
}

template <class T>
void h_bfi(Warp& w, const Inst& in, u32 m) {
  T* d = D<T>(w, in.o[0]);
  const T *a = S<T>(w, in.o[1]), *b = S<T>(w, in.o[2]);
  const u32 *c = S<u32>(w, in.o[3]), *e = S<u32>(w, in.o[4]);
  constexpr u32 nb = sizeof(T) * 8;
  for_lanes(m, [&](int i) {
    u32 pos = c[i] & 0xff, len = e[i] & 0xff;
    T r = b[i];
    if (pos < nb && len) {
      T mk = (len >= nb ? ~(T)0 : (((T)1 << len) - 1));
      r = (r & ~(T)(mk << pos)) | (T)((a[i] & mk) << pos);
    }
    d[i] = r;
  });
}

static inline u32 prmt1(u32 a, u32 b, u32 sel, u32 mode) {
  u64 v = ((u64)b << 32) | a;
  u32 r = 0;
  auto byte = [&](u32 i) { return (u32)(v >> (8 * (i & 7))) & 0xff; };
  if (mode == 0) {
    for (int i = 0; i < 4; i++) {
      u32 s = (sel >> (4 * i)) & 15;
      u32 x = byte(s & 7);
      if (s & 8) x = (x & 0x80) ? 0xff : 0;
      r |= x << (8 * i);
    }
    return r;
  }
  u32 s = sel & 3;
  for (u32 i = 0; i < 4; i++) {
    u32 idx = 0;
    switch (mode) {
      case 1:
        idx = s + i;
        break;  // f4e
      case 2:
        idx = (s - i) & 7;
        break;  // b4e
      case 3:
        idx = s;
        break;  // rc8
      case 4:
        idx = std::max(i, s);
        break;  // ecl
      case 5:
        idx = std::min(i, s);
        break;  // ecr
      case 6:
        idx = (s & 1) * 2 + (i & 1);
        break;  // rc16
    }
    r |= byte(idx) << (8 * i);
  }
  return r;
}

template <int MODE>
void h_prmt(Warp& w, const Inst& in, u32 m) {
  u32* d = D<u32>(w, in.o[0]);
  const u32 *a = S<u32>(w, in.o[1]), *b = S<u32>(w, in.o[2]), *c = S<u32>(w, in.o[3]);
  if (MODE == 0 && in.o[3].bank == 1 && !(c[0] & 0x8888)) {
    u32 s = c[0];
    u32 s0 = (s & 7) * 8, s1 = ((s >> 4) & 7) * 8, s2 = ((s >> 8) & 7) * 8, s3 = ((s >> 12) & 7) * 8;
#pragma GCC ivdep
    for (int i = 0; i < 32; i++) {
      u64 v = ((u64)b[i] << 32) | a[i];
      u32 r = (u32)((v >> s0) & 255) | ((u32)((v >> s1) & 255) << 8) | ((u32)((v >> s2) & 255) << 16) |
              ((u32)((v >> s3) & 255) << 24);
      d[i] = ((m >> i) & 1) ? r : d[i];
    }
    return;
  }
  for_lanes(m, [&](int i) { d[i] = prmt1(a[i], b[i], c[i], MODE); });
}

void h_lop3(Warp& w, const Inst& in, u32 m) {
  u32* d = D<u32>(w, in.o[0]);
  const u32 *a = S<u32>(w, in.o[1]), *b = S<u32>(w, in.o[2]), *c = S<u32>(w, in.o[3]);
  u32 t = in.s[0];
  u32 k0 = (t & 1) ? ~0u : 0, k1 = (t & 2) ? ~0u : 0, k2 = (t & 4) ? ~0u : 0, k3 = (t & 8) ? ~0u : 0,
      k4 = (t & 16) ? ~0u : 0, k5 = (t & 32) ? ~0u : 0, k6 = (t & 64) ? ~0u : 0, k7 = (t & 128) ? ~0u : 0;
  u32 pr = 0;
#pragma GCC ivdep
  for (int i = 0; i < 32; i++) {
    u32 A = a[i], B = b[i], C = c[i];
    u32 lo = (~B & ((~C & k0) | (C & k1))) | (B & ((~C & k2) | (C & k3)));
    u32 hi = (~B & ((~C & k4) | (C & k5))) | (B & ((~C & k6) | (C & k7)));
    u32 r = (~A & lo) | (A & hi);
    d[i] = ((m >> i) & 1) ? r : d[i];
  }
  if (in.s[1]) {  // predicate output
    for (int i = 0; i < 32; i++) pr |= (u32)(d[i] != 0) << i;
    u32 q = pred_mask(w, in.o[5]);
    u32 r = in.s[1] == 1 ? (pr | q) : (pr & q);
    u32& p = *D<u32>(w, in.o[4]);
    p = (p & ~m) | (r & m);
  }
}

template <int DIR, int WRAP>
void h_shf(Warp& w, const Inst& in, u32 m) {
  u32* d = D<u32>(w, in.o[0]);
  const u32 *a = S<u32>(w, in.o[1]), *b = S<u32>(w, in.o[2]), *c = S<u32>(w, in.o[3]);
#pragma GCC ivdep
  for (int i = 0; i < 32; i++) {
    u32 n = WRAP ? (c[i] & 31) : (c[i] > 32 ? 32 : c[i]);
    u64 v = ((u64)b[i] << 32) | a[i];
    u32 r = DIR == 0 ? (u32)((v << n) >> 32) : (u32)(v >> n);
    d[i] = ((m >> i) & 1) ? r : d[i];
  }
}

}  // namespace

bool AluDecoder::decode_bits() {
  if (op == "shf") {
    simple(32);
    bool l = p.has("l"), wrap = p.has("wrap");
    return set(l ? (wrap ? &h_shf<0, 1> : &h_shf<0, 0>) : (wrap ? &h_shf<1, 1> : &h_shf<1, 0>), Pipe::Alu);
  }
  if (op == "lop3") {
    bool bo = p.has("or") || p.has("and");
    in.o[0] = b.dst(p, p.ops[0]);
    for (int i = 1; i < 4; i++) in.o[i] = b.src(p, p.ops[i], 32);
    in.n = 4;
    in.s[0] = (u32)p.ops[4].imm;
    if (bo) {
      in.s[1] = p.has("or") ? 1 : 2;
      in.o[4] = b.regop(p.ops[0].reg2, OF_DEF);
      in.o[5] = b.src(p, p.ops[5], 1);
      in.n = 6;
    }
    return set(&h_lop3, Pipe::Alu);
  }
  if (op == "prmt") {
    simple(32);
    if (p.has("f4e")) return set(&h_prmt<1>, Pipe::Alu);
    if (p.has("b4e")) return set(&h_prmt<2>, Pipe::Alu);
    if (p.has("rc8")) return set(&h_prmt<3>, Pipe::Alu);
    if (p.has("ecl")) return set(&h_prmt<4>, Pipe::Alu);
    if (p.has("ecr")) return set(&h_prmt<5>, Pipe::Alu);
    if (p.has("rc16")) return set(&h_prmt<6>, Pipe::Alu);
    return set(&h_prmt<0>, Pipe::Alu);
  }
  if (op == "bfe") {
    in.o[0] = b.dst(p, p.ops[0]);
    in.o[1] = b.src(p, p.ops[1], bits);
    in.o[2] = b.src(p, p.ops[2], 32);
    in.o[3] = b.src(p, p.ops[3], 32);
    in.n = 4;
    if (ty == "u32") return set(&h_bfe<u32>, Pipe::Alu);
    if (ty == "s32") return set(&h_bfe<s32>, Pipe::Alu);
    if (ty == "u64") return set(&h_bfe<u64>, Pipe::Alu);
    return set(&h_bfe<s64>, Pipe::Alu);
  }
  if (op == "bfi") {
    in.o[0] = b.dst(p, p.ops[0]);
    in.o[1] = b.src(p, p.ops[1], bits);
    in.o[2] = b.src(p, p.ops[2], bits);
    in.o[3] = b.src(p, p.ops[3], 32);
    in.o[4] = b.src(p, p.ops[4], 32);
    in.n = 5;
    return set(bits == 32 ? &h_bfi<u32> : &h_bfi<u64>, Pipe::Alu);
  }
  if (op == "bfind") {
    simple(bits);
    bool sh = p.has("shiftamt");
    if (ty == "u32")
      return set(sh ? mk1<u32, u32>([](u32 a) { return a ? (u32)__builtin_clz(a) : ~0u; })
                    : mk1<u32, u32>([](u32 a) { return a ? 31u - (u32)__builtin_clz(a) : ~0u; }),
                 Pipe::Alu);
    if (ty == "s32")
      return set(sh ? mk1<u32, s32>([](s32 a) {
                   u32 v = (u32)(a < 0 ? ~a : a);
                   return v ? (u32)__builtin_clz(v) : ~0u;
                 })
                    : mk1<u32, s32>([](s32 a) {
                        u32 v = (u32)(a < 0 ? ~a : a);
                        return v ? 31u - (u32)__builtin_clz(v) : ~0u;
                      }),
                 Pipe::Alu);
    if (ty == "u64")
      return set(sh ? mk1<u32, u64>([](u64 a) { return a ? (u32)__builtin_clzll(a) : ~0u; })
                    : mk1<u32, u64>([](u64 a) { return a ? 63u - (u32)__builtin_clzll(a) : ~0u; }),
                 Pipe::Alu);
    return set(mk1<u32, s64>([](s64 a) {
                 u64 v = (u64)(a < 0 ? ~a : a);
                 return v ? 63u - (u32)__builtin_clzll(v) : ~0u;
               }),
               Pipe::Alu);
  }
  if (op == "brev") {
    simple(bits);
    return set(bits == 32 ? mk1<u32, u32>([](u32 a) {
                 u32 r = 0;
                 for (int i = 0; i < 32; i++) r |= ((a >> i) & 1) << (31 - i);
                 return r;
               })
                          : mk1<u64, u64>([](u64 a) {
                              u64 r = 0;
                              for (int i = 0; i < 64; i++) r |= ((a >> i) & 1) << (63 - i);
                              return r;
                            }),
               Pipe::Alu);
  }
  if (op == "clz") {
    simple(bits);
    return set(bits == 32 ? mk1<u32, u32>([](u32 a) { return a ? (u32)__builtin_clz(a) : 32u; })
                          : mk1<u32, u64>([](u64 a) { return a ? (u32)__builtin_clzll(a) : 64u; }),
               Pipe::Alu);
  }
  if (op == "popc") {
    simple(bits);
    return set(bits == 32 ? mk1<u32, u32>([](u32 a) { return (u32)__builtin_popcount(a); })
                          : mk1<u32, u64>([](u64 a) { return (u32)__builtin_popcountll(a); }),
               Pipe::Alu);
  }
  if (op == "fns") {
    simple(32);
    return set(mk3<u32, u32, u32, s32>([](u32 mask, u32 base, s32 off) {
                 u32 r = ~0u;
                 if (off == 0) return (mask >> (base & 31)) & 1 ? base : r;
                 int c = 0;
                 if (off > 0) {
                   for (u32 i = base; i < 32; i++)
                     if ((mask >> i) & 1)
                       if (++c == off) return i;
                 } else {
                   for (int i = (int)base; i >= 0; i--)
                     if ((mask >> i) & 1)
                       if (++c == -off) return (u32)i;
                 }
                 return r;
               }),
               Pipe::Alu);
  }
  if (op == "bmsk") {
    simple(32);
    bool cl = p.has("clamp");
    return set(cl ? mk2<u32, u32, u32>([](u32 a, u32 c) {
                 u64 mk = c >= 32 ? 0xffffffffull : ((1ull << c) - 1);
                 return a >= 32 ? 0u : (u32)(mk << a);
               })
                  : mk2<u32, u32, u32>([](u32 a, u32 c) { return (u32)(((1ull << (c & 31)) - 1) << (a & 31)); }),
               Pipe::Alu);
  }
  if (op == "szext") {
    simple(32);
    return set(ty == "u32" ? mk2<u32, u32, u32>([](u32 a, u32 c) { return c >= 32 ? a : a & (u32)((1ull << c) - 1); })
                           : mk2<u32, u32, u32>([](u32 a, u32 c) {
                               if (c >= 32) return a;
                               if (!c) return 0u;
                               u32 s = 32 - c;
                               return (u32)((s32)(a << s) >> s);
                             }),
               Pipe::Alu);
  }
  return false;
}

}  // namespace hemu
