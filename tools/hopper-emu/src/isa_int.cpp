// Integer arithmetic.
#include "isa_alu.h"

namespace hemu {
namespace {

template <class T>
Handler int_bin(const std::string& op) {
  using S_ = std::make_signed_t<T>;
  using U = std::make_unsigned_t<T>;
  constexpr bool sg = std::is_signed_v<T>;
  if (op == "add") return mk2<U, U, U>([](U a, U b) -> U { return a + b; });
  if (op == "sub") return mk2<U, U, U>([](U a, U b) -> U { return a - b; });
  if (op == "mul.lo") return mk2<U, U, U>([](U a, U b) -> U { return (U)((u64)a * (u64)b); });
  if (op == "mul.hi")
    return mk2<T, T, T>([](T a, T b) -> T {
      if constexpr (sizeof(T) == 8) {
        if constexpr (sg)
          return (T)(((s128)a * b) >> 64);
        else
          return (T)(((u128)a * b) >> 64);
      } else if constexpr (sizeof(T) == 4) {
        if constexpr (sg)
          return (T)(((s64)a * b) >> 32);
        else
          return (T)(((u64)a * b) >> 32);
      } else
        return (T)(((s64)a * (s64)b) >> 16);
    });
  if (op == "div")
    return mk2<T, T, T>([](T a, T b) -> T {
      if (b == 0) return (T)-1;
      if (sg && b == (T)-1) return (T)(0 - (U)a);
      return a / b;
    });
  if (op == "rem")
    return mk2<T, T, T>([](T a, T b) -> T {
      if (b == 0) return a;
      if (sg && b == (T)-1) return 0;
      return a % b;
    });
  if (op == "min") return mk2<T, T, T>([](T a, T b) -> T { return a < b ? a : b; });
  if (op == "max") return mk2<T, T, T>([](T a, T b) -> T { return a > b ? a : b; });
  if (op == "min.relu")
    return mk2<T, T, T>([](T a, T b) -> T {
      T r = a < b ? a : b;
      return r < 0 ? 0 : r;
    });
  if (op == "max.relu")
    return mk2<T, T, T>([](T a, T b) -> T {
      T r = a > b ? a : b;
      return r < 0 ? 0 : r;
    });
  if (op == "add.sat")
    return mk2<T, T, T>([](T a, T b) -> T {
      s64 r = (s64)a + (s64)b;
      if (r > (s64)std::numeric_limits<T>::max()) r = std::numeric_limits<T>::max();
      if (r < (s64)std::numeric_limits<T>::min()) r = std::numeric_limits<T>::min();
      return (T)r;
    });
  if (op == "sub.sat")
    return mk2<T, T, T>([](T a, T b) -> T {
      s64 r = (s64)a - (s64)b;
      if (r > (s64)std::numeric_limits<T>::max()) r = std::numeric_limits<T>::max();
      if (r < (s64)std::numeric_limits<T>::min()) r = std::numeric_limits<T>::min();
      return (T)r;
    });
  if (op == "and") return mk2<U, U, U>([](U a, U b) -> U { return a & b; });
  if (op == "or") return mk2<U, U, U>([](U a, U b) -> U { return a | b; });
  if (op == "xor") return mk2<U, U, U>([](U a, U b) -> U { return a ^ b; });
  if (op == "shl") return mk2<U, U, u32>([](U a, u32 b) -> U { return b >= sizeof(U) * 8 ? 0 : (U)(a << b); });
  if (op == "shr")
    return mk2<T, T, u32>([](T a, u32 b) -> T {
      constexpr u32 n = sizeof(T) * 8;
      if (b >= n) return sg ? (T)((S_)a >> (n - 1)) : (T)0;
      return (T)(a >> b);
    });
  if (op == "neg") return mk1<U, U>([](U a) -> U { return (U)(0 - a); });
  if (op == "not") return mk1<U, U>([](U a) -> U { return (U)~a; });
  if (op == "cnot") return mk1<U, U>([](U a) -> U { return a == 0 ? 1 : 0; });
  if (op == "abs") return mk1<T, T>([](T a) -> T { return (S_)a < 0 ? (T)(0 - (U)a) : a; });
  if (op == "mad.lo") return mk3<U, U, U, U>([](U a, U b, U c) -> U { return (U)((u64)a * (u64)b + (u64)c); });
  if (op == "mad.hi")
    return mk3<T, T, T, T>([](T a, T b, T c) -> T {
      if constexpr (sizeof(T) == 8) {
        if constexpr (sg)
          return (T)((U)(((s128)a * b) >> 64) + (U)c);
        else
          return (T)(((u128)a * b) >> 64) + c;
      } else if constexpr (sizeof(T) == 4) {
        if constexpr (sg)
          return (T)((U)(((s64)a * b) >> 32) + (U)c);
        else
          return (T)(((u64)a * b) >> 32) + c;
      } else
        return (T)((((s64)a * (s64)b) >> 16) + c);
    });
  if (op == "sad")
    return mk3<T, T, T, T>([](T a, T b, T c) -> T { return (T)((U)c + (a < b ? (U)b - (U)a : (U)a - (U)b)); });
  return nullptr;
}

Handler int_any(const std::string& ty, const std::string& op) {
  if (ty == "u16" || ty == "b16") return int_bin<u16>(op);
  if (ty == "s16") return int_bin<s16>(op);
  if (ty == "u32" || ty == "b32") return int_bin<u32>(op);
  if (ty == "s32") return int_bin<s32>(op);
  if (ty == "u64" || ty == "b64") return int_bin<u64>(op);
  if (ty == "s64") return int_bin<s64>(op);
  return nullptr;
}

// ---- extended precision: s[0]: 0 add 1 sub 2 mad.lo 3 mad.hi ; s[1] cc out ; s[2] carry in
template <class T>
void h_carry(Warp& w, const Inst& in, u32 m) {
  T* d = D<T>(w, in.o[0]);
  const T *a = S<T>(w, in.o[1]), *b = S<T>(w, in.o[2]), *c = in.n > 3 ? S<T>(w, in.o[3]) : a;
  for_lanes(m, [&](int i) {
    u32 ci = in.s[2] ? (w.carry >> i) & 1 : 0;
    u128 r;
    u32 co;
    const int nb = sizeof(T) * 8;
    if (in.s[0] == 0) {
      r = (u128)a[i] + b[i] + ci;
      co = (u32)(r >> nb) & 1;
    } else if (in.s[0] == 1) {
      r = (u128)a[i] - b[i] - ci;
      co = (u32)(r >> nb) & 1;
    } else {
      u128 p = (u128)a[i] * b[i];
      if (in.s[3] && in.s[0] == 3) p = (u128)((s128)(std::make_signed_t<T>)a[i] * (s128)(std::make_signed_t<T>)b[i]);
      T t = in.s[0] == 2 ? (T)p : (T)(p >> nb);
      r = (u128)t + c[i] + ci;
      co = (u32)(r >> nb) & 1;
    }
    d[i] = (T)r;
    if (in.s[1]) w.carry = (w.carry & ~(1u << i)) | (co << i);
  });
}

template <bool AS, bool BS>
void h_dp4a(Warp& w, const Inst& in, u32 m) {
  u32* d = D<u32>(w, in.o[0]);
  const u32 *a = S<u32>(w, in.o[1]), *b = S<u32>(w, in.o[2]), *c = S<u32>(w, in.o[3]);
  for_lanes(m, [&](int i) {
    s32 r = (s32)c[i];
    for (int j = 0; j < 4; j++) {
      s32 x = AS ? (s32)(int8_t)(a[i] >> (8 * j)) : (s32)(u8)(a[i] >> (8 * j));
      s32 y = BS ? (s32)(int8_t)(b[i] >> (8 * j)) : (s32)(u8)(b[i] >> (8 * j));
      r += x * y;
    }
    d[i] = (u32)r;
  });
}

template <bool AS, bool BS, bool HI>
void h_dp2a(Warp& w, const Inst& in, u32 m) {
  u32* d = D<u32>(w, in.o[0]);
  const u32 *a = S<u32>(w, in.o[1]), *b = S<u32>(w, in.o[2]), *c = S<u32>(w, in.o[3]);
  for_lanes(m, [&](int i) {
    s32 r = (s32)c[i];
    for (int j = 0; j < 2; j++) {
      s32 x = AS ? (s32)(s16)(a[i] >> (16 * j)) : (s32)(u16)(a[i] >> (16 * j));
      u32 bb = b[i] >> (8 * (j + (HI ? 2 : 0)));
      s32 y = BS ? (s32)(int8_t)bb : (s32)(u8)bb;
      r += x * y;
    }
    d[i] = (u32)r;
  });
}

}  // namespace

bool AluDecoder::decode_int() {
  if (op == "add" || op == "sub" || op == "mul" || op == "fma" || op == "mad" || op == "div" || op == "rem" ||
      op == "min" || op == "max" || op == "abs" || op == "neg" || op == "sad" || op == "sqrt") {
    if (!is_int && ty != "u16x2" && ty != "s16x2") return false;
    if (ty == "u16x2" || ty == "s16x2") {
      simple(32);
      if (op == "add")
        return set(
            mk2<u32, u32, u32>([](u32 a, u32 c) { return ((a + c) & 0xffff) | (((a >> 16) + (c >> 16)) << 16); }),
            Pipe::Alu);
      if (op == "min" || op == "max") {
        if (ty[0] == 'u')
          return set(op == "min" ? mk2<u32, u32, u32>([](u32 a, u32 c) {
                       return std::min(a & 0xffff, c & 0xffff) | (std::min(a >> 16, c >> 16) << 16);
                     })
                                 : mk2<u32, u32, u32>([](u32 a, u32 c) {
                                     return std::max(a & 0xffff, c & 0xffff) | (std::max(a >> 16, c >> 16) << 16);
                                   }),
                     Pipe::Alu);
        return set(op == "min" ? mk2<u32, u32, u32>([](u32 a, u32 c) {
                     return (u32)(u16)std::min((s16)a, (s16)c) |
                            ((u32)(u16)std::min((s16)(a >> 16), (s16)(c >> 16)) << 16);
                   })
                               : mk2<u32, u32, u32>([](u32 a, u32 c) {
                                   return (u32)(u16)std::max((s16)a, (s16)c) |
                                          ((u32)(u16)std::max((s16)(a >> 16), (s16)(c >> 16)) << 16);
                                 }),
                   Pipe::Alu);
      }
      return false;
    }
    // integers
    if (p.has("cc")) {
      simple(bits);
      in.s[0] = op == "add" ? 0 : op == "sub" ? 1 : p.has("lo") ? 2 : 3;
      in.s[1] = 1;
      in.s[3] = ty[0] == 's';
      return set(bits == 64 ? &h_carry<u64> : &h_carry<u32>, Pipe::Alu);
    }
    if ((op == "mul" || op == "mad") && p.has("wide")) {
      in.o[0] = b.dst(p, p.ops[0]);
      in.o[1] = b.src(p, p.ops[1], bits);
      in.o[2] = b.src(p, p.ops[2], bits);
      in.n = 3;
      if (op == "mad") {
        in.o[3] = b.src(p, p.ops[3], bits * 2);
        in.n = 4;
      }
      Pipe pi = Pipe::Fma;
      if (op == "mul") {
        if (ty == "s32") return set(mk2<u64, s32, s32>([](s32 a, s32 c) { return (u64)((s64)a * c); }), pi);
        if (ty == "u32") return set(mk2<u64, u32, u32>([](u32 a, u32 c) { return (u64)a * c; }), pi);
        if (ty == "s16") return set(mk2<u32, s16, s16>([](s16 a, s16 c) { return (u32)((s32)a * c); }), pi);
        if (ty == "u16") return set(mk2<u32, u16, u16>([](u16 a, u16 c) { return (u32)a * c; }), pi);
      } else {
        if (ty == "s32")
          return set(mk3<u64, s32, s32, u64>([](s32 a, s32 c, u64 e) { return (u64)((s64)a * c) + e; }), pi);
        if (ty == "u32") return set(mk3<u64, u32, u32, u64>([](u32 a, u32 c, u64 e) { return (u64)a * c + e; }), pi);
        if (ty == "s16")
          return set(mk3<u32, s16, s16, u32>([](s16 a, s16 c, u32 e) { return (u32)((s32)a * c) + e; }), pi);
        if (ty == "u16") return set(mk3<u32, u16, u16, u32>([](u16 a, u16 c, u32 e) { return (u32)a * c + e; }), pi);
      }
      return false;
    }
    simple(bits);
    std::string key = op;
    if (op == "mul" || op == "mad") key += p.has("hi") ? ".hi" : ".lo";
    if (p.has("sat")) key += ".sat";
    if (p.has("relu")) key += ".relu";
    // IMAD issues to the heavy half of the FMA pipe on Hopper.
    return set(int_any(ty, key), op == "mul" || op == "mad" ? Pipe::Fma : Pipe::Alu);
  }
  if (op == "mul24" || op == "mad24") {
    simple(32);
    bool s = ty == "s32";
    if (p.has("hi")) return false;
    if (op == "mul24")
      return set(s ? mk2<u32, s32, s32>([](s32 a, s32 c) { return (u32)((s64)(a << 8 >> 8) * (c << 8 >> 8)); })
                   : mk2<u32, u32, u32>([](u32 a, u32 c) { return (a & 0xffffff) * (c & 0xffffff); }),
                 Pipe::Fma);
    return set(
        s ? mk3<u32, s32, s32, u32>([](s32 a, s32 c, u32 e) { return (u32)((s64)(a << 8 >> 8) * (c << 8 >> 8)) + e; })
          : mk3<u32, u32, u32, u32>([](u32 a, u32 c, u32 e) { return (a & 0xffffff) * (c & 0xffffff) + e; }),
        Pipe::Fma);
  }
  if (op == "addc" || op == "subc" || op == "madc") {
    simple(bits);
    in.s[0] = op == "addc" ? 0 : op == "subc" ? 1 : p.has("lo") ? 2 : 3;
    in.s[1] = p.has("cc");
    in.s[2] = 1;
    in.s[3] = ty[0] == 's';
    return set(bits == 64 ? &h_carry<u64> : &h_carry<u32>, Pipe::Alu);
  }
  if (op == "and" || op == "or" || op == "xor" || op == "not" || op == "cnot") {
    simple(bits);
    return set(int_any(ty, op), Pipe::Alu);
  }
  if (op == "shl" || op == "shr") {
    in.o[0] = b.dst(p, p.ops[0]);
    in.o[1] = b.src(p, p.ops[1], bits);
    in.o[2] = b.src(p, p.ops[2], 32);
    in.n = 3;
    return set(int_any(ty, op), Pipe::Alu);
  }
  if (op == "dp4a") {
    simple(32);
    bool as = p.mods[1] == "s32", bs = p.mods[2] == "s32";
    return set(
        as ? (bs ? &h_dp4a<true, true> : &h_dp4a<true, false>) : (bs ? &h_dp4a<false, true> : &h_dp4a<false, false>),
        Pipe::Alu);
  }
  if (op == "dp2a") {
    simple(32);
    bool as = p.mods[2] == "s32", bs = p.mods[3] == "s32", hi = p.has("hi");
    Handler t[8] = {&h_dp2a<false, false, false>, &h_dp2a<false, false, true>, &h_dp2a<false, true, false>,
                    &h_dp2a<false, true, true>,   &h_dp2a<true, false, false>, &h_dp2a<true, false, true>,
                    &h_dp2a<true, true, false>,   &h_dp2a<true, true, true>};
    return set(t[as * 4 + bs * 2 + hi], Pipe::Alu);
  }
  return false;
}

}  // namespace hemu
