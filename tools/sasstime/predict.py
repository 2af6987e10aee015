"""A kernel and its description, bound together and run: clocks of one iteration of the main loop."""

import collections
import math
import os
import sys

import tomllib

from sassbudget.flow import Graph

from . import sass, sim


def fail(text):
    sys.stderr.write(f"sasstime: {text}\n")
    sys.exit(2)


def read_description(name):
    if not name:
        return {}
    here = os.path.join(os.path.dirname(os.path.abspath(__file__)), "kernels", name + ".toml")
    path = here if os.path.exists(here) else name
    try:
        with open(path, "rb") as f:
            return tomllib.load(f)
    except (OSError, tomllib.TOMLDecodeError) as e:
        fail(f"{path}: {e}")


def find_loop(fn, graph, kind):
    """The loop with the most tensor work ('mma'), or with the most LDSM/STSM ('transpose')."""
    best = None
    for loop in graph.loops:
        nested = [l for l in graph.loops if l is not loop and l.blocks < loop.blocks and not l.spin]
        own = loop.blocks - set().union(set(), *(l.blocks for l in nested))
        ops = collections.Counter(i.op.split(".")[0] for b in own for i in graph.block_instrs(b))
        score = sum(n for o, n in ops.items() if o.endswith("GMMA")) if kind == "mma" else ops["LDSM"] + ops["STSM"]
        if kind == "mma" and any(
            i.op.split(".")[0].endswith("GMMA") for l in nested for b in l.blocks for i in graph.block_instrs(b)
        ):
            continue  # prologue and tail of a work item
        if score and (best is None or score > best[0]):
            best = (score, loop)
    if not best:
        raise sass.Mismatch(f"no {kind} loop in {fn.demangled[:80]}")
    return best[1]


def bind(path, spec, rings, role):
    """{op addr: action} for the mbarriers and order barriers of one role; fails where counts differ."""
    ops = [o for o, _ in path.iteration(0)]
    path.counts = {}
    waits = [o for o in ops if o.kind == "wait"]
    signals = [o for o in ops if o.kind == "signal"]
    actions = {}
    names = {
        "consumer": (("wait", waits), ("release", signals)),
        "producer": (("wait_source", waits), ("wait_empty", waits), ("fill", signals), ("release_source", signals)),
    }
    for ring in rings:
        for what, pool in names[role]:
            if what in ring:
                if ring[what] >= len(pool):
                    raise sass.Mismatch(
                        "ring %s: %s = %d, but the %s loop has only %d such instructions"
                        % (ring["name"], what, ring[what], role, len(pool))
                    )
                actions[pool[ring[what]].addr] = (what, ring["name"])
    for key, pool in (("waits", waits), ("signals", signals)):
        if key in spec and spec[key] != len(pool):
            raise sass.Mismatch(
                "the %s loop has %d mbarrier %s, the description says %d" % (role, len(pool), key, spec[key])
            )
    bars = [o for o in ops if o.kind == "bar"]
    if role == "consumer":
        ordered = [o for o in bars if o.sync[1] is None and o.sync[2] == 256]
        syncs = [o for o in ordered if o.sync[0] == "sync"]
        arrives = [o for o in ordered if o.sync[0] == "arv"]
        if syncs and len(syncs) == len(arrives):
            for o in syncs:
                actions[o.addr] = ("order", "sync")
            for o in arrives:
                actions[o.addr] = ("order", "arv")
        elif ordered:
            raise sass.Mismatch("%d BAR.SYNC but %d BAR.ARV with a register for a number" % (len(syncs), len(arrives)))
        if "order" in spec and spec["order"] != bool(syncs):
            raise sass.Mismatch("order barriers %s in the loop" % ("found" if syncs else "missing"))
    return actions


