"""What a results file is: ``fpsattn-bench/1``. benchmarks/README.md says the same in prose.

A file is valid at every moment of a run: the runner rewrites it as a whole after each case.
"""

from __future__ import annotations

import math
from typing import Any

SCHEMA = "fpsattn-bench/1"
MODES = ("quick", "full", "dry")
STATES = ("running", "complete", "interrupted")
PART_STATUSES = ("pending", "running", "ok", "failed", "skipped", "timeout", "interrupted")
CASE_STATUSES = ("ok", "passed", "failed", "crashed", "absent", "skipped")

# Dense BF16 implementations: the fastest of those measured together is what speed-ups are counted from.
BASELINES = ("sdpa-cudnn", "sdpa-flash", "fa3-bf16", "sdpa-math")

_TOP = {
    "schema": str, "state": str, "mode": str, "timings_meaningless": bool, "started": str, "command": str,
    "repository": dict, "environment": dict, "telemetry": dict, "ceilings": dict, "parts": list, "cases": list,
}  # fmt: skip
_PART = {"name": str, "title": str, "status": str, "seconds": (int, float), "limit_s": (int, float, type(None))}
_CASE = {"part": str, "id": str, "status": str}
_TIME = ("min", "median", "max", "repeats")


def new_case(part: str, case_id: str, status: str = "ok", **fields: Any) -> dict[str, Any]:
    """A case with the keys that every case has. ``correct`` is None where the case says nothing about right or wrong."""
    return {"part": part, "id": case_id, "status": status, "reason": None, "correct": None, **fields}


def _check(where: str, value: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    problems = []
    for key, kind in wanted.items():
        if key not in value:
            problems.append(f"{where}: no {key!r}")
        elif not isinstance(value[key], kind):
            problems.append(f"{where}.{key}: {type(value[key]).__name__} came, {kind} was wanted")
    return problems


def _check_case(where: str, case: dict[str, Any]) -> list[str]:
    problems = _check(where, case, _CASE)
    if case.get("status") not in CASE_STATUSES:
        problems.append(f"{where}.status: {case.get('status')!r} came, one of {CASE_STATUSES} was wanted")
    if case.get("status") in ("failed", "crashed", "absent", "skipped") and not case.get("reason"):
        problems.append(f"{where}: status {case['status']!r} without a reason")
    time_ms = case.get("time_ms")
    if time_ms is not None:
        missing = [key for key in _TIME if key not in time_ms]
        if missing:
            problems.append(f"{where}.time_ms: no {', '.join(missing)}")
        elif not time_ms["min"] <= time_ms["median"] <= time_ms["max"]:
            problems.append(f"{where}.time_ms: min <= median <= max does not hold: {time_ms}")
    return problems


def validate(results: dict[str, Any]) -> list[str]:
    """Everything that is wrong with a results file, as sentences; empty when it is valid."""
    if results.get("schema") != SCHEMA:
        return [f"schema: {results.get('schema')!r} came, {SCHEMA!r} was wanted"]
    problems = _check("results", results, _TOP)
    if problems:
        return problems
    if results["state"] not in STATES:
        problems.append(f"state: {results['state']!r} came, one of {STATES} was wanted")
    if results["mode"] not in MODES:
        problems.append(f"mode: {results['mode']!r} came, one of {MODES} was wanted")
    if results["mode"] == "dry" and not results["timings_meaningless"]:
        problems.append("timings_meaningless: must be true for a dry run")
    for index, part in enumerate(results["parts"]):
        problems += _check(f"parts[{index}]", part, _PART)
        if part.get("status") not in PART_STATUSES:
            problems.append(f"parts[{index}].status: {part.get('status')!r} came, one of {PART_STATUSES} was wanted")
        if part.get("status") in ("skipped", "failed", "timeout") and not part.get("reason"):
            problems.append(f"parts[{index}]: status {part['status']!r} without a reason")
    seen = set()
    for index, case in enumerate(results["cases"]):
        problems += _check_case(f"cases[{index}]", case)
        key = (case.get("part"), case.get("id"))
        if key in seen:
            problems.append(f"cases[{index}]: second case of the name {key}")
        seen.add(key)
    return problems


def finite(value: Any) -> Any:
    """``value`` with every NaN and infinity replaced by a string: strict JSON has neither."""
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value
