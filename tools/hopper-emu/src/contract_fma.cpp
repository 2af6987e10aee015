// A pass over a decoded kernel: multiplications and additions become multiply-adds, as ptxas makes them.
#include "isa_alu.h"

namespace hemu {
namespace {

// contracted multiply-add: +-(a*b) +- c
template <bool NP, bool NC, bool Z>
void h_contract(Warp& w, const Inst& in, u32 m) {
  float* d = D<float>(w, in.o[0]);
  const float *a = S<float>(w, in.o[1]), *b = S<float>(w, in.o[2]), *c = S<float>(w, in.o[3]);
#pragma GCC ivdep
  for (int i = 0; i < 32; i++) {
    float x = a[i], y = b[i], z = c[i];
    if (Z) {
      x = ftz(x);
      y = ftz(y);
      z = ftz(z);
    }
    float r = __builtin_fmaf(NP ? -x : x, y, NC ? -z : z);
    if (Z) r = ftz(r);
    d[i] = ((m >> i) & 1) ? r : d[i];
  }
}
void h_skip(Warp&, const Inst&, u32) {}

}  // namespace

// ptxas contracts mul.f32 / add.f32 pairs that carry no rounding modifier into one FFMA. Same-block, single-use products only.
void contract_fma(Kernel& k) {
  const size_t n = k.code.size();
  std::unordered_map<u32, u32> uses, defs;
  auto each = [](Inst& in, auto f) {
    if (in.guard_mode) f(in.guard);
    for (auto& o : in.o)
      if (o.flags & OF_REG) f(o);
    for (u32 i = 0; i < in.nvec; i++)
      if (in.vec[i].flags & OF_REG) f(in.vec[i]);
  };
  std::vector<u8> lead(n + 1, 0);
  for (size_t i = 0; i < n; i++) {
    Inst& in = k.code[i];
    if (in.flags & (IF_BRANCH | IF_TERM)) {
      lead[i + 1] = 1;
      if (in.src->mods[0] == "brx") {
        if (in.aux)
          for (u32 j = 0; j < in.s[0]; j++) lead[((u32*)in.aux)[j]] = 1;
      } else if (in.flags & IF_BRANCH)
        lead[in.target] = 1;
    }
    each(in, [&](Opnd& o) {
      if (o.flags & OF_DEF) defs[o.vreg]++;
      if (!(o.flags & OF_DEF) || (o.flags & OF_USE)) uses[o.vreg]++;
    });
  }
  auto kind = [](const Inst& in) -> int {  // 1 mul, 2 add, 3 sub; +16 ftz
    auto& m = in.src->mods;
    if (in.src->mods.back() != "f32" || in.guard_mode || !in.fn || in.nvec) return 0;
    int z = 0;
    for (size_t i = 1; i + 1 < m.size(); i++) {
      if (m[i] == "ftz")
        z = 16;
      else
        return 0;
    }
    if (m[0] == "mul") return 1 | z;
    if (m[0] == "add") return 2 | z;
    if (m[0] == "sub") return 3 | z;
    return 0;
  };
  std::unordered_map<u32, u32> mul_at, last_def;  // vreg -> instruction index, within the block
  for (size_t i = 0; i < n; i++) {
    if (lead[i]) {
      mul_at.clear();
      last_def.clear();
    }
    Inst& in = k.code[i];
    int kd = kind(in);
    if ((kd & 15) >= 2) {
      for (int side = 1; side <= 2; side++) {
        Opnd& p = in.o[side];
        if (!(p.flags & OF_REG)) continue;
        auto it = mul_at.find(p.vreg);
        if (it == mul_at.end() || uses[p.vreg] != 1 || defs[p.vreg] != 1) continue;
        Inst& mu = k.code[it->second];
        if ((kind(mu) & 16) != (kd & 16)) continue;
        bool ok = true;
        for (int q = 1; q <= 2; q++)
          if (mu.o[q].flags & OF_REG) {
            auto d = last_def.find(mu.o[q].vreg);
            if (d != last_def.end() && d->second >= it->second) ok = false;
          }
        if (!ok) continue;
        Opnd c = in.o[3 - side];
        bool sub = (kd & 15) == 3, np = sub && side == 2, nc = sub && side == 1, z = kd & 16;
        in.o[1] = mu.o[1];
        in.o[2] = mu.o[2];
        in.o[3] = c;
        in.n = 4;
        in.aux = &k;  // marks a contracted operation for the statistics
        in.fn = np   ? (z ? &h_contract<true, false, true> : &h_contract<true, false, false>)
                : nc ? (z ? &h_contract<false, true, true> : &h_contract<false, true, false>)
                     : (z ? &h_contract<false, false, true> : &h_contract<false, false, false>);
        mu.fn = &h_skip;
        mu.flags |= IF_FUSED;
        for (auto& o : mu.o) o = Opnd();
        mu.n = 0;
        break;
      }
    }
    each(in, [&](Opnd& o) {
      if (o.flags & OF_DEF) {
        last_def[o.vreg] = (u32)i;
        mul_at.erase(o.vreg);
      }
    });
    if ((kind(in) & 15) == 1 && !(in.flags & IF_FUSED) && (in.o[0].flags & OF_REG)) mul_at[in.o[0].vreg] = (u32)i;
  }
}

}  // namespace hemu
