"""``fpsattention.apply``: FPSAttention as the self-attention of diffusers' Wan transformers. See ``docs/diffusers.md``."""

from __future__ import annotations

import warnings
import weakref
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..errors import BuildError, ConfigError, UnsupportedError
from ..schedule import Schedule

try:
    from .installation import Installation, check_not_compiled, unsupported
except ImportError as error:
    if isinstance(error, BuildError):
        raise
    raise BuildError(
        f'fpsattention.apply: diffusers cannot be imported ({error}): pip install "fpsattention[diffusers]"'
    ) from error
from .record import Recorder
from .report import Report

_warned: set[str] = set()


def apply(
    model: Any,
    schedule: Schedule | str | Path | Mapping[str, Any] = "training_free",
    *,
    on_unsupported: str = "raise",
    num_train_timesteps: int | None = None,
    debug: bool = False,
) -> Handle:
    """Replace the self-attention of a Wan pipeline or transformer by FPSAttention under ``schedule``.

    Weights, state dict and cross-attention stay as they are. Per forward, a pre-hook of the transformer reads the token grid and
    the sigma of every sample; nothing counts forwards.

    Args:
        model: a diffusers pipeline (both experts of Wan2.2) or a ``WanTransformer3DModel``, also inside ``torch.compile``, DDP or PEFT.
        schedule: a :class:`Schedule`, the name of a preset, a file, or a JSON object.
        on_unsupported: ``"raise"``, or ``"dense"``: run the model's own attention where this library cannot, and report it.
        num_train_timesteps: sigma = timestep / this; default: of the pipeline's scheduler, else 1000.
        debug: warn about NaN and Inf in q, k, v, outputs and their gradients, naming the layer. Waits for the device.

    Returns:
        A handle: ``remove()``, ``report()``, ``log_dict()``, ``record()``; a context manager that removes at its end.

    Raises:
        ConfigError: the schedule is wrong or not for this model, or one is applied already.
        UnsupportedError: what and why, with ``on_unsupported="raise"``.
    """
    if on_unsupported not in ("raise", "dense"):
        raise ConfigError(f"fpsattention.apply: on_unsupported {on_unsupported!r}, wanted 'raise' or 'dense'")
    resolved = Schedule.resolve(schedule)
    if resolved.required and on_unsupported == "dense":
        raise ConfigError(
            "fpsattention.apply: on_unsupported 'dense', wanted 'raise': the schedule is required by the weights it was trained with"
        )
    transformers = _transformers(model)
    scheduler = partial(_scheduler_of, weakref.ref(model) if hasattr(model, "components") else None)
    if num_train_timesteps is None:
        num_train_timesteps = getattr(getattr(scheduler(), "config", None), "num_train_timesteps", 1000)

    reasons = {name: unsupported(transformer) for name, transformer in transformers.items()}
    for name, reason in reasons.items():
        if reason is not None and on_unsupported == "raise":
            raise UnsupportedError(f"fpsattention.apply: {name}: {reason}")
    _warn_paper(resolved, transformers)
    installations: list[Installation] = []
    try:
        for name, transformer in transformers.items():
            if reasons[name] is None:
                arguments = (scheduler, num_train_timesteps, on_unsupported, debug)
                installations.append(Installation(transformer, resolved, name, *arguments))
    except BaseException:
        for installation in installations:
            installation.remove()
        raise
    skipped = {name: reason for name, reason in reasons.items() if reason is not None}
    for name, reason in skipped.items():
        _warn_once(f"fpsattention.apply: {name} stays dense: {reason}")
    return Handle(resolved, installations, skipped)


