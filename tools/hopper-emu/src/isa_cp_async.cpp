// cp.async, the copies that are not bulk.
#include "isa_mem.h"

namespace hemu {

namespace {

// ---- cp.async (non bulk). o[0] dst addr(shared) o[1] src addr; o[2] src-size or pred; s[0] size s[1] mode 0 plain 1 src-size 2 ignore-src
void h_cp_async(Warp& w, const Inst& in, u32 m) {
  u32 size = in.s[0];
  std::vector<std::array<u64, 3>> ops;
  for_lanes(m, [&](int l) {
    u64 d = (u32)(lane_u64(w, in.o[0], l) + in.s[2]), s = lane_u64(w, in.o[1], l) + (u64)in.imm;
    u64 n = size;
    if (in.s[1] == 1) n = std::min<u64>(size, lane_u64(w, in.o[2], l));
    if (in.s[1] == 2) n = ((pred_mask(w, in.o[2]) >> l) & 1) ? 0 : size;
    SharedRef r = shared_ref(w, in, (u32)d, size, (u32)l, true);
    if (n) global_ptr(w, in, s, (u32)n & ~3u ? size : (u32)n, (u32)l, false);
    ops.push_back({d, s, n});
    if (w.L->stats_on) w.L->st.gld += n;
    (void)r;
  });
  Warp* pw = &w;
  const Inst* pi = &in;
  auto run = [pw, pi, ops, size]() {
    for (auto& o : ops) {
      SharedRef r = shared_ref(*pw, *pi, (u32)o[0], size, 0, true);
      u8* p = r.cta->smem.data() + r.off;
      if (o[2]) memcpy(p, (void*)o[1], o[2]);
      if (o[2] < size) memset(p + o[2], 0, size - o[2]);
      shadow_generic_write(*pw, *pi, r.cta, r.off, size, 0);
    }
    pw->L->activity++;
  };
  if (Options::get().async == AsyncMode::Eager)
    run();
  else
    w.cp_open.push_back({run});
}
void h_cp_commit(Warp& w, const Inst&, u32) {
  w.cp_groups.push_back(std::move(w.cp_open));
  w.cp_open.clear();
}
void h_cp_wait(Warp& w, const Inst& in, u32) {
  if (in.s[0] == 0xffffffffu) {
    for (auto& o : w.cp_open) (void)o;
    cp_async_wait(w, 0);
    for (auto& o : w.cp_open) o.run();
    w.cp_open.clear();
  } else
    cp_async_wait(w, in.s[0]);
}
// cp.async.mbarrier.arrive[.noinc]: arrive triggers once prior cp.async of the thread complete
void h_cp_mbar(Warp& w, const Inst& in, u32 m) {
  cp_async_wait(w, 0);
  for (auto& o : w.cp_open) o.run();
  w.cp_open.clear();
  for_lanes(m, [&](int l) {
    SharedRef r = shared_ref(w, in, (u32)(lane_u64(w, in.o[0], l) + (u64)in.imm), 8, (u32)l, true);
    MBar& b = mbar_get(w.L, &w, &in, r.cta, r.off);
    if (!in.s[0]) b.pending++;  // without .noinc the pending count is incremented first
    mbar_arrive(w.L, &w, &in, r.cta, r.off, 1, 0);
  });
}

}  // namespace

bool decode_cp_async(Builder& b, const PtxInst& p, Inst& in) {
  const std::string& op = p.mods[0];
  if (op == "cp" && p.has("async") && !p.has("bulk") && !p.has("reduce")) {
    if (p.has("commit_group")) {
      in.fn = &h_cp_commit;
      in.pipe = Pipe::LsuGlobal;
      return true;
    }
    if (p.has("wait_group")) {
      in.s[0] = (u32)p.ops[0].imm;
      in.fn = &h_cp_wait;
      in.pipe = Pipe::LsuGlobal;
      return true;
    }
    if (p.has("wait_all")) {
      in.s[0] = 0xffffffffu;
      in.fn = &h_cp_wait;
      in.pipe = Pipe::LsuGlobal;
      return true;
    }
    if (p.has("mbarrier")) {
      b.addr(p, p.ops[0], in, 0);
      in.n = 1;
      in.s[0] = p.has("noinc");
      in.fn = &h_cp_mbar;
      in.pipe = Pipe::Barrier;
      return true;
    }
    b.addr(p, p.ops[0], in, 0);
    in.s[2] = (u32)in.imm;
    b.addr(p, p.ops[1], in, 1);
    in.n = 2;
    in.s[0] = (u32)p.ops[2].imm;
    if (p.ops.size() > 3) {
      const PtxOperand& o = p.ops[3];
      if (o.kind == OpK::REG && b.f->regs[(size_t)o.reg].bits == 1) {
        in.s[1] = 2;
        in.o[2] = b.src(p, o, 1);
        in.n = 3;
      } else if (!(o.kind == OpK::REG && b.f->regs[(size_t)o.reg].bits == 64)) {
        in.s[1] = 1;
        in.o[2] = b.src(p, o, 32);
        in.n = 3;
      }
    }
    in.fn = &h_cp_async;
    in.pipe = Pipe::LsuGlobal;
    return true;
  }
  return false;
}

}  // namespace hemu
