"""The supervisor: runs each part in a process of its own, follows its journal, keeps the results file and the clock.

Nothing here imports torch, so nothing here can be taken down by a device.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import parts, telemetry
from .context import REPOSITORY, describe_status, tail
from .results import Results, utc_now
from .schema import new_case
from .worker import SKIPPED, UNSOUND

TOTAL_S = {"quick": 480.0, "full": 1500.0, "dry": 55.0}
STALL_S = {
    "quick": 75.0,
    "full": 180.0,
    "dry": 40.0,
}  # no line in the journal for so long: hung (a compilation takes 40 s)
RESERVE_S = {"quick": 6.0, "full": 10.0, "dry": 1.0}  # kept back for the report and the last write
MAX_RESTARTS = 8
POLL_S = 0.1


class Interrupted(Exception):
    """The suite itself was told to stop."""


@dataclass
class Options:
    """The command line, understood."""

    mode: str
    out: Path
    scratch: Path
    parts: list[str]
    total_s: float
    stall_s: float
    settings: dict[str, Any] = field(default_factory=dict)  # passed on to the workers


class Follower:
    """Reads whole lines that were appended to a file since the last call."""

    def __init__(self, path: Path):
        self._path = path
        self._offset = path.stat().st_size if path.exists() else 0
        self._rest = b""

    def events(self) -> list[dict[str, Any]]:
        if not self._path.exists():
            return []
        with open(self._path, "rb") as file:
            file.seek(self._offset)
            data = file.read()
        self._offset += len(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [json.loads(line) for line in lines if line.strip()]


@dataclass
class Attempt:
    """What one worker process has said so far."""

    unit: str | None = None
    unit_started: float = 0.0
    culprit: str | None = None
    skip: str | None = None


def limit_of(name: str, names: list[str], mode: str, left_s: float) -> float:
    """Seconds for a part: its share, by weight, of what is left for it and the parts after it."""
    weights = {other: parts.load(other).WEIGHTS[mode] for other in names[names.index(name) :]}
    return max(0.0, left_s) * weights[name] / max(1e-9, sum(weights.values()))


class Runner:
    def __init__(self, options: Options, results: Results):
        self.options = options
        self.results = results
        self.started = time.monotonic()
        self.process: subprocess.Popen | None = None
        self.banned: dict[str, str] = {}
        self.signals: list[int] = []  # noted by the handler, acted on where nothing is half done

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.started:6.1f} s] {text}", flush=True)

    def left(self) -> float:
        return self.options.total_s - RESERVE_S[self.options.mode] - (time.monotonic() - self.started)

    # One part --------------------------------------------------------------------------------------------------------

    def run_part(self, name: str) -> None:
        module = parts.load(name)
        record = self.results.part(name)
        record.update(title=module.TITLE, correctness=module.CORRECTNESS)
        if record["status"] == "ok" and all(case["status"] != "skipped" for case in self.results.cases(name)):
            self.say(f"{name}: done in an earlier run")
            return
        limit = limit_of(name, self.options.parts, self.options.mode, self.left())
        record.update(status="running", reason=None, limit_s=round(limit, 1))
        self.results.save()
        self.say(f"{name}: {module.TITLE} (at most {limit:.0f} s)")
        begun = time.monotonic()
        before = telemetry.snapshot()
        sampler = telemetry.Sampler(self.options.scratch / "telemetry" / f"{name}.csv")
        try:
            status, reason = self._attempts(name, module, begun + limit)
        finally:
            self._kill()
            self.results.data["telemetry"][name] = {
                "before": before, "during": sampler.stop(), "after": telemetry.snapshot(),
            }  # fmt: skip
            record["seconds"] = round(record["seconds"] + time.monotonic() - begun, 2)
        log = self.options.scratch / "logs" / f"{name}.txt"
        record.update(status=status, reason=reason)
        if status != "ok" and log.exists():
            record["log_tail"] = tail(log.read_text(errors="replace"))
        self.results.save()
        cases = self.results.cases(name)
        counts = {
            key: sum(case["status"] == key for case in cases) for key in sorted({case["status"] for case in cases})
        }
        self.say(f"{name}: {status}{f' ({reason})' if reason else ''} {counts or ''}".rstrip())

    def _attempts(self, name: str, module: Any, deadline: float) -> tuple[str, str | None]:
        """Workers for one part, a fresh one after each crash, until it is through or out of time."""
        done = {case["unit"] for case in self.results.cases(name) if case.get("unit") and case["status"] != "skipped"}
        for attempt_number in range(MAX_RESTARTS + 1):
            attempt, outcome = self._one_attempt(name, done, deadline, attempt_number)
            if outcome == 0:
                return self._judge(name)
            if outcome == SKIPPED:
                return "skipped", attempt.skip or "no reason was given"
            if outcome == "timeout":
                self._blame(name, attempt, "the part's time ran out", fault=False)
                return "timeout", f"its time ran out{f' in {attempt.unit}' if attempt.unit else ''}"
            what = "hung: no sign of life" if outcome == "stalled" else (
                "left the device unusable" if outcome == UNSOUND else describe_status(outcome)
            )  # fmt: skip
            if attempt.unit is None:
                if module.OWN_CODE:
                    self.results.add_case(new_case(name, "worker", "crashed", reason=what, correct=False))
                return "failed", f"the worker died outside any unit ({what})"
            self._blame(name, attempt, what, fault=True)
            if attempt.culprit is None:
                done.add(attempt.unit)
            self.results.save()
        return "failed", f"{MAX_RESTARTS} workers died one after the other"

    def _blame(self, name: str, attempt: Attempt, what: str, *, fault: bool) -> None:
        """Records who was at work when a worker died, and keeps a guilty peer out of the rest of the run."""
        if attempt.unit is None:
            return
        seconds = time.monotonic() - attempt.unit_started
        reason = f"{what} after {seconds:.0f} s"
        # A peer's crash is the peer's; our own name, or a part that is all our own code, makes it a fault of the library.
        own = parts.load(name).OWN_CODE or (attempt.culprit or "").startswith("fpsattn")
        correct = False if fault and own else None
        case_id = f"{attempt.unit}/{attempt.culprit}" if attempt.culprit else attempt.unit
        status = "crashed" if fault else "skipped"
        self.results.add_case(
            new_case(name, case_id, status, reason=reason, correct=correct, unit=None, implementation=attempt.culprit)
        )
        self.say(f"{name}: {case_id}: {reason}")
        if fault and attempt.culprit:
            self.banned[attempt.culprit] = f"left out after it {what} in {attempt.unit}"

    def _judge(self, name: str) -> tuple[str, str | None]:
        cases = self.results.cases(name)
        wrong = [case["id"] for case in cases if case.get("correct") is False]
        if wrong:
            return "failed", f"{len(wrong)} wrong: {', '.join(wrong[:3])}"
        statuses = {case["status"] for case in cases}
        if statuses == {"failed"}:
            return "failed", f"every case failed, the first: {cases[0]['reason']}"
        if statuses == {"skipped"}:
            return "timeout", f"no unit was run, the first: {cases[0]['reason']}"
        return "ok", None

    # One worker ------------------------------------------------------------------------------------------------------

    def _launch(self, name: str, done: set[str], deadline: float) -> tuple[subprocess.Popen, Follower]:
        scratch = self.options.scratch
        journal = scratch / "raw" / f"{name}.jsonl"
        settings = {
            **self.options.settings, "mode": self.options.mode, "out": str(self.options.out), "scratch": str(scratch),
            "part": name, "limit_s": deadline - time.monotonic(), "journal": str(journal), "done": sorted(done),
            "banned": self.banned,
        }  # fmt: skip
        path = scratch / "raw" / f"{name}.settings.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(settings))
        log = scratch / "logs" / f"{name}.txt"
        log.parent.mkdir(parents=True, exist_ok=True)
        environment = dict(os.environ, PYTHONUNBUFFERED="1")
        extra = [str(REPOSITORY)]
        if (
            importlib.util.find_spec("fpsattention") is None
        ):  # an installed package has the built kernels: never shadow it
            extra.append(str(REPOSITORY / "python"))
        environment["PYTHONPATH"] = ":".join([*extra, environment.get("PYTHONPATH", "")]).rstrip(":")
        follower = Follower(journal)
        with open(log, "ab") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.suite.worker", str(path)], cwd=REPOSITORY, env=environment,
                stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        return process, follower

    def _one_attempt(self, name: str, done: set[str], deadline: float, number: int) -> tuple[Attempt, Any]:
        attempt = Attempt()
        self.process, follower = self._launch(name, done, deadline)
        alive = time.monotonic()
        while True:
            self._stop_if_told()
            exit_status = self.process.poll()
            events = follower.events()
            if events:
                alive = time.monotonic()
                for event in events:
                    self._take(name, attempt, event, done)
                self.results.save()
            if exit_status is not None:
                self._kill()  # what it may have left running in its session
                return attempt, exit_status
            now = time.monotonic()
            if now > deadline:
                self._kill()
                return attempt, "timeout"
            if now - alive > self.options.stall_s:
                self._kill()
                return attempt, "stalled"
            time.sleep(POLL_S)

    def _take(self, name: str, attempt: Attempt, event: dict[str, Any], done: set[str]) -> None:
        kind = event["event"]
        if kind == "unit-begin":
            attempt.unit, attempt.unit_started, attempt.culprit = event["unit"], time.monotonic(), None
        elif kind == "unit-end":
            done.add(event["unit"])
            attempt.unit = attempt.culprit = None
        elif kind == "enter":
            attempt.culprit = event["name"]
        elif kind == "leave":
            attempt.culprit = None
        elif kind == "case":
            case = event["case"]
            case.setdefault("unit", attempt.unit)
            self.results.add_case(case)
        elif kind == "ceiling":
            self.results.data["ceilings"][event["name"]] = {"value": event["value"], "unit": event["unit"]}
        elif kind == "skip":
            attempt.skip = event["reason"]

    def _stop_if_told(self) -> None:
        if self.signals:
            raise Interrupted

    def _kill(self) -> None:
        """Ends the worker's whole session: it may have started compilers and test programs."""
        if self.process is None:
            return
        for sig, patience in ((signal.SIGTERM, 3.0), (signal.SIGKILL, 3.0)):
            try:
                os.killpg(self.process.pid, sig)
            except ProcessLookupError:
                break
            try:
                self.process.wait(timeout=patience)
            except subprocess.TimeoutExpired:
                continue
            if sig is signal.SIGTERM:
                time.sleep(0.05)
        self.process = None

    def _environment(self) -> dict[str, Any]:
        """What is measured on, asked of a process of its own: importing torch here would put CUDA into the supervisor."""
        environment = dict(os.environ)
        environment["PYTHONPATH"] = ":".join([str(REPOSITORY), environment.get("PYTHONPATH", "")]).rstrip(":")
        try:
            run = subprocess.run(
                [sys.executable, "-m", "benchmarks.suite.environment"], cwd=REPOSITORY, env=environment, timeout=60,
                capture_output=True, text=True,
            )  # fmt: skip
            return json.loads(run.stdout.strip().splitlines()[-1])
        except (subprocess.SubprocessError, ValueError, IndexError) as error:
            return {"absent": f"{type(error).__name__}: {error}"[:300]}

    # The run ---------------------------------------------------------------------------------------------------------

    def run(self) -> int:
        """All parts. 0: checked and right, 1: something is wrong, 3: nothing checked right or wrong, 130/143: stopped."""
        data = self.results.data
        note = lambda signum, _frame: self.signals.append(signum)  # noqa: E731
        previous = {sig: signal.signal(sig, note) for sig in (signal.SIGINT, signal.SIGTERM)}
        try:
            data["environment"] = self._environment()
            data["telemetry"]["static"] = telemetry.static()
            data["telemetry"]["start"] = telemetry.snapshot()
            for name in self.options.parts:
                self._stop_if_told()
                self.run_part(name)
            data["state"] = "complete"
        except Interrupted:
            data["state"] = "interrupted"
            self._kill()
            for record in data["parts"]:
                if record["status"] == "running":
                    record.update(status="interrupted", reason=f"the suite got signal {self.signals[0]}")
            self.say("interrupted: what was measured is kept")
        finally:
            for sig, handler in previous.items():
                signal.signal(sig, handler)
        data["telemetry"]["end"] = telemetry.snapshot()
        data["finished"] = utc_now()
        self.results.save()
        if data["state"] == "interrupted":
            return 128 + self.signals[0]
        return 1 if self.results.incorrect() else 0 if self.results.checked() else 3
