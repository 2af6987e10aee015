"""The demo's pipeline, loaded and run."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..analysis.optional import require
from ..analysis.time_split import time_split
from ..errors import ConfigError
from .config import DemoConfig, Progress, no_model
from .tiny_wan import tiny_inputs, tiny_pipeline


@dataclass
class Run:
    """Result of one pipeline run."""

    frames: np.ndarray  # [F, H, W, 3] in [0, 1]
    latents: torch.Tensor
    seconds: dict[str, float]  # quantize, attention, rest; together the whole run


def resolve_device(name: str) -> str:
    """ "cpu" or "cuda"; "auto" takes a Hopper GPU where the kernels can run, else the CPU."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "fpsattention.demo: device 'cuda', but torch sees no GPU: run fpsattn doctor, or use --device cpu"
        )
    if name != "auto":
        return name
    from ..ops.core import sm90_missing

    hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
    return "cuda" if hopper and sm90_missing() is None else "cpu"


def load_pipeline(config: DemoConfig, device: str) -> tuple[Any, dict[str, Any]]:
    """The pipeline on its device, and the model's part of its call."""
    if config.model is None:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    diffusers = require("diffusers", "demo")
    if config.model is None:
        pipe = tiny_pipeline(config.seed)
        call: dict[str, Any] = tiny_inputs(config.seed, config.height, config.width, config.num_frames)
        if device == "cuda":
            pipe.transformer.to(torch.bfloat16)
            call = {name: x.to(device) for name, x in call.items()}
    else:
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        # The argument's name changed with 0.42, which warns of the old one.
        argument = "dtype" if torch.torch_version.TorchVersion(diffusers.__version__) >= "0.42" else "torch_dtype"
        verbosity = diffusers.logging.get_verbosity()
        diffusers.logging.set_verbosity_error()  # what went wrong is in the exception
        try:
            pipe = diffusers.WanPipeline.from_pretrained(config.model, **{argument: dtype})
        except (OSError, ValueError) as error:
            raise no_model(config.model, f"cannot be loaded ({str(error).splitlines()[0]})") from error
        finally:
            diffusers.logging.set_verbosity(verbosity)
        call = {"prompt": config.prompt, "negative_prompt": config.negative_prompt or None}
    pipe.to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe, call


def run_pipeline(
    pipe: Any, call: dict[str, Any], config: DemoConfig, device: str, what: str, progress: Progress
) -> Run:
    """One timed run from the configured seed."""
    total = config.num_inference_steps
    last: dict[str, torch.Tensor] = {}

    def on_step(_pipe: Any, step: int, _timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        last["latents"] = values["latents"]
        progress(what, step + 1, total)
        return values

    def run() -> tuple[Any, float]:
        start = time.perf_counter()
        with torch.no_grad():
            frames = pipe(
                **call, height=config.height, width=config.width, num_frames=config.num_frames,
                num_inference_steps=total, guidance_scale=config.guidance_scale, output_type="np",
                generator=torch.Generator().manual_seed(config.seed), callback_on_step_end=on_step,
            ).frames[0]  # fmt: skip
        return frames, time.perf_counter() - start  # the frames are on the CPU, so the device is done

    progress(what, 0, total)
    (frames, whole), seconds = time_split(run, device)
    seconds["rest"] = whole - seconds["quantize"] - seconds["attention"]
    return Run(np.asarray(frames), last["latents"].float().cpu(), seconds)
