"""The GPU suite, as a dry run on the CPU, with planted failures: nothing that was measured is lost, nobody innocent is blamed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import fpsattention as fps
from fpsattention.analysis.time_split import time_split

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import timing, workloads  # noqa: E402
from benchmarks.bench_end_to_end import amdahl  # noqa: E402
from benchmarks.bench_facts import rows_of  # noqa: E402
from benchmarks.bench_kernels import first_blocks  # noqa: E402
from benchmarks.plugin import Results, read_lines, resumable  # noqa: E402
from benchmarks.telemetry import Telemetry  # noqa: E402

PEERS = textwrap.dedent(
    """
    import os, time
    import torch
    import torch.nn.functional as F
    from benchmarks.peers import Absent, Peer, Prepared

    def good(w, d):
        run = lambda x: F.scaled_dot_product_attention(x.q, x.k, x.v)
        return Prepared(run, train=run)

    def raises(w, d):
        raise RuntimeError("planted: prepare raises")

    def raises_late(w, d):
        def run(x):
            if "test_interleaved" in os.environ["PYTEST_CURRENT_TEST"]:
                raise RuntimeError("planted: raises when interleaved")
            return F.scaled_dot_product_attention(x.q, x.k, x.v)
        return Prepared(run)

    def absent(w, d):
        raise Absent("planted: not installed")

    def dies(w, d):
        os.abort()

    def hangs(w, d):
        time.sleep(600)

    def zeros(w, d):
        return Prepared(lambda x: torch.zeros_like(x.q))

    PEERS = [Peer(name, name, "bf16", make, own=own) for name, make, own in (
        ("good", good, False), ("raises", raises, False), ("raises-late", raises_late, False), ("absent", absent, False),
        ("dies", dies, False), ("hangs", hangs, False), ("own-zeros", zeros, True), ("own-dies", dies, True))]
    """
)


def environment() -> dict[str, str]:
    kept = {
        key: value for key, value in os.environ.items() if not key.startswith(("FPSATTN_", "HOPPER_EMU", "PYTEST_"))
    }
    return {**kept, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "FPSATTN_COMMIT": "tested"}


FACTS, KERNELS, PEER_BENCH, CORRECTNESS = (
    f"benchmarks/bench_{name}.py" for name in ("facts", "kernels", "peers", "correctness")
)  # a run of some files imports no more than these


def command(out: Path, *arguments: object) -> list[str]:
    return ["sh", str(ROOT / "benchmarks/run_gpu_suite.sh"), "--dry-run", "--out", str(out), *map(str, arguments)]


def run(out: Path, *arguments: object) -> tuple[int, list[dict], str]:
    done = subprocess.run(command(out, *arguments), env=environment(), capture_output=True, text=True, timeout=300)
    return done.returncode, read_lines(out) if out.exists() else [], done.stdout + done.stderr


@pytest.fixture
def peers_file(tmp_path: Path) -> Path:
    path = tmp_path / "planted_peers.py"
    path.write_text(PEERS)
    return path


def outcomes(lines: list[dict], part: str) -> set[str]:
    """Of the tests whose name has this part."""
    return {line["outcome"] for line in lines if line["type"] == "outcome" and part in line["id"]}


def outcome_of(lines: list[dict], name: str) -> set[str]:
    return outcomes(lines, f"[{name}-forward-tiny-0.3]")


@pytest.mark.slow
def test_dry_run_measures_marks_and_reports(tmp_path: Path) -> None:
    chosen = "test_own or test_linear or test_ceilings or test_interleaved or test_facts or (test_forward and tiny-odd)"
    status, lines, output = run(tmp_path / "r.jsonl", "-k", f"({chosen}) and not training and not fpsattn-token")
    assert status == 0, output
    (header,) = (line for line in lines if line["type"] == "run")
    assert header["mode"] == "dry" and header["timings_meaningless"] and header["commit"] == "tested"
    assert (
        "--dry-run" in header["command"]
        and header["date"].startswith("20")
        and header["gpu"]
        and header["environment"]["versions"]
    )
    ours = [line for line in lines if line.get("kind") == "comparison" and line["implementation"] == "fpsattn"]
    assert len(ours) == 2 and all({"quantize", "attention"} <= line["stages_ms"].keys() for line in ours)
    judged = [line["accuracy"]["rel_l1"] for line in lines if line.get("kind") == "judged"]
    assert all(0.0 < error < 0.07 for error in judged) and len(judged) == 2  # rounded to FP8, so never zero
    assert {"bf16", "fps-fp8"} <= {line["name"] for line in lines if line.get("kind") == "linear"}
    forward = [line for line in lines if line.get("kind") == "kernel"]
    assert [line["density"] for line in forward[:5]] == list(workloads.DENSITIES)
    skipped = [line for line in lines if line["type"] == "outcome" and line["outcome"] == "skipped"]
    assert skipped and all(line["reason"] for line in skipped)
    assert "DRY RUN: TIMINGS ARE MEANINGLESS" in (tmp_path / "r.md").read_text()


@pytest.mark.slow
def test_failing_absent_and_dying_peers_change_nothing(tmp_path: Path, peers_file: Path) -> None:
    names = "good or raises or absent or dies or hangs or test_interleaved"
    status, lines, output = run(
        tmp_path / "r.jsonl", PEER_BENCH, "--peers-file", peers_file, "-k", f"forward-tiny-0.3 and not own and ({names})",
        "-o", "faulthandler_timeout=8",
    )  # fmt: skip
    assert status == 0, output
    wanted = {
        "good": "passed",
        "raises": "failed",
        "raises-late": "passed",
        "absent": "skipped",
        "dies": "crashed",
        "hangs": "crashed",
    }
    assert {name: outcome_of(lines, name) for name in wanted} == {name: {outcome} for name, outcome in wanted.items()}
    assert not any(line["own"] for line in lines if line["type"] == "outcome" and "test_peer" in line["id"])
    together = {line["implementation"] for line in lines if line.get("kind") == "comparison"}
    assert together == {"good"}  # prepared anew in the process that replaced the dead ones
    (late,) = (line["reasons"] for line in lines if line.get("kind") == "failed when interleaved")
    assert "planted: raises when interleaved" in late["raises-late"]


@pytest.mark.slow
def test_our_own_wrong_and_dying_kernels_fail_the_run(tmp_path: Path, peers_file: Path) -> None:
    status, lines, output = run(
        tmp_path / "r.jsonl",
        PEER_BENCH,
        "--peers-file",
        peers_file,
        "-k",
        "forward-tiny-0.3 and (good or own-zeros or own-dies)",
    )
    assert status == 1, output
    assert outcome_of(lines, "own-zeros") == {"failed"} and outcome_of(lines, "own-dies") == {"crashed"}
    for name in ("own-zeros", "own-dies"):
        assert f"WRONG: benchmarks/bench_peers.py::test_own[{name}-forward-tiny-0.3]" in output
    assert outcome_of(lines, "good") == {"passed"}


@pytest.mark.slow
def test_a_run_is_resumed_after_its_time_limit_and_after_a_kill(tmp_path: Path, peers_file: Path) -> None:
    out = tmp_path / "r.jsonl"
    options = (
        *(FACTS, KERNELS, PEER_BENCH),
        "--peers-file",
        peers_file,
        "--resume",
        "-k",
        "test_facts or test_ceilings or (forward-tiny-0.3 and hangs)",
    )
    status, lines, _ = run(out, *options, "--time-limit", "0.001")
    assert status == 5 and outcomes(lines, "") == {"not run"}
    suite = subprocess.Popen(command(out, *options), env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                             start_new_session=True)  # fmt: skip
    deadline = time.monotonic() + 120
    try:
        while time.monotonic() < deadline and "passed" not in outcomes(read_lines(out), "test_ceilings"):
            time.sleep(0.1)
    finally:
        os.killpg(suite.pid, signal.SIGKILL)
        suite.wait(timeout=10)
    assert any(line.get("name") == "copy" for line in read_lines(out))
    with out.open("a") as file:
        file.write('{"type": "measurement", "cut o')  # killed within a write
    status, lines, output = run(out, *options[:-1], "test_facts or test_ceilings or (forward-tiny-0.3 and good)")
    assert status == 5, output  # nothing more of ours was checked: facts want a GPU
    assert sum(line.get("name") == "copy" for line in lines) == 1 and outcome_of(lines, "good") == {"passed"}


def test_a_run_that_exists_is_not_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "r.jsonl"
    assert resumable(out, False, "dry", "tested") == []
    Results(out).append("run", schema="fpsattn-bench/2", mode="dry", commit="another")
    before = out.read_text()
    with pytest.raises(pytest.UsageError, match="--resume, or another --out"):
        resumable(out, False, "dry", "another")
    with pytest.raises(pytest.UsageError, match="commit another, not dry, tested"):
        resumable(out, True, "dry", "tested")
    assert resumable(out, True, "dry", "another") == [] and out.read_text() == before


@pytest.mark.slow
def test_cpp_programs_pass_fail_crash_and_skip(tmp_path: Path) -> None:
    folder = tmp_path / "build" / "tests" / "cpp"
    folder.mkdir(parents=True)
    programs = {
        "test_good": "echo '[  PASSED  ] 2 tests.'",
        "test_bad": "echo '[  FAILED  ] 1 test, listed below:'; exit 1",
        "test_crash": "kill -ABRT $$",
        "test_no_gpu": "echo '[  PASSED  ] 0 tests.'; echo '[  SKIPPED ] 1 test, listed below:'",
        "test_no_device": "echo 'no GPU'; exit 77",
        "consumer": "exit 9",  # no test program: not run
    }
    for name, body in programs.items():
        (folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / name).chmod(0o755)
    launcher = tmp_path / "launcher"
    launcher.write_text('#!/bin/sh\nshift 2\nexec "$@"\n')
    launcher.chmod(0o755)
    out = tmp_path / "r.jsonl"
    done = subprocess.run(
        command(out, CORRECTNESS, "-k", "test_cpp", "--build-dir", tmp_path / "build"), env={**environment(), "FPSATTN_EMULATOR": str(launcher)},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    outcomes = {line["id"].split("[")[1][:-1]: line for line in read_lines(out) if line["type"] == "outcome"}
    assert {name: line["outcome"] for name, line in outcomes.items()} == {
        "test_good": "passed", "test_bad": "failed", "test_crash": "failed", "test_no_gpu": "skipped", "test_no_device": "skipped",
    }  # fmt: skip
    assert "FAILED" in outcomes["test_bad"]["reason"] and "exit status -6" in outcomes["test_crash"]["reason"]


# Pieces ----------------------------------------------------------------------------------------------------------------


def test_time_split_sees_the_ops_by_their_names() -> None:
    """Real profiler events of the op and of torch's attention: all of FPSAttention counts as attention, cross-attention does not."""
    q, k, v = (torch.randn(1, 3 * 5 * 7, 2, 64) for _ in range(3))
    with torch.no_grad():
        out, ours = time_split(lambda: fps.attention(q, k, v, grid=(3, 5, 7)), "cpu")
        assert torch.equal(out, fps.attention(q, k, v, grid=(3, 5, 7)))
        assert ours["quantize"] > 0 and ours["attention"] > 0  # a split of wall time: no ratio holds on a busy machine
        sdpa = torch.nn.functional.scaled_dot_product_attention
        _, dense = time_split(lambda: sdpa(*(x.transpose(1, 2) for x in (q, k, v))), "cpu")
        assert dense["attention"] > 0 and dense["quantize"] == 0
        _, dense = time_split(lambda: sdpa(query=q, key=k, value=v), "cpu")
        assert dense["attention"] > 0 and dense["quantize"] == 0
        _, cross = time_split(lambda: sdpa(q.transpose(1, 2), *(x[:, :9].transpose(1, 2) for x in (k, v))), "cpu")
        assert cross["rest"] > 0 and cross["attention"] == 0
    with pytest.raises(ValueError, match="no self-attention was seen"):
        amdahl(dense, cross)


