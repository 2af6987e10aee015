// Arithmetic in FP16 and BF16, scalar and packed.
#include "isa_alu.h"

namespace hemu {
namespace {

// half / bf16 ops, scalar or packed. s[0] flags, s[1] op (0 add 1 sub 2 mul 3 fma 4 min 5 max 6 neg 7 abs 8 ex2 9 tanh), s[2]=1 bf16
static inline u16 d2h(double x, bool bf) {
  float f = (float)x;
  if ((double)f == x || x != x) return bf ? float_to_bf16(f) : float_to_half(f);
  return bf ? double_to_bf16(x) : double_to_half(x);
}
static u16 half_op(u16 A, u16 B, u16 C, u32 op, u32 fl, bool bf) {
  if (op == 6) return A ^ 0x8000;
  if (op == 7) return A & 0x7fff;
  double a = h2d(A, bf), b = h2d(B, bf), c = h2d(C, bf);
  auto fz = [&](double x) { return (fl & F_FTZ) && !bf && std::fabs(x) < 0x1p-14 ? std::copysign(0.0, x) : x; };
  a = fz(a);
  b = fz(b);
  c = fz(c);
  double r = 0;
  switch (op) {
    case 0:
      r = a + b;
      break;
    case 1:
      r = a - b;
      break;
    case 2:
      r = a * b;
      break;
    case 3:
      r = a * b + c;
      break;
    case 4:
    case 5: {
      if (fl & F_NAN) {
        if (a != a || b != b) return 0x7fff;
      }
      double x = a, y = b;
      if (fl & F_ABS) {
        x = std::fabs(a);
        y = std::fabs(b);
      }
      r = op == 4 ? (double)fmin_ptx((float)x, (float)y) : (double)fmax_ptx((float)x, (float)y);
      if (fl & F_XORSIGN) r = std::copysign(r, std::signbit(a) != std::signbit(b) ? -1.0 : 1.0);
      break;
    }
    case 8:
      r = std::exp2(a);
      break;
    case 9:
      r = std::tanh(a);
      break;
  }
  u16 q = d2h(r, bf);
  if (fl & F_FTZ && !bf && (q & 0x7c00) == 0) q &= 0x8000;
  if (r != r) q = 0x7fff;
  if (fl & F_SAT) {
    double v = h2d(q, bf);
    if (v != v || v < 0)
      q = 0;
    else if (v > 1)
      q = bf ? 0x3f80 : 0x3c00;
  }
  if (fl & F_RELU) {
    double v = h2d(q, bf);
    if (v != v)
      q = 0x7fff;
    else if (v < 0 || q == 0x8000)
      q = 0;
  }
  return q;
}
template <int PACK>
void h_half(Warp& w, const Inst& in, u32 m) {
  u32 op = in.s[1], fl = in.s[0];
  bool bf = in.s[2];
  for_lanes(m, [&](int l) {
    u32 a = (u32)lane_u64(w, in.o[1], l), b = in.n > 2 ? (u32)lane_u64(w, in.o[2], l) : 0,
        c = in.n > 3 ? (u32)lane_u64(w, in.o[3], l) : 0;
    u32 r = half_op((u16)a, (u16)b, (u16)c, op, fl, bf);
    if (PACK) r |= (u32)half_op((u16)(a >> 16), (u16)(b >> 16), (u16)(c >> 16), op, fl, bf) << 16;
    set_lane_u64(w, in.o[0], l, r);
  });
}

}  // namespace

bool AluDecoder::decode_half() {
  if (!half) return false;
  if (op == "add" || op == "sub" || op == "mul" || op == "fma" || op == "mad" || op == "div" || op == "rem" ||
      op == "min" || op == "max" || op == "abs" || op == "neg" || op == "sad" || op == "sqrt") {
    simple(ty == "f16" || ty == "bf16" ? 16 : 32, ty == "f16" ? 'h' : ty == "bf16" ? 'b' : 0);
    in.s[0] = flags();
    in.s[2] = ty[0] == 'b';
    static const std::map<std::string, u32> t = {{"add", 0}, {"sub", 1}, {"mul", 2}, {"fma", 3},
                                                 {"min", 4}, {"max", 5}, {"neg", 6}, {"abs", 7}};
    auto it = t.find(op);
    if (it == t.end()) return false;
    in.s[1] = it->second;
    return set(ty.back() == '2' ? &h_half<1> : &h_half<0>, Pipe::Half);
  }
  if (op == "ex2" || op == "lg2" || op == "rcp" || op == "rsqrt" || op == "sin" || op == "cos" || op == "tanh") {
    simple(ty.back() == '2' ? 32 : 16);
    in.s[1] = op == "ex2" ? 8 : 9;
    in.s[0] = flags();
    in.s[2] = ty[0] == 'b';
    return set(ty.back() == '2' ? &h_half<1> : &h_half<0>, Pipe::Mufu);
  }
  return false;
}

}  // namespace hemu
