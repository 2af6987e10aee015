"""The command line, and the checks that set its exit status."""

import argparse
import json
import subprocess
import sys

from .binary import WHEELS, fail, load
from .budget import analyse
from .model import RATES
from .report import clip, print_diff, print_kernel, short, show_loop

DESCRIPTION = "A static throughput budget for every loop of a compiled CUDA kernel."


def check(kernels, args):
    bad = []

    def expect(ok, k, text):
        if not ok:
            bad.append("{}: {}".format(clip(short(k["name"]), 90), text))

    for k in kernels:
        spills = k["spill_loads"] + k["spill_stores"]
        hot = [l for l in k["loops"] if l["role"] in ("mma", "math")]
        if args.max_spills is not None:
            expect(spills <= args.max_spills, k, "%d spill instructions, allowed %d" % (spills, args.max_spills))
        if args.max_loop_spills is not None:
            worst = max([l["spills"] for l in hot] or [0])
            expect(
                worst <= args.max_loop_spills,
                k,
                "%d spill instructions in a hot loop, allowed %d" % (worst, args.max_loop_spills),
            )
        for what, limit in (("registers", args.max_regs), ("stack", args.max_stack)):
            if limit is not None:
                expect(k[what] is not None and k[what] <= limit, k, "%s %s, allowed %d" % (what, k[what], limit))
        for op in filter(None, (args.require or "").split(",")):
            expect(any(o.startswith(op) for o in k["opcodes"]), k, f"no {op} instruction")
        for op in filter(None, (args.forbid or "").split(",")):
            expect(not any(o.startswith(op) for o in k["opcodes"]), k, f"has a {op} instruction")
        if args.min_tflops is not None:
            best = max([l["bound_tflops"] or 0 for l in k["loops"]] or [0])
            expect(best >= args.min_tflops, k, f"upper bound {best:.0f} TFLOP/s, expected {args.min_tflops:.0f}")
    return bad


def parser():
    p = argparse.ArgumentParser(prog="sassbudget", description=DESCRIPTION)
    p.add_argument("file", nargs="?", help="cubin, .o, .so, executable, or SASS text")
    p.add_argument("-k", "--kernel", help="only kernels whose name matches this regex")
    p.add_argument(
        "-n",
        "--warpgroups",
        type=int,
        help="warpgroups running the loop at once on one SM (default: from launch bounds)",
    )
    p.add_argument("--clock", type=float, default=1.755, help="GHz (default 1.755)")
    p.add_argument("--sms", type=int, default=132, help="SM count (default 132)")
    p.add_argument("--arch", default="sm_90", help="code to pick from a fat binary (default sm_90)")
    p.add_argument(
        "--rate",
        action="append",
        default=[],
        metavar="NAME=LANES",
        help="override a rate, lanes/clk/SM: {}".format(" ".join(sorted(RATES))),
    )
    p.add_argument(
        "--all-paths", action="store_true", help="count conditional blocks too (then the bound is not a lower bound)"
    )
    p.add_argument(
        "--add-loop",
        type=int,
        action="append",
        default=[],
        metavar="I",
        help="charge loop I (say, a producer that transposes) to every mma iteration",
    )
    p.add_argument("--loop-top", type=int, default=1, metavar="K", help="loops to detail (default 1)")
    p.add_argument("--show-loop", type=int, metavar="I", help="print loop I, annotated")
    p.add_argument("--no-live", dest="live", action="store_false", help="skip live-register counts")
    p.add_argument("--width", type=int, default=110, help="columns for names and lists (default 110)")
    p.add_argument("--json", action="store_true")
    p.add_argument("--diff", nargs=2, metavar=("A", "B"), help="compare two builds")
    p.add_argument("--setup", action="store_true", help="pip install the disassemblers, then stop")
    g = p.add_argument_group("checks (exit 1 when one fails)")
    g.add_argument("--max-spills", type=int)
    g.add_argument("--max-loop-spills", type=int)
    g.add_argument("--max-regs", type=int)
    g.add_argument("--max-stack", type=int)
    g.add_argument("--require", metavar="OPS", help="opcodes that must occur, comma separated")
    g.add_argument("--forbid", metavar="OPS", help="opcodes that must not occur")
    g.add_argument("--min-tflops", type=float, help="least upper bound of the best loop")
    return p


def main(argv=None):
    args = parser().parse_args(argv)
    args.rates = dict(RATES)
    for r in args.rate:
        name, _, value = r.partition("=")
        if name not in RATES or not value.replace(".", "", 1).isdigit() or float(value) <= 0:
            fail("--rate wants NAME=LANES with NAME one of {}".format(" ".join(sorted(RATES))))
        args.rates[name] = float(value)
    if args.setup:
        cmd = [sys.executable, "-m", "pip", "install"] + WHEELS
        print(" ".join(["python3"] + cmd[1:]), flush=True)
        return subprocess.call(cmd)
    if args.diff:
        a, b = ([analyse(f, args)[0] for f in load(path, args)] for path in args.diff)
        if args.json:
            print(json.dumps({"a": a, "b": b}, indent=1))
        else:
            print_diff(a, b, args)
        kernels = b
    else:
        if not args.file:
            parser().error("a file is needed")
        pairs = [analyse(f, args) for f in load(args.file, args)]
        kernels = [k for k, _ in pairs]
        if args.show_loop is not None:
            if len(pairs) > 1:
                fail("--show-loop wants one kernel; %d match, narrow with -k" % len(pairs))
            show_loop(pairs[0][1], args.show_loop, args)
        elif args.json:
            print(json.dumps(kernels, indent=1))
        else:
            for n, k in enumerate(kernels):
                print_kernel(k, n, args)
    bad = check(kernels, args)
    for line in bad:
        sys.stderr.write(f"sassbudget: FAIL {line}\n")
    return 1 if bad else 0