def test_amdahl() -> None:
    dense = {"quantize": 0.0, "attention": 8.0, "rest": 2.0}
    law = amdahl(dense, {"quantize": 0.5, "attention": 1.5, "rest": 2.0})
    assert law == pytest.approx({"attention_share": 0.8, "attention_speedup": 4.0, "predicted": 2.5, "limit": 5.0})


def test_interleaved_times_everybody_and_leaves_failures_out() -> None:
    order: list[str] = []

    def call(name: str):
        def body(turn: int) -> None:
            order.append(name)
            if name == "c" and order.count("c") > 3:
                raise RuntimeError("planted")

        return body

    failed: dict[str, str] = {}
    times = timing.interleaved({n: call(n) for n in "abc"}, "cpu", 0.0, min_repeats=4, failed=failed)
    assert set(times) == {"a", "b"} and failed == {"c": "RuntimeError: planted"}
    assert all(t["repeats"] == 4 and t["min"] <= t["median"] <= t["max"] for t in times.values())
    assert order[6:9] == ["a", "b", "c"] and order[9:12] == ["b", "c", "a"]  # the order rotates
    with pytest.raises(RuntimeError, match="planted"):
        timing.interleaved({"c": call("c")}, "cpu", 0.0)


def test_workload_counts_what_the_kernel_multiplies() -> None:
    workload = workloads.build(workloads.TINY, 0.6, "cpu")
    layout = workload.layout
    blocks_of_tile = layout.tile_block_offsets.diff()
    pairs = int((workload.mask.kv_num_blocks[0, 0] * blocks_of_tile).sum())
    assert workload.computed_flops == 4 * 128 * 128 * 64 * 2 * pairs and workload.mask.density <= 0.6
    assert workloads.build(workloads.TINY, 1.0, "cpu").dense


