"""The demo's settings."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..analysis.optional import require
from ..errors import ConfigError

#: progress(what, done, total)
Progress = Callable[[str, int, int], None]

HUB_ID = r"[\w-][\w.-]*/[\w-][\w.-]*"  # owner/name
PROMPT = "A red fox runs through fresh snow at sunrise, cinematic"


@dataclass(frozen=True)
class DemoConfig:
    """Settings; the defaults take about a minute on two CPU cores."""

    out: Path = Path("fpsattn_demo")
    preset: str = "paper"  # or a schedule file
    height: int = 256
    width: int = 384
    num_frames: int = 33
    num_inference_steps: int = 6
    guidance_scale: float = 2.0
    seed: int = 0
    device: str = "auto"
    model: str | None = None  # None: the tiny pipeline
    prompt: str = PROMPT
    negative_prompt: str = ""
    control: bool = True
    max_rows: int = 1024  # query tokens per head looked at when the error is split

    def __post_init__(self) -> None:
        if self.height < 16 or self.width < 16 or self.height % 16 or self.width % 16:
            raise ConfigError(
                f"fpsattention.demo: size {self.height}x{self.width}, expected height and width that are multiples of 16"
            )
        if self.num_frames < 1 or self.num_frames % 4 != 1:
            raise ConfigError(
                f"fpsattention.demo: num_frames {self.num_frames}, expected 4k + 1 (1, 5, 9, ..., 33, ..., 81)"
            )
        if self.num_inference_steps < 1:
            raise ConfigError(f"fpsattention.demo: num_inference_steps {self.num_inference_steps}, expected at least 1")
        if self.device not in ("auto", "cpu", "cuda"):
            raise ConfigError(f"fpsattention.demo: device {self.device!r}, expected 'auto', 'cpu' or 'cuda'")
        if self.model is not None and not Path(self.model).is_dir() and not re.fullmatch(HUB_ID, self.model):
            raise no_model(self.model, "is neither a folder here nor the form of a hub id")

    @classmethod
    def small(cls, **changes: Any) -> DemoConfig:
        """The smallest demo that still has phases and tiles: seconds, for continuous integration."""
        return cls(**{"height": 96, "width": 160, "num_frames": 17, "num_inference_steps": 4, **changes})


def no_model(model: str, what: str) -> ConfigError:
    """The error for a model that cannot be had."""
    return ConfigError(
        f"fpsattention.demo: model {model!r} {what}, expected a folder or hub id of a diffusers Wan text-to-video pipeline such as "
        "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    )


def check_packages() -> None:
    """BuildError, before minutes are spent, if a package that the demo needs is missing."""
    for module in ("diffusers", "imageio.v2", "imageio_ffmpeg", "matplotlib", "skimage.metrics", "safetensors"):
        require(module, "demo")
