"""Kernel microbenchmarks: the executables of benchmarks/cpp, one JSON line per case, and this board's own ceilings."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..context import Context, Skip, Unit, describe_status, tail
from .cpp_tests import executables

NAME, TITLE = "kernels", "kernel microbenchmarks"
WEIGHTS = {"quick": 50.0, "full": 150.0, "dry": 5.0}
CORRECTNESS = False
OWN_CODE = True
GEMM = 8192
SKIP_CODE = 77  # a benchmark's exit status where there is no device, as ctest has it


def measure_ceilings(context: Context) -> None:
    """What this board reaches on plain work: a copy, a BF16 and an FP8 matrix product, on random data.

    Copy: bytes read plus bytes written. They are the roof of the roofline; a kernel is held against them, not a datasheet.
    """
    import torch

    from .. import timing

    device = context.device
    n, elements = (256, 1 << 16) if context.dry else (GEMM, 1 << 30)
    source = [torch.randn(elements, device=device, dtype=torch.bfloat16) for _ in range(2)]
    target = torch.empty_like(source[0])
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    a8, b8 = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)
    one = torch.ones((), device=device)
    calls = {
        "copy": lambda turn: target.copy_(source[turn % 2]),
        "bf16-gemm": lambda turn: a @ b,
        "fp8-gemm": lambda turn: torch._scaled_mm(
            a8, b8.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True
        ),
    }
    failed: dict[str, str] = {}
    times = timing.interleaved(
        calls, device, 0.05 if context.dry else 2.0, max_repeats=20,
        on_error=lambda name, error: failed.update({name: f"{type(error).__name__}: {error}"[:300]}),
    )  # fmt: skip
    units = {
        "copy": (2 * source[0].nbytes / 1e9, "GB/s"),
        "bf16-gemm": (2 * n**3 / 1e12, "TFLOP/s"),
        "fp8-gemm": (2 * n**3 / 1e12, "TFLOP/s"),
    }
    for name, summary in times.items():
        amount, unit = units[name]
        value = amount / (summary["median"] / 1e3)
        context.journal.event("ceiling", name=name, value=value, unit=unit)
        context.journal.case(f"ceiling/{name}", kind="ceiling", time_ms=summary, rate={"value": value, "unit": unit})
    for name, reason in failed.items():
        context.journal.case(f"ceiling/{name}", "failed", kind="ceiling", reason=reason)


def parse_lines(output: str) -> list[dict[str, Any]]:
    """The JSON objects among the lines of a program's output."""
    found = []
    for line in output.splitlines():
        if line.startswith("{"):
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
    return found


def time_of(record: dict[str, Any]) -> dict[str, Any] | None:
    """{min, median, max, repeats} of a benchmark line, which has ``"ms": {"min", "median", "max"}``; None without."""
    given = record.get("ms")
    if isinstance(given, dict) and {"min", "median", "max"} <= given.keys():
        return {"repeats": record.get("repeats", 1), **given}
    return None


def case_name(record: dict[str, Any], position: int) -> str:
    """A name for a line: its place in the output and its own ``case``; one name may come several times."""
    return f"{position:02d}-{record.get('case') or record.get('name') or 'case'}"


def units(context: Context) -> Iterator[Unit]:
    try:
        import torch
    except ImportError as error:
        raise Skip(f"no torch: {error}") from error
    if context.dry or torch.cuda.is_available():
        yield Unit("ceilings", lambda: measure_ceilings(context), estimate_s=0.5 if context.dry else 8.0)
    build = context.find_build_dir()
    programs = [path for path in executables(build / "benchmarks") if path.name.startswith("bench_")] if build else []
    if not programs:
        context.journal.case(
            "programs", "skipped", reason="no bench_* executables: see part `build`, or give --build-dir"
        )
        return
    if context.dry and not context.emulator:
        context.journal.case("programs", "skipped", reason="a dry run has no GPU and no FPSATTN_EMULATOR was given")
        return

    def run(program: Path, share_s: float) -> None:
        # --small: one tiny case; its times mean nothing under an emulator.
        argv = [*context.launcher(), str(program)] + (["--small"] if context.dry else [])
        status, output = context.command(argv, f"{program.name}.txt", share_s, cwd=program.parent)
        records = parse_lines(output)
        for position, record in enumerate(records):
            case_id = f"{program.name}/{case_name(record, position)}"
            context.journal.case(case_id, kind="kernel", program=program.name, time_ms=time_of(record), record=record)
        if status == SKIP_CODE:
            context.journal.case(
                program.name, "skipped", kind="kernel", reason=tail(output, 2, 300) or "it found no device"
            )
        elif status != 0 or not records:
            what = describe_status(status) if status != 0 else "printed no line of JSON"
            crashed = status is not None and status < 0
            context.journal.case(
                program.name, "skipped" if status is None else "failed", kind="kernel", reason=f"{what}: {tail(output, 4, 600)}",
                correct=False if crashed else None, log_tail=tail(output),
            )  # fmt: skip

    for position, program in enumerate(programs):

        def begin(program: Path = program, left: int = len(programs) - position) -> None:
            run(program, max(2.0, context.remaining() - 1) / left if left > 1 else context.remaining() - 1)

        yield Unit(program.name, begin, estimate_s=2.0)