class Model:
    """A kernel ready to be run under given parameters."""

    def __init__(self, fn, description, par, order=True):
        self.fn, self.d, self.par, self.order = fn, description, par, order
        self.graph = Graph(fn)
        c = description.get("consumer", {})
        loop = find_loop(fn, self.graph, "mma")
        self.path = sass.Path(fn, self.graph, loop, c.get("branch", []), par)
        self.rings = description.get("ring", [])
        threads = fn.facts.get("max_threads") or 384
        dealloc = any(i.op.startswith("USETMAXREG.DEALLOC") for i in fn.instrs)
        self.count = c.get("warpgroups") or max(1, threads // 128 - (1 if dealloc else 0))
        self.consumers = list(range(self.count * description.get("ctas_per_sm", 1)))
        self.actions = bind(self.path, c, self.rings, "consumer")
        self.path.check_rules()
        self.producer = None
        if "producer" in description:
            p = description["producer"]
            self.producer = sass.Path(
                fn, self.graph, find_loop(fn, self.graph, p.get("loop", "transpose")), p.get("branch", []), par
            )
            self.producer_actions = bind(self.producer, p, self.rings, "producer")
        ops = [o for o, _ in self.path.iteration(0)]
        self.path.counts = {}
        self.mma_flops = sum(o.mma["flops"] for o in ops if o.mma) * len(self.consumers)
        self.flops = description.get("flops", self.mma_flops)
        self.tensor = sum(o.mma["clocks"] for o in ops if o.mma) * len(self.consumers) / par["tensor_rate"]
        self.wide = any(o.mma and o.mma["wide"] for o in ops)

    def run(self, iterations=20, stagger=None):
        bytes_per_iteration = sum(r.get("bytes", 0) for r in self.rings if "fill" not in r)
        guess = (
            max(self.tensor, 8 * sum(o.pipe == "mufu" for o, _ in self.path.iteration(0)) * len(self.consumers)) * 1.2
        )
        share = bytes_per_iteration / guess / self.par["smem_bytes"]
        rings = []
        for r in self.rings:
            r = dict(r)
            if r.get("multicast"):
                r["bytes"] = r["bytes"] / r["multicast"]
            rings.append(r)
        roles = [
            ("consumer", self.path, self.consumers, self.actions, self.par["stagger"] if stagger is None else stagger)
        ]
        if self.producer:
            roles.append(("producer", self.producer, [99], self.producer_actions, 0))
            self.producer.counts = {}
        self.path.counts = {}
        s = sim.Sim(self.par, roles, rings, self.consumers, min(share, 0.5), self.order)
        s.run(iterations)
        return s


def predict(fn, description, par, iterations=20, order=True, staggers=(0, 150, 300, 600)):
    """Runs the loop from several starting offsets of the warpgroups; the spread belongs to the answer.

    ``reduced_bytes`` of the description, which go to L2 by bulk reductions, are a floor of it: the loop does not run faster than they leave.
    """
    model = Model(fn, description, par, order)
    runs = []
    for st in staggers:
        s = model.run(iterations, st)
        clocks, t0, t1 = sim.steady(s, s.warps[0])
        runs.append((clocks, st, s, t0, t1))
    runs.sort(key=lambda r: r[0])
    middle = runs[len(runs) // 2]
    floor = description.get("reduced_bytes", 0) / par["reduce_bytes"]
    mean = max(floor, sum(r[0] for r in runs) / len(runs))
    out = {
        "clocks": mean,
        "reduction_clocks": floor,
        "low": runs[0][0],
        "high": runs[-1][0],
        "tensor_clocks": model.tensor,
        "tensor_utilization": model.tensor / mean,
        "flops": model.flops,
        "tflops_loop": model.flops / mean * par["clock"] * 1e9 * par["sms"] / 1e12,
    }
    w = description.get("workload")
    if w:
        waves = math.ceil(w["items"] / par["sms"])
        time = waves * (w["iterations"] * mean + mean + par["store_drain"])
        out["tflops"] = w["flops"] / (time / (par["clock"] * 1e9)) / 1e12
        out["geometry"] = out["tflops"] / out["tflops_loop"]
    return model, out, middle
