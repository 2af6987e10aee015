"""Control flow: basic blocks, dominators, natural loops."""

import collections
import re

from .model import _FMA, _GLOBAL, _TMA


class Loop:
    def __init__(self, header):
        self.header, self.blocks, self.latches = header, set(), []
        self.parent, self.must, self.spin, self.index = None, set(), False, 0


class Graph:
    """Basic blocks, edges, dominators and natural loops of one function."""

    def __init__(self, fn):
        self.fn = fn
        self.blocks, self.succ = self._build()
        self.pred = collections.defaultdict(set)
        for a, outs in self.succ.items():
            for b in outs:
                self.pred[b].add(a)
        self.idom = self._dominators()
        self.loops = self._loops()

    def _targets(self, ins):
        out = [self.fn.labels[t] for t in ins.targets if t in self.fn.labels]
        if not out and ins.op.split(".")[0] in ("BRA", "JMP", "BSSY"):
            m = re.search(r"(?:^|[\s,])0x([0-9a-f]+)$", ins.args)
            if m:
                out = [int(m[1], 16)]
        return out

    def _build(self):
        ins = self.fn.instrs
        at = {i.addr: n for n, i in enumerate(ins)}
        reconverge = {}  # instr index of BSYNC -> target
        last = {}
        flow = {}  # instr index -> (targets, falls)
        for n, i in enumerate(ins):
            base = i.op.split(".")[0]
            always = i.pred in ("", "@PT", "@UPT")
            if base == "BSSY":
                last[i.args.split(",")[0].strip()] = self._targets(i)
            elif base in ("BRA", "JMP", "BRX", "BRXU", "JMX", "JMXU"):
                operands = [a for a in i.args.split("(*")[0].split(",") if a.strip()]
                conditional = not always or (base in ("BRA", "JMP") and len(operands) > 1)
                flow[n] = (self._targets(i), conditional)
            elif base == "BSYNC":
                reconverge[n] = last.get(i.args.split(",")[0].strip(), [])
            elif base in ("EXIT", "RET", "KILL") and always:
                flow[n] = ([], False)
            elif base == "WARPSYNC" and i.targets:
                flow[n] = (self._targets(i), True)
        for n, targets in reconverge.items():
            nxt = ins[n + 1].addr if n + 1 < len(ins) else None
            if targets and nxt not in targets:
                flow[n] = (targets, True)
        leaders = {0}
        for n, (targets, _) in flow.items():
            leaders.add(n + 1)
            leaders.update(at[t] for t in targets if t in at)
        starts = sorted(x for x in leaders if x < len(ins))
        blocks = [(s, e) for s, e in zip(starts, starts[1:] + [len(ins)], strict=False)]
        index = {s: b for b, (s, _) in enumerate(blocks)}
        succ = {}
        for b, (_s, e) in enumerate(blocks):
            targets, falls = flow.get(e - 1, ([], True))
            outs = {index[at[t]] for t in targets if t in at}
            if falls and e < len(ins):
                outs.add(index[e])
            succ[b] = outs
        return blocks, succ

    def _dominators(self):
        roots = [0] + [b for b in range(1, len(self.blocks)) if not self.pred[b]]
        order, seen = [], set()

        def visit(start):
            stack = [(start, iter(sorted(self.succ[start])))]
            seen.add(start)
            while stack:
                node, it = stack[-1]
                for nxt in it:
                    if nxt not in seen:
                        seen.add(nxt)
                        stack.append((nxt, iter(sorted(self.succ[nxt]))))
                        break
                else:
                    order.append(node)
                    stack.pop()

        for r in roots:
            if r not in seen:
                visit(r)
        for b in range(len(self.blocks)):  # cycles with no entry edge
            if b not in seen:
                roots.append(b)
                visit(b)
        order.append(-1)
        number = {b: i for i, b in enumerate(order)}
        roots = set(roots)
        idom = {-1: -1}

        def meet(a, b):
            while a != b:
                while number[a] < number[b]:
                    a = idom[a]
                while number[b] < number[a]:
                    b = idom[b]
            return a

        changed = True
        while changed:
            changed = False
            for b in reversed(order[:-1]):
                preds = [p for p in self.pred[b] if p in idom] + ([-1] if b in roots else [])
                if not preds:
                    continue
                new = preds[0]
                for p in preds[1:]:
                    new = meet(new, p)
                if idom.get(b) != new:
                    idom[b] = new
                    changed = True
        return idom

    def chain(self, b):
        out = set()
        while b != -1:
            out.add(b)
            b = self.idom[b]
        return out

    def _loops(self):
        loops = {}
        for u, outs in self.succ.items():
            for h in outs:
                if h in self.chain(u):
                    loop = loops.setdefault(h, Loop(h))
                    loop.latches.append(u)
                    stack, body = [u], {h}
                    while stack:
                        b = stack.pop()
                        if b not in body:
                            body.add(b)
                            stack.extend(self.pred[b])
                    loop.blocks |= body
        found = sorted(loops.values(), key=lambda l: (self.blocks[l.header][0], -len(l.blocks)))
        for n, loop in enumerate(found):
            loop.index = n
            outer = [o for o in found if o is not loop and loop.blocks < o.blocks]
            loop.parent = min(outer, key=lambda o: len(o.blocks)) if outer else None
            must = set.intersection(*(self.chain(u) for u in loop.latches))
            loop.must = must & loop.blocks
            loop.spin = self._is_spin(loop)
        return found

    def _is_spin(self, loop):
        ops = [i.op.split(".")[0] for b in loop.blocks for i in self.block_instrs(b)]
        if ops == ["BRA"]:  # the guard after the last EXIT
            return True
        waits = any(
            o in ("SYNCS", "NANOSLEEP", "USETMAXREG", "LD", "LDG", "LDS", "ATOM", "ATOMG", "ATOMS", "UCGABAR_WAIT")
            for o in ops
        )
        works = any(
            o in _FMA
            or o in _GLOBAL - {"LD", "LDG", "ATOM", "ATOMG"}
            or o in _TMA
            or o in ("MUFU", "F2FP", "LDSM", "STSM", "STS")
            or o.endswith("MMA")
            for o in ops
        )
        return len(ops) <= 16 and waits and not works

    def block_instrs(self, b):
        s, e = self.blocks[b]
        return self.fn.instrs[s:e]
