"""``python -m benchmarks.suite``, called by benchmarks/run_gpu_suite.sh."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import tarfile
import time
from pathlib import Path

from . import parts
from .context import REPOSITORY
from .results import Results
from .runner import STALL_S, TOTAL_S, Options, Runner


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="benchmarks/run_gpu_suite.sh",
        description="Checks correctness and measures this library and its peers on one Hopper GPU, in one run. "
        "Exit status: 0 right, 1 something is wrong, 2 usage, 3 nothing could be checked, 130/143 stopped.",
    )
    mode = p.add_mutually_exclusive_group()
    mode.add_argument(
        "--quick", dest="mode", action="store_const", const="quick", help="at most 8 minutes (the default)"
    )
    mode.add_argument("--full", dest="mode", action="store_const", const="full", help="at most 25 minutes")
    mode.add_argument(
        "--dry-run",
        dest="mode",
        action="store_const",
        const="dry",
        help="tiny sizes on the CPU; its times mean nothing",
    )
    p.set_defaults(mode="quick")
    p.add_argument("--out", type=Path, help="results folder (build-bench/<time> by default)")
    p.add_argument("--scratch", type=Path, help="logs, raw lines and builds (OUT/scratch by default)")
    p.add_argument("--resume", action="store_true", help="go on with the results.json in --out: same commit, same GPU")
    p.add_argument("--parts", help=f"only these, of {','.join(parts.ORDER)}")
    p.add_argument("--skip", help="not these parts")
    p.add_argument("--build-dir", type=Path, help="prebuilt executables; also FPSATTN_BENCH_BUILD")
    p.add_argument("--hopper-facts", type=Path, help="program that measures hardware facts; also FPSATTN_HOPPER_FACTS")
    p.add_argument("--peers-file", type=Path, action="append", default=[], help="a Python file with more PEERS")
    p.add_argument("--only-peers", help="only these peers, by name")
    p.add_argument("--time-limit", type=float, help="seconds for the whole run instead of the mode's own")
    p.add_argument("--stall-limit", type=float, help="seconds without a sign of life after which a worker is ended")
    p.add_argument("--list", action="store_true", help="list parts and peers, measure nothing")
    return p


def names_of(text: str | None, known: list[str], what: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()] if text else []
    for name in names:
        if name not in known:
            raise SystemExit(f"run_gpu_suite.sh: {what} {name!r} came, one of {', '.join(known)} was wanted")
    return names


def pack_logs(out: Path, scratch: Path) -> None:
    """One archive of logs, raw lines and telemetry: easy to carry away."""
    with tarfile.open(out / "logs.tar.gz", "w:gz") as archive:
        for name in ("logs", "raw", "telemetry"):
            if (scratch / name).is_dir():
                archive.add(scratch / name, arcname=name)


def write_report(out: Path) -> None:
    try:
        from benchmarks.report import markdown
        from benchmarks.reporting.load import load

        text = markdown(load([out / "results.json"]))
        (out / "report.md").write_text(text)
        print(text)
    except Exception as error:  # a report that fails must not hide the results
        print(f"report: {type(error).__name__}: {error} (python -m benchmarks.report {out / 'results.json'})")


def main(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    order = list(parts.ORDER)
    if args.list:
        for name in order:
            module = parts.load(name)
            print(
                f"{name:13} {module.TITLE} (quick {module.WEIGHTS['quick']:.0f} s, full {module.WEIGHTS['full']:.0f} s)"
            )
        return 0
    chosen = names_of(args.parts, order, "part") or order
    skipped = names_of(args.skip, order, "part")
    out = (args.out or REPOSITORY / "build-bench" / time.strftime("%Y%m%d-%H%M%S", time.gmtime())).resolve()
    scratch = (args.scratch or out / "scratch").resolve()
    out.mkdir(parents=True, exist_ok=True)
    path = out / "results.json"
    command = "benchmarks/run_gpu_suite.sh " + shlex.join(argv)
    if args.resume and path.exists():
        results = Results.load(path)
        fresh = Results.create(path.with_name("results.new.json"), mode=args.mode, command=command, root=REPOSITORY)
        fresh.path.unlink()
        if (results.data["mode"], results.data["repository"]["commit"]) != (
            args.mode,
            fresh.data["repository"]["commit"],
        ):
            raise SystemExit("run_gpu_suite.sh: --resume: the results in --out are of another mode or commit")
        results.data["state"] = "running"
    elif path.exists():
        raise SystemExit(f"run_gpu_suite.sh: {path} exists: --resume, or another --out")
    else:
        results = Results.create(path, mode=args.mode, command=command, root=REPOSITORY)
    build_dir = args.build_dir or (
        Path(os.environ["FPSATTN_BENCH_BUILD"]) if os.environ.get("FPSATTN_BENCH_BUILD") else None
    )
    emulator = os.environ.get("FPSATTN_EMULATOR") if args.mode == "dry" else None
    options = Options(
        mode=args.mode, out=out, scratch=scratch, parts=[name for name in order if name in chosen and name not in skipped],
        total_s=args.time_limit or TOTAL_S[args.mode], stall_s=args.stall_limit or STALL_S[args.mode],
        settings={
            "build_dir": str(build_dir.resolve()) if build_dir else None,
            "hopper_facts": str(args.hopper_facts.resolve()) if args.hopper_facts else None, "emulator": emulator,
            "peers_files": [str(file.resolve()) for file in args.peers_file],
            "only_peers": [name.strip() for name in (args.only_peers or "").split(",") if name.strip()],
        },
    )  # fmt: skip
    status = Runner(options, results).run()
    write_report(out)
    pack_logs(out, scratch)
    for case in results.incorrect():
        print(f"WRONG: {case['part']}: {case['id']}: {case['reason']}")
    meaning = {0: "right", 1: "something is wrong", 3: "nothing was checked right or wrong"}.get(status, "stopped")
    print(
        f"{path}: {results.data['state']}; {results.checked()} checks, {len(results.incorrect())} wrong; exit status {status} ({meaning})"
    )
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
