"""``fpsattention.apply``, ``remove`` and ``status``: FPSAttention as the self-attention of video transformers. See ``docs/diffusers.md``."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError, UnsupportedError
from ..schedule import Schedule
from ..schedule.scheduler import flow_shift_of, shifts_dynamically
from .adapters import Adapter, find
from .handle import Handle
from .installation import Installation, installation_of, unsupported
from .sigmas import SchedulerOf

_warned: set[str] = set()


def apply(
    model: Any,
    schedule: Schedule | str | Path | Mapping[str, Any] = "training_free",
    *,
    linears: str | None = None,
    token_order: str | None = None,
    prepare: bool | str = False,
    adapter: Adapter | None = None,
    exact: Sequence[int] = (),
    replace: bool = False,
    on_unsupported: str = "raise",
    num_train_timesteps: int | None = None,
    debug: bool = False,
) -> Handle:
    """Replace the self-attention of a video pipeline or transformer by FPSAttention under ``schedule``.

    Weights and state dict stay as they are: only the call of the attention itself, inside the model's own processors, is replaced, and,
    where a level says so, the product of a linear layer. Per forward, a pre-hook of the transformer reads the token grid and the sigma of every sample.

    Args:
        model: a diffusers pipeline (both experts of Wan2.2) or a transformer, also inside ``torch.compile``, DDP, FSDP or PEFT.
        schedule: a :class:`Schedule`, the name of a preset, a file, or a JSON object.
        linears: "fp8": the projections and feed-forward layers of every "fp8" level run in FP8, too; "bf16": as the model's own;
            None: as the levels say. Layers in ``Schedule.own_linears``, by default the first and the last, keep their own.
        token_order: "tile": tokens go to tile order once per forward, where the blocks begin, and back where they end; "raster": they stay
            as they are. None: tile for the families that are known to allow it. Forwards with dense attention stay in raster order.
        prepare: True: norms and RoPE of q and k run inside of the quantizer, in FP32 without the roundings to 16 bits that the model's own
            code has in between, wherever attention is FP8 under a window or a static pattern; an error where they cannot. "auto":
            wherever they can, and the model's own elsewhere, with a line in the report.
        adapter: what is known of a model of another class than those of ``integrations.adapters``.
        exact: frames of the token grid that attend everything and are attended by everything, whatever the schedule says: (0,) for the
            first frame of image-to-video, -1 for the last. What shares a tile with them does, too: take tiles of few frames. Text,
            audio, history and reference images of the same sequence are so in any case: sparse are pairs of video tokens only.
        replace: take off a schedule that is applied already. Copies (EMA, a teacher) carry one that nobody has a handle of:
            it is taken off in any case.
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
        raise ConfigError(f"fpsattention.apply: on_unsupported {on_unsupported!r}, expected 'raise' or 'dense'")
    if not all(type(frame) is int for frame in exact):
        raise ConfigError(f"fpsattention.apply: exact {exact!r}, expected numbers of frames")
    resolved = Schedule.resolve(schedule)
    if linears is not None:
        resolved = resolved.with_linears(linears)
    if resolved.required and on_unsupported == "dense":
        raise ConfigError(
            "fpsattention.apply: on_unsupported 'dense', expected 'raise': the schedule is required by the weights it was trained with"
        )
    transformers = _transformers(model, "apply")
    scheduler = SchedulerOf(model if hasattr(model, "components") else None)
    if num_train_timesteps is None:
        num_train_timesteps = getattr(getattr(scheduler(), "config", None), "num_train_timesteps", 1000)

    resolved = _follow(resolved, scheduler())
    adapters = {name: adapter or find(transformer) for name, transformer in transformers.items()}
    skipped = {}
    for name, transformer in transformers.items():
        existing = installation_of(transformer)
        if existing is not None and not replace and not existing.copied:
            raise ConfigError(
                f"fpsattention.apply: {name}: a schedule is applied already, expected none: call remove() on its handle or "
                "fpsattention.remove(model) first, or apply(..., replace=True)"
            )
        reason = unsupported(transformer, adapters[name])
        if reason is not None:
            if on_unsupported == "raise":
                raise UnsupportedError(f"fpsattention.apply: {name}: {reason}")
            skipped[name] = reason
    _warn_paper(resolved, transformers)
    for transformer in transformers.values():
        if (existing := installation_of(transformer)) is not None:
            existing.remove()
    installations: list[Installation] = []
    try:
        for name, transformer in transformers.items():
            known = adapters[name]
            if name not in skipped and known is not None:
                arguments = (scheduler, num_train_timesteps, on_unsupported, debug, token_order, tuple(exact), prepare)
                installations.append(Installation(transformer, known, resolved, name, *arguments))
    except BaseException:
        for installation in installations:
            installation.remove()
        raise
    for name, reason in skipped.items():
        _warn_once(f"fpsattention.apply: {name} stays dense: {reason}")
    return Handle(resolved, installations, skipped)


