// What the decoders of arithmetic share (isa_alu.cpp: who decodes what).
#pragma once

#include "isa.h"

namespace hemu {

inline float ftz(float x) {
  u32 u = f2u(x);
  return (u & 0x7f800000u) == 0 ? u2f(u & 0x80000000u) : x;
}
inline float sat01(float x) { return x != x ? 0.f : (x < 0.f ? 0.f : (x > 1.f ? 1.f : x)); }

// Modifiers, in Inst::s[0] of the handlers that look at them.
enum { F_FTZ = 1, F_SAT = 2, F_RELU = 4, F_NAN = 8, F_XORSIGN = 16, F_ABS = 32 };

inline float fmin_ptx(float a, float b) {
  return a != a ? b : (b != b ? a : (a == b ? (std::signbit(a) ? a : b) : (a < b ? a : b)));
}
inline float fmax_ptx(float a, float b) {
  return a != a ? b : (b != b ? a : (a == b ? (std::signbit(a) ? b : a) : (a > b ? a : b)));
}

// FP16 or BF16 bits as a number.
inline double h2d(u16 h, bool bf) { return bf ? bf16_to_float(h) : half_to_float(h); }

// One arithmetic instruction being decoded: its type, taken apart, and the ways to fill Inst that most share.
struct AluDecoder {
  AluDecoder(Builder& builder, const PtxInst& ptx, Inst& inst)
      : b(builder), p(ptx), in(inst), op(ptx.mods[0]), ty(ptx.mods.back()) {
    is_int = ty.size() >= 2 && (ty[0] == 'u' || ty[0] == 's' || ty[0] == 'b') && ty[1] != 'f' && type_bytes(ty);
    bits = (u8)(type_bytes(ty) * 8);
    f32 = ty == "f32", f64 = ty == "f64";
    half = ty == "f16" || ty == "f16x2" || ty == "bf16" || ty == "bf16x2";
  }

  Builder& b;
  const PtxInst& p;
  Inst& in;
  const std::string& op;
  const std::string& ty;
  u8 bits;
  bool is_int, f32, f64, half;

  int rnd() const { return p.has("rz") ? 1 : p.has("rm") ? 2 : p.has("rp") ? 3 : 0; }
  u32 flags() const {
    u32 f = 0;
    if (p.has("ftz")) f |= F_FTZ;
    if (p.has("sat")) f |= F_SAT;
    if (p.has("relu")) f |= F_RELU;
    if (p.has("NaN")) f |= F_NAN;
    if (p.has("xorsign")) f |= F_XORSIGN | F_ABS;
    if (p.has("abs")) f |= F_ABS;
    return f;
  }
  // The handler and the pipe of the instruction; false where there is no handler.
  bool set(Handler handler, Pipe pipe) {
    if (!handler) return false;
    in.fn = handler;
    in.pipe = pipe;
    return true;
  }
  // The destination, then every source at this width (fp: what float immediates become).
  void simple(u8 width, char fp = 0) {
    in.o[0] = b.dst(p, p.ops[0]);
    for (size_t i = 1; i < p.ops.size(); i++) in.o[i] = b.src(p, p.ops[i], width, fp);
    in.n = (u8)p.ops.size();
  }

  // Each: false where the instruction is not of its family.
  bool decode_move();
  bool decode_compare();
  bool decode_float();
  bool decode_half();
  bool decode_int();
  bool decode_bits();
};

}  // namespace hemu
