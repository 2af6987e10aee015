"""The GPU suite on a CPU: a dry run end to end, and planted failures that it must survive, record and judge."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.suite import parts, schema  # noqa: E402
from benchmarks.suite.bundle import bundle  # noqa: E402
from benchmarks.suite.parts.cpp_tests import parse_gtest  # noqa: E402
from benchmarks.suite.parts.end_to_end import amdahl, category  # noqa: E402
from benchmarks.suite.parts.facts import summarize as facts_summary  # noqa: E402
from benchmarks.suite.parts.kernels import parse_lines, time_of  # noqa: E402
from benchmarks.suite.results import Results  # noqa: E402
from benchmarks.suite.runner import limit_of  # noqa: E402

pytest.importorskip("torch")
from benchmarks.suite.workloads import window_for_density  # noqa: E402

pytestmark = pytest.mark.slow  # processes that load torch, many of them

PEERS = textwrap.dedent(
    """
    import os, time
    import torch
    import torch.nn.functional as F
    from benchmarks.python.peers import Absent, Peer, Prepared

    def good(w, d):
        run = lambda x: F.scaled_dot_product_attention(x.q, x.k, x.v)
        return Prepared(run, w.shape.dense_flops(), train=run)

    def raises(w, d):
        raise RuntimeError("planted: prepare raises")

    def raises_late(w, d):
        calls = []
        def run(x):
            calls.append(1)
            if len(calls) > 2:
                raise RuntimeError("planted: the third call raises")
            return F.scaled_dot_product_attention(x.q, x.k, x.v)
        return Prepared(run, w.shape.dense_flops())

    def absent(w, d):
        raise Absent("planted: not installed")

    def dies(w, d):
        os.abort()

    def hangs(w, d):
        time.sleep(600)

    def zeros(w, d):
        return Prepared(lambda x: torch.zeros_like(x.q), w.shape.dense_flops())

    PEERS = [Peer(name, name, "bf16", make, own=own) for name, make, own in (
        ("good", good, False), ("raises", raises, False), ("raises-late", raises_late, False), ("absent", absent, False),
        ("dies", dies, False), ("hangs", hangs, False), ("fpsattn-zeros", zeros, True), ("fpsattn-dies", dies, True))]
    """
)


@pytest.fixture
def peers_file(tmp_path: Path) -> Path:
    path = tmp_path / "planted_peers.py"
    path.write_text(PEERS)
    return path


def command(out: Path, *arguments: object) -> list[str]:
    return ["sh", str(ROOT / "benchmarks/run_gpu_suite.sh"), "--dry-run", "--out", str(out), *map(str, arguments)]


def environment() -> dict[str, str]:
    result = {key: value for key, value in os.environ.items() if not key.startswith(("FPSATTN_", "HOPPER_EMU"))}
    return {**result, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "FPSATTN_COMMIT": "tested"}


def run(out: Path, *arguments: object) -> tuple[int, dict, str]:
    done = subprocess.run(command(out, *arguments), env=environment(), capture_output=True, text=True, timeout=150)
    path = out / "results.json"
    data = json.loads(path.read_text()) if path.exists() else {}
    if data:
        assert schema.validate(data) == []
    return done.returncode, data, done.stdout + done.stderr


def statuses(data: dict, part: str) -> dict[str, str]:
    return {case["id"]: case["status"] for case in data["cases"] if case["part"] == part}


def peer_status(data: dict, name: str) -> set[str]:
    return {case["status"] for case in data["cases"] if case.get("implementation") == name}


def test_dry_run_measures_marks_and_reports(tmp_path: Path) -> None:
    status, data, output = run(tmp_path / "out", "--skip", "end_to_end")
    assert status == 0, output
    assert data["state"] == "complete" and data["timings_meaningless"] and data["mode"] == "dry"
    assert {part["name"] for part in data["parts"]} == set(parts.ORDER) - {"end_to_end"}
    assert all(part["reason"] for part in data["parts"] if part["status"] == "skipped")
    ours = [case for case in data["cases"] if case.get("implementation") == "fpsattn"]
    assert len(ours) == 3 and all(case["status"] == "ok" and case["correct"] for case in ours)
    forward = next(case for case in ours if case["kind"] == "forward")
    assert {"quantize", "attention"} <= forward["stages_ms"].keys()
    assert 0.0 < forward["accuracy"]["rel_l1"] < 0.07  # rounded to FP8, so never zero
    assert peer_status(data, "fa3-fp8") == {"absent"}
    report = (tmp_path / "out" / "report.md").read_text()
    assert "DRY RUN: TIMINGS ARE MEANINGLESS" in report
    assert (tmp_path / "out" / "logs.tar.gz").exists()


def test_failing_absent_and_dying_peers_do_not_stop_the_run(tmp_path: Path, peers_file: Path) -> None:
    names = "good,raises,raises-late,absent,dies"
    status, data, output = run(
        tmp_path / "out", "--parts", "peers", "--peers-file", peers_file, "--only-peers", names, "--time-limit", 60
    )
    assert status == 3, output  # nothing of ours was checked, and that is said
    assert peer_status(data, "good") == {"ok"}
    assert peer_status(data, "raises") == {"failed"}
    assert peer_status(data, "raises-late") == {"failed", "absent"}  # absent: it has no backward
    assert peer_status(data, "absent") == {"absent"}
    # It took its process down once; a fresh one went on and left it out of everything after.
    assert peer_status(data, "dies") == {"crashed", "skipped"}
    reasons = [case["reason"] for case in data["cases"] if case.get("implementation") == "dies"]
    assert any("SIGABRT" in reason for reason in reasons)
    assert data["state"] == "complete" and data["parts"][0]["status"] == "ok"


def test_a_hanging_peer_is_ended_and_the_rest_is_measured(tmp_path: Path, peers_file: Path) -> None:
    status, data, output = run(
        tmp_path / "out", "--parts", "peers", "--peers-file", peers_file, "--only-peers", "hangs,good", "--stall-limit", 12,
        "--time-limit", 60,
    )  # fmt: skip
    assert peer_status(data, "good") == {"ok"}, output
    assert any("hung" in case["reason"] for case in data["cases"] if case.get("implementation") == "hangs")


def test_our_own_wrong_and_dying_kernels_fail_the_run(tmp_path: Path, peers_file: Path) -> None:
    status, data, output = run(
        tmp_path / "out", "--parts", "peers", "--peers-file", peers_file, "--only-peers", "good,fpsattn-zeros,fpsattn-dies",
        "--time-limit", 60,
    )  # fmt: skip
    assert status == 1, output
    for name in ("fpsattn-zeros", "fpsattn-dies"):
        assert f"WRONG: peers: forward/tiny/density=0.3/{name}" in output
    assert peer_status(data, "good") == {"ok"}


def test_a_killed_run_keeps_its_cases_and_is_resumed(tmp_path: Path, peers_file: Path) -> None:
    out = tmp_path / "out"
    options = ("--parts", "kernels,peers", "--peers-file", peers_file, "--time-limit", 90)
    suite = subprocess.Popen(
        command(out, *options, "--only-peers", "good,hangs"), env=environment(), stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 60
        data: dict = {}
        while time.monotonic() < deadline:
            if (out / "results.json").exists():
                data = json.loads((out / "results.json").read_text())  # whole at every moment
                if any(case["id"].endswith("/workload") for case in data["cases"]):
                    break
            time.sleep(0.05)
        assert data["state"] == "running"
        os.kill(suite.pid, signal.SIGKILL)
        suite.wait(timeout=10)
    finally:
        for sleeper in _workers_of(out):
            os.kill(sleeper, signal.SIGKILL)
    kept = json.loads((out / "results.json").read_text())
    assert schema.validate(kept) == [] and "ceiling/copy" in statuses(kept, "kernels")
    first = next(case for case in kept["cases"] if case["id"] == "ceiling/copy")
    status, data, output = run(out, *options, "--only-peers", "good", "--resume")
    assert data["state"] == "complete", output
    assert next(case for case in data["cases"] if case["id"] == "ceiling/copy") == first  # not measured again
    assert peer_status(data, "good") == {"ok"}


def _workers_of(out: Path) -> list[int]:
    """Worker processes that were given a settings file below ``out``: SIGKILL leaves their supervisor no time to end them."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if (
                    str(out).encode() in (entry / "cmdline").read_bytes()
                    and b"worker" in (entry / "cmdline").read_bytes()
                ):
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


