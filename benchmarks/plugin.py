"""The suite's pytest plugin: what is appended to the results file, resuming, the time limit, whose fault a failure is.

The results file is JSON, an object a line (README.md, "The results file"), each appended by one write: whatever dies, what was measured
before is there. Tests run in a worker process of pytest-xdist. This plugin is loaded there and in the supervising process, which stays off the GPU.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest

from fpsattention.analysis import jsonable
from fpsattention.analysis.environment import PACKAGES, environment

from .telemetry import Telemetry

REPOSITORY = Path(__file__).resolve().parents[1]
SCHEMA = "fpsattn-bench/2"
PEER_PACKAGES = (
    "triton", "nvidia-cudnn-frontend", "nvidia-cudnn-cu13", "nvidia-cudnn-cu12", "sageattention", "flashinfer-python", "flash-attn-3",
    "flash-attn", "spas-sage-attn", "fastvideo-kernel",
)  # fmt: skip
TIME_IS_OVER = "the time limit is reached: --resume goes on here"
DONE = ("passed", "failed", "crashed", "skipped")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fpsattention benchmarks")
    for mode, text in (
        ("quick", "about 8 minutes on a Hopper GPU (the default)"),
        ("full", "about 25 minutes"),
        ("dry-run", "tiny sizes on the CPU: checks the suite itself, its times mean nothing"),
    ):
        group.addoption(
            f"--{mode}", dest="bench_mode", action="store_const", const=mode.split("-")[0], default="quick", help=text
        )
    group.addoption("--out", type=Path, help="results file, .jsonl (default: build-bench/<time>.jsonl)")
    group.addoption("--resume", action="store_true", help="go on with the file given by --out: same mode, same commit")
    group.addoption("--time-limit", type=float, help="seconds after which no further test is begun")
    group.addoption("--build-dir", type=Path, help="CMake build folder with the C++ tests")
    group.addoption("--hopper-facts", type=Path, help="executable of tools/hopper-facts")
    group.addoption("--library", type=Path, help="libfpsattn.so whose speed is predicted (default: the package's own)")
    group.addoption("--peers-file", type=Path, action="append", default=[], help="a Python file with more PEERS")


def commit() -> dict[str, Any]:
    """The commit and whether tracked files differ from it; FPSATTN_COMMIT, where git or the .git folder is absent, wins."""
    if given := os.environ.get("FPSATTN_COMMIT"):
        return {"commit": given, "dirty": None}

    def git(*arguments: str) -> str:
        return subprocess.check_output(["git", "-C", REPOSITORY, *arguments], stderr=subprocess.PIPE, text=True).strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.CalledProcessError) as error:
        raise pytest.UsageError(f"git cannot name the commit ({error}): set FPSATTN_COMMIT") from error


class Results:
    """The results file."""

    def __init__(self, path: Path):
        self.path = path

    def append(self, line_type: str, **fields: Any) -> None:
        line = json.dumps({"type": line_type, **jsonable(fields)}, allow_nan=False) + "\n"
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, line.encode())
        finally:
            os.close(descriptor)

    def measurements(self, kind: str) -> list[dict[str, Any]]:
        """What was recorded so far, by whichever process."""
        return [line for line in read_lines(self.path) if line.get("kind") == kind]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a results file; a last line that was cut off is left out. ValueError where it is no such file."""
    lines = path.read_text().split("\n")[:-1]  # what follows the last line break was cut off by a kill
    objects = [json.loads(line) for line in lines if line]
    if not objects or objects[0].get("schema") != SCHEMA:
        raise ValueError(f"{path}: no results file of schema {SCHEMA}")
    return objects


def is_foreign(nodeid: str) -> bool:
    """Whether a test's failure says nothing about this library."""
    return "::test_peer[" in nodeid


# Settings --------------------------------------------------------------------------------------------------------------


def pytest_configure(config: pytest.Config) -> None:
    worker = getattr(config, "workerinput", None)
    if worker is not None:
        config.bench = {**worker["bench"], "results": Results(Path(worker["bench"]["out"]))}
        return
    mode = config.option.bench_mode
    config.bench = {"mode": mode, "device": "cpu" if mode == "dry" else "cuda", "done": [], "deadline": None}
    if config.option.collectonly:
        return
    now = datetime.now(timezone.utc)
    out = (config.option.out or REPOSITORY / "build-bench" / f"{now:%Y%m%d-%H%M%S}.jsonl").resolve()
    telemetry = Telemetry()
    about = commit()
    done = resumable(out, config.option.resume, mode, about["commit"])
    out.parent.mkdir(parents=True, exist_ok=True)
    results = Results(out)
    limit = config.option.time_limit
    config.bench.update(out=str(out), done=done, deadline=time.time() + limit if limit else None)
    results.append(
        "run", schema=SCHEMA, mode=mode, timings_meaningless=mode == "dry", date=now.isoformat(timespec="seconds"),
        command="python -m pytest " + shlex.join(config.invocation_params.args), **about, gpu=telemetry.static(),
        environment=environment("cpu", PACKAGES + PEER_PACKAGES),
        settings={k: v for k, v in sorted(os.environ.items()) if k.startswith(("FPSATTN_", "CUDA_", "HOPPER_EMU"))},
    )  # fmt: skip
    config.pluginmanager.register(Supervisor(config, results, telemetry))


