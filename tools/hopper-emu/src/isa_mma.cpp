// mma.sync and movmatrix.
#include "tensor_numerics.h"

namespace hemu {

namespace {

// ---- mma.sync. s[0]=M s[1]=N s[2]=K s[3]=dtype s[4]=atype s[5]=btype s[6]: nA | nB<<8 | nC<<16, s[7] flags 1 sat ; vec: D, A, B, C
void h_mma(Warp& w, const Inst& in, u32 m) {
  if (!need_full(w, in, m)) return;
  const u32 K = in.s[2], dt = in.s[3] & 0xff, ct = in.s[3] >> 8, at = in.s[4], bt = in.s[5];
  const u32 nA = in.s[6] & 255, nB = (in.s[6] >> 8) & 255, nD = in.nvec2, nC = (in.s[6] >> 16) & 255;
  float A[16][64], B[64][8];
  u32 es = esize(at), epr = 4 / es;
  const Opnd *vd = in.vec, *va = vd + nD, *vb = va + nA, *vc = vb + nB;
  for (int l = 0; l < 32; l++) {
    u32 g = (u32)l / 4, t = (u32)l % 4;
    for (u32 i = 0; i < nA; i++) {
      u32 v = S<u32>(w, va[i])[l];
      u32 row = g + 8 * (i & 1), k0 = t * epr + 4 * epr * (i >> 1);
      for (u32 e = 0; e < epr; e++)
        A[row][k0 + e] = to_f(at, es == 4 ? v : (v >> (8 * es * e)) & (es == 2 ? 0xffff : 0xff));
    }
    for (u32 i = 0; i < nB; i++) {
      u32 v = S<u32>(w, vb[i])[l];
      u32 k0 = t * epr + 4 * epr * i;
      for (u32 e = 0; e < epr; e++)
        B[k0 + e][g] = to_f(bt, es == 4 ? v : (v >> (8 * es * e)) & (es == 2 ? 0xffff : 0xff));
    }
  }
  if (w.L->stats_on) w.L->st.wgmma_macs["mma.sync"] += 16ull * 8 * K;
  u32 out[4][32];
  for (int l = 0; l < 32; l++)
    for (u32 i = 0; i < 4; i++) {
      u32 row = (u32)l / 4 + 8 * (i >> 1), col = 2 * ((u32)l % 4) + (i & 1);
      if (dt == M_S32) {
        int64_t s = (s32)S<u32>(w, vc[i])[l];
        for (u32 k = 0; k < K; k++) s += (int64_t)A[row][k] * (int64_t)B[k][col];
        if (in.s[7] & 1) s = std::min<int64_t>(std::max<int64_t>(s, INT32_MIN), INT32_MAX);
        out[i][l] = (u32)s;
      } else {
        float c =
            ct == M_F16 ? half_to_float((u16)(S<u32>(w, vc[i >> 1])[l] >> (16 * (i & 1)))) : u2f(S<u32>(w, vc[i])[l]);
        for (u32 k = 0; k < K; k++) c = __builtin_fmaf(A[row][k], B[k][col], c);
        out[i][l] = dt == M_F16 ? float_to_half(c) : f2u(c);
      }
    }
  (void)nC;
  if (dt == M_F16)
    for (u32 i = 0; i < 2; i++) {
      u32* d = D<u32>(w, vd[i]);
      for (int l = 0; l < 32; l++) d[l] = (out[2 * i][l] & 0xffff) | (out[2 * i + 1][l] << 16);
    }
  else
    for (u32 i = 0; i < 4; i++) memcpy(D<u32>(w, vd[i]), out[i], 128);
}
void h_movmatrix(Warp& w, const Inst& in, u32 m) {
  if (!need_full(w, in, m)) return;
  u32 s[32], d[32];
  memcpy(s, S<u32>(w, in.o[1]), 128);
  auto el = [&](int r, int c) { return (u32)(u16)(s[r * 4 + c / 2] >> (16 * (c & 1))); };
  for (int l = 0; l < 32; l++) {
    int r = l / 4, c = (l % 4) * 2;
    d[l] = el(c, r) | (el(c + 1, r) << 16);
  }
  memcpy(D<u32>(w, in.o[0]), d, 128);
}

}  // namespace

bool decode_mma(Builder& b, const PtxInst& p, Inst& in) {
  const std::string& op = p.mods[0];
  if (op == "mma") {
    if (p.has("sp") || p.has("block_scale")) return false;
    std::string shape;
    size_t si = 0;
    for (size_t i = 0; i < p.mods.size(); i++)
      if (p.mods[i].size() > 3 && p.mods[i][0] == 'm' && isdigit(p.mods[i][1])) {
        shape = p.mods[i];
        si = i;
      }
    u32 M, N, K;
    if (sscanf(shape.c_str(), "m%un%uk%u", &M, &N, &K) != 3 || M != 16 || N != 8) return false;
    std::vector<std::string> tys;
    for (size_t i = si + 1; i < p.mods.size(); i++)
      if (mty(p.mods[i]) != M_B1) tys.push_back(p.mods[i]);
    if (tys.size() != 4) return false;
    in.s[0] = M;
    in.s[1] = N;
    in.s[2] = K;
    in.s[4] = mty(tys[1]);
    in.s[5] = mty(tys[2]);
    in.s[3] = mty(tys[0]) | (mty(tys[3]) << 8);
    if (mty(tys[0]) == M_F64) return false;
    in.s[7] = p.has("satfinite");
    u32 nd = (u32)p.ops[0].sub.size(), na = p.ops[1].kind == OpK::VEC ? (u32)p.ops[1].sub.size() : 1,
        nb = p.ops[2].kind == OpK::VEC ? (u32)p.ops[2].sub.size() : 1, nc = (u32)p.ops[3].sub.size();
    in.s[6] = na | (nb << 8) | (nc << 16);
    in.vec = b.vec(nd + na + nb + nc);
    in.nvec = nd + na + nb + nc;
    in.nvec2 = nd;
    u32 q = 0;
    auto add = [&](const PtxOperand& o, bool d, char fp) {
      if (o.kind == OpK::VEC) {
        for (auto& s : o.sub) in.vec[q++] = d ? b.dst(p, s) : b.src(p, s, 32, fp);
      } else
        in.vec[q++] = d ? b.dst(p, o) : b.src(p, o, 32, fp);
    };
    add(p.ops[0], true, 0);
    add(p.ops[1], false, 0);
    add(p.ops[2], false, 0);
    add(p.ops[3], false, 'f');
    in.fn = &h_mma;
    in.pipe = Pipe::Tensor;
    return true;
  }
  if (op == "movmatrix") {
    in.o[0] = b.dst(p, p.ops[0]);
    in.o[1] = b.src(p, p.ops[1], 32);
    in.n = 2;
    in.fn = &h_movmatrix;
    in.pipe = Pipe::LsuShared;
    return true;
  }
  return false;
}

}  // namespace hemu
