"""The demo's videos and pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..analysis import plots
from ..analysis.captures import error_series
from ..analysis.optional import require
from ..schedule import Schedule
from .config import DemoConfig

FRAMES_PER_SECOND = 16  # as Wan's


def write_video(path: Path, frames: np.ndarray) -> Path:
    """H.264 in MP4; frames [F, H, W, 3] in [0, 1], sizes multiples of 16."""
    imageio = require("imageio.v2", "demo")
    require("imageio_ffmpeg", "demo")
    pixels = (np.clip(frames, 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8)
    imageio.mimwrite(str(path), list(pixels), format="FFMPEG", fps=FRAMES_PER_SECOND, codec="libx264", quality=8)
    return path


def draw(
    config: DemoConfig,
    schedule: Schedule,
    masks: dict[str, Any],
    dense: np.ndarray,
    fps: np.ndarray,
    report: dict[str, Any],
) -> None:
    """Writes both videos and all pictures to `config.out`. `dense`, `fps`: frames [F, H, W, 3] in [0, 1]; `masks`: of levels, by name."""
    out = Path(config.out)
    write_video(out / "dense.mp4", dense)
    write_video(out / "fps.mp4", fps)
    records = report["captures"]
    grid = tuple(records[0]["grid"])
    if masks:
        layout = next(iter(masks.values())).layout
        title = f"Block masks on grid {'x'.join(map(str, grid))}, tile {'x'.join(map(str, layout.tile))} tokens"
        plots.plot_block_masks(masks, out / "block_mask.png", title)
    phases = [(phase.high, phase.low, phase.level) for phase in schedule.in_sigma().phases]
    plots.plot_error_vs_sigma(
        error_series(records), phases, out / "error_vs_sigma.png",
        f'Error of one attention call, schedule "{Path(config.preset).name}"',
    )  # fmt: skip
    video = report["quality"]["video"]
    plots.plot_side_by_side(
        dense, fps, out / "side_by_side.png", f"Same seed, {config.num_inference_steps} steps",
        video["psnr_db_per_frame"], video["ssim_per_frame"],
    )  # fmt: skip
    runs = {name: report["seconds"][name] for name in ("dense", "FPSAttention")}
    plots.plot_time_split(runs, out / "time_split.png", f"Where the time went ({report['environment']['device']})")
