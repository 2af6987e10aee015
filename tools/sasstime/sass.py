"""SASS with control words: disassembly, control flow (both from sassbudget) and the path one warp takes."""

import re
import tempfile

from sassbudget.binary import cubins_of, demangle, elf_facts, find_tool, output, read_bytes
from sassbudget.sass import FUNCTION, parse_sass

from . import machine

_FIRST = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/.*;\s*/\*\s*0x([0-9a-f]{16})\s*\*/")
_SECOND = re.compile(r"^\s*/\*\s*0x([0-9a-f]{16})\s*\*/\s*$")


def control_words(text):
    """[(function, {address: high half of the encoding})]"""
    out, addr = [], None
    for line in text.splitlines():
        m = _FIRST.match(line) if out else None
        if m:
            addr = int(m[1], 16)
            continue
        m = _SECOND.match(line) if addr is not None else None
        if m:
            out[-1][1][addr] = int(m[1], 16)
            addr = None
            continue
        m = FUNCTION.match(line)
        if m:
            out.append((m[1], {}))
    return out


def matches(function, pattern):
    """Whether the regex is found in the name, mangled or not."""
    return re.search(pattern, function.demangled) or re.search(pattern, function.name)


def load(path, pattern=None, arch="sm_90"):
    """Functions of a cubin, object, library or SASS text (with encodings) whose name matches."""
    data = read_bytes(path)
    texts = []
    if data[:4] != b"\x7fELF":
        texts.append((data.decode(errors="replace"), {}))
    else:
        with tempfile.TemporaryDirectory() as tmp:
            for cubin in cubins_of(path, tmp, arch, pattern):
                texts.append((output([find_tool("nvdisasm"), "-c", "-g", "-hex", cubin]), elf_facts(read_bytes(cubin))))
    found = []
    for text, facts in texts:
        words = dict(control_words(text))
        functions = parse_sass(text)
        for f in functions:
            f.control = words.get(f.name, {})
            f.facts = dict(facts.get(f.name, {}))
            if any(i.addr not in f.control for i in f.instrs):
                raise SystemExit(
                    f"sasstime: no encodings in the SASS of {f.name[:80]}: dump it with nvdisasm -hex or cuobjdump -sass"
                )
        found += functions
    for f, nice in zip(found, demangle([f.name for f in found]), strict=False):
        f.demangled = nice
    if pattern:
        found = [f for f in found if matches(f, pattern)]
    return found


class Mismatch(Exception):
    pass


