// CTA and cluster barriers, mbarrier instructions, setmaxnreg.
#include "isa.h"

namespace hemu {

void cluster_recheck(Cluster& cl) {
  if (cl.live_warps && cl.cl_arrived >= cl.live_warps) {
    cl.cl_arrived = 0;
    cl.cl_phase++;
    cl.events++;
    cl.L->activity++;
    for (auto& c : cl.ctas)
      for (auto& x : c->warps) x->cl_arrived = false;
  }
}

namespace {

void h_warpsync(Warp& w, const Inst& in, u32 m) {
  u32 mm = (u32)lane_u64(w, in.o[0], ffs32(m));
  collective(w, in, mm);
}

// ---- CTA barriers. s[0] 0 sync 1 arrive 2 red ; s[1] aligned ; s[2] has count ; s[3] red op 0 popc 1 and 2 or ; o[0] id, o[1] count, o[2] pred, o[3] dest
void block_on(Warp& w, Block b, u32 info, u64 val) {
  w.blocked = true;
  w.why = b;
  w.why_info = info;
  w.why_val = val;
  w.next_pc = w.pc;
}
void h_bar(Warp& w, const Inst& in, u32 m) {
  Cta& c = *w.cta;
  u32 id = (u32)lane_u64(w, in.o[0], ffs32(m)) & 0xffff;
  if (id > 15) w.L->fatal(&w, &in, Cat::Other, 719, "barrier id %u out of range", id);
  NamedBar& b = c.bars[id];
  if (w.bar_state == 1) {
    if (b.phase == w.bar_phase) {
      block_on(w, Block::Barrier, id, b.expected);
      return;
    }
    w.bar_state = 0;
    if (Options::get().racecheck) race_sync(w, c.bar_vc[id], true, false);
    return;
  }
  if (!collective(w, in, w.live)) return;
  u32 cnt = in.s[2] ? (u32)lane_u64(w, in.o[1], ffs32(m)) : 0;
  if (in.s[2] && (cnt & 31))
    w.L->report(&w, &in, Cat::Other, true, "barrier %u thread count %u is not a multiple of the warp size", id, cnt);
  if (b.arrived && b.expected != cnt)
    w.L->report(&w, &in, Cat::Other, true, "barrier %u used with different thread counts in one phase (%u and %u)", id,
                b.expected, cnt);
  if (!b.arrived) b.expected = cnt;
  b.arrived += in.s[1] || w.active == w.live ? 32 : (u32)__builtin_popcount(m);
  b.warps.push_back(w.id);
  if (Options::get().racecheck) race_sync(w, c.bar_vc[id], false, true);
  w.L->activity++;
  u64 ph = b.phase;
  bar_recheck(c);
  u32 need = cnt ? cnt : c.live_warps * 32;
  if (b.phase == ph && b.arrived > need)
    w.L->report(&w, &in, Cat::Other, true, "barrier %u: %u threads arrived, %u expected", id, b.arrived, need);
  if (in.s[0] == 1) return;
  if (b.phase != ph) {
    if (Options::get().racecheck) race_sync(w, c.bar_vc[id], true, false);
    return;
  }
  w.bar_state = 1;
  w.bar_phase = ph;
  block_on(w, Block::Barrier, id, cnt);
}
struct RedState {
  u64 phase;
  u32 acc_popc, acc_and, acc_or, res_popc, res_and, res_or;
};
static std::map<std::pair<Cta*, u32>, RedState>& red_states() {
  static std::map<std::pair<Cta*, u32>, RedState> s;
  return s;
}
void h_bar_red(Warp& w, const Inst& in, u32 m) {
  Cta& c = *w.cta;
  u32 id = (u32)lane_u64(w, in.o[0], ffs32(m)) & 15;
  NamedBar& b = c.bars[id];
  auto& rs = red_states()[{&c, id}];
  if (w.bar_state == 0) {
    if ((w.active & w.live) == w.live) {
      if (!b.arrived) {
        rs.acc_popc = 0;
        rs.acc_and = 1;
        rs.acc_or = 0;
      }
      u32 p = pred_mask(w, in.o[2]) & m;
      rs.acc_popc += (u32)__builtin_popcount(p);
      rs.acc_and &= p == m;
      rs.acc_or |= p != 0;
    }
  }
  u64 ph = b.phase;
  h_bar(w, in, m);
  if (b.phase != ph) {
    rs.res_popc = rs.acc_popc;
    rs.res_and = rs.acc_and;
    rs.res_or = rs.acc_or;
  }
  if (w.blocked || w.next_pc == w.pc) return;
  if (in.s[3] == 0)
    for_lanes(m, [&](int l) { set_lane_u64(w, in.o[3], l, rs.res_popc); });
  else {
    u32& d = *D<u32>(w, in.o[3]);
    bool v = in.s[3] == 1 ? rs.res_and : rs.res_or;
    d = (d & ~m) | (v ? m : 0);
  }
}

void h_cluster_arrive(Warp& w, const Inst& in, u32) {
  if (!collective(w, in, w.live)) return;
  Cluster& cl = *w.cta->cl;
  if (w.cl_arrived || w.cl_waiting)
    w.L->report(&w, &in, Cat::Other, true, "barrier.cluster.arrive executed twice without barrier.cluster.wait");
  w.cl_arrived = true;
  w.cl_waiting = true;
  w.cl_phase = cl.cl_phase;
  cl.cl_arrived++;
  w.L->activity++;
  if (Options::get().racecheck)
    for (auto& c : cl.ctas) race_sync(w, c->bar_vc[16], false, true);
  cluster_recheck(cl);
}
void h_cluster_wait(Warp& w, const Inst& in, u32) {
  if (!collective(w, in, w.live)) return;
  Cluster& cl = *w.cta->cl;
  if (!w.cl_waiting) {
    w.L->report(&w, &in, Cat::Other, true, "barrier.cluster.wait without a preceding arrive");
    return;
  }
  if (cl.cl_phase == w.cl_phase) {
    block_on(w, Block::Cluster, 0, 0);
    return;
  }
  w.cl_waiting = false;
  if (Options::get().racecheck) race_sync(w, w.cta->bar_vc[16], true, false);
}

// ---- mbarrier
u32 mb_addr(Warp& w, const Opnd& o, u64 imm, int l, u32 generic) {
  u64 a = lane_u64(w, o, l) + imm;
  (void)generic;
  return (u32)a;
}
void h_mb_init(Warp& w, const Inst& in, u32 m) {
  for_lanes(m, [&](int l) {
    SharedRef r = shared_ref(w, in, mb_addr(w, in.o[0], (u64)in.imm, l, 0), 8, (u32)l, true);
    u32 cnt = (u32)lane_u64(w, in.o[1], l);
    if (cnt == 0 || cnt > 0xfffff) w.L->report(&w, &in, Cat::Mbarrier, true, "mbarrier.init with count %u", cnt);
    MBar& b = r.cta->mbars[r.off];
    if (b.valid && (b.pending != b.expected || b.tx != 0))
      w.L->report(&w, &in, Cat::Mbarrier, false, "mbarrier at shared offset %u re-initialised in the middle of a phase",
                  r.off);
    b = MBar();
    b.off = r.off;
    b.valid = true;
    b.expected = b.pending = cnt;
    b.init_by = w.tid0 + (u32)l;
    memset(r.cta->smem.data() + r.off, 0xAB, 8);
    if (!r.cta->shadow.empty())
      for (u32 k = 0; k < 2; k++) {
        auto& s = r.cta->shadow[r.off / 4 + k];
        s.state = 2;
        s.bar |= SC_MBAR;
      }
    w.L->activity++;
    r.cta->cl->events++;
  });
}
void h_mb_inval(Warp& w, const Inst& in, u32 m) {
  for_lanes(m, [&](int l) {
    SharedRef r = shared_ref(w, in, mb_addr(w, in.o[0], (u64)in.imm, l, 0), 8, (u32)l, true);
    MBar& b = mbar_get(w.L, &w, &in, r.cta, r.off);
    b.valid = false;
    if (!r.cta->shadow.empty())
      for (u32 k = 0; k < 2; k++) r.cta->shadow[r.off / 4 + k].bar &= (uint8_t)~SC_MBAR;
  });
}
// s[0]: 0 arrive 1 arrive.expect_tx 2 expect_tx 3 complete_tx 4 arrive_drop 5 arrive_drop.expect_tx; o[0] addr, o[1] dst(sink), o[2] count/tx, s[1] has operand
void h_mb_arrive(Warp& w, const Inst& in, u32 m) {
  for_lanes(m, [&](int l) {
    SharedRef r = shared_ref(w, in, mb_addr(w, in.o[0], (u64)in.imm, l, 0), 8, (u32)l, true);
    u64 v = in.s[1] ? lane_u64(w, in.o[2], l) & 0xffffffff : 1;
    u64 st = 0;
    if (Options::get().racecheck && in.s[0] != 3) race_sync(w, r.cta->mbar_vc[r.off], false, true);
    switch (in.s[0]) {
      case 0:
        st = mbar_arrive(w.L, &w, &in, r.cta, r.off, (u32)v, 0);
        break;
      case 1:
        st = mbar_arrive(w.L, &w, &in, r.cta, r.off, 1, (int64_t)v);
        break;
      case 2: {
        MBar& b = mbar_get(w.L, &w, &in, r.cta, r.off);
        b.tx += (int64_t)v;
        w.L->activity++;
        break;
      }
      case 3:
        mbar_complete_tx(w.L, &w, &in, r.cta, r.off, (int64_t)v);
        break;
      case 4:
      case 5: {
        MBar& b = mbar_get(w.L, &w, &in, r.cta, r.off);
        u32 c = in.s[0] == 4 ? (u32)v : 1;
        b.expected -= c;
        st = mbar_arrive(w.L, &w, &in, r.cta, r.off, c, in.s[0] == 5 ? (int64_t)v : 0);
        break;
      }
    }
    if (!(in.o[1].flags & OF_SINK)) set_lane_u64(w, in.o[1], l, st);
  });
}
// s[0] 0 test 1 try ; s[1] parity form ; o[0] pred dst ; o[1] addr ; o[2] state/parity
void h_mb_wait(Warp& w, const Inst& in, u32 m) {
  u32 res = 0, off = 0;
  u64 val = 0;
  bool pend = false;
  Cta* bc = nullptr;
  for_lanes(m, [&](int l) {
    SharedRef r = shared_ref(w, in, mb_addr(w, in.o[1], (u64)in.imm, l, 0), 8, (u32)l, false);
    if (r.cta != w.cta)
      w.L->report(&w, &in, Cat::Mbarrier, true, "mbarrier wait on a remote CTA's barrier is not allowed");
    MBar& b = mbar_get(w.L, &w, &in, r.cta, r.off);
    u64 v = lane_u64(w, in.o[2], l);
    bool done = in.s[1] ? ((b.phase & 1) != (v & 1)) : (b.phase != v);
    res |= (u32)done << l;
    if (!done && !pend) {
      pend = true;
      off = r.off;
      val = v;
    }
    bc = r.cta;
  });
  if (pend && in.s[0] == 1 && !w.force_timeout) {
    block_on(w, Block::MbarWait, off, val);
    return;
  }
  if (pend) {
    w.stop = true;
    w.polled = true;
    w.force_timeout = false;
    w.why = Block::Poll;
    w.why_info = off;
    w.why_val = val;
  }
  if (res && Options::get().racecheck)
    race_sync(w, bc->mbar_vc[(u32)((u32)lane_u64(w, in.o[1], ffs32(res)) + (u64)in.imm) & 0xffffff], true, false);
  u32& d = *D<u32>(w, in.o[0]);
  d = (d & ~m) | (res & m);
}
void h_mb_pending(Warp& w, const Inst& in, u32 m) {
  for_lanes(m, [&](int l) { set_lane_u64(w, in.o[0], l, lane_u64(w, in.o[1], l) & 0xfffff); });
}

// ---- setmaxnreg
void h_setmaxnreg(Warp& w, const Inst& in, u32 m) {
  (void)m;
  if (!collective(w, in, w.live)) return;
  u32 n = in.s[0];
  bool inc = in.s[1];
  u32 cur = w.setmaxnreg;
  if (n < 24 || n > 256 || (n & 7))
    w.L->fatal(&w, &in, Cat::Other, 715, "setmaxnreg count %u must be a multiple of 8 in [24,256]", n);
  Cta& c = *w.cta;
  if (inc) {
    if (n < cur) {
      w.L->report(&w, &in, Cat::Other, true, "setmaxnreg.inc to %u below the current %u", n, cur);
    }
    int need = (int)(n - cur) * 32;
    if (need > c.reg_budget) {
      block_on(w, Block::Sleep, n, 0);
      return;
    }
    c.reg_budget -= need;
  } else {
    if (n > cur) {
      w.L->report(&w, &in, Cat::Other, true, "setmaxnreg.dec to %u above the current %u", n, cur);
    }
    c.reg_budget += (int)(cur - n) * 32;
    c.cl->events++;
  }
  w.setmaxnreg = n;
  w.L->activity++;
}

}  // namespace

void bar_recheck(Cta& c) {
  for (auto& b : c.bars) {
    if (!b.arrived) continue;
    u32 need = b.expected ? b.expected : c.live_warps * 32;
    if (b.arrived == need || (!b.expected && b.arrived >= need)) {
      b.arrived = 0;
      b.phase++;
      b.warps.clear();
      c.cl->events++;
      c.L->activity++;
    }
  }
}

bool decode_barrier(Builder& b, const PtxInst& p, Inst& in) {
  const std::string& op = p.mods[0];
  auto set = [&](Handler h, Pipe pi) {
    in.fn = h;
    in.pipe = pi;
    return true;
  };
  if (op == "bar" || op == "barrier") {
    if (p.has("warp")) {
      in.o[0] = b.src(p, p.ops[0], 32);
      in.n = 1;
      return set(&h_warpsync, Pipe::Barrier);
    }
    if (p.has("cluster")) return set(p.has("arrive") ? &h_cluster_arrive : &h_cluster_wait, Pipe::Barrier);
    in.s[1] = op == "bar" || p.has("aligned");
    if (p.has("red")) {
      in.s[0] = 2;
      in.s[3] = p.has("popc") ? 0 : p.has("and") ? 1 : 2;
      in.o[3] = b.dst(p, p.ops[0]);
      in.o[0] = b.src(p, p.ops[1], 32);
      size_t k = 2;
      if (p.ops.size() > 3) {
        in.s[2] = 1;
        in.o[1] = b.src(p, p.ops[2], 32);
        k = 3;
      } else
        in.o[1] = b.konst(32, 0);
      in.o[2] = b.src(p, p.ops[k], 1);
      in.n = 4;
      return set(&h_bar_red, Pipe::Barrier);
    }
    in.s[0] = p.has("arrive") ? 1 : 0;
    in.o[0] = b.src(p, p.ops[0], 32);
    in.n = 1;
    if (p.ops.size() > 1) {
      in.s[2] = 1;
      in.o[1] = b.src(p, p.ops[1], 32);
      in.n = 2;
    }
    return set(&h_bar, Pipe::Barrier);
  }
  if (op == "mbarrier") {
    in.pipe = Pipe::Barrier;
    if (p.has("init")) {
      b.addr(p, p.ops[0], in, 0);
      in.o[1] = b.src(p, p.ops[1], 32);
      in.n = 2;
      in.fn = &h_mb_init;
      return true;
    }
    if (p.has("inval")) {
      b.addr(p, p.ops[0], in, 0);
      in.n = 1;
      in.fn = &h_mb_inval;
      return true;
    }
    if (p.has("test_wait") || p.has("try_wait")) {
      in.s[0] = p.has("try_wait");
      in.s[1] = p.has("parity");
      b.addr(p, p.ops[1], in, 1);
      in.o[0] = b.dst(p, p.ops[0]);
      in.o[2] = b.src(p, p.ops[2], in.s[1] ? 32 : 64);
      in.n = 3;
      in.fn = &h_mb_wait;
      return true;
    }
    if (p.has("pending_count")) {
      in.o[0] = b.dst(p, p.ops[0]);
      in.o[1] = b.src(p, p.ops[1], 64);
      in.n = 2;
      in.fn = &h_mb_pending;
      return true;
    }
    bool ex = p.has("expect_tx"), drop = p.has("arrive_drop"), arr = p.has("arrive");
    if (p.has("complete_tx"))
      in.s[0] = 3;
    else if (drop)
      in.s[0] = ex ? 5 : 4;
    else if (arr)
      in.s[0] = ex ? 1 : 0;
    else if (ex)
      in.s[0] = 2;
    else
      return false;
    size_t k = 0;
    in.o[1].flags = OF_SINK;
    if (p.ops[0].kind != OpK::ADDR) {
      if (p.ops[0].kind == OpK::REG) in.o[1] = b.dst(p, p.ops[0]);
      k = 1;
    }
    b.addr(p, p.ops[k], in, 0);
    in.n = 3;
    if (p.ops.size() > k + 1) {
      in.s[1] = 1;
      in.o[2] = b.src(p, p.ops[k + 1], 32);
    } else
      in.o[2] = b.konst(32, 1);
    in.fn = &h_mb_arrive;
    return true;
  }
  if (op == "setmaxnreg") {
    in.s[0] = (u32)p.ops[0].imm;
    in.s[1] = p.has("inc");
    return set(&h_setmaxnreg, Pipe::Control);
  }
  return false;
}

}  // namespace hemu
