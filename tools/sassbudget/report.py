"""What is printed: a kernel and its loops, one loop's code, two builds side by side."""

import collections
import os
import re

from .binary import fail
from .model import CLASSES, PIPES, classify


def rank(loop):
    order = {"mma": 0, "math": 1, "producer": 2, "outer": 3, "other": 4, "spin": 5}
    return (order[loop["role"]], -loop["cycles"].get("tensor", 0), -loop["instructions"])


def clip(text, width):
    return text if len(text) <= width else text[: width - 3] + "..."


def short(name):
    """A demangled name without namespaces, integral wrappers and the void in front."""
    name = re.sub(r"\b(?:\w+::)+", "", name)
    name = re.sub(r"\bC<\(?(?:int\))?(-?\d+)>", r"\1", name)
    return re.sub(r"^void |\((?:int|bool)\)", "", name)


def print_kernel(k, n, args):
    print("kernel %d  %s" % (n, clip(short(k["name"]), 2 * args.width)))
    reg = "{}".format(k["registers"]) if k["registers"] is not None else "?"
    if k["setmaxnreg"]:
        reg += " (setmaxnreg {})".format("/".join(map(str, k["setmaxnreg"])))
    print(
        "  %s  regs %s  spills %d LDL + %d STL  stack %s B  static smem %s B  threads %s  "
        "instructions %d"
        % (
            k["arch"] or "sm_?",
            reg,
            k["spill_loads"],
            k["spill_stores"],
            k["stack"] if k["stack"] is not None else "?",
            k["static_smem"] if k["static_smem"] is not None else "?",
            k["max_threads"] or "?",
            k["instructions"],
        )
    )
    loops = sorted(k["loops"], key=rank)
    if not loops:
        print("  no loop")
    shown = [l for l in loops if l["role"] != "spin"][: args.loop_top]
    if loops:
        print("  loop role      header   latch    depth instr (+cond)  spills  bound cyc  limit")
    for l in [x for x in loops if x["role"] != "spin"]:
        print(
            "  L%-3d %-9s 0x%-6x 0x%-6x %-5d %5d (+%d)%s %6d  %9.0f  %s"
            % (
                l["loop"],
                l["role"],
                l["header"],
                l["latch"],
                l["depth"],
                l["instructions"],
                l["conditional_instructions"],
                " " * (5 - len(str(l["conditional_instructions"]))),
                l["spills"],
                l["bound_cycles"],
                l["limit"],
            )
        )
    spins = sum(l["role"] == "spin" for l in loops)
    if spins:
        print("  (%d spin loops on barriers and the like not listed)" % spins)
    for l in shown:
        print_loop(l, args)
    print()


def print_loop(l, args):
    where = "  source {}".format(l["source"]) if l["source"] else ""
    live = "  peak live %d regs" % l["peak_live_registers"] if l["peak_live_registers"] else ""
    print(
        "\n  L%d %s loop, one iteration, %d warpgroup%s%s%s"
        % (l["loop"], l["role"], l["warpgroups"], "" if l["warpgroups"] == 1 else "s", live, where)
    )
    if l["contains"]:
        print("    work of nested loops {} is not counted here".format(l["contains"]))
    groups = collections.defaultdict(list)
    for op, c in l["ops"].items():
        groups[classify(op, "R0, gdesc[0]", args.rates)[0]].append("%d %s" % (c, op))
    print("    class      instr +cond   opcodes")
    for c in CLASSES:
        if l["mix"].get(c) or l["conditional_mix"].get(c):
            print(
                "    %-10s %5d %5s   %s"
                % (c, l["mix"].get(c, 0), l["conditional_mix"].get(c, ""), clip(", ".join(groups[c]), args.width))
            )
    print("    %-10s %5d %5d" % ("total", l["instructions"], l["conditional_instructions"]))
    print("    pipe       1 warpgroup   x%d   share of bound   (SM cycles)" % l["warpgroups"])
    for p in sorted(l["cycles"], key=lambda p: -l["cycles"][p]):
        print(
            "    %-10s %11.0f %5.0f   %5.1f%%%s"
            % (
                p,
                l["per_warpgroup_cycles"].get(p, 0),
                l["cycles"][p],
                100 * l["cycles"][p] / l["bound_cycles"],
                "   <- limit" if p == l["limit"] else "",
            )
        )
    if l["role"] == "mma" and args.add_loop:
        print(f"    the last column includes loops {args.add_loop} once per iteration")
    line = "    bound: >= {:.0f} cycles per iteration, limited by {}".format(l["bound_cycles"], l["limit"])
    if l["bound_tflops"]:
        line += "; <= %.0f TFLOP/s at %.3f GHz x %d SMs" % (l["bound_tflops"], args.clock, args.sms)
    print(line)
    if l["serial_tflops"]:
        print(
            "    if tensor and vector work never overlapped: {:.0f} cycles, {:.0f} TFLOP/s".format(
                l["serial_cycles"], l["serial_tflops"]
            )
        )


