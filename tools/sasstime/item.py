"""A whole work item: prologue, n iterations of the main loop, epilogue, and the next item behind it.

The main loop alone says what a long list costs. This plays the loop around it too, as a warp meets it: everything in it runs but
what calls a function (slow paths) or spins. Two lengths give a linear model: clocks of an iteration, and clocks that an item costs
beyond its iterations.
"""

import collections

from . import sass, sim
from .predict import Model


class ItemPath:
    """Passes of the loop around `main` (a sass.Path), each with `iterations` of the main loop in the place of that loop."""

    def __init__(self, main, iterations, last_skips):
        """last_skips: an address; the last iteration of an item leaves out the basic block that holds it."""
        self.main, self.graph, self.iterations, self.number = main, main.graph, iterations, 0
        (skipped,) = [b for b in main.loop.blocks if any(i.addr == last_skips for i in main.graph.block_instrs(b))]
        self.skipped = {i.addr for i in main.graph.block_instrs(skipped)}
        inner = main.loop
        around = [l for l in self.graph.loops if l.blocks > inner.blocks and not l.spin]
        if not around:
            raise sass.Mismatch("no loop over work items around the main loop")
        self.loop = min(around, key=lambda l: len(l.blocks))
        self.to_main = self._before(inner.header)
        self.next = {}

    def _before(self, target):
        """Blocks of a pass from which `target` is still ahead."""
        found, stack = set(), [target]
        while stack:
            b = stack.pop()
            for p in self.graph.pred[b]:
                if p in self.loop.blocks and p not in self.main.loop.blocks and p not in found:
                    found.add(p)
                    if p != self.loop.header:
                        stack.append(p)
        return found

    def _follow(self, b):
        """The successor of a block outside the main loop."""
        if b not in self.next:
            inside = [s for s in sorted(self.graph.succ[b]) if s in self.loop.blocks and s not in self.main.spin]
            inside = [s for s in inside if not self._calls(s)] or inside
            if b in self.to_main:
                inside = [s for s in inside if s in self.to_main or s == self.main.loop.header] or inside
            if not inside:
                raise sass.Mismatch(f"the path through an item ends at 0x{self.main._addr(b):x}")
            self.next[b] = b + 1 if b + 1 in inside else inside[0]
        return self.next[b]

    def _calls(self, b):
        """Whether the straight line from b calls or spins before anything joins it."""
        for _ in range(6):
            if b in self.main.spin or any(i.op.startswith("CALL") for i in self.graph.block_instrs(b)):
                return True
            if len(self.graph.succ[b]) != 1 or len(self.graph.pred[b]) != 1:
                return False
            b = next(iter(self.graph.succ[b]))
        return False

    def iteration(self, _number):
        out, b = [], self.loop.header
        for _ in range(4000):
            if b == self.main.loop.header:
                for i in range(self.iterations):
                    ops = self.main.iteration(self.number)
                    out += ops if i + 1 < self.iterations else [x for x in ops if x[0].addr not in self.skipped]
                    self.number += 1
                leaves = {s for x in self.main.loop.blocks for s in self.graph.succ[x]} - self.main.loop.blocks
                b = min(leaves & self.loop.blocks - self.main.spin)
                continue
            start, end = self.graph.blocks[b]
            following = self._follow(b)
            out += [
                (self.main.ops[self.main.fn.instrs[n].addr], n == end - 1 and following != b + 1)
                for n in range(start, end)
            ]
            if following == self.loop.header:
                return out
            b = following
        raise sass.Mismatch("the path through an item does not come back to its beginning")


class ItemSim(sim.Sim):
    """With a producer that takes items one after the other: it draws the next one when it has asked for the last V block of the
    present one, and knows `draw` clocks later what to load."""

    def __init__(self, *args, blocks, draw):
        self.blocks, self.draw = blocks, draw
        self.known = {0: 0.0}  # item -> time its loads may be issued
        self.waiting = collections.defaultdict(list)
        super().__init__(*args)

    def fill(self, ring, t, first=False):
        number, ring.fills = ring.fills, ring.fills + 1
        ring.full.setdefault(number, sim.INF)
        item = number // (1 if ring.name == "item" else self.blocks)
        if item in self.known:
            self.at(max(t, self.known[item]), self.load, ring, number)
        else:
            self.waiting[item].append((ring, number))

    def load(self, ring, number):
        start = max(self.t, self.tma_free)
        self.tma_free = start + ring.bytes / self.p["l2_bytes"]
        self.at(self.tma_free + self.p["tma_latency"], self.filled, ring, number)
        if ring.name == "v" and (number + 1) % self.blocks == 0:
            item = (number + 1) // self.blocks
            self.known[item] = start + self.draw
            for late in self.waiting.pop(item, []):
                self.at(self.known[item], self.load, *late)

    def mbarrier_wait(self, w, o):
        action, soon = w.names.get(o.addr), self.t + self.p["mbarrier"]
        if not action:
            return soon
        ring = self.rings[action[1]]
        number = w.counts[ring.name]
        w.counts[ring.name] += 1
        if ring.full.get(number, sim.INF) <= self.t:
            return soon
        w.waiting_board = ("full", ring, number, o.wbar)
        return sim.INF


def bind(path, model, names):
    """{address: action} of the waits and signals around the main loop, which the description names in order."""
    inside = {i.addr for b in model.path.loop.blocks for i in path.graph.block_instrs(b)}
    ops = [o for o, _ in path.iteration(0) if o.addr not in inside]
    actions = dict(model.actions)
    for kind, action, key in (("wait", "wait", "waits"), ("signal", "release", "signals")):
        found = [o for o in ops if o.kind == kind]
        if len(found) != len(names[key]):
            raise sass.Mismatch(
                f"{len(found)} mbarrier {key} around the main loop, the description names {len(names[key])}"
            )
        actions |= {o.addr: (action, name) for o, name in zip(found, names[key], strict=True)}
    return actions


def item_clocks(fn, description, par, blocks, items=5):
    """Clocks from one item of `blocks` KV blocks to the next, on one SM, both warpgroups at work; and the simulation."""
    model = Model(fn, description, par)
    item = description["item"]
    next_k = next(a for a, action in model.actions.items() if action == ("wait", item["last_skips"]))
    path = ItemPath(model.path, blocks - 1, next_k)  # the last PV stands behind the loop
    actions = bind(path, model, item)
    rings = [{**r, "bytes": r["bytes"] / r.get("multicast", 1)} for r in model.rings]
    rings.append({"name": "item", "stages": item["stages"], "bytes": item["bytes"]})
    path.number, model.path.counts = 0, {}
    roles = [("consumer", path, model.consumers, actions, par["stagger"])]
    run = ItemSim(
        par,
        roles,
        rings,
        model.consumers,
        0.2,
        True,
        blocks=blocks,
        draw=item["dependent_loads"] * par["global_latency"],
    )
    run.run(items, limit=60_000_000)
    starts = run.warps[0].starts
    return (starts[-1] - starts[1]) / (len(starts) - 2), run


def linear(fn, description, par, short=8, long=24):
    """(clocks of an item beyond its blocks, clocks of a block): of items of two lengths."""
    a, _ = item_clocks(fn, description, par, short)
    b, _ = item_clocks(fn, description, par, long)
    slope = (b - a) / (long - short)
    return a - slope * short, slope