def test_telemetry_sums_up_what_was_sampled_in_between(monkeypatch: pytest.MonkeyPatch) -> None:
    clocks = iter(range(100, 10_000, 100))
    answers = {
        "nvmlInit": lambda: None, "nvmlDeviceGetHandleByIndex": lambda i: "gpu", "nvmlDeviceGetClockInfo": lambda d, which: next(clocks),
        "nvmlDeviceGetPowerUsage": lambda d: 650_000, "nvmlDeviceGetTemperature": lambda d, sensor: 60,
        "nvmlDeviceGetCurrentClocksEventReasons": lambda d: 4, "NVML_CLOCK_SM": 1, "NVML_CLOCK_MEM": 2, "NVML_TEMPERATURE_GPU": 0,
        "NVMLError": RuntimeError,
    }  # fmt: skip
    monkeypatch.setitem(sys.modules, "pynvml", SimpleNamespace(**answers))
    monkeypatch.setattr("benchmarks.telemetry.INTERVAL_S", 0.01)
    telemetry = Telemetry()
    start = time.time()
    while (found := telemetry.between(start, time.time())) is None or found["samples"] < 3:
        assert time.time() < start + 30
        time.sleep(0.01)
    telemetry.stop()
    assert found["power_w"] == [650.0, 650.0, 650.0] and found["event_reasons"] == ["0x4"]
    low, median, high = found["sm_mhz"]
    assert 100 <= low < median < high
    assert telemetry.between(start - 2, start - 1) is None
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert "pip install nvidia-ml-py" in Telemetry().static()["absent"]


