"""Peer comparison: this library and everybody else on the same tensors, interleaved; speed and accuracy side by side."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from ..context import Context, Skip, Unit

NAME, TITLE = "peers", "peer comparison"
WEIGHTS = {"quick": 90.0, "full": 420.0, "dry": 22.0}
CORRECTNESS = False
OWN_CODE = False  # a crash is this library's only while it is its turn
BACKWARD_FLOPS = 2.5  # five products against two: S again, dP, dV, dQ, dK


def load_peers(files: list[Path]) -> tuple[list[Any], ModuleType]:
    """The peers of benchmarks/python/peers.py and of any further files; a later one of the same name replaces the earlier."""
    from benchmarks.python import peers as own

    found = {peer.name: peer for peer in own.PEERS}
    for number, file in enumerate(files):
        spec = importlib.util.spec_from_file_location(f"peers_file_{number}", file)
        if spec is None or spec.loader is None:
            raise Skip(f"--peers-file {file} is not a Python file")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look their module up
        spec.loader.exec_module(module)
        found.update({peer.name: peer for peer in module.PEERS})
    return list(found.values()), own


@dataclass
class Spec:
    """One comparison: what is measured together."""

    kind: str  # forward or training
    shape: Any
    density: float

    @property
    def id(self) -> str:
        return f"{self.kind}/{self.shape.name}/density={self.density:g}"


def specs(context: Context) -> list[Spec]:
    """Most telling first: a run that is cut short has measured what matters most."""
    from .. import workloads as w

    if context.dry:
        return [Spec("forward", w.TINY, 0.3), Spec("forward", w.TINY_ODD, 1.0), Spec("training", w.TINY, 0.3)]
    quick = [
        Spec("forward", w.WAN_14B_720P, 0.194), Spec("forward", w.WAN_14B_720P, 1.0), Spec("forward", w.WAN_1B_480P, 0.194),
        Spec("training", w.WAN_1B_480P, 0.194),
    ]  # fmt: skip
    if context.mode == "quick":
        return quick
    rest = [Spec("forward", w.WAN_14B_720P, density) for density in (0.1, 0.3, 0.5)]
    rest += [Spec("forward", w.WAN_1B_480P, density) for density in (1.0, 0.1, 0.3, 0.5)]
    rest += [Spec("forward", w.D64_480P, density) for density in (0.194, 1.0)]
    rest += [
        Spec("forward", w.STA_GRID, 0.18),
        Spec("training", w.WAN_14B_720P, 0.194),
        Spec("training", w.D64_480P, 0.194),
    ]
    return quick + rest


class Comparison:
    """Runs one spec: prepares each peer, judges its first output, times all of them together, writes a case for each."""

    def __init__(self, context: Context, spec: Spec, peers: list[Any], absent: type[Exception]):
        self.context, self.spec, self.absent = context, spec, absent
        self.peers = [peer for peer in peers if peer.quick or context.mode != "quick"]
        if context.only_peers:
            self.peers = [peer for peer in self.peers if peer.name in context.only_peers]
        self.cases: dict[str, dict[str, Any]] = {}
        self.calls: dict[str, Callable[[int], Any]] = {}

    def run(self, budget_s: float) -> None:
        import torch

        from .. import accuracy, timing, workloads

        device = self.context.device
        self.workload = workloads.build(self.spec.shape, self.spec.density, device)
        l2 = torch.cuda.get_device_properties(0).L2_cache_size if device == "cuda" else None
        training = self.spec.kind == "training"
        sets = workloads.sets_needed(self.spec.shape, l2)
        self.inputs = workloads.random_inputs(self.spec.shape, device, sets, requires_grad=training)
        judge = accuracy.Judge(self.workload, self.inputs[0], rows=8 if self.context.dry else 48)
        self.context.journal.case(
            f"{self.spec.id}/workload", kind="workload", workload=self.workload.describe(), input_sets=sets,
            sparsity_error=judge.sparsity(),
        )  # fmt: skip
        for peer in self.peers:
            self._guard(peer, lambda peer=peer: self._prepare(peer, judge))  # type: ignore[misc]
        by_name = {peer.name: peer for peer in self.peers}
        owner = lambda name: name.split("/")[0]  # noqa: E731
        times = timing.interleaved(
            self.calls, device, budget_s, min_repeats=3 if self.context.dry else 5, max_repeats=4 if self.context.dry else 50,
            enter=lambda name: self.context.journal.event("enter", name=owner(name)),
            on_error=lambda name, error: self._fail(by_name[owner(name)], error),
        )  # fmt: skip
        self.context.journal.event("leave", name="timing")
        for name, fields in self.cases.items():
            if name in times:
                self._write(name, fields, times)

    # Steps -----------------------------------------------------------------------------------------------------------

    def _id(self, peer_name: str) -> str:
        return f"{self.spec.id}/{peer_name}"

    def _guard(self, peer: Any, step: Callable[[], None]) -> None:
        """Runs a step of a peer: absent and failing peers are recorded, a broken device is passed on."""
        journal = self.context.journal
        fields = {"implementation": peer.name, "title": peer.title, "precision": peer.precision, "kind": self.spec.kind}
        if peer.name in self.context.banned:
            journal.case(self._id(peer.name), "skipped", reason=self.context.banned[peer.name], **fields)
            return
        journal.event("enter", name=peer.name)
        try:
            step()
        except self.absent as absent:
            journal.case(self._id(peer.name), "absent", reason=str(absent), **fields)
        except Exception as error:
            self._fail(peer, error)
        journal.event("leave", name=peer.name)

    def _fail(self, peer: Any, error: Exception) -> None:
        from ..worker import device_is_sound

        if not device_is_sound(self.context.device):
            raise error
        for name in [name for name in self.calls if name.split("/")[0] == peer.name]:
            del self.calls[name]
        self.cases.pop(peer.name, None)
        self.context.journal.case(
            self._id(peer.name), "failed", reason=f"{type(error).__name__}: {error}"[:600], correct=False if peer.own else None,
            implementation=peer.name, title=peer.title, precision=peer.precision, kind=self.spec.kind,
        )  # fmt: skip

    def _prepare(self, peer: Any, judge: Any) -> None:
        import torch

        from .. import accuracy, timing

        device = self.context.device
        prepared = peer.prepare(self.workload, device)
        training = self.spec.kind == "training"
        if training and prepared.train is None:
            raise self.absent("has no backward here")
        timing.synchronize(device)
        before = torch.cuda.memory_allocated() if device == "cuda" else 0
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        x = self.inputs[0]
        if training:
            out = prepared.train(x)
            grad_out = torch.randn_like(out)
            grads = torch.autograd.grad(out, (x.q, x.k, x.v), grad_out)
            finite = all(bool(torch.isfinite(g).all()) for g in grads)
            figures = {**judge.judge_grad_q(grads[0], grad_out, x, sparse=prepared.sparse), "finite": finite}
            correct = finite and figures["rel_l1"] <= accuracy.GRAD_REL_L1_LIMIT
        else:
            with torch.no_grad():
                out = prepared.run(x)
            figures = judge.judge(out, sparse=prepared.sparse)
            correct = accuracy.within_limits(figures)
        timing.synchronize(device)
        if out.shape != x.q.shape:
            raise ValueError(f"its output has shape {tuple(out.shape)}, {tuple(x.q.shape)} was wanted")
        memory = torch.cuda.max_memory_allocated() - before if device == "cuda" else None
        self.cases[peer.name] = {
            "implementation": peer.name, "title": peer.title, "precision": peer.precision, "kind": self.spec.kind,
            "sparse": prepared.sparse, "accuracy": figures, "memory_bytes": memory, "note": prepared.note,
            "workload": self.workload.describe(), "computed_flops": prepared.flops,
            "correct": correct if peer.own else None,
            "reason": None if correct or not peer.own else f"outside the accuracy guard: {figures}",
        }  # fmt: skip
        if training:
            self._add_training_calls(peer.name, prepared)
        else:
            self._add(peer.name, prepared.run)
            for stage, call in prepared.stages.items():
                self._add(f"{peer.name}/{stage}", call)

    def _add(self, name: str, call: Callable[[Any], Any]) -> None:
        import torch

        def timed(turn: int) -> None:
            with torch.no_grad():
                call(self.inputs[turn % len(self.inputs)])

        self.calls[name] = timed

    def _add_training_calls(self, name: str, prepared: Any) -> None:
        import torch

        grad_out = torch.randn_like(self.inputs[0].q)
        graphs: dict[int, Any] = {}

        def both(turn: int) -> None:
            x = self.inputs[turn % len(self.inputs)]
            torch.autograd.grad(prepared.train(x), (x.q, x.k, x.v), grad_out)

        def backward(turn: int) -> None:
            x = self.inputs[turn % len(self.inputs)]
            if x.index not in graphs:
                graphs[x.index] = prepared.train(x)
            torch.autograd.grad(graphs[x.index], (x.q, x.k, x.v), grad_out, retain_graph=True)

        self.calls[name] = both
        self.calls[f"{name}/backward"] = backward

    def _write(self, name: str, fields: dict[str, Any], times: dict[str, Any]) -> None:
        """Two rates, never mixed: FLOP of the blocks that were computed, and of dense attention over the real tokens."""
        stages = {key.split("/", 1)[1]: value for key, value in times.items() if key.startswith(f"{name}/")}
        training = self.spec.kind == "training"
        kernel = stages.get("backward" if training else "attention")
        total_factor, kernel_factor = (1 + BACKWARD_FLOPS, BACKWARD_FLOPS) if training else (1.0, 1.0)
        dense = self.spec.shape.dense_flops()

        def rates(factor: float, summary: dict[str, Any]) -> dict[str, float]:
            seconds = summary["median"] / 1e3
            return {
                "computed_blocks": factor * fields["computed_flops"] / seconds / 1e12,
                "dense_equivalent": factor * dense / seconds / 1e12,
            }

        self.context.journal.case(
            self._id(name), **fields, time_ms=times[name], stages_ms=stages, dense_flops=dense,
            tflops=rates(total_factor, times[name]), kernel_tflops=rates(kernel_factor, kernel) if kernel else None,
        )  # fmt: skip


def units(context: Context) -> Iterator[Unit]:
    try:
        import torch

        import fpsattention  # noqa: F401
    except Exception as error:
        raise Skip(f"cannot import: {type(error).__name__}: {error}"[:400]) from error
    if context.device == "cuda" and not torch.cuda.is_available():
        raise Skip("torch sees no CUDA device (--dry-run works on a CPU)")
    peers, own = load_peers(context.peers_files)
    todo = specs(context)
    for position, spec in enumerate(todo):

        def run(spec: Spec = spec, left: int = len(todo) - position) -> None:
            # Half of a unit's time goes to planning, compiling and the FP64 rows.
            Comparison(context, spec, peers, own.Absent).run(budget_s=0.5 * context.remaining() / left)

        yield Unit(spec.id, run, estimate_s=0.5 if context.dry else 6.0)
