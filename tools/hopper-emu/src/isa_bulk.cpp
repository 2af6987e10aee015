// Bulk asynchronous copies without a tensor map, their groups, tensormap.replace, st.async; the decoder of all of TMA.
#include "bulk.h"

namespace hemu {

namespace {

// ---- plain bulk copies. s[0] kind 0 global->shared 1 shared->global 2 shared::cta->shared::cluster 3 global prefetch; s[1] reduce op, s[4] dtype
// o[0] dst o[1] src o[2] size o[3] mbar o[4] mask; s[2] dst off, imm src off, s[3] mbar off, s[5] multicast
void h_bulk(Warp& w, const Inst& in, u32 m) {
  for_lanes(m, [&](int l) {
    u32 n = (u32)lane_u64(w, in.o[2], l);
    if (n & 15) w.L->fatal(&w, &in, Cat::Memory, 716, "cp.async.bulk size %u is not a multiple of 16", n);
    u64 d = lane_u64(w, in.o[0], l) + (u64)(s64)(s32)in.s[2], s = lane_u64(w, in.o[1], l) + (u64)in.imm;
    if ((d & 15) || (s & 15))
      w.L->fatal(&w, &in, Cat::Memory, 716, "cp.async.bulk addresses must be 16-byte aligned (dst 0x%llx src 0x%llx)",
                 (unsigned long long)d, (unsigned long long)s);
    Warp* pw = &w;
    const Inst* pi = &in;
    Cluster* cl = w.cta->cl;
    if (in.s[0] == 0) {
      u32 off, moff;
      Cta* dc = cta_of_shared(w, in, (u32)d, off, "bulk copy destination");
      Cta* mc = cta_of_shared(w, in, (u32)lane_u64(w, in.o[3], l) + in.s[3], moff, "bulk copy mbarrier");
      u32 mask = in.s[5] ? (u32)lane_u64(w, in.o[4], l) & 0xffff : 1u << dc->rank;
      for (u32 r = 0; r < 16; r++)
        if ((mask >> r) & 1) {
          if (r >= cl->ctas.size())
            w.L->fatal(&w, &in, Cat::Memory, 700, "bulk multicast mask 0x%x exceeds the cluster", mask);
          smem_range(w, in, cl->ctas[r].get(), off, n, "bulk copy");
          mbar_get(w.L, &w, &in, in.s[5] ? cl->ctas[r].get() : mc, moff);
        }
      check_global_range(w, in, s, s + n, false, "bulk copy source");
      if (w.L->stats_on) w.L->st.tma_load += n;
      for (u32 r = 0; r < 16; r++)
        if ((mask >> r) & 1) begin_load(w, in, cl->ctas[r].get(), off, n, "bulk copy");
      bool mcst = in.s[5];
      w.L->schedule_async(cl, [=]() {
        for (u32 r = 0; r < 16; r++)
          if ((mask >> r) & 1) {
            Cta* t = cl->ctas[r].get();
            memcpy(t->smem.data() + off, (void*)s, n);
            end_load(t, off, n);
            mbar_complete_tx(pw->L, pw, pi, mcst ? t : mc, moff, n);
          }
      });
    } else if (in.s[0] == 2) {
      u32 off, soff, moff;
      Cta* dc = cta_of_shared(w, in, (u32)d, off, "bulk copy destination");
      Cta* sc = cta_of_shared(w, in, (u32)s, soff, "bulk copy source");
      Cta* mc = cta_of_shared(w, in, (u32)lane_u64(w, in.o[3], l) + in.s[3], moff, "bulk copy mbarrier");
      smem_range(w, in, dc, off, n, "bulk copy");
      smem_range(w, in, sc, soff, n, "bulk copy");
      mbar_get(w.L, &w, &in, mc, moff);
      shadow_async_read(w.L, &w, &in, sc, soff, n, w.tid0 + (u32)l, w.cta, "bulk copy source");
      u32 rop = in.s[1], dt = in.s[4];
      if (!rop) begin_load(w, in, dc, off, n, "bulk copy");
      w.L->schedule_async(cl, [=]() {
        if (!rop) end_load(dc, off, n);
        if (rop)
          reduce_bytes(dc->smem.data() + off, sc->smem.data() + soff, n, rop, dt);
        else
          memcpy(dc->smem.data() + off, sc->smem.data() + soff, n);
        shadow_async_write(dc, off, n);
        mbar_complete_tx(pw->L, pw, pi, mc, moff, n);
      });
    } else if (in.s[0] == 1) {
      u32 soff;
      Cta* sc = cta_of_shared(w, in, (u32)s, soff, "bulk copy source");
      smem_range(w, in, sc, soff, n, "bulk copy");
      check_global_range(w, in, d, d + n, true, "bulk copy destination");
      shadow_async_read(w.L, &w, &in, sc, soff, n, w.tid0 + (u32)l, w.cta, "bulk store");
      if (w.L->stats_on) w.L->st.tma_store += n;
      u32 rop = in.s[1], dt = in.s[4];
      auto st = std::make_shared<BulkStore>();
      begin_store(sc, soff, n);
      st->read = [=](BulkStore& b) {
        end_store(sc, soff, n);
        b.data.assign(sc->smem.data() + soff, sc->smem.data() + soff + n);
        pw->L->activity++;
      };
      st->write = [=](BulkStore& b) {
        if (rop)
          reduce_bytes((u8*)d, b.data.data(), n, rop, dt);
        else
          memcpy((void*)d, b.data.data(), n);
        pw->L->activity++;
      };
      queue_store(w, l, st);
    }
  });
}
void h_bulk_commit(Warp& w, const Inst&, u32 m) {
  for_lanes(m, [&](int l) {
    auto it = w.bulk.find(l);
    if (it == w.bulk.end()) return;
    it->second.groups.push_back(std::move(it->second.open));
    it->second.open.clear();
  });
}
void h_bulk_wait(Warp& w, const Inst& in, u32 m) {
  for_lanes(m, [&](int l) { bulk_wait(w, l, in.s[0], in.s[1]); });
}
void h_nop(Warp&, const Inst&, u32) {}

// tensormap.replace.tile.field: s[0] field, s[1] ordinal; o[0] addr, o[1] value
enum { TF_ADDR, TF_RANK, TF_BOX, TF_DIM, TF_STRIDE, TF_ESTR, TF_DTYPE, TF_ILV, TF_SWZ, TF_FILL };
void h_tm_replace(Warp& w, const Inst& in, u32 m) {
  for_lanes(m, [&](int l) {
    u64 a = lane_u64(w, in.o[0], l) + (u64)in.imm;
    u8* p;
    if (in.s[2] || (a >> 56) == 1) {
      SharedRef r = shared_ref(w, in, (u32)a, 128, (u32)l, true);
      p = r.cta->smem.data() + r.off;
    } else
      p = global_ptr(w, in, a, 128, (u32)l, true);
    TmaDesc d;
    memcpy(&d, p, sizeof d);
    if (d.magic != TmaDesc::kMagic) w.L->fatal(&w, &in, Cat::Memory, 700, "tensormap.replace on an invalid tensor map");
    u64 v = lane_u64(w, in.o[1], l);
    switch (in.s[0]) {
      case TF_ADDR:
        d.addr = v;
        break;
      case TF_RANK:
        d.rank = (u8)(v + 1);
        break;
      case TF_BOX:
        d.box[in.s[1]] = (u16)v;
        break;
      case TF_DIM:
        d.dim_m1[in.s[1]] = (u32)v - 1;
        break;
      case TF_STRIDE:
        d.stride[in.s[1]] = v;
        break;
      case TF_ESTR:
        d.estr[in.s[1]] = (u8)v;
        break;
      case TF_DTYPE:
        d.dtype = (u8)v;
        break;
      case TF_SWZ:
        d.swizzle = (u8)v;
        break;
      case TF_FILL:
        d.oob = (u8)v;
        break;
    }
    memcpy(p, &d, sizeof d);
  });
}
// tensormap.cp_fenceproxy: copy 128 bytes shared -> global
void h_tm_cp(Warp& w, const Inst& in, u32 m) {
  if (w.active == w.live || true) {
    int l = ffs32(m);
    u64 d = lane_u64(w, in.o[0], l) + in.s[2], s = lane_u64(w, in.o[1], l) + (u64)in.imm;
    SharedRef r = shared_ref(w, in, (u32)s, 128, (u32)l, false);
    memcpy(global_ptr(w, in, d, 128, (u32)l, true), r.cta->smem.data() + r.off, 128);
    w.L->activity++;
  }
}
// st.async / red.async: s[0] bytes per element, s[1] count, s[2] reduce op (+1), s[3] mbar off, s[4] dt; o[0] addr o[2] mbar ; vec values
void h_st_async(Warp& w, const Inst& in, u32 m) {
  for_lanes(m, [&](int l) {
    u32 off, moff, n = in.s[0] * in.s[1];
    Cta* dc = cta_of_shared(w, in, (u32)(lane_u64(w, in.o[0], l) + (u64)in.imm), off, "st.async destination");
    Cta* mc = cta_of_shared(w, in, (u32)lane_u64(w, in.o[2], l) + in.s[3], moff, "st.async mbarrier");
    smem_range(w, in, dc, off, n, "st.async");
    mbar_get(w.L, &w, &in, mc, moff);
    struct Buf {
      u8 b[32];
    } buf;
    for (u32 i = 0; i < in.s[1]; i++) {
      u64 v = lane_u64(w, in.vec[i], l);
      memcpy(buf.b + i * in.s[0], &v, in.s[0]);
    }
    u32 rop = in.s[2], dt = in.s[4];
    Warp* pw = &w;
    const Inst* pi = &in;
    w.L->schedule_async(w.cta->cl, [=]() {
      if (rop)
        reduce_bytes(dc->smem.data() + off, buf.b, n, rop, dt);
      else
        memcpy(dc->smem.data() + off, buf.b, n);
      shadow_async_write(dc, off, n);
      mbar_complete_tx(pw->L, pw, pi, mc, moff, n);
    });
  });
}

}  // namespace

bool decode_tma(Builder& b, const PtxInst& p, Inst& in) {
  const std::string& op = p.mods[0];
  in.pipe = Pipe::Tma;
  if (op == "cp" && (p.has("bulk"))) {
    if (p.has("commit_group")) {
      in.fn = &h_bulk_commit;
      return true;
    }
    if (p.has("wait_group")) {
      in.s[0] = (u32)p.ops[0].imm;
      in.s[1] = p.has("read");
      in.fn = &h_bulk_wait;
      return true;
    }
    bool reduce = p.has("reduce");
    if (p.has("prefetch")) {
      in.fn = &h_nop;
      return true;
    }
    if (p.has("tensor")) return decode_tensor_copy(b, p, in, reduce);
    // non-tensor: find dst/src spaces
    std::vector<std::string> sp;
    for (auto& s : p.mods)
      if (s == "global" || s == "shared::cluster" || s == "shared::cta" || s == "shared") sp.push_back(s);
    if (sp.size() < 2) return false;
    in.s[1] = reduce ? red_op(p) : 0;
    in.s[4] = red_type(p);
    b.addr(p, p.ops[0], in, 0);
    in.s[2] = (u32)in.imm;
    if (p.ops.size() > 3 && p.ops[3].kind == OpK::ADDR) {
      b.addr(p, p.ops[3], in, 3);
      in.s[3] = (u32)in.imm;
    } else
      in.o[3] = b.konst(32, 0);
    b.addr(p, p.ops[1], in, 1);
    in.o[2] = b.src(p, p.ops[2], 32);
    in.o[4] = b.konst(32, 0);
    if (p.has("multicast::cluster")) {
      in.s[5] = 1;
      in.o[4] = b.src(p, p.ops[4], 16);
    }
    in.n = 5;
    in.s[0] = sp[0] == "global" ? 1 : sp[1] == "global" ? 0 : 2;
    in.fn = &h_bulk;
    return true;
  }
  if (op == "tensormap") {
    if (p.has("cp_fenceproxy")) {
      b.addr(p, p.ops[0], in, 0);
      in.s[2] = (u32)in.imm;
      b.addr(p, p.ops[1], in, 1);
      in.n = 2;
      in.fn = &h_tm_cp;
      return true;
    }
    static const std::map<std::string, u32> t = {{"global_address", TF_ADDR},  {"rank", TF_RANK},
                                                 {"box_dim", TF_BOX},          {"global_dim", TF_DIM},
                                                 {"global_stride", TF_STRIDE}, {"element_stride", TF_ESTR},
                                                 {"elemtype", TF_DTYPE},       {"interleave_layout", TF_ILV},
                                                 {"swizzle_mode", TF_SWZ},     {"fill_mode", TF_FILL}};
    bool ok = false;
    for (auto& s : p.mods) {
      auto it = t.find(s);
      if (it != t.end()) {
        in.s[0] = it->second;
        ok = true;
      }
      if (s.rfind("shared", 0) == 0) in.s[2] = 1;
    }
    if (!ok) return false;
    b.addr(p, p.ops[0], in, 0);
    size_t k = 1;
    if (p.ops.size() > 2) {
      in.s[1] = (u32)p.ops[1].imm;
      k = 2;
    }
    in.o[1] = b.src(p, p.ops[k], p.mods.back() == "b64" ? 64 : 32);
    in.n = 2;
    in.fn = &h_tm_replace;
    return true;
  }
  if ((op == "st" || op == "red") && p.has("async")) {
    in.s[0] = type_bytes(p.mods.back());
    in.s[1] = p.has("v2") ? 2 : p.has("v4") ? 4 : 1;
    in.s[2] = op == "red" ? red_op(p) : 0;
    in.s[4] = red_type(p);
    b.addr(p, p.ops[2], in, 2);
    in.s[3] = (u32)in.imm;
    b.addr(p, p.ops[0], in, 0);
    in.o[1] = b.konst(32, 0);
    in.vec = b.vec(in.s[1]);
    in.nvec = in.s[1];
    for (u32 i = 0; i < in.s[1]; i++)
      in.vec[i] = b.src(p, p.ops[1].kind == OpK::VEC ? p.ops[1].sub[i] : p.ops[1], (u8)(in.s[0] * 8),
                        p.mods.back() == "f32" ? 'f' : 0);
    in.n = 3;
    in.fn = &h_st_async;
    return true;
  }
  return false;
}

}  // namespace hemu