def remove(model: Any) -> bool:
    """Restore the original attention of a pipeline or transformer, bit for bit, whoever holds the handle: also on copies.

    Returns:
        Whether there was a schedule to take off.

    Raises:
        UnsupportedError: ``model`` is no pipeline or module.
    """
    found = [installation_of(transformer) for transformer in _transformers(model, "remove").values()]
    for installation in found:
        if installation is not None:
            installation.remove()
    return any(installation is not None for installation in found)


@dataclass(frozen=True)
class Status:
    """What ``fpsattention.status`` found on one transformer.

    Attributes:
        adapter: the model family.
        schedule: in force.
        layers: names of the attention modules under the schedule.
        replaced: those whose processor somebody set since, to its class: they run without the schedule.
        compiled: the transformer or blocks of it are compiled in place.
        copied: it came along with a copied or unpickled model: no handle controls it.
    """

    adapter: str
    schedule: Schedule
    layers: tuple[str, ...]
    replaced: Mapping[str, str]
    compiled: bool
    copied: bool

    def __str__(self) -> str:
        levels = " > ".join(dict.fromkeys(phase.level for phase in self.schedule.phases))
        notes = [f"{len(self.replaced)} replaced since"] * bool(self.replaced)
        notes += ["compiled"] * self.compiled + ["a copy, without a handle"] * self.copied
        return f"{self.adapter}: {len(self.layers)} attention layers, levels {levels}" + "".join(
            f", {n}" for n in notes
        )


def status(model: Any) -> dict[str, Status]:
    """The schedules in force on a pipeline or transformer, by the name of the transformer; empty where there are none.

    Raises:
        UnsupportedError: ``model`` is no pipeline or module.
    """
    found = {}
    for name, transformer in _transformers(model, "status").items():
        one = installation_of(transformer)
        if one is not None:
            replaced = one.replaced()
            layers = tuple(site.name for site in one.sites if site.name not in replaced)
            schedule = one.tables.schedule
            found[name] = Status(one.adapter.name, schedule, layers, replaced, one.compiled_modules(), one.copied)
    return found


def _transformers(model: Any, function: str) -> dict[str, Any]:
    """Name to transformer: of a pipeline, all its components called transformer*; otherwise the module, unwrapped."""
    components = getattr(model, "components", None)
    if isinstance(components, Mapping):
        found = {
            name: _unwrap(part)
            for name, part in components.items()
            if name.startswith("transformer") and part is not None
        }
        if found:
            return {name: part for i, (name, part) in enumerate(found.items()) if part not in list(found.values())[:i]}
        raise UnsupportedError(
            f"fpsattention.{function}: {type(model).__name__} has no transformer (components: {', '.join(components)}), "
            "expected a pipeline of a video transformer"
        )
    if isinstance(model, torch.nn.Module):
        return {"transformer": _unwrap(model)}
    raise UnsupportedError(
        f"fpsattention.{function}: {type(model).__name__} is not supported, expected a diffusers pipeline or a transformer"
    )


def _unwrap(module: Any) -> Any:
    """The model inside torch.compile, DDP, FSDP, checkpointing or PEFT."""
    for name in ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"):
        if isinstance(module, torch.nn.Module) and module._modules.get(name) is not None:
            return _unwrap(module._modules[name])
    if isinstance(module, (torch.nn.DataParallel, torch.nn.parallel.DistributedDataParallel)):
        return _unwrap(module.module)
    if type(module).__module__.startswith("peft.") and hasattr(module, "get_base_model"):
        return _unwrap(module.get_base_model())
    return module


def _follow(schedule: Schedule, scheduler: Any) -> Schedule:
    """A schedule of fractions of steps takes the flow shift of the pipeline; another one is compared with it."""
    made_for = schedule.model.get("flow_shift")
    if scheduler is None or (schedule.axis == "sigma" and made_for is None):
        return schedule
    name = type(scheduler).__name__
    if shifts_dynamically(scheduler):
        if schedule.axis == "sigma":
            _warn_once(
                f"fpsattention.apply: the schedule was made for flow shift {made_for}, and {name} shifts with the size of the video: its phases "
                "cover other shares of the steps at other sizes"
            )
        return schedule  # its steps are looked at in every run
    try:
        shift = flow_shift_of(scheduler)
    except ConfigError as error:
        _warn_once(
            f"fpsattention.apply: {error}: the phases of the schedule are placed for flow shift {schedule.flow_shift}, and may cover other "
            "shares of the steps than they say"
        )
        return schedule
    if made_for is not None and abs(shift - made_for) > 1e-6 * shift:
        follows = (
            "follow the scheduler"
            if schedule.axis == "steps"
            else "cover other shares of the steps than it was made for"
        )
        _warn_once(
            f"fpsattention.apply: the schedule was made for flow shift {made_for}, {name} of this pipeline has {shift:g}: the phases {follows}"
        )
    return schedule.with_flow_shift(shift)


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
