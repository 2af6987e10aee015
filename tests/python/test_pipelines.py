"""``fpsattention.apply(pipe, "training_free")`` on a tiny random pipeline of every family that can be built without a network."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import pytest
import tiny_models
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from tiny_pipelines import PIPELINES, model, sample

import fpsattention as fps
from fpsattention.integrations import adapters
from fpsattention.integrations.state import CURRENT

STEPS = 8


@contextmanager
def levels_of(handle: Any) -> Iterator[list[set[str]]]:
    """The levels of the samples of every forward inside."""
    (installation,) = handle.installations
    levels: list[set[str]] = []

    def note(*_: Any) -> None:
        assert CURRENT.forward is not None
        levels.append({installation.tables.group_levels[0][int(s)].name for s in CURRENT.forward.segments})

    hook = installation.transformer.register_forward_pre_hook(note)  # runs after that of the installation
    yield levels
    hook.remove()


@pytest.mark.slow
@pytest.mark.parametrize("name", list(PIPELINES))
def test_training_free_end_to_end(name):
    """The first quarter of the steps is the model's own attention, the rest FP8; nothing fell back; remove() restores every bit."""
    pipe, arguments = PIPELINES[name]()
    plain = sample(pipe, arguments, STEPS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # schedulers whose shift cannot be read are said
        handle = fps.apply(pipe, "training_free")
    with levels_of(handle) as levels:
        out = sample(pipe, arguments, STEPS)
    report = handle.report()
    handle.remove()
    assert torch.isfinite(out).all()
    assert not torch.equal(out, plain)
    assert float((out - plain).abs().sum() / plain.abs().sum()) < 0.2  # FP8 of a random model, over all steps
    assert torch.equal(sample(pipe, arguments, STEPS), plain)

    assert not report.fallbacks
    assert {row.level for row in report.rows if row.calls} == {"dense", "careful"}
    runs = [(level, len(list(group))) for level, group in groupby(levels, key=lambda one: "".join(sorted(one)))]
    forwards = sum(n for _, n in runs)
    chunks = (
        forwards // STEPS if name != "helios" else None
    )  # with guidance two forwards a step; Helios: chunk by chunk
    if chunks:
        assert runs == [("dense", 2 * chunks), ("careful", 6 * chunks)]
    else:
        assert [level for level, _ in runs][:2] == ["dense", "careful"]
    assert {row.calls for row in report.rows if row.level == "dense"} == {
        next(r.calls for r in report.rows if r.level == "dense")
    }


@pytest.mark.parametrize("name", ["chronoedit", "consisid", "ltx2", "flux2"])
@torch.no_grad()
def test_a_loop_over_a_scheduler(name):
    """Families whose pipelines need encoders of images, sound or faces: their transformer, as a pipeline calls it."""
    family = tiny_models.FAMILIES[name]
    transformer, (_, arguments) = model(name), family.make(1)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)

    def loop() -> torch.Tensor:
        scheduler.set_timesteps(STEPS)
        latents = arguments["hidden_states"].clone()
        width = latents.shape[1]
        for t, sigma in zip(scheduler.timesteps, scheduler.sigmas, strict=False):
            told = torch.full_like(arguments["timestep"], family.time(float(sigma)))
            step = transformer(**{**arguments, "hidden_states": latents, "timestep": told}, return_dict=False)[0]
            if step.shape != latents.shape:  # conditions are more channels, a reference more frames
                step = torch.nn.functional.pad(step, (0, 0) * 3 + (0, width - step.shape[1]))[..., : latents.shape[-1]]
            latents = scheduler.step(step, t, latents, return_dict=False)[0]
        return latents

    plain = loop()
    with fps.apply(transformer, "training_free") as handle, levels_of(handle) as levels:
        out = loop()
        assert not handle.report().fallbacks
    assert torch.isfinite(out).all() and not torch.equal(out, plain)
    names = [name for name, _ in groupby("".join(sorted(one)) for one in levels)]
    assert names == ["dense", "careful"]
    assert torch.equal(loop(), plain)


def test_twelve_video_families_run_as_pipelines():
    families = {adapters.find(model(name)) for name in PIPELINES if name in tiny_models.FAMILIES}
    assert len([adapter for adapter in families if adapter is not None and adapter.kind == "video"]) >= 12