def test_rows_of_a_facts_file() -> None:
    document = {"device": "x", "rows": [{"id": "pipe/ex2", "value": 16.0, "unit": "instr/clk"}]}
    assert rows_of(document) == {"pipe/ex2": [16.0, "instr/clk"]}
    for other in ([1, 2], {"rows": 3}, {"rows": [{"id": "no value"}]}):
        with pytest.raises(ValueError, match="no list of rows"):
            rows_of(other)


def test_lists_for_no_clusters_are_those_of_the_tiles() -> None:
    """Every block a tile of its own, with the list of the tile that it is of: the same bits, and nothing to share."""
    workload = workloads.build(workloads.Shape("odd", (4, 8, 12), 1, tile=(4, 8, 6)), 1.0, "cpu")
    layout, (x, *_) = workload.layout, workloads.random_inputs(workload.shape, "cpu")
    tiles, counts, indices = first_blocks(workload, 2)
    alone, alone_counts, alone_indices = first_blocks(workload, 2, clusters=False)
    assert layout.num_blocks > layout.num_tiles and alone.tolist() == list(range(layout.num_blocks))
    assert alone_counts.shape[2] == layout.num_blocks and torch.equal(alone_indices, indices[:, :, tiles.long()])
    q8, k8, v8t, q_scale, k_scale, v_scale, *_ = torch.ops.fpsattn.quantize(
        x.q, x.k, x.v, layout.token_of_slot, layout.tile_block_offsets, granularity=0, smooth_k=True, pow2_scales=False
    )
    with_tiles, without = (
        torch.ops.fpsattn.forward(
            q8, k8, v8t, q_scale, k_scale, v_scale, layout.token_of_slot, *lists, num_tokens=workload.shape.tokens, softmax_scale=0.1,
            out_dtype=torch.bfloat16,
        )[0]
        for lists in ((tiles, counts, indices), (alone, alone_counts, alone_indices))
    )  # fmt: skip
    assert torch.equal(with_tiles, without)