def show_loop(graph, index, args):
    loop = next((l for l in graph.loops if l.index == index), None)
    if loop is None:
        fail("no loop %d in %s" % (index, clip(graph.fn.demangled, 60)))
    inner = [l for l in graph.loops if l is not loop and l.blocks < loop.blocks]
    last = None
    for b in sorted(loop.blocks):
        tag = "must" if b in loop.must else "cond"
        nest = [l.index for l in inner if b in l.blocks]
        print(
            "---- block 0x{:x}  {}{} -> {}".format(
                graph.fn.instrs[graph.blocks[b][0]].addr,
                tag,
                f"  in L{nest}" if nest else "",
                " ".join(f"0x{graph.fn.instrs[graph.blocks[s][0]].addr:x}" for s in sorted(graph.succ[b])),
            )
        )
        for i in graph.block_instrs(b):
            klass, cost, _ = classify(i.op, i.args, args.rates)
            pipes = " ".join(f"{p}:{c:g}" for p, c in cost.items() if p != "issue")
            src = "%s:%d" % (os.path.basename(i.src[0]), i.src[1]) if i.src and i.src != last else ""
            last = i.src
            print("%06x %-9s %-16s %5s %-58s %s" % (i.addr, klass, pipes, i.pred, clip((i.op + " " + i.args), 58), src))


def print_diff(a, b, args):
    """One line per changed number, for kernels present in both builds."""
    pairs = [(x, y) for x in a for y in b if x["name"] == y["name"]]
    if not pairs and len(a) == len(b) == 1:
        pairs = [(a[0], b[0])]
    names = {x["name"] for x, _ in pairs} | {y["name"] for _, y in pairs}
    for side, ks in (("only in A", a), ("only in B", b)):
        for k in ks:
            if k["name"] not in names:
                print("{}: {}".format(side, clip(short(k["name"]), args.width)))
    for x, y in pairs:
        print("kernel  {}".format(clip(short(y["name"]), 2 * args.width)))
        rows = [
            (f, x[f], y[f])
            for f in ("registers", "spill_loads", "spill_stores", "stack", "static_smem", "max_threads", "instructions")
        ]
        lx, ly = ([l for l in sorted(k["loops"], key=rank) if l["role"] != "spin"][: args.loop_top] for k in (x, y))
        for p, q in zip(lx, ly, strict=False):
            tag = "L%d/L%d %s " % (p["loop"], q["loop"], q["role"])
            rows += [
                (tag + f, p[f], q[f])
                for f in ("instructions", "spills", "bound_cycles", "limit", "bound_tflops", "peak_live_registers")
            ]
            rows += [(tag + "cycles " + c, p["cycles"].get(c, 0), q["cycles"].get(c, 0)) for c in PIPES]
            ops = sorted(set(p["ops"]) | set(q["ops"]))
            rows += [(tag + o, p["ops"].get(o, 0), q["ops"].get(o, 0)) for o in ops]
        changed = [r for r in rows if r[1] != r[2]]
        for name, old, new in changed:
            delta = "  %+g" % (new - old) if isinstance(old, (int, float)) and isinstance(new, (int, float)) else ""
            print("  %-44s %10s -> %-10s%s" % (name, old, new, delta))
        if not changed:
            print("  no change")
