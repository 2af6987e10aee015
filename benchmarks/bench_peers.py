"""Peer comparison: this library and everybody else on the same tensors; each by itself first, then all that are right, interleaved.

By itself (``test_own``, ``test_peer``) an implementation is prepared, judged and timed in a test of its own: one that crashes or hangs
takes nobody along. Those that passed are timed in turns by ``test_interleaved``, whose times are the ones that are compared.
"""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch

from . import accuracy, timing
from . import peers as own_peers
from . import workloads as w
from .bench_kernels import BACKWARD_FLOPS


@dataclass(frozen=True)
class Comparison:
    """What is measured together: ``kind`` is forward or training."""

    kind: str
    shape: w.Shape
    density: float

    @property
    def id(self) -> str:
        return f"{self.kind}-{self.shape.name}-{self.density:g}"


QUICK = (  # most telling first
    Comparison("forward", w.WAN_14B_720P, w.PAPER_DENSITY), Comparison("forward", w.WAN_14B_720P, 1.0),
    Comparison("forward", w.WAN_1B_480P, w.PAPER_DENSITY), Comparison("training", w.WAN_1B_480P, w.PAPER_DENSITY),
)  # fmt: skip
COMPARISONS = {
    "quick": QUICK,
    "full": QUICK
    + tuple(Comparison("forward", w.WAN_14B_720P, density) for density in (0.1, 0.3, 0.5))
    + tuple(Comparison("forward", w.WAN_1B_480P, density) for density in (1.0, 0.1, 0.3, 0.5))
    + tuple(Comparison("forward", w.D64_480P, density) for density in (w.PAPER_DENSITY, 1.0))
    + (Comparison("forward", w.STA_GRID, 0.18), Comparison("training", w.WAN_14B_720P, w.PAPER_DENSITY),
       Comparison("training", w.D64_480P, w.PAPER_DENSITY)),
    "dry": (Comparison("forward", w.TINY, 0.3), Comparison("forward", w.TINY_ODD, 1.0), Comparison("training", w.TINY, 0.3)),
}  # fmt: skip


def load_peers(files: tuple[Path, ...]) -> list[Any]:
    """The peers of ``peers.py`` and of any further files; a later one of the same name replaces the earlier."""
    found = {peer.name: peer for peer in own_peers.PEERS}
    for number, file in enumerate(files):
        spec = importlib.util.spec_from_file_location(f"peers_file_{number}", file)
        if spec is None or spec.loader is None:
            raise pytest.UsageError(f"--peers-file {file} is not a Python file")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look their module up
        spec.loader.exec_module(module)
        found.update({peer.name: peer for peer in module.PEERS})
    return list(found.values())


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Comparison by comparison: its implementations one by one, then all of them together."""
    mode = metafunc.config.bench["mode"]
    peers = [p for p in load_peers(tuple(metafunc.config.option.peers_file)) if p.quick or mode != "quick"]
    if "peer" in metafunc.fixturenames:
        mine = metafunc.function is test_own
        metafunc.parametrize("peer", [p for p in peers if p.own == mine], ids=lambda peer: peer.name)
    metafunc.parametrize("comparison", COMPARISONS[mode], ids=lambda comparison: comparison.id, scope="module")


class Bench:
    """One comparison's tensors, and the implementations that were found right on them."""

    def __init__(self, comparison: Comparison, device: str, dry: bool):
        self.comparison, self.device, self.dry = comparison, device, dry
        self.workload = w.build(comparison.shape, comparison.density, device)
        self.training = comparison.kind == "training"
        self.inputs = w.random_inputs(comparison.shape, device, requires_grad=self.training)
        self.prepared: dict[str, own_peers.Prepared] = {}

    def calls(self, name: str) -> dict[str, timing.Call]:
        """What is timed of an implementation: the whole, and its stages alone."""
        prepared = self.prepared[name]
        if self.training:
            return self._training_calls(name, prepared)

        def timed(call: Any) -> timing.Call:
            return torch.no_grad()(lambda turn: call(self.inputs[turn % len(self.inputs)]))

        stages = {f"{name}/{stage}": timed(call) for stage, call in prepared.stages.items()}
        return {name: timed(prepared.run), **stages}

    def _training_calls(self, name: str, prepared: own_peers.Prepared) -> dict[str, timing.Call]:
        grad_out = torch.randn_like(self.inputs[0].q)
        graphs: dict[int, torch.Tensor] = {}

        def both(turn: int) -> None:
            x = self.inputs[turn % len(self.inputs)]
            torch.autograd.grad(prepared.train(x), (x.q, x.k, x.v), grad_out)

        def backward(turn: int) -> None:
            x = self.inputs[turn % len(self.inputs)]
            if x.index not in graphs:
                graphs[x.index] = prepared.train(x)
            torch.autograd.grad(graphs[x.index], (x.q, x.k, x.v), grad_out, retain_graph=True)

        return {name: both, f"{name}/backward": backward}

    def judge(self, prepared: own_peers.Prepared) -> tuple[dict[str, Any], bool]:
        """Figures of accuracy, and whether they pass the guard of this library."""
        x, rows = self.inputs[0], 8 if self.dry else 48
        if not self.training:
            with torch.no_grad():
                out = prepared.run(x)
            if out.shape != x.q.shape:
                raise ValueError(f"its output has shape {tuple(out.shape)}, {tuple(x.q.shape)} was expected")
            figures = accuracy.judge(self.workload, x, out, sparse=prepared.sparse, rows=rows)
            return figures, accuracy.within_limits(figures)
        out = prepared.train(x)
        grad_out = torch.randn_like(out)
        grads = torch.autograd.grad(out, (x.q, x.k, x.v), grad_out)
        figures = accuracy.judge(
            self.workload, x, out, sparse=prepared.sparse, rows=rows, grad_out=grad_out, grad_q=grads[0]
        )
        figures["finite"] = all(bool(grad.isfinite().all()) for grad in grads)
        return figures, accuracy.within_limits(figures, gradient=True)

    def flops(self, prepared: own_peers.Prepared) -> int:
        if prepared.flops is not None:
            return prepared.flops
        return self.workload.computed_flops if prepared.sparse else self.comparison.shape.dense_flops

    def rates(self, prepared: own_peers.Prepared, ms: dict[str, Any], factor: float) -> dict[str, float]:
        """Two rates, never mixed: FLOP of the blocks that were computed, and of dense attention over the real tokens."""
        flops = {"computed_blocks": self.flops(prepared), "dense_equivalent": self.comparison.shape.dense_flops}
        return {name: factor * amount / ms["median"] / 1e9 for name, amount in flops.items()}