class Handle:
    """What ``apply`` returns.

    Attributes:
        schedule: the schedule in force.
        installations: one per transformer.
        skipped: transformers that stay dense (``on_unsupported="dense"``), and why.
    """

    def __init__(self, schedule: Schedule, installations: list[Installation], skipped: dict[str, str]):
        self.schedule = schedule
        self.installations = installations
        self.skipped = skipped
        self._removed = False

    def remove(self) -> None:
        """Restore the original attention, bit for bit. Calling it again does nothing."""
        if not self._removed:
            for installation in self.installations:
                installation.remove()
            self._removed = True

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def report(self) -> Report:
        """What ran since ``apply`` or ``reset``, layer by layer and level by level. Waits for the device."""
        rows, executions, fallbacks, grids = [], {}, dict.fromkeys(self._skip_notes(), 0), {}
        nonfinite: Counter[str] = Counter()
        for installation in self.installations:
            rows += installation.rows()
            executions[installation.name] = installation.executions()
            nonfinite.update(installation.nonfinite)
            for processor in installation.processors:
                fallbacks.update({f"{processor.name}: {reason}": n for reason, n in processor.fallbacks.items()})
            for grid, _ in installation.counts():
                layout = installation.tables.tables(grid).layout
                text = f"tile {'x'.join(map(str, layout.tile))}, {'x'.join(map(str, layout.tile_grid))} tiles, "
                grids["x".join(map(str, grid))] = text + f"{layout.num_slots / layout.num_tokens:.3f} slots per token"
        host_reads = sum(installation.reader.host_reads for installation in self.installations)
        return Report(rows, executions, fallbacks, dict(nonfinite), host_reads, grids)

    def log_dict(self) -> dict[str, float]:
        """Flat numbers for a tracker: ``fpsattn/density``, ``fpsattn/calls/<level>`` (samples x layers), ``fpsattn/nonfinite``,
        ``fpsattn/fallbacks``. Waits for the device."""
        report = self.report()
        calls: Counter[str] = Counter()
        for row in report.rows:
            calls[row.level] += row.calls
        log = {f"fpsattn/calls/{level}": float(count) for level, count in calls.items()}
        log["fpsattn/density"] = report.density
        log["fpsattn/nonfinite"] = float(sum(report.nonfinite.values()))
        log["fpsattn/fallbacks"] = float(sum(report.fallbacks.values()))
        return log

    def reset(self) -> None:
        """Start counting anew."""
        for installation in self.installations:
            installation.reset()

    def record(
        self,
        *,
        dir: str | Path,
        layers: Iterable[int] | None = None,
        sigmas: Iterable[float] | None = None,
    ) -> Recorder:
        """Write q, k, v (after RoPE) of coming forwards to ``dir``, until ``stop()`` on the result (a context manager).

        Args:
            layers: indices; default all.
            sigmas: targets, each met by the first forward at or below it; default: the first forward at every sigma.

        Reads sigma on the host at every forward. Works at dense levels, too.
        """
        layers = None if layers is None else sorted(set(layers))
        targets = None if sigmas is None else sorted({float(sigma) for sigma in sigmas})
        for installation in self.installations:
            check_not_compiled(installation.transformer)
            if installation.recorder is not None:
                raise ConfigError(
                    "fpsattention.record: a recording is on already, wanted none: call stop() on it first"
                )
            count = len(installation.processors)
            bad = [layer for layer in layers or () if not 0 <= layer < count]
            if bad:
                raise ConfigError(f"fpsattention.record: layers {bad}, wanted indices below {count}")
        if targets and not 0.0 <= targets[0] <= targets[-1] <= 1.0:
            raise ConfigError(f"fpsattention.record: sigmas {targets}, wanted numbers in [0, 1]")
        observers = [
            (processor, partial(_save, weakref.ref(installation), layer))
            for installation in self.installations
            for layer, processor in enumerate(installation.processors)
        ]
        for processor, observer in observers:
            processor.observers.append(observer)

        def stop(recorder: Recorder) -> None:
            for installation in self.installations:
                if installation.recorder is recorder:
                    installation.recorder = None
            for processor, observer in observers:
                if observer in processor.observers:
                    processor.observers.remove(observer)

        recorder = Recorder(dir, layers, targets, self.schedule.tile, stop)
        for installation in self.installations:
            installation.recorder = recorder
        return recorder

    def _skip_notes(self) -> list[str]:
        return [f"{name}: {reason}" for name, reason in self.skipped.items()]


def _save(installation: weakref.ref[Installation], layer: int, _name: str, q: Any, k: Any, v: Any, _out: Any) -> None:
    owner = installation()
    if owner is not None and owner.recorder is not None:
        owner.recorder.save(owner.name, layer, q, k, v)


def _transformers(model: Any) -> dict[str, Any]:
    """Name to transformer: of a pipeline, all its components called transformer*; otherwise the module, unwrapped."""
    components = getattr(model, "components", None)
    if isinstance(components, Mapping):
        found = {
            name: _unwrap(part)
            for name, part in components.items()
            if name.startswith("transformer") and part is not None
        }
        if found:
            return found
        raise UnsupportedError(
            f"fpsattention.apply: {type(model).__name__} has no transformer (components: {', '.join(components)}), "
            "wanted a pipeline of WanTransformer3DModel"
        )
    if isinstance(model, torch.nn.Module):
        return {"transformer": _unwrap(model)}
    raise UnsupportedError(
        f"fpsattention.apply: {type(model).__name__} is not supported, wanted a diffusers pipeline or a WanTransformer3DModel"
    )


def _unwrap(module: Any) -> Any:
    """The model inside torch.compile, DDP or PEFT."""
    if hasattr(module, "_orig_mod"):
        return _unwrap(module._orig_mod)
    if isinstance(module, (torch.nn.DataParallel, torch.nn.parallel.DistributedDataParallel)):
        return _unwrap(module.module)
    if type(module).__module__.startswith("peft.") and hasattr(module, "get_base_model"):
        return _unwrap(module.get_base_model())
    return module


def _scheduler_of(pipeline: weakref.ref[Any] | None) -> Any:
    return getattr(pipeline() if pipeline is not None else None, "scheduler", None)


def _warn_paper(schedule: Schedule, transformers: dict[str, Any]) -> None:
    training = any(getattr(transformer, "training", False) for transformer in transformers.values())
    if schedule.provenance.get("preset") == "paper" and not schedule.required and not training:
        _warn_once(
            "fpsattention.apply: the preset 'paper' is meant for weights fine-tuned with it, and this schedule is not marked as such "
            "(required: true): stock weights lose quality, most of all in the first steps; use 'training_free' for them"
        )


def _warn_once(text: str) -> None:
    """Once per process and text: not once per layer, forward or pipeline."""
    if text not in _warned:
        _warned.add(text)
        warnings.warn(text, stacklevel=3)
