"""The results file: one dictionary, rewritten atomically, so that a killed run leaves a valid file with what it had."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

from .schema import SCHEMA, finite, validate


def utc_now() -> str:
    """ISO 8601 in UTC, to the second."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def repository_state(root: Path) -> dict[str, Any]:
    """Commit and cleanliness of the checkout. FPSATTN_COMMIT names the commit where there is no git (and wins where there is)."""
    if os.environ.get("FPSATTN_COMMIT"):
        return {"commit": os.environ["FPSATTN_COMMIT"], "dirty": None, "source": "FPSATTN_COMMIT"}

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()

    try:
        dirty = bool(git("status", "--porcelain", "--untracked-files=no"))
        return {"commit": git("rev-parse", "HEAD"), "dirty": dirty, "source": "git"}
    except (OSError, subprocess.SubprocessError) as error:
        return {"commit": "unknown", "dirty": None, "source": f"unknown: {type(error).__name__}; set FPSATTN_COMMIT"}


class Results:
    """``data`` is the file's content. ``save`` writes it as a whole: a temporary file, fsync, rename."""

    def __init__(self, path: Path, data: dict[str, Any]):
        self.path = path
        self.data = data
        self._case_index = {(case["part"], case["id"]): i for i, case in enumerate(data["cases"])}

    @classmethod
    def create(cls, path: Path, *, mode: str, command: str, root: Path) -> Results:
        data = {
            "schema": SCHEMA, "state": "running", "mode": mode, "timings_meaningless": mode == "dry",
            "started": utc_now(), "finished": None, "command": command, "repository": repository_state(root),
            "environment": {}, "telemetry": {}, "ceilings": {}, "parts": [], "cases": [],
        }  # fmt: skip
        results = cls(path, data)
        results.save()
        return results

    @classmethod
    def load(cls, path: Path) -> Results:
        """Reads a file and checks it. ValueError with every problem when it is not valid."""
        data = json.loads(path.read_text())
        problems = validate(data)
        if problems:
            raise ValueError(f"{path}: " + "; ".join(problems[:5]))
        return cls(path, data)

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        with open(temporary, "w") as file:
            json.dump(finite(self.data), file, indent=1, allow_nan=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.path)

    def part(self, name: str) -> dict[str, Any]:
        """The record of a part, made on first use."""
        for record in self.data["parts"]:
            if record["name"] == name:
                return record
        record = {
            "name": name, "title": name, "status": "pending", "reason": None, "seconds": 0.0, "limit_s": None,
            "correctness": False, "log_tail": None,
        }  # fmt: skip
        self.data["parts"].append(record)
        return record

    def add_case(self, case: dict[str, Any]) -> None:
        """Adds a case; a later one of the same part and id replaces the earlier (a unit run again after a crash).

        Only a crash stays: that its culprit was left out of the second try is no news, and must not hide it.
        """
        key = (case["part"], case["id"])
        if (
            key in self._case_index
            and case["status"] == "skipped"
            and self.data["cases"][self._case_index[key]]["status"] == "crashed"
        ):
            return
        if key in self._case_index:
            self.data["cases"][self._case_index[key]] = case
        else:
            self._case_index[key] = len(self.data["cases"])
            self.data["cases"].append(case)

    def cases(self, part: str) -> list[dict[str, Any]]:
        return [case for case in self.data["cases"] if case["part"] == part]

    def incorrect(self) -> list[dict[str, Any]]:
        """Cases that found this library wrong."""
        return [case for case in self.data["cases"] if case.get("correct") is False]

    def checked(self) -> int:
        """Number of cases that found this library right or wrong."""
        return sum(case.get("correct") is not None for case in self.data["cases"])
