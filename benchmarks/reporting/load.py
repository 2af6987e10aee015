"""Reads results files and answers the questions that tables and plots ask of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.suite.schema import BASELINES, validate

DRY = "DRY RUN: TIMINGS ARE MEANINGLESS"


@dataclass
class Report:
    """One or more results files of the same kind: all dry or none."""

    files: list[dict[str, Any]]

    @property
    def dry(self) -> bool:
        return any(data["timings_meaningless"] for data in self.files)

    def label(self) -> str:
        """GPU, date and commit, for under a table or a plot."""
        parts = []
        for data in self.files:
            gpu = (data["environment"].get("gpu") or {}).get("name") or "no GPU"
            commit = data["repository"]["commit"][:10] + ("+changes" if data["repository"]["dirty"] else "")
            state = "" if data["state"] == "complete" else f", run {data['state']}"
            parts.append(f"{gpu}, {data['started'][:10]}, commit {commit}{state}")
        text = "; ".join(dict.fromkeys(parts))
        return f"{DRY}. {text}" if self.dry else text

    def cases(self, part: str, kind: str | None = None, *, status: str | None = "ok") -> list[dict[str, Any]]:
        """Cases of a part over all files; of the same id, the last file's."""
        found: dict[str, dict[str, Any]] = {}
        for data in self.files:
            for case in data["cases"]:
                if (
                    case["part"] == part
                    and (kind is None or case.get("kind") == kind)
                    and status in (None, case["status"])
                ):
                    found[case["id"]] = case
        return list(found.values())

    def comparisons(self, kind: str) -> Iterator[tuple[str, list[dict[str, Any]]]]:
        """(name of the comparison, its measured cases), in the order in which they ran."""
        groups: dict[str, list[dict[str, Any]]] = {}
        for case in self.cases("peers", kind):
            groups.setdefault(case["id"].rsplit("/", 1)[0], []).append(case)
        yield from groups.items()

    def ceilings(self) -> dict[str, dict[str, Any]]:
        merged: dict[str, dict[str, Any]] = {}
        for data in self.files:
            merged.update(data["ceilings"])
        return merged


def baseline_of(cases: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The fastest dense BF16 implementation among cases measured together; None where none was."""
    dense = [case for case in cases if case["implementation"] in BASELINES]
    return min(dense, key=lambda case: case["time_ms"]["median"]) if dense else None


def load(paths: list[Path]) -> Report:
    """Reads and checks. ValueError on an invalid file, or when dry and measured files are mixed."""
    files = []
    for path in paths:
        data = json.loads(Path(path).read_text())
        problems = validate(data)
        if problems:
            raise ValueError(f"{path}: " + "; ".join(problems[:5]))
        files.append(data)
    if len({data["timings_meaningless"] for data in files}) > 1:
        raise ValueError("dry-run and measured results came together: report them apart")
    return Report(files)