@lru_cache(maxsize=1)
def bench_of(comparison: Comparison, device: str, dry: bool) -> Bench:
    """The tensors of one comparison at a time."""
    return Bench(comparison, device, dry)


def check_one(peer: Any, comparison: Comparison, bench, record) -> None:
    """Prepares an implementation, judges its output, times it by itself for a moment."""
    tensors = bench_of(comparison, bench["device"], bench["mode"] == "dry")
    try:
        prepared = peer.prepare(tensors.workload, bench["device"])
        if tensors.training and prepared.train is None:
            raise own_peers.Absent("has no backward here")
    except own_peers.Absent as absent:
        pytest.skip(f"absent: {absent}")
    before = torch.cuda.memory_allocated() if bench["device"] == "cuda" else 0
    if bench["device"] == "cuda":
        torch.cuda.reset_peak_memory_stats()
    figures, right = tensors.judge(prepared)
    memory = torch.cuda.max_memory_allocated() - before if bench["device"] == "cuda" else None
    about = {
        "implementation": peer.name,
        "title": peer.title,
        "precision": peer.precision,
        "comparison": comparison.id,
        "own": peer.own,
    }
    record("judged", **about, sparse=prepared.sparse, accuracy=figures, memory_bytes=memory, note=prepared.note)
    assert right or not peer.own, f"outside the accuracy guard: {figures}"
    tensors.prepared[peer.name] = prepared
    try:
        alone = timing.interleaved(tensors.calls(peer.name), bench["device"], 0.2, min_repeats=3, max_repeats=5)
    except Exception:
        del tensors.prepared[peer.name]
        raise
    record("alone", **about, ms=alone)


def test_own(comparison: Comparison, peer: Any, bench, record) -> None:
    check_one(peer, comparison, bench, record)


def test_peer(comparison: Comparison, peer: Any, bench, record) -> None:
    check_one(peer, comparison, bench, record)


def test_interleaved(comparison: Comparison, bench, record, results, request) -> None:
    """Everybody who passed, in turns: the times that are compared. Where a crash replaced the process, they are prepared anew."""
    tensors = bench_of(comparison, bench["device"], bench["mode"] == "dry")
    passed = {line["implementation"] for line in results.measurements("alone") if line["comparison"] == comparison.id}
    peers = {peer.name: peer for peer in load_peers(tuple(request.config.option.peers_file)) if peer.name in passed}
    if not peers:
        pytest.skip("nobody passed alone")
    for name, peer in peers.items():
        if name not in tensors.prepared:
            tensors.prepared[name] = peer.prepare(tensors.workload, bench["device"])
    calls = {key: call for name in peers for key, call in tensors.calls(name).items()}
    failed: dict[str, str] = {}
    repeats = 3 if bench["mode"] == "dry" else 5
    times = timing.interleaved(
        calls, bench["device"], 4 * timing.BUDGET_S[bench["mode"]], min_repeats=repeats, failed=failed
    )
    for name, peer in peers.items():
        if name not in times:
            continue
        prepared = tensors.prepared[name]
        stages = {key.split("/")[1]: ms for key, ms in times.items() if key.startswith(f"{name}/")}
        kernel = stages.get("backward" if tensors.training else "attention")
        total, alone = (1 + BACKWARD_FLOPS, BACKWARD_FLOPS) if tensors.training else (1.0, 1.0)
        record(
            "comparison", comparison=comparison.id, training=tensors.training, workload=tensors.workload.describe(),
            implementation=name, title=peer.title, precision=peer.precision, sparse=prepared.sparse, own=peer.own, ms=times[name],
            stages_ms=stages, tflops=tensors.rates(prepared, times[name], total),
            kernel_tflops=tensors.rates(prepared, kernel, alone) if kernel else None,
        )  # fmt: skip
    assert not {name for name in failed if peers[name.split("/")[0]].own}, failed
    if failed:
        record("failed when interleaved", reasons=failed)
