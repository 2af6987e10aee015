"""Hardware facts: an optional program that measures what the kernels' design hangs on (pipes, WGMMA rates, L2, clocks).

It is no part of this repository: FPSATTN_HOPPER_FACTS or --hopper-facts names its executable, which takes
``--out FILE [--quick]`` and writes a JSON file. It runs first, on a cool and idle GPU.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..context import Context, Skip, Unit, describe_status, tail

NAME, TITLE = "facts", "hardware facts"
WEIGHTS = {"quick": 60.0, "full": 120.0, "dry": 1.0}
CORRECTNESS = False
OWN_CODE = False


def summarize(document: Any) -> dict[str, Any]:
    """The rows of a facts file as {name: {value, unit}}; empty where its form is not the one known here."""
    rows = document.get("rows", []) if isinstance(document, dict) else document
    named = (
        [row for row in rows if isinstance(row, dict) and "id" in row and "value" in row]
        if isinstance(rows, list)
        else []
    )
    return {row["id"]: {"value": row["value"], "unit": row.get("unit", "")} for row in named}


def units(context: Context) -> Iterator[Unit]:
    if context.dry:
        raise Skip("a dry run has no hardware to measure")
    present = context.out / "facts.json"
    if present.exists():
        raise Skip(f"{present} is there already")
    given = context.hopper_facts or (
        Path(os.environ["FPSATTN_HOPPER_FACTS"]) if os.environ.get("FPSATTN_HOPPER_FACTS") else None
    )
    if given is None:
        raise Skip("no program was given: --hopper-facts PATH or FPSATTN_HOPPER_FACTS")
    if not os.access(given, os.X_OK):
        raise Skip(f"{given} is not an executable file")

    def run() -> None:
        argv = [str(given), "--out", str(present)] + (["--quick"] if context.mode == "quick" else [])
        status, output = context.command(argv, "facts.txt", context.remaining() - 2)
        found = summarize(json.loads(present.read_text())) if present.exists() else {}
        if status == 0:
            context.journal.case("facts", facts=found, file=present.name)
        else:
            reason = f"{describe_status(status)}: {tail(output, 3)}"
            context.journal.case("facts", "failed", reason=reason, facts=found)

    yield Unit("facts", run, estimate_s=10.0)