def test_a_terminated_run_says_interrupted(tmp_path: Path, peers_file: Path) -> None:
    out = tmp_path / "out"
    suite = subprocess.Popen(
        command(out, "--parts", "peers", "--peers-file", peers_file, "--only-peers", "hangs"), env=environment(),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not _workers_of(out):
        time.sleep(0.05)
    suite.send_signal(signal.SIGTERM)
    assert suite.wait(timeout=30) == 128 + signal.SIGTERM
    data = json.loads((out / "results.json").read_text())
    assert data["state"] == "interrupted" and data["parts"][0]["status"] == "interrupted"
    assert _workers_of(out) == []


def _program(folder: Path, name: str, body: str) -> None:
    """A stand-in for a GoogleTest executable: writes the report that --gtest_output asks for."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(
        f"#!{sys.executable}\nimport json, os, sys\n"
        "report = next(a.split(':', 1)[1] for a in sys.argv if a.startswith('--gtest_output='))\n"
        "def write(tests):\n    json.dump({'testsuites': [{'name': 'S', 'testsuite': tests}]}, open(report, 'w'))\n"
        + body
    )
    path.chmod(0o755)


def test_cpp_programs_pass_fail_crash_and_skip(tmp_path: Path) -> None:
    folder = tmp_path / "build" / "tests" / "cpp"
    passed = "{'name': 'a', 'classname': 'S', 'status': 'RUN', 'result': 'COMPLETED'}"
    _program(folder, "test_good", f"write([{passed}])\n")
    _program(
        folder,
        "test_bad",
        f"write([{passed}, {{**{passed}, 'name': 'b', 'failures': [{{'failure': 'planted'}}]}}])\nsys.exit(1)\n",
    )
    _program(folder, "test_crash", "os.abort()\n")
    _program(
        folder,
        "test_no_gpu",
        "write([{'name': 'c', 'status': 'RUN', 'result': 'SKIPPED', 'skipped': [{'message': 'no GPU'}]}])\n",
    )
    _program(folder, "consumer", "sys.exit(9)\n")  # no test program: not run
    launcher = tmp_path / "launcher"
    launcher.write_text('#!/bin/sh\nshift 2\nexec "$@"\n')
    launcher.chmod(0o755)
    variables = {**environment(), "FPSATTN_EMULATOR": str(launcher)}
    out = tmp_path / "out"
    done = subprocess.run(
        command(out, "--parts", "build,cpp_tests", "--build-dir", tmp_path / "build", "--time-limit", 60), env=variables,
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    data = json.loads((out / "results.json").read_text())
    assert done.returncode == 1, done.stdout + done.stderr
    wanted = {"test_good": "passed", "test_bad": "failed", "test_crash": "failed", "test_no_gpu": "skipped"}
    assert statuses(data, "cpp_tests") == wanted
    reasons = {case["id"]: case["reason"] for case in data["cases"] if case["part"] == "cpp_tests"}
    assert "S.b" in reasons["test_bad"] and "SIGABRT" in reasons["test_crash"] and "no GPU" in reasons["test_no_gpu"]


def test_bad_arguments_are_refused(tmp_path: Path) -> None:
    status, data, output = run(tmp_path / "out", "--parts", "kernel")
    assert status == 1 and not data and "part 'kernel' came, one of facts" in output
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "results.json").write_text("{}")
    done = subprocess.run(command(tmp_path / "full"), env=environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode != 0 and "--resume, or another --out" in done.stderr
    assert (tmp_path / "full" / "results.json").read_text() == "{}"


def test_a_crash_is_not_hidden_by_what_follows(tmp_path: Path) -> None:
    results = Results.create(tmp_path / "results.json", mode="dry", command="x", root=ROOT)
    results.add_case(schema.new_case("peers", "a", "crashed", reason="died", correct=False))
    results.add_case(schema.new_case("peers", "a", "skipped", reason="left out"))
    assert [case["status"] for case in results.incorrect()] == ["crashed"]


# Pieces ----------------------------------------------------------------------------------------------------------------


def test_results_survive_a_failing_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = Results.create(tmp_path / "results.json", mode="dry", command="x", root=ROOT)
    results.add_case(schema.new_case("peers", "a", value=float("nan")))
    results.save()
    before = (tmp_path / "results.json").read_text()
    assert '"value": "nan"' in before
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("planted")))
    results.add_case(schema.new_case("peers", "b"))
    with pytest.raises(OSError, match="planted"):
        results.save()
    assert (tmp_path / "results.json").read_text() == before


def test_a_later_case_of_the_same_name_replaces_the_earlier(tmp_path: Path) -> None:
    results = Results.create(tmp_path / "results.json", mode="dry", command="x", root=ROOT)
    for value in (1, 2):
        results.add_case(schema.new_case("peers", "a", value=value))
    assert [case["value"] for case in results.data["cases"]] == [2]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"schema": "other/1"}, "schema"),
        ({"timings_meaningless": False}, "timings_meaningless"),
        ({"state": "done"}, "state"),
        ({"cases": [{"part": "p", "id": "a", "status": "failed"}]}, "without a reason"),
        ({"cases": [{"part": "p", "id": "a", "status": "ok"}] * 2}, "second case"),
        (
            {
                "cases": [
                    {"part": "p", "id": "a", "status": "ok", "time_ms": {"min": 2, "median": 1, "max": 3, "repeats": 1}}
                ]
            },
            "min <= median",
        ),
        (
            {"parts": [{"name": "n", "title": "t", "status": "skipped", "seconds": 0, "limit_s": None}]},
            "without a reason",
        ),
    ],
)
def test_validation_finds_what_is_wrong(tmp_path: Path, change: dict, problem: str) -> None:
    data = Results.create(tmp_path / "results.json", mode="dry", command="x", root=ROOT).data
    assert schema.validate(data) == []
    assert any(problem in text for text in schema.validate({**data, **change}))


def test_time_left_over_goes_to_the_parts_after() -> None:
    names = list(parts.ORDER)
    total = 480.0
    first = limit_of(names[0], names, "quick", total)
    second_if_skipped = limit_of(names[1], names, "quick", total)
    assert first < total and second_if_skipped > limit_of(names[1], names, "quick", total - first)
    left = total
    for name in names:
        left -= limit_of(name, names, "quick", left)
    assert abs(left) < 1e-6  # all of it, and not a second more


def test_readers_of_other_programs_output() -> None:
    line = '{"case": "a", "ms": {"min": 1, "median": 2, "max": 3}, "repeats": 7}'
    (record,) = parse_lines(f"noise\n{line}\n{{broken\n")
    assert time_of(record) == {"min": 1, "median": 2, "max": 3, "repeats": 7}
    assert time_of({"ms": 2}) is None
    counts = parse_gtest(
        {"testsuites": [{"name": "S", "testsuite": [{"name": "a", "status": "NOTRUN", "result": "SUPPRESSED"}]}]}
    )
    assert (counts["passed"], counts["failed"], counts["skipped"]) == (0, 0, 0)


def test_rows_of_a_facts_file() -> None:
    document = {"device": "x", "rows": [{"id": "pipe/ex2", "value": 16.0, "unit": "instr/clk"}, {"id": "no value"}]}
    assert facts_summary(document) == {"pipe/ex2": {"value": 16.0, "unit": "instr/clk"}}
    assert facts_summary([1, 2]) == {} and facts_summary({"rows": 3}) == {}


def test_profiled_kernels_land_in_their_category() -> None:
    assert category(["fpsattn::quantize", "self_attention"], "x") == "quantize"
    assert category(["fpsattn::attention"], "statistics_kernel") == "quantize"
    assert category(["fpsattn::attention"], "forward_kernel<128>") == "attention"
    assert (
        category(["aten::_cudnn_attention", "aten::scaled_dot_product_attention", "self_attention"], "x") == "attention"
    )
    assert category(["aten::scaled_dot_product_attention"], "x") == "rest"  # cross-attention
    assert category(["aten::linear", "self_attention"], "gemm") == "rest"


def test_amdahl() -> None:
    dense = {"quantize": 0.0, "attention": 8.0, "rest": 2.0}
    law = amdahl(dense, {"quantize": 0.5, "attention": 1.5, "rest": 2.0})
    assert law == pytest.approx({"attention_share": 0.8, "attention_speedup": 4.0, "predicted": 2.5, "limit": 5.0})
    assert amdahl(dense, dict.fromkeys(dense, 0.0)) is None


def test_windows_meet_their_density() -> None:
    for tile_grid, target in (((3, 5, 20), 0.194), ((5, 6, 10), 0.1), ((1, 1, 7), 0.5)):
        window = window_for_density(tile_grid, target)
        share = window[0] * window[1] * window[2] / (tile_grid[0] * tile_grid[1] * tile_grid[2])
        assert all(1 <= w <= n for w, n in zip(window, tile_grid, strict=True)) and abs(share - target) < 0.08
    assert window_for_density((3, 5, 20), 1.0) == (3, 5, 20)


def test_bundle_takes_programs_and_libraries_only(tmp_path: Path) -> None:
    build = tmp_path / "build"
    _program(build / "tests" / "cpp", "test_x", "")
    (build / "tests" / "cpp" / "CMakeFiles").mkdir()
    _program(build / "tests" / "cpp" / "CMakeFiles", "junk", "")
    (build / "tests" / "cpp" / "note.txt").write_text("x")
    (build / "lib").mkdir()
    (build / "lib" / "libfpsattn.so").write_bytes(b"x")
    copied = bundle(build, tmp_path / "carried", strip=False)
    assert sorted(str(path.relative_to(tmp_path / "carried")) for path in copied) == [
        "lib/libfpsattn.so",
        "tests/cpp/test_x",
    ]
    with pytest.raises(FileNotFoundError, match="no executables"):
        bundle(tmp_path / "carried" / "lib" / "none", tmp_path / "other", strip=False)
