"""SASS text, of nvdisasm or cuobjdump, as functions made of instructions."""

import collections
import re

Instr = collections.namedtuple("Instr", "addr pred op args targets src live")
_INSTR = re.compile(
    r"^\s*/\*([0-9a-f]{4,})\*/\s+\{?\s*(@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*(?:\.[\w~]+)*)"
    r"\s*(.*?)\s*;"
)
_ARCH = re.compile(r"^\s*(?:\.target\s+|code for |arch = )(sm_\w+)")
FUNCTION = re.compile(r"\s*(?:Function : |\.section\s+\.text\.)([^,\s]+)")
_LABEL = re.compile(r"^\s*([.$\w@]+):\s*(?://.*)?$")
_TARGET = re.compile(r"`\(([^)]+)\)")
_SOURCE = re.compile(r'//## File "([^"]+)", line (\d+)')
_LIVE = re.compile(r"//\s*\|\s*(\d*)\s*\|")


class Function:
    def __init__(self, name):
        self.name, self.instrs, self.labels = name, [], {}
        self.arch, self.facts, self.demangled = "", {}, name


def parse_sass(text):
    """Parse nvdisasm (labels) or cuobjdump -sass (absolute targets) text into Functions."""
    functions, fn, pending, src, arch = [], None, [], None, ""
    for line in text.splitlines():
        m = _INSTR.match(line) if fn else None  # most lines are one
        if m:
            addr = int(m[1], 16)
            for label in pending:
                fn.labels[label] = addr
            pending = []
            op, args = m[3], m[4]
            targets = _TARGET.findall(args)
            if "BRANCH_TARGETS" in args:
                targets = re.findall(r"\.L\w+", args.split("BRANCH_TARGETS", 1)[1])
            live = _LIVE.search(line)
            fn.instrs.append(
                Instr(addr, (m[2] or "").strip(), op, args, targets, src, int(live[1]) if live and live[1] else None)
            )
            continue
        m = _ARCH.search(line)
        if m:
            arch = m[1]
        m = FUNCTION.match(line)
        if m:
            fn = Function(m[1])
            fn.arch = arch
            functions.append(fn)
            pending, src = [], None
            continue
        if fn is None:
            continue
        m = _SOURCE.search(line)
        if m:
            src = (m[1], int(m[2]))
            continue
        m = _LABEL.match(line)
        if m:
            pending.append(m[1])
    for fn in functions:
        while fn.instrs and fn.instrs[-1].op == "NOP":  # section padding
            fn.instrs.pop()
    return [fn for fn in functions if fn.instrs]
