// What decoders of instructions build operands with: registers, constants, special registers, addresses.
#include <algorithm>
#include <queue>
#include <set>

#include "isa.h"

namespace hemu {

void Builder::fail(const PtxInst& p, const std::string& why) {
  throw PtxError("cannot decode '" + p.op + "' at PTX line " + std::to_string(p.line) +
                 (p.src_line ? " (" + (m->files.count(p.file) ? m->files[p.file] : std::string("?")) + ":" +
                                   std::to_string(p.src_line) + ")"
                             : "") +
                 ": " + why + "\n    " + m->source_line(p.line));
}
uint32_t Builder::new_vreg(uint8_t bits) {
  vbits.push_back(bits);
  return (uint32_t)vbits.size() - 1;
}
Opnd* Builder::vec(size_t n) {
  k->vecs.emplace_back(n);
  return k->vecs.back().data();
}

Opnd Builder::konst(uint8_t bits, uint64_t v) {
  Opnd o;
  o.bank = 1;
  o.bits = bits;
  if (bits < 64 && bits > 1) v &= (1ull << bits) - 1;
  auto key = std::make_pair((int)bits, std::to_string(v));
  auto it = const_cache.find(key);
  if (it != const_cache.end()) {
    o.off = it->second;
    return o;
  }
  size_t w = bits == 1 ? 4 : bits <= 16 ? 64 : bits == 32 ? 128 : bits == 64 ? 256 : 512;
  size_t off = (k->consts.size() + 63) & ~(size_t)63;
  k->consts.resize(off + w);
  uint8_t* p = k->consts.data() + off;
  if (bits == 1) {
    uint32_t m = v ? ~0u : 0;
    memcpy(p, &m, 4);
  } else
    for (int i = 0; i < 32; i++) {
      if (bits <= 16)
        ((uint16_t*)p)[i] = (uint16_t)v;
      else if (bits == 32)
        ((uint32_t*)p)[i] = (uint32_t)v;
      else if (bits == 64)
        ((uint64_t*)p)[i] = v;
      else {
        ((uint64_t*)p)[2 * i] = v;
        ((uint64_t*)p)[2 * i + 1] = 0;
      }
    }
  const_cache[key] = (uint32_t)off;
  o.off = (uint32_t)off;
  return o;
}
Opnd Builder::regop(int reg, uint8_t flags, bool neg) {
  Opnd o;
  o.vreg = frame_base + (uint32_t)reg;
  o.bits = f->regs[(size_t)reg].bits;
  if (o.bits == 8) o.bits = 16;
  o.flags = (uint8_t)(OF_REG | flags | (neg ? OF_NEG : 0));
  return o;
}
Opnd Builder::special(const PtxInst& p, const std::string& n) {
  static const std::map<std::string, int> t = {{"%tid.x", SR_TIDX},
                                               {"%tid.y", SR_TIDY},
                                               {"%tid.z", SR_TIDZ},
                                               {"%ntid.x", SR_NTIDX},
                                               {"%ntid.y", SR_NTIDY},
                                               {"%ntid.z", SR_NTIDZ},
                                               {"%ctaid.x", SR_CTAX},
                                               {"%ctaid.y", SR_CTAY},
                                               {"%ctaid.z", SR_CTAZ},
                                               {"%nctaid.x", SR_NCTAX},
                                               {"%nctaid.y", SR_NCTAY},
                                               {"%nctaid.z", SR_NCTAZ},
                                               {"%laneid", SR_LANE},
                                               {"%warpid", SR_WARP},
                                               {"%nwarpid", SR_NWARP},
                                               {"%smid", SR_SM},
                                               {"%nsmid", SR_NSM},
                                               {"%clusterid.x", SR_CLX},
                                               {"%clusterid.y", SR_CLY},
                                               {"%clusterid.z", SR_CLZ},
                                               {"%nclusterid.x", SR_NCLX},
                                               {"%nclusterid.y", SR_NCLY},
                                               {"%nclusterid.z", SR_NCLZ},
                                               {"%cluster_ctaid.x", SR_CCX},
                                               {"%cluster_ctaid.y", SR_CCY},
                                               {"%cluster_ctaid.z", SR_CCZ},
                                               {"%cluster_nctaid.x", SR_CNX},
                                               {"%cluster_nctaid.y", SR_CNY},
                                               {"%cluster_nctaid.z", SR_CNZ},
                                               {"%cluster_ctarank", SR_CRANK},
                                               {"%cluster_nctarank", SR_CNRANK},
                                               {"%lanemask_eq", SR_LEQ},
                                               {"%lanemask_le", SR_LLE},
                                               {"%lanemask_lt", SR_LLT},
                                               {"%lanemask_ge", SR_LGE},
                                               {"%lanemask_gt", SR_LGT},
                                               {"%dynamic_smem_size", SR_DYNSMEM},
                                               {"%total_smem_size", SR_TOTSMEM},
                                               {"%gridid", SR_GRIDID},
                                               {"%is_explicit_cluster", SR_EXPLICIT_CLUSTER},
                                               {"%reserved_smem_offset_begin", SR_ZERO},
                                               {"%reserved_smem_offset_0", SR_ZERO},
                                               {"%reserved_smem_offset_1", SR_ZERO},
                                               {"%reserved_smem_offset_cap", SR_RSMEM_BEGIN},
                                               {"%envreg0", SR_ZERO},
                                               {"%envreg1", SR_ENV1},
                                               {"%envreg2", SR_ENV2},
                                               {"%reserved_smem_offset_end", SR_RSMEM_BEGIN}};
  auto it = t.find(n);
  if (it == t.end()) fail(p, "unknown special register or symbol " + n);
  auto s = special_vreg.find(it->second);
  uint8_t bits = it->second == SR_GRIDID ? 64 : it->second == SR_EXPLICIT_CLUSTER ? 1 : 32;
  if (s == special_vreg.end()) s = special_vreg.emplace(it->second, new_vreg(bits)).first;
  Opnd o;
  o.vreg = s->second;
  o.bits = bits;
  o.flags = OF_REG | OF_USE | OF_PIN;
  return o;
}
bool Builder::symbol_value(const std::string& n, uint64_t& v) {
  auto l = local_off.find(n);
  if (l != local_off.end()) {
    v = l->second;
    return true;
  }
  auto s = shared_off->find(f->name + "::" + n);
  if (s == shared_off->end()) s = shared_off->find(n);
  if (s != shared_off->end()) {
    v = s->second;
    return true;
  }
  if (in_entry)
    for (size_t i = 0; i < k->params.size(); i++)
      if (k->params[i].name == n) {
        v = symbol_addr("@param") + k->param_off[i];
        return true;
      }
  uint64_t a = symbol_addr(n);
  if (a) {
    v = a;
    return true;
  }
  return false;
}
Opnd Builder::src(const PtxInst& p, const PtxOperand& o, uint8_t bits, char fp) {
  switch (o.kind) {
    case OpK::REG:
      return regop(o.reg, OF_USE, o.neg);
    case OpK::IMM:
      if (fp == 'f' && bits == 32) {
        float f = (float)o.imm;
        return konst(32, f2u(f));
      }
      if (fp == 'd') {
        double d = (double)o.imm;
        uint64_t u;
        memcpy(&u, &d, 8);
        return konst(64, u);
      }
      return konst(bits, (uint64_t)o.imm);
    case OpK::FIMM: {
      if (bits == 64) {
        double d = o.f;
        uint64_t u;
        memcpy(&u, &d, 8);
        if (o.fbits == 64) u = (uint64_t)o.imm;
        return konst(64, u);
      }
      if (bits == 32) {
        if (o.fbits == 32) return konst(32, (uint64_t)o.imm);
        return konst(32, f2u((float)o.f));
      }
      if (bits == 16) return konst(16, fp == 'b' ? float_to_bf16((float)o.f) : float_to_half((float)o.f));
      fail(p, "bad floating-point immediate");
    }
    case OpK::SYM: {
      if (o.name == "WARP_SZ") return konst(bits, 32);
      if (o.name == "%pt" || o.name == "true") return konst(1, 1);
      uint64_t v;
      if (o.name[0] == '%') return special(p, o.name);
      if (symbol_value(o.name, v)) return konst(bits, v + (uint64_t)o.imm);
      fail(p, "unknown symbol " + o.name);
    }
    case OpK::SINK:
      return konst(bits, 0);
    default:
      fail(p, "unexpected operand kind");
  }
}
Opnd Builder::dst(const PtxInst& p, const PtxOperand& o) {
  if (o.kind == OpK::REG) return regop(o.reg, OF_DEF);
  if (o.kind == OpK::SINK) {
    auto s = special_vreg.find(-1);
    if (s == special_vreg.end()) s = special_vreg.emplace(-1, new_vreg(64)).first;
    Opnd r;
    r.vreg = s->second;
    r.bits = 64;
    r.flags = OF_REG | OF_DEF | OF_SINK;
    return r;
  }
  fail(p, "destination is not a register");
}
void Builder::addr(const PtxInst& p, const PtxOperand& a, Inst& in, int slot) {
  if (a.kind != OpK::ADDR) fail(p, "expected an address operand");
  in.imm = a.imm;
  if (a.reg >= 0) {
    in.o[slot] = regop(a.reg, OF_USE);
    return;
  }
  if (a.name.empty()) {
    in.o[slot] = konst(64, (uint64_t)a.imm);
    in.imm = 0;
    return;
  }
  if (a.name[0] == '%') {
    in.o[slot] = special(p, a.name);
    return;
  }
  uint64_t v;
  if (!symbol_value(a.name, v)) fail(p, "unknown symbol " + a.name);
  in.o[slot] = konst(64, v + (uint64_t)a.imm);
  in.imm = 0;
}

}  // namespace hemu