class Path:
    """The instructions of one iteration of a loop after another, as one warp meets them.

    Conditional branches inside the loop follow `rules`. What is not covered by a rule
    is decided by `default` and listed in self.assumed.
    """

    def __init__(self, fn, graph, loop, rules, par):
        self.fn, self.graph, self.loop = fn, graph, loop
        self.ops = {i.addr: machine.decode(i, fn.control[i.addr], par) for i in fn.instrs}
        self.index = {i.addr: n for n, i in enumerate(fn.instrs)}
        self.block_at = {graph.blocks[b][0]: b for b in range(len(graph.blocks))}
        self.spin = set()
        for l in graph.loops:
            if l.spin and l is not loop:
                self.spin |= l.blocks
        self.rules, self.used, self.assumed, self.inner = rules, set(), {}, {}
        self.decisions = {b: self._decide(b) for b in loop.blocks if len(graph.succ[b]) > 1}

    def _reach(self, start):
        """Blocks of the loop reachable from start without passing its header."""
        out, stack = set(), [start]
        while stack:
            b = stack.pop()
            if b in out or b not in self.loop.blocks or b == self.loop.header:
                continue
            out.add(b)
            stack += list(self.graph.succ[b])
        return out

    def _decide(self, b):
        """-> (successor usually taken, successor taken every n-th time, n)"""
        succ = sorted(self.graph.succ[b])
        inside = [s for s in succ if s in self.loop.blocks and s not in self.spin]
        out_of_line = [s for s in inside if self._leads_to_spin(s)]
        inside = [s for s in inside if s not in out_of_line] or inside
        if len(inside) == 1:
            return inside[0], None, 0
        if not inside:
            raise Mismatch(f"block 0x{self._addr(b):x} leads nowhere in the loop")
        if self.loop.header in inside:  # a latch: go on
            return self.loop.header, None, 0
        inner = [
            s for s in inside if any(l.header == s and b in l.blocks and l is not self.loop for l in self.graph.loops)
        ]
        if inner:  # an inner loop: one trip
            return next(s for s in inside if s not in inner), None, 0
        a, c = inside[:2]
        ra, rc = self._reach(a), self._reach(c)
        only_a, only_c = ra - rc, rc - ra
        where = self._addr(b)
        for run, region, skip in ((a, only_a, c), (c, only_c, a)):
            if not region:
                continue
            w = self._weight(region)
            for n, rule in enumerate(self.rules):
                if self._matches(rule, w):
                    self.used.add(n)
                    every = rule.get("every", 1 if rule.get("run", True) else 0)
                    if every == 0:
                        return skip, None, 0
                    if every == 1:
                        return run, None, 0
                    return skip, run, every
        region, run, skip = (only_a, a, c) if only_a and (not only_c or len(only_a) <= len(only_c)) else (only_c, c, a)
        if only_a and only_c:
            self.assumed[where] = f"if-else: path 0x{self._addr(a):x} taken"
            return a, None, 0
        w = self._weight(region)
        skips = w["vector"] >= 16 and not w["sync"]
        self.assumed[where] = "%s %d instructions (%s)" % ("skips" if skips else "runs", w["count"], w["top"])
        return (skip if skips else run), None, 0

    def _leads_to_spin(self, s):
        seen = set()
        while s not in seen and len(self.graph.succ[s]) == 1:
            seen.add(s)
            if self._weight({s})["count"] > 6:
                return False
            s = next(iter(self.graph.succ[s]))
            if s in self.spin:
                return True
        return s in self.spin

    def _addr(self, b):
        return self.fn.instrs[self.graph.blocks[b][0]].addr

    def _weight(self, region):
        w = {"count": 0, "vector": 0, "sync": 0, "ops": {}}
        for b in region - self.spin:
            for i in self.graph.block_instrs(b):
                base = i.op.split(".")[0]
                w["count"] += 1
                w["ops"][base] = w["ops"].get(base, 0) + 1
                w["vector"] += base in machine.FMA or base in ("FMNMX", "MUFU", "F2FP", "FSEL", "IMAD", "ISETP", "SEL")
                w["sync"] += base in ("SYNCS", "BAR", "WARPGROUP") or base.endswith("GMMA")
        w["top"] = ", ".join("%d %s" % (n, o) for o, n in sorted(w["ops"].items(), key=lambda x: -x[1])[:3])
        return w

    @staticmethod
    def _matches(rule, w):
        """rule['has'] = {op: least count, '!op': greatest count}"""
        for op, n in rule["has"].items():
            count = w["ops"].get(op.lstrip("!"), 0)
            if (count > n) if op.startswith("!") else (count < n):
                return False
        return True

    def iteration(self, number):
        """Ops of iteration `number`, in order, with branch outcomes: [(op, taken)]."""
        out, b, guard = [], self.loop.header, 0
        counts = self.__dict__.setdefault("counts", {})
        while True:
            guard += 1
            if guard > 4000:
                raise Mismatch("the path through the loop does not come back to its header; an inner loop needs a rule")
            s, e = self.graph.blocks[b]
            succ = self.graph.succ[b]
            nxt = None
            if len(succ) == 1:
                nxt = next(iter(succ))
            elif b in self.decisions:
                usual, other, every = self.decisions[b]
                k = counts[b] = counts.get(b, 0) + 1
                nxt = other if every and k % every == 0 else usual
            if nxt is None:
                raise Mismatch(f"block 0x{self._addr(b):x} ends the path")
            for n in range(s, e):
                i = self.fn.instrs[n]
                last = n == e - 1
                out.append((self.ops[i.addr], last and nxt != b + 1))
            if nxt == self.loop.header:
                return out
            b = nxt

    def check_rules(self):
        for n, rule in enumerate(self.rules):
            if n not in self.used and not rule.get("optional"):
                raise Mismatch(f"no branch of the loop matches rule {rule!r}: the description is stale")
