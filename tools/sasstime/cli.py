"""The command line, and the checks that set its exit status."""

import argparse
import json
import sys

from sassbudget.report import clip, short

from . import machine, sass
from .item import linear
from .picture import draw
from .predict import fail, predict, read_description
from .report import describe_op, show, stall_table

# H20: 148 TFLOP/s at 16 bits from 78 SMs at 1.98 GHz.
GPUS = {"h100": {}, "h200": {}, "h20": {"sms": 78, "tensor_rate": 0.234, "clock": 1.98}}


def parser():
    p = argparse.ArgumentParser(
        prog="sasstime", description="How long one SM of a Hopper GPU takes for a main loop, and why. See README.md."
    )
    p.add_argument("file", help="cubin, .o, .so or SASS text with encodings")
    p.add_argument("-k", "--kernel", help="regex on the kernel name (default: that of the description)")
    p.add_argument("-d", "--description", help="a name in kernels/, or a TOML file")
    p.add_argument("--gpu", choices=sorted(GPUS), default="h100")
    p.add_argument("--clock", type=float, help="GHz")
    p.add_argument("--sms", type=int)
    p.add_argument(
        "--what-if", action="append", default=[], metavar="NAME=VALUE", help=" ".join(sorted(machine.DEFAULTS))
    )
    p.add_argument(
        "--every", action="append", default=[], metavar="RULE=N", help="branch rule by name: every N-th time"
    )
    p.add_argument("--no-order", action="store_true", help="ignore the order barriers")
    p.add_argument("--iterations", type=int, default=20)
    p.add_argument("--top", type=int, default=14)
    p.add_argument("--width", type=int, default=110)
    p.add_argument("--json", action="store_true")
    p.add_argument("--picture", metavar="FILE", help="the timeline as .png or .svg (needs matplotlib; one kernel)")
    p.add_argument("--item", action="store_true", help="the cost of a whole work item too (the description's [item])")
    p.add_argument("--min-tensor-utilization", type=float, metavar="PERCENT")
    p.add_argument("--max-clocks", type=float, metavar="CLOCKS")
    return p


def parameters(args):
    par = dict(machine.DEFAULTS)
    par.update(GPUS[args.gpu])
    if args.clock:
        par["clock"] = args.clock
    if args.sms:
        par["sms"] = args.sms
    for w in args.what_if:
        name, _, value = w.partition("=")
        if name not in par:
            fail(f"--what-if {name}: no such parameter")
        par[name] = float(value)
    return par


def main(argv=None):
    args = parser().parse_args(argv)
    args.par = parameters(args)
    description = read_description(args.description)
    for e in args.every:
        name, _, value = e.partition("=")
        rules = [r for r in description.get("consumer", {}).get("branch", []) if r.get("name") == name]
        if not rules:
            fail(f"--every {name}: the description has no such branch rule")
        rules[0]["every"] = int(value)
    pattern = args.kernel or description.get("kernel")
    functions = sass.load(args.file, pattern)
    functions = [f for f in functions if any(i.op.split(".")[0].endswith("GMMA") for i in f.instrs)]
    if not functions:
        fail(f"no kernel with WGMMA in {args.file} matches {pattern}")
    bad, results = [], []
    for fn in functions:
        try:
            model, out, run = predict(fn, description, args.par, args.iterations, not args.no_order)
        except sass.Mismatch as e:
            fail(f"{clip(short(fn.demangled), 80)} does not match the description: {e}")
        out["kernel"] = fn.demangled
        if args.picture:
            draw(model, out, run, args.picture)
        if args.item:
            if "item" not in description:
                fail(f"--item: {args.description} has no [item]")
            out["item_clocks"], out["block_clocks"] = linear(fn, description, args.par)
        if args.json:
            out["stalls"] = [
                {"clocks": n, "address": a, "reason": r, "instruction": describe_op(fn, a)}
                for n, a, r in stall_table(model, run, args.top)
            ]
            out["assumed"] = {hex(a): t for a, t in model.path.assumed.items()}
            results.append(out)
        else:
            show(model, out, run, args)
            if args.item:
                print(f"  item of n blocks: {out['item_clocks']:.0f} + {out['block_clocks']:.0f} n clocks\n")
        if args.max_clocks and out["clocks"] > args.max_clocks:
            bad.append("{:.0f} clocks per iteration, allowed {:.0f}".format(out["clocks"], args.max_clocks))
        if args.min_tensor_utilization and 100 * out["tensor_utilization"] < args.min_tensor_utilization:
            bad.append(
                "tensor utilization {:.1f} %, expected {:.1f}".format(
                    100 * out["tensor_utilization"], args.min_tensor_utilization
                )
            )
    if args.json:
        print(json.dumps(results, indent=1))
    for b in bad:
        sys.stderr.write(f"sasstime: FAIL {b}\n")
    return 1 if bad else 0
