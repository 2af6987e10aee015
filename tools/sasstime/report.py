"""What is printed: the prediction, on what the warps wait, and a timeline of two iterations."""

import collections
import os

from sassbudget.report import clip, short

from . import sim


def stall_table(model, run, top):
    clocks, _, s, t0, t1 = run
    iterations = {w.wg: len(w.starts) for w in s.warps}
    rows = collections.Counter()
    for (wg, addr, reason), n in s.stalls.items():
        if wg in model.consumers:
            rows[(addr, reason)] += n / iterations[wg] / len(model.consumers)
    return [(n, addr, reason) for (addr, reason), n in rows.most_common(top)]


def by_reason(model, run):
    _, _, s, t0, t1 = run
    rows = collections.Counter()
    for w in s.warps:
        if w.wg in model.consumers:
            for (wg, _addr, reason), n in s.stalls.items():
                if wg == w.wg:
                    rows[reason] += n / len(w.starts) / len(model.consumers)
            rows["issuing"] += s.issued[w.wg] / len(w.starts) / len(model.consumers)
    return rows


def timeline(model, run, width=104, iterations=2):
    """One column = a fraction of an iteration. Tensor row: the warpgroup it works for; MUFU: tenths of its rate."""
    clocks, _, s, t0, t1 = run
    start = s.warps[0].starts[-1 - iterations]
    span = clocks * iterations
    col = span / width
    names = "ABCDEFGH"
    lines = []
    row = ["."] * width
    fill = [collections.Counter() for _ in range(width)]
    for a, b, wg, _, _ in s.mma_log:
        for c in range(max(0, int((a - start) / col)), min(width, int((b - start) / col) + 1)):
            left, right = start + c * col, start + (c + 1) * col
            fill[c][wg] += max(0, min(b, right) - max(a, left))
    for c in range(width):
        if sum(fill[c].values()) > col / 2:
            row[c] = names[fill[c].most_common(1)[0][0] % 8]
    lines.append("tensor  " + "".join(row))
    mufu = [0.0] * width
    for t in s.mufu_log:
        c = int((t - start) / col)
        if 0 <= c < width:
            mufu[c] += model.par["mufu_issue"]
    lines.append("mufu    " + "".join("." if m < col * 0.05 else str(min(9, int(10 * m / col))) for m in mufu))
    codes = {
        sim.TENSOR: "t",
        sim.BARRIER: "b",
        sim.MBARRIER: "m",
        sim.BOARD: "s",
        sim.FIXED: "-",
        sim.TAKEN: "o",
        sim.QUEUE: "q",
    }
    for w in s.warps:
        cells = [collections.Counter() for _ in range(width)]
        for t, wg, reason, n in s.state_log:
            if wg != w.wg or t + n < start:
                continue
            for c in range(max(0, int((t - start) / col)), min(width, int((t + n - start) / col) + 1)):
                left, right = start + c * col, start + (c + 1) * col
                cells[c][codes.get(reason, "p")] += max(0, min(t + n, right) - max(t, left))
        text = ""
        for c in cells:
            sum(c.values())
            code, n = c.most_common(1)[0] if c else (" ", 0)
            text += code if n > col / 2 else "#"
        lines.append("%-7s " % ("WG " + names[w.wg % 8] if w.role == "consumer" else w.role[:7]) + text)
    lines.append(
        "        A, B: tensor core works for WG A, B   # issuing   t tensor result   s scoreboard   p pipe busy   "
        "b named barrier   m mbarrier   - dependency   o other warp issued"
    )
    return lines


def describe_op(fn, addr):
    i = next(i for i in fn.instrs if i.addr == addr)
    src = "%s:%d" % (os.path.basename(i.src[0]), i.src[1]) if i.src else ""
    return "0x%-6x %-46s %s" % (addr, ((i.pred + " " if i.pred else "") + i.op + " " + i.args)[:46], src)


def show(model, out, run, args):
    print(f"kernel  {clip(short(model.fn.demangled), 110)}")
    print(
        "  loop at 0x%x, %d consumer warpgroups%s"
        % (
            model.fn.instrs[model.graph.blocks[model.path.loop.header][0]].addr,
            len(model.consumers),
            ", producer loop simulated" if model.producer else "",
        )
    )
    for addr, text in sorted(model.path.assumed.items()):
        print(f"  assumed at 0x{addr:x}: {text}")
    print(
        "  {:.0f} clocks per iteration ({:.0f} to {:.0f} over starting offsets); tensor busy {:.0f} = {:.1f} %".format(
            out["clocks"], out["low"], out["high"], out["tensor_clocks"], 100 * out["tensor_utilization"]
        )
    )
    print(
        "  %.0f TFLOP/s in the loop at %.3f GHz x %d SMs%s"
        % (
            out["tflops_loop"],
            args.par["clock"],
            args.par["sms"],
            "; {:.0f} with waves, prologue and epilogue".format(out["tflops"]) if "tflops" in out else "",
        )
    )
    if out["reduction_clocks"]:
        print("  bulk reductions to L2 take {:.0f} clocks per iteration".format(out["reduction_clocks"]))
    s = run[2]
    n = len(s.warps[0].starts)
    print(
        "\n  pipes, share of the time: "
        + "  ".join(
            f"{p} {100 * v / s.t:.0f} %"
            for p, v in sorted(s.pipe_log.items(), key=lambda x: -x[1])
            if p and v / s.t > 0.02
        )
    )
    rows = by_reason(model, run)
    total = sum(rows.values())
    print(
        "  one warp, clocks per iteration: "
        + "  ".join(f"{r} {v:.0f}" for r, v in rows.most_common() if v > total * 0.004)
    )
    print("\n  clocks  reason            instruction")
    for n, addr, reason in stall_table(model, run, args.top):
        print("  %6.1f  %-16s  %s" % (n, reason, describe_op(model.fn, addr)))
    print()
    for line in timeline(model, run, args.width):
        print("  " + line)
    print()
