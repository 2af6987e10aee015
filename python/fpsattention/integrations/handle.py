"""What ``apply`` returns: :class:`Handle`."""

from __future__ import annotations

import inspect
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial, wraps
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..schedule import Schedule
from .engine import Engine
from .installation import Installation, check_recordable
from .record import Recorder
from .report import Report


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

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, each call of which is a forward of the transformer that it is given.

        For code that calls the parts of a model instead of the model: DiffSynth-Studio's ``pipe.model_fn = handle.around(pipe.model_fn)``.
        The adapter's ``geometry`` gets the arguments of ``function`` by name.
        """
        signature = inspect.signature(function)
        rest = next((p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD), "")

        @wraps(function)
        def forward(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            arguments = {**bound.arguments, **bound.arguments.get(rest, {})}
            given = [one for one in self.installations if any(x is one.transformer for x in arguments.values())]
            if self._removed or len(given) != 1:
                return function(*args, **kwargs)
            with given[0].forward_of(arguments):
                return function(*args, **kwargs)

        return forward

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside, the transformers run their own attention, uncounted: the dense teacher of a sparse student that shares its weights.

        For whole forwards, and for all threads: do not enter it while another thread runs one.
        """
        before = [installation.paused for installation in self.installations]
        for installation in self.installations:
            installation.paused = True
        try:
            yield
        finally:
            for installation, paused in zip(self.installations, before, strict=True):
                installation.paused = paused

    def report(self) -> Report:
        """What ran since ``apply`` or ``reset``, layer by layer and level by level. Waits for the device."""
        return report(self.installations, self.skipped)

    def write_receipt(self, path: str | Path) -> Path:
        """Put what ran since ``apply`` or ``reset`` into a video: schedule and its hash, densities, precisions, fallbacks.

        MP4 and MOV carry it in a box of their own at the end, no byte of the video changes; beside other files it is ``NAME.fpsattn.json``.
        ``fpsattn verify FILE`` reads and checks it. Returns the file that holds it. Waits for the device.

        Raises:
            ConfigError: nothing ran, or there is no such file.
        """
        from . import receipt

        report = self.report()
        if not any(report.forwards.values()):
            raise ConfigError(
                "fpsattention.write_receipt: no forward ran since apply or reset, expected the run that made the video"
            )
        return receipt.write(path, receipt.make(self.schedule, report, self.skipped))

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
            dir: a new folder, or one without recordings.
            layers: indices; default all.
            sigmas: targets, each met by the first forward at or below it; default: the first forward at every sigma.

        Reads sigma on the host at every forward. Works at dense levels, too.
        """
        layers = None if layers is None else sorted(set(layers))
        targets = None if sigmas is None else sorted({float(sigma) for sigma in sigmas})
        for installation in self.installations:
            check_recordable(installation)
            if installation.recorder is not None:
                raise ConfigError(
                    "fpsattention.record: a recording is on already, expected none: call stop() on it first"
                )
            count = len(installation.sites)
            bad = [layer for layer in layers or () if not 0 <= layer < count]
            if bad:
                raise ConfigError(f"fpsattention.record: layers {bad}, expected indices below {count}")
        if targets and not 0.0 <= targets[0] <= targets[-1] <= 1.0:
            raise ConfigError(f"fpsattention.record: sigmas {targets}, expected numbers in [0, 1]")
        observers = [
            (site, partial(_save, weakref.ref(installation), site.layer))
            for installation in self.installations
            for site in installation.sites
        ]
        for site, observer in observers:
            site.observers.append(observer)

        def stop(recorder: Recorder) -> None:
            for installation in self.installations:
                if installation.recorder is recorder:
                    installation.recorder = None
            for site, observer in observers:
                if observer in site.observers:
                    site.observers.remove(observer)

        recorder = Recorder(dir, layers, targets, self.schedule.tile, stop)
        for installation in self.installations:
            installation.recorder = recorder
        return recorder


def report(installations: Iterable[Engine], skipped: Mapping[str, str]) -> Report:
    """The report of some transformers, and of those that stay dense."""
    result = Report([], fallbacks=dict.fromkeys((f"{name}: {reason}" for name, reason in skipped.items()), 0))
    for installation in installations:
        result.rows.extend(installation.rows())
        result.executions[installation.name] = installation.executions()
        result.prepared[installation.name] = installation.prepared()
        result.forwards[installation.name] = installation.forwards()
        result.nonfinite.update(installation.nonfinite)
        result.replaced.update(installation.replaced())
        result.fallbacks.update(
            dict.fromkeys((f"{name}: {why}" for name, why in installation.own_linears().items()), 0)
        )
        result.fallbacks.update(installation.refused_linears)
        if installation.own_norms:
            result.fallbacks[f"{installation.name}: {installation.own_norms}"] = 0
        if installation.causal_text:
            result.fallbacks[f"{installation.name}: the causal attention of its text, of every layer"] = 0
        for site in installation.sites:
            result.fallbacks.update({f"{site.name}: {reason}": n for reason, n in site.fallbacks.items()})
        for tokens, _, _ in installation.counts():
            layout = installation.tables.tables(tokens).layout
            text = f"tile {'x'.join(map(str, layout.tile))}, {'x'.join(map(str, layout.tile_grid))} tiles, "
            grid = "x".join(map(str, tokens.grid)) + (f" + {tokens.text_len} text" if tokens.text_len else "")
            text += f"{layout.num_slots / layout.num_tokens:.3f} slots per token"
            result.grids[grid] = text + (", tokens in tile order" if tokens.order == "tile" else "")
        result.host_reads += installation.host_reads()
    return result


def _save(installation: weakref.ref[Installation], layer: int, _name: str, q: Any, k: Any, v: Any, _out: Any) -> None:
    owner = installation()
    if owner is not None and owner.recorder is not None:
        owner.recorder.save(owner.name, layer, q, k, v)
