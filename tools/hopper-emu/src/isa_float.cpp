// Floating-point arithmetic in FP32 and FP64, and the special functions.
#include <cfenv>

#include "isa_alu.h"

namespace hemu {
namespace {

// slow generic f32 op with modifiers. s[1] = op: 0 add 1 sub 2 mul 3 fma 4 div 5 sqrt 6 rcp ; s[2] = rounding
template <class T>
void h_fslow(Warp& w, const Inst& in, u32 m) {
  T* d = D<T>(w, in.o[0]);
  const T* a = S<T>(w, in.o[1]);
  const T* b = in.n > 2 ? S<T>(w, in.o[2]) : a;
  const T* c = in.n > 3 ? S<T>(w, in.o[3]) : a;
  static const int modes[] = {FE_TONEAREST, FE_TOWARDZERO, FE_DOWNWARD, FE_UPWARD, FE_TONEAREST};
  int old = fegetround();
  fesetround(modes[in.s[2]]);
  for_lanes(m, [&](int i) {
    volatile T x = a[i], y = b[i], z = c[i];
    if (sizeof(T) == 4 && (in.s[0] & F_FTZ)) {
      x = ftz((float)x);
      y = ftz((float)y);
      z = ftz((float)z);
    }
    volatile T r = 0;
    switch (in.s[1]) {
      case 0:
        r = x + y;
        break;
      case 1:
        r = x - y;
        break;
      case 2:
        r = x * y;
        break;
      case 3:
        r = sizeof(T) == 4 ? (T)std::fma((float)x, (float)y, (float)z) : (T)std::fma((double)x, (double)y, (double)z);
        break;
      case 4:
        r = x / y;
        break;
      case 5:
        r = sizeof(T) == 4 ? (T)sqrtf((float)x) : (T)std::sqrt((double)x);
        break;
      case 6:
        r = (T)1 / x;
        break;
    }
    T q = r;
    if (sizeof(T) == 4 && (in.s[0] & F_FTZ)) q = ftz((float)q);
    if (in.s[0] & F_SAT) q = sat01((float)q);
    if (in.s[0] & F_RELU) q = q > 0 ? q : (T)0;
    if (q != q && sizeof(T) == 4) q = (T)u2f(0x7fffffff);
    d[i] = q;
  });
  fesetround(old);
}

// ---- special functions
static inline float ex2f_approx(float x) { return exp2f(x); }

template <int OP, bool Z>
void h_sfu(Warp& w, const Inst& in, u32 m) {
  float* d = D<float>(w, in.o[0]);
  const float* a = S<float>(w, in.o[1]);
  if (OP == 0) {  // ex2: range-reduced polynomial, max error about 1 ulp, vectorised
    float t[32];
#pragma GCC ivdep
    for (int i = 0; i < 32; i++) {
      float x = a[i];
      if (Z) x = ftz(x);
      float c = x < -151.f ? -151.f : (x > 129.f ? 129.f : x);
      float fl = std::floor(c + 0.5f);
      float r = c - fl;
      float p = 1.5353362e-4f;
      p = p * r + 1.3398874e-3f;
      p = p * r + 9.6184373e-3f;
      p = p * r + 5.5503324e-2f;
      p = p * r + 2.4022648e-1f;
      p = p * r + 6.9314720e-1f;
      p = p * r + 1.0f;
      int n = (int)fl;
      int n1 = n >> 1, n2 = n - n1;
      float s1 = u2f((u32)(n1 + 127) << 23), s2 = u2f((u32)(n2 + 127) << 23);
      float y = p * s1 * s2;
      y = x != x ? x : y;
      t[i] = Z ? ftz(y) : y;
    }
    for (int i = 0; i < 32; i++) d[i] = ((m >> i) & 1) ? t[i] : d[i];
    return;
  }
  for_lanes(m, [&](int i) {
    float x = a[i];
    if (Z) x = ftz(x);
    float r = 0;
    switch (OP) {
      case 1:
        r = log2f(x);
        break;
      case 2:
        r = 1.f / x;
        break;
      case 3:
        r = (float)(1.0 / std::sqrt((double)x));
        break;
      case 4:
        r = sqrtf(x);
        break;
      case 5:
        r = (float)std::sin((double)x);
        break;
      case 6:
        r = (float)std::cos((double)x);
        break;
      case 7:
        r = tanhf(x);
        break;
    }
    d[i] = Z ? ftz(r) : r;
  });
}

void h_rcp64(Warp& w, const Inst& in, u32 m) {
  double* d = D<double>(w, in.o[0]);
  const double* a = S<double>(w, in.o[1]);
  for_lanes(m, [&](int i) {
    double r = in.s[0] ? 1.0 / std::sqrt(a[i]) : 1.0 / a[i];
    u64 u;
    memcpy(&u, &r, 8);
    u &= 0xffffffff00000000ull;
    memcpy(&d[i], &u, 8);
  });
}

void h_testp(Warp& w, const Inst& in, u32 m) {
  u32 r = 0;
  for_lanes(m, [&](int i) {
    double x;
    bool sub;
    if (in.o[1].bits == 64) {
      x = S<double>(w, in.o[1])[i];
      sub = std::fpclassify(x) == FP_SUBNORMAL;
    } else {
      float f = S<float>(w, in.o[1])[i];
      x = f;
      sub = std::fpclassify(f) == FP_SUBNORMAL;
    }
    bool t = false;
    switch (in.s[0]) {
      case 0:
        t = std::isfinite(x);
        break;
      case 1:
        t = std::isinf(x);
        break;
      case 2:
        t = !std::isnan(x);
        break;
      case 3:
        t = std::isnan(x);
        break;
      case 4:
        t = std::isfinite(x) && !sub && x != 0;
        break;
      case 5:
        t = sub;
        break;
    }
    r |= (u32)t << i;
  });
  u32& d = *D<u32>(w, in.o[0]);
  d = (d & ~m) | (r & m);
}

void h_fminmax(Warp& w, const Inst& in, u32 m) {
  float* d = D<float>(w, in.o[0]);
  const float *a = S<float>(w, in.o[1]), *b = S<float>(w, in.o[2]);
  const float* c = in.n > 3 ? S<float>(w, in.o[3]) : nullptr;
  for_lanes(m, [&](int i) {
    float x = a[i], y = b[i], z = c ? c[i] : 0;
    if (in.s[0] & F_FTZ) {
      x = ftz(x);
      y = ftz(y);
      z = ftz(z);
    }
    bool sx = std::signbit(x) != std::signbit(y);
    if (in.s[0] & F_ABS) {
      x = std::fabs(x);
      y = std::fabs(y);
      z = std::fabs(z);
    }
    float r = in.s[1] ? fmax_ptx(x, y) : fmin_ptx(x, y);
    if (c) r = in.s[1] ? fmax_ptx(r, z) : fmin_ptx(r, z);
    if ((in.s[0] & F_NAN) && (x != x || y != y || (c && z != z))) r = u2f(0x7fffffff);
    if (in.s[0] & F_XORSIGN) r = std::copysign(r, sx ? -1.f : 1.f);
    d[i] = r;
  });
}

}  // namespace

bool AluDecoder::decode_float() {
  if (!f32 && !f64) return false;
  if (op == "add" || op == "sub" || op == "mul" || op == "fma" || op == "mad" || op == "div" || op == "rem" ||
      op == "min" || op == "max" || op == "abs" || op == "neg" || op == "sad" || op == "sqrt") {
    if (op == "add" && p.mods.size() >= 2 && p.ops.size() == 3 && (p.has("f16") || p.has("bf16"))) return false;
    simple(bits, f32 ? 'f' : 'd');
    u32 fl = flags();
    int r = rnd();
    Pipe pi = f32 ? Pipe::Fma : Pipe::Fp64;
    if (op == "abs")
      return set(f32 ? mk1<u32, u32>([](u32 a) { return a & 0x7fffffffu; })
                     : mk1<u64, u64>([](u64 a) { return a & 0x7fffffffffffffffull; }),
                 f32 ? Pipe::Alu : pi);
    if (op == "neg")
      return set(f32 ? mk1<u32, u32>([](u32 a) { return a ^ 0x80000000u; })
                     : mk1<u64, u64>([](u64 a) { return a ^ 0x8000000000000000ull; }),
                 f32 ? Pipe::Alu : pi);
    if (op == "min" || op == "max") {
      if (f64)
        return set(op == "min" ? mk2<double, double, double>([](double a, double c) {
                     return a != a ? c : c != c ? a : std::min(a, c);
                   })
                               : mk2<double, double, double>([](double a, double c) {
                                   return a != a ? c : c != c ? a : std::max(a, c);
                                 }),
                   pi);
      if (fl == 0 && in.n == 3)
        return set(op == "min" ? mk2<float, float, float>([](float a, float c) {
                     float r = a < c ? a : c;
                     r = a != a ? c : r;
                     r = c != c ? a : r;
                     return r;
                   })
                               : mk2<float, float, float>([](float a, float c) {
                                   float r = a > c ? a : c;
                                   r = a != a ? c : r;
                                   r = c != c ? a : r;
                                   return r;
                                 }),
                   Pipe::Alu);
      if (fl == F_FTZ && in.n == 3)
        return set(op == "min" ? mk2<float, float, float>([](float a, float c) {
                     a = ftz(a);
                     c = ftz(c);
                     float r = a < c ? a : c;
                     r = a != a ? c : r;
                     r = c != c ? a : r;
                     return r;
                   })
                               : mk2<float, float, float>([](float a, float c) {
                                   a = ftz(a);
                                   c = ftz(c);
                                   float r = a > c ? a : c;
                                   r = a != a ? c : r;
                                   r = c != c ? a : r;
                                   return r;
                                 }),
                   Pipe::Alu);
      in.s[0] = fl;
      in.s[1] = op == "max";
      return set(&h_fminmax, Pipe::Alu);
    }
    if (op == "div" || op == "sqrt") {
      if (p.has("approx") && op == "sqrt") return set(p.has("ftz") ? &h_sfu<4, true> : &h_sfu<4, false>, Pipe::Mufu);
      in.s[0] = fl;
      in.s[1] = op == "div" ? 4 : 5;
      in.s[2] = (u32)r;
      return set(f32 ? &h_fslow<float> : &h_fslow<double>, f32 ? Pipe::Mufu : pi);
    }
    u32 code = op == "add" ? 0 : op == "sub" ? 1 : op == "mul" ? 2 : 3;
    if (r == 0 && (fl == 0 || fl == F_FTZ)) {
      if (f64) {
        if (code == 0) return set(mk2<double, double, double>([](double a, double c) { return a + c; }), pi);
        if (code == 1) return set(mk2<double, double, double>([](double a, double c) { return a - c; }), pi);
        if (code == 2) return set(mk2<double, double, double>([](double a, double c) { return a * c; }), pi);
        return set(
            mk3<double, double, double, double>([](double a, double c, double e) { return __builtin_fma(a, c, e); }),
            pi);
      }
      if (!fl) {
        if (code == 0) return set(mk2<float, float, float>([](float a, float c) { return a + c; }), pi);
        if (code == 1) return set(mk2<float, float, float>([](float a, float c) { return a - c; }), pi);
        if (code == 2) return set(mk2<float, float, float>([](float a, float c) { return a * c; }), pi);
        return set(mk3<float, float, float, float>([](float a, float c, float e) { return __builtin_fmaf(a, c, e); }),
                   pi);
      }
      if (code == 0) return set(mk2<float, float, float>([](float a, float c) { return ftz(ftz(a) + ftz(c)); }), pi);
      if (code == 1) return set(mk2<float, float, float>([](float a, float c) { return ftz(ftz(a) - ftz(c)); }), pi);
      if (code == 2) return set(mk2<float, float, float>([](float a, float c) { return ftz(ftz(a) * ftz(c)); }), pi);
      return set(mk3<float, float, float, float>(
                     [](float a, float c, float e) { return ftz(__builtin_fmaf(ftz(a), ftz(c), ftz(e))); }),
                 pi);
    }
    in.s[0] = fl;
    in.s[1] = code;
    in.s[2] = (u32)r;
    return set(f32 ? &h_fslow<float> : &h_fslow<double>, pi);
  }
  if (op == "ex2" || op == "lg2" || op == "rcp" || op == "rsqrt" || op == "sin" || op == "cos" || op == "tanh") {
    bool z = p.has("ftz");
    simple(bits, f32 ? 'f' : 'd');
    if (f64) {
      if (p.has("approx")) {
        in.s[0] = op == "rsqrt";
        return set(&h_rcp64, Pipe::Mufu);
      }
      in.s[1] = 6;
      in.s[2] = (u32)rnd();
      return op == "rcp" ? set(&h_fslow<double>, Pipe::Fp64) : false;
    }
    if (op == "rcp" && !p.has("approx")) {
      in.s[0] = flags();
      in.s[1] = 6;
      in.s[2] = (u32)rnd();
      return set(&h_fslow<float>, Pipe::Mufu);
    }
    Handler h = nullptr;
    if (op == "ex2") h = z ? &h_sfu<0, true> : &h_sfu<0, false>;
    if (op == "lg2") h = z ? &h_sfu<1, true> : &h_sfu<1, false>;
    if (op == "rcp") h = z ? &h_sfu<2, true> : &h_sfu<2, false>;
    if (op == "rsqrt") h = z ? &h_sfu<3, true> : &h_sfu<3, false>;
    if (op == "sin") h = z ? &h_sfu<5, true> : &h_sfu<5, false>;
    if (op == "cos") h = z ? &h_sfu<6, true> : &h_sfu<6, false>;
    if (op == "tanh") h = &h_sfu<7, false>;
    return set(h, Pipe::Mufu);
  }
  if (op == "copysign") {
    simple(bits, f32 ? 'f' : 'd');
    return set(f32 ? mk2<u32, u32, u32>([](u32 a, u32 c) { return (a & 0x80000000u) | (c & 0x7fffffffu); })
                   : mk2<u64, u64, u64>([](u64 a, u64 c) { return (a & (1ull << 63)) | (c & ~(1ull << 63)); }),
               Pipe::Alu);
  }
  if (op == "testp") {
    in.o[0] = b.dst(p, p.ops[0]);
    in.o[1] = b.src(p, p.ops[1], bits, f32 ? 'f' : 'd');
    in.n = 2;
    static const std::map<std::string, u32> t = {{"finite", 0},     {"infinite", 1}, {"number", 2},
                                                 {"notanumber", 3}, {"normal", 4},   {"subnormal", 5}};
    auto it = t.find(p.mods[1]);
    if (it == t.end()) return false;
    in.s[0] = it->second;
    return set(&h_testp, Pipe::Alu);
  }
  return false;
}

}  // namespace hemu
