"""Hardware facts: what the kernels' design hangs on (pipes, WGMMA rates, L2, clocks), measured by tools/hopper-facts on an idle GPU."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from .plugin import REPOSITORY

BUILT = REPOSITORY / "build/hopper-facts/static/hopper-facts"


def rows_of(document: object) -> dict[str, list[object]]:
    """The rows of a facts file as {name: [value, unit]}. ValueError where its form is not the one known here."""
    rows = document.get("rows") if isinstance(document, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) and {"id", "value"} <= row.keys() for row in rows):
        raise ValueError("no list of rows with an id and a value")
    return {row["id"]: [row["value"], row.get("unit", "")] for row in rows}


def test_facts(bench, record, request, tmp_path: Path) -> None:
    if bench["mode"] == "dry":
        pytest.skip("a dry run has no hardware to measure")
    program = request.config.option.hopper_facts or BUILT
    if not os.access(program, os.X_OK):
        pytest.skip(f"no executable {program}: tools/hopper-facts/build.sh builds it, --hopper-facts names another")
    out = tmp_path / "facts.json"
    quick = ["--quick"] if bench["mode"] == "quick" else []
    run = subprocess.run([program, "--out", out, *quick], capture_output=True, text=True, timeout=200)
    if out.exists():
        record("facts", rows=rows_of(json.loads(out.read_text())))
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
