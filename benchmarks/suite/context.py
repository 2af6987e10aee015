"""What a part is given (`Context`) and what it hands back through (`Journal`): lines of JSON in a file.

The supervisor follows the file, so that a worker that crashes, hangs or is killed has already told all it knew.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .schema import finite, new_case

REPOSITORY = Path(__file__).resolve().parents[2]


class Skip(Exception):
    """A part has nothing that it can do here; the text says why and what would change that."""


class Journal:
    """Appends events to a file, each flushed. Events: unit-begin, unit-end, enter, leave, case, ceiling, skip, alive."""

    def __init__(self, path: Path, part: str):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "a", buffering=1)  # noqa: SIM115 (lives as long as the process)
        self.part = part

    def event(self, kind: str, **fields: Any) -> None:
        self._file.write(json.dumps({"event": kind, **finite(fields)}) + "\n")
        self._file.flush()

    def case(self, case_id: str, status: str = "ok", **fields: Any) -> None:
        self.event("case", case=new_case(self.part, case_id, status, **fields))

    @contextlib.contextmanager
    def culprit(self, name: str) -> Iterator[None]:
        """Names what runs inside: if the process dies or hangs there, ``name`` is left out from then on."""
        self.event("enter", name=name)
        yield  # an exception passes through without `leave`: the worker decides whether the process is still sound
        self.event("leave", name=name)


@dataclass
class Unit:
    """Something that is done as a whole: ``run`` journals its cases. ``estimate_s`` decides whether it is still begun."""

    id: str
    run: Callable[[], None]
    estimate_s: float = 1.0


@dataclass
class Context:
    """Settings of one run, the same for every part; ``limit_s`` is the time this part has left."""

    mode: str  # quick, full, dry
    out: Path
    scratch: Path
    part: str
    limit_s: float
    build_dir: Path | None = None
    hopper_facts: Path | None = None
    peers_files: list[Path] = field(default_factory=list)  # more peer adapters, same form as benchmarks/python/peers.py
    only_peers: list[str] = field(default_factory=list)
    emulator: Path | None = None
    done: set[str] = field(default_factory=set)  # units that need not be run again
    banned: dict[str, str] = field(default_factory=dict)  # name -> why it is left out
    journal: Journal = None  # type: ignore[assignment]
    started: float = field(default_factory=time.monotonic)

    @property
    def dry(self) -> bool:
        return self.mode == "dry"

    @property
    def device(self) -> str:
        return "cpu" if self.dry else "cuda"

    def remaining(self) -> float:
        """Seconds this part has left."""
        return self.limit_s - (time.monotonic() - self.started)

    def pick(self, quick: Any, full: Any, dry: Any) -> Any:
        return {"quick": quick, "full": full, "dry": dry}[self.mode]

    def find_build_dir(self) -> Path | None:
        """The folder with built executables: the given one, or what the build part made."""
        for candidate in (self.build_dir, self.scratch / "build"):
            if candidate and any((candidate / sub).is_dir() for sub in ("tests", "benchmarks")):
                return candidate
        return None

    def native_environment(self) -> dict[str, str]:
        """Environment for a built executable: it must find libfpsattn and the CUDA runtime wherever they were carried to."""
        environment = dict(os.environ)
        folders = []
        build = self.find_build_dir()
        if build:
            folders += sorted({str(path.parent) for path in build.rglob("*.so*")})
        if not self.emulator:
            folders += cuda_runtime_folders()
        if folders:
            environment["LD_LIBRARY_PATH"] = ":".join([*folders, environment.get("LD_LIBRARY_PATH", "")]).rstrip(":")
        return environment

    def launcher(self) -> list[str]:
        """What stands before a device program: nothing on a GPU, the emulator's launcher where one was given."""
        return [str(self.emulator), "run", "--"] if self.emulator else []

    def _wait(self, process: subprocess.Popen, deadline: float) -> int | None:
        """Exit status, or None at the deadline. Says that it is alive all the while: the program has a deadline of its own."""
        while (left := deadline - time.monotonic()) > 0:
            try:
                return process.wait(timeout=min(left, 10.0))
            except subprocess.TimeoutExpired:
                self.journal.event("alive")
        return None

    def command(
        self, argv: list[str], log: str, timeout_s: float, *, cwd: Path | None = None
    ) -> tuple[int | None, str]:
        """Runs a program; its output goes to ``logs/<log>``. What it leaves running ends with the worker's session.

        Returns (exit status, output); the status is None when the time ran out and it was killed, -n for signal n.
        """
        path = self.scratch / "logs" / log
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab") as file:
            file.write(f"$ {' '.join(argv)}\n".encode())
            file.flush()
            start = file.tell()
            process = subprocess.Popen(
                argv, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, cwd=cwd or REPOSITORY,
                env=self.native_environment(),
            )  # fmt: skip
            status = self._wait(process, time.monotonic() + max(0.1, timeout_s))
            if status is None:
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(timeout=3)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
        with open(path, "rb") as file:
            file.seek(start)
            return status, file.read().decode(errors="replace")


def cuda_runtime_folders() -> list[str]:
    """Folders of libcudart that torch's own packages or a toolkit bring."""
    import sysconfig

    folders = []
    purelib = Path(sysconfig.get_paths()["purelib"])
    patterns = ("nvidia/*/lib/libcudart.so*", "torch/lib/libcudart*.so*")
    for pattern in patterns:
        folders += [str(path.parent) for path in purelib.glob(pattern)]
    for root in (os.environ.get("CUDA_HOME"), "/usr/local/cuda"):
        if root and (Path(root) / "lib64").is_dir():
            folders.append(str(Path(root) / "lib64"))
    return list(dict.fromkeys(folders))


def tail(text: str, lines: int = 15, characters: int = 2000) -> str:
    """The end of a log, for a results file."""
    return "\n".join(text.strip().splitlines()[-lines:])[-characters:]


def describe_status(status: int | None) -> str:
    """'exit status 3', 'killed by SIGSEGV', 'ran out of time'."""
    if status is None:
        return "ran out of time"
    if status < 0:
        try:
            return f"killed by {signal.Signals(-status).name}"
        except ValueError:
            return f"killed by signal {-status}"
    return f"exit status {status}"