def resumable(out: Path, resume: bool, mode: str, commit: str) -> list[str]:
    """The tests that need not run again."""
    if not out.exists():
        return []
    if not resume:
        raise pytest.UsageError(f"{out} exists: --resume, or another --out")
    try:
        lines = read_lines(out)
    except ValueError as error:
        raise pytest.UsageError(str(error)) from error
    first = lines[0]
    if (first["mode"], first["commit"]) != (mode, commit):
        raise pytest.UsageError(f"{out} is of mode {first['mode']}, commit {first['commit']}, not {mode}, {commit}")
    os.truncate(out, out.read_bytes().rindex(b"\n") + 1)
    return sorted({line["id"] for line in lines if line["type"] == "outcome" and line["outcome"] in DONE})


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """xdist: what a worker is told. The same for one that replaces a dead one: it must collect the same tests."""
    node.workerinput["bench"] = node.config.bench


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Kernel tests in a dry run: run_tests.sh runs these."""
    return True if config.bench["mode"] == "dry" and collection_path.name.startswith("test_sm90_") else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    done = set(config.bench["done"])
    keep, drop = [], []
    for item in items:
        (drop if item.nodeid in done else keep).append(item)
    config.hook.pytest_deselected(items=drop)
    items[:] = keep


# In the worker ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def bench(request: pytest.FixtureRequest) -> dict[str, Any]:
    """ "mode" (quick, full, dry), "device" (cpu, cuda); tests that need a GPU and find none are skipped by this."""
    settings = request.config.bench
    if settings["device"] == "cuda":
        import torch

        if not torch.cuda.is_available():
            pytest.skip("torch sees no CUDA device (--dry-run works on a CPU)")
    return settings


@pytest.fixture
def results(bench: dict[str, Any]) -> Results:
    """The results file so far."""
    return bench["results"]


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Callable[..., None]:
    """``record(kind, **what)`` appends a measurement of this test to the results file."""
    results = request.config.bench["results"]
    return lambda kind, **what: results.append("measurement", id=request.node.nodeid, kind=kind, **what)


def pytest_runtest_setup(item: pytest.Item) -> None:
    deadline = item.config.bench["deadline"]
    if deadline and time.time() > deadline:
        pytest.skip(TIME_IS_OVER)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Any:
    report = yield
    if report.failed and item.config.bench["device"] == "cuda":
        end_if_device_is_lost(item, report)
    if report.failed and is_foreign(item.nodeid):
        report.outcome, report.wasxfail = "skipped", "a peer's failure"
    return report


def end_if_device_is_lost(item: pytest.Item, report: pytest.TestReport) -> None:
    """After a device-side fault every CUDA call of the process fails: a fresh one must go on."""
    import torch

    try:
        torch.cuda.synchronize()
    except Exception as error:
        lost = {"id": item.nodeid, "kind": "device lost", "error": str(error), "text": report.longreprtext}
        item.config.bench["results"].append("measurement", **lost)
        os._exit(70)


# In the supervisor -----------------------------------------------------------------------------------------------------


class Supervisor:
    """Writes outcomes, sums them up. Exit status: 0 right, 1 something of ours is wrong, 5 nothing was checked."""

    def __init__(self, config: pytest.Config, results: Results, telemetry: Telemetry):
        self.config, self.results, self.telemetry = config, results, telemetry
        self.wrong: list[str] = []
        self.checked = 0

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        crashed = report.when == "???"  # xdist's word for a test whose worker died
        own = not is_foreign(report.nodeid)
        if crashed and not own:
            report.outcome, report.wasxfail = "skipped", "a peer's crash"
        if report.when == "setup" and report.passed or report.when == "teardown" and not report.failed:
            return
        text = report.longreprtext if not report.skipped or hasattr(report, "wasxfail") else report.longrepr[2]
        failed = report.failed or hasattr(report, "wasxfail")
        outcome = (
            "crashed" if crashed else "failed" if failed else "not run" if TIME_IS_OVER in text else report.outcome
        )
        self.wrong += [report.nodeid] if own and failed else []
        self.checked += own and outcome in ("passed", "failed", "crashed")
        stop = getattr(report, "stop", time.time())
        self.results.append(
            "outcome", id=report.nodeid, outcome=outcome, own=own, seconds=round(report.duration, 2),
            reason=None if outcome == "passed" else text.removeprefix("Skipped: ")[-4000:],
            telemetry=self.telemetry.between(stop - report.duration, stop),
        )  # fmt: skip

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        self.telemetry.stop()
        if exitstatus in (0, 1, 5):
            session.exitstatus = 1 if self.wrong else 0 if self.checked else 5

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        from .tables import markdown

        path = self.results.path
        try:
            report = markdown([path])
            path.with_suffix(".md").write_text(report)
            terminalreporter.write_line(report)
        except Exception as error:  # a table that fails must not hide the results
            terminalreporter.write_line(f"tables: {type(error).__name__}: {error}")
        for name in self.wrong:
            terminalreporter.write_line(f"WRONG: {name}")
        terminalreporter.write_line(f"{path}: {self.checked} of ours checked, {len(self.wrong)} wrong")
