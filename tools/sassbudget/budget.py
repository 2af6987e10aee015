"""What one iteration of a loop costs on every pipe: a lower bound on its clocks."""

import collections
import os
import re

from .flow import Graph
from .model import CLASSES, PIPES, classify


def loop_budget(graph, loop, args):
    """Cost of one iteration of `loop`; nested loops that do work are left out."""
    nested = [l for l in graph.loops if l is not loop and l.blocks < loop.blocks and not l.spin]
    skip = set().union(*(l.blocks for l in nested)) if nested else set()
    mix, cond, ops = collections.Counter(), collections.Counter(), collections.Counter()
    cost, flops, total, conditional = collections.Counter(), 0, 0, 0
    files, live, spills = collections.Counter(), 0, 0
    shapes = collections.Counter()
    for b in sorted(loop.blocks - skip):
        must = b in loop.must or args.all_paths
        for i in graph.block_instrs(b):
            klass, c, f = classify(i.op, i.args, args.rates)
            live = max(live, i.live or 0)
            spills += klass == "spill"
            if i.src:
                files[i.src] += 1
            if not must:
                cond[klass] += 1
                conditional += 1
                continue
            total += 1
            mix[klass] += 1
            ops[op_key(i.op)] += 1
            flops += f
            for pipe, cyc in c.items():
                cost[pipe] += cyc
            if klass == "tensor":
                shapes[".".join(i.op.split(".")[:2])] += 1
    every = {i.op.split(".")[0] for b in loop.blocks for i in graph.block_instrs(b)}
    if any(i.op.split(".")[0].endswith("MMA") for b in skip for i in graph.block_instrs(b)):
        role = "outer"
    elif mix["tensor"] or cond["tensor"]:
        role = "mma"
    elif loop.spin:
        role = "spin"
    elif every & {"UTMALDG", "UBLKCP", "LDGSTS"}:
        role = "producer"
    elif nested:
        role = "outer"
    elif mix["fma"] or mix["mufu"]:
        role = "math"
    else:
        role = "other"
    warps = args.warpgroups or graph.fn.facts.get("compute_warpgroups") or 1
    warps = 1 if role in ("producer", "spin") else warps
    extra = added_cost(graph, args) if role == "mma" else {}
    pipes = {p: cost[p] * warps + extra.get(p, 0) for p in PIPES if cost[p] or extra.get(p)}
    limit = max(pipes, key=lambda p: pipes[p]) if pipes else "issue"
    bound = pipes.get(limit, 0)
    vector = max([pipes[p] for p in pipes if p not in ("tensor", "smem")] or [0])
    serial = pipes.get("tensor", 0) + vector
    scale = args.clock * 1e9 * args.sms / 1e12
    addresses = [graph.fn.instrs[graph.blocks[b][0]].addr for b in loop.blocks]
    latch = graph.fn.instrs[max(graph.blocks[b][1] for b in loop.latches) - 1].addr
    lines = (
        sorted(l for (f, l), _ in files.items() if files and f == max(files, key=lambda k: files[k])[0])
        if files
        else []
    )
    top = max(files, key=lambda k: files[k])[0] if files else None
    return {
        "loop": loop.index,
        "role": role,
        "start": min(addresses),
        "header": graph.fn.instrs[graph.blocks[loop.header][0]].addr,
        "latch": latch,
        "depth": depth(loop),
        "parent": loop.parent.index if loop.parent else None,
        "contains": [l.index for l in nested],
        "instructions": total,
        "conditional_instructions": conditional,
        "mix": {k: mix[k] for k in CLASSES if mix[k]},
        "conditional_mix": {k: cond[k] for k in CLASSES if cond[k]},
        "ops": dict(ops.most_common()),
        "shapes": dict(shapes),
        "spills": spills,
        "peak_live_registers": live or None,
        "warpgroups": warps,
        "per_warpgroup_cycles": {p: round(cost[p], 1) for p in PIPES if cost[p]},
        "cycles": {p: round(v, 1) for p, v in pipes.items()},
        "bound_cycles": round(bound, 1),
        "limit": limit,
        "serial_cycles": round(serial, 1),
        "flops": flops * warps,
        "bound_tflops": round(flops * warps / bound * scale, 1) if flops and bound else None,
        "serial_tflops": round(flops * warps / serial * scale, 1) if flops and serial else None,
        "source": "%s:%d-%d" % (os.path.basename(top), lines[0], lines[-1]) if top else None,
    }


def added_cost(graph, args):
    """Cost of the loops named by --add-loop: one warpgroup, once per iteration of an mma loop."""
    cost = collections.Counter()
    for loop in graph.loops:
        if loop.index in args.add_loop:
            for b in loop.must:
                for i in graph.block_instrs(b):
                    for pipe, cyc in classify(i.op, i.args, args.rates)[1].items():
                        cost[pipe] += cyc
    return cost


def depth(loop):
    n = 0
    while loop.parent:
        loop, n = loop.parent, n + 1
    return n


def op_key(op):
    """Opcode without modifiers that do not change the pipe; keep what tells variants apart."""
    parts = op.split(".")
    keep = {
        "MUFU": 2,
        "F2FP": 4,
        "F2F": 3,
        "QGMMA": 2,
        "HGMMA": 2,
        "IGMMA": 2,
        "SYNCS": 2,
        "WARPGROUP": 2,
        "BAR": 2,
        "LDSM": 5,
        "STSM": 5,
        "SHFL": 2,
        "IMAD": 2,
    }
    return ".".join(parts[: keep.get(parts[0], 1)])


def analyse(fn, args):
    graph = Graph(fn)
    loops = [loop_budget(graph, l, args) for l in graph.loops]
    counts = collections.Counter(i.op.split(".")[0] for i in fn.instrs)
    maxreg = [
        int(m[1], 16)
        for i in fn.instrs
        if i.op.startswith("USETMAXREG")
        for m in [re.search(r"(0x[0-9a-f]+)", i.args)]
        if m
    ]
    return {
        "name": fn.demangled,
        "mangled": fn.name,
        "arch": fn.arch,
        "instructions": len(fn.instrs),
        "registers": fn.facts.get("registers"),
        "setmaxnreg": sorted(set(maxreg)),
        "stack": fn.facts.get("stack"),
        "static_smem": fn.facts.get("smem"),
        "max_threads": fn.facts.get("max_threads"),
        "spill_loads": counts["LDL"],
        "spill_stores": counts["STL"],
        "opcodes": dict(counts),
        "loops": loops,
    }, graph
