"""`fpsattn demo`: one Wan pipeline, dense and with FPSAttention, from the same seed; videos, pictures, numbers.

By default the pipeline is the tiny one of `tiny_wan` (set weights, no network); `model` runs real Wan weights
through the same path. Three runs: dense, dense again (the control: it must score "identical", or the comparison means
nothing), and FPSAttention. The q, k, v of the FPSAttention run are recorded, and the error of every attention call in them
is split into quantization and sparsity (`analysis.captures`).
"""

from __future__ import annotations

import shutil
import tempfile
import time
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ..analysis.captures import PARTS, analyze_captures, find_captures, level_mask, save_json
from ..analysis.environment import environment
from ..analysis.metrics import compare, compare_videos
from ..schedule import Schedule
from ..schedule.presets import PRESETS
from .config import DemoConfig, Progress, check_packages
from .pictures import draw
from .pipeline import load_pipeline, resolve_device, run_pipeline
from .summary import write_report
from .tiny_wan import TILE

RECORDED_LAYERS = 2  # first and last layer of a model are recorded


def run_demo(config: DemoConfig, progress: Progress = lambda what, done, total: None) -> dict[str, Any]:
    """Run everything, write all files to `config.out`, and return the report (also `report.json`)."""
    check_packages()
    import fpsattention as fps

    Schedule.resolve(config.preset)  # a wrong name must not cost a model's loading time
    begin = time.perf_counter()
    device = resolve_device(config.device)
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    pipe, call = load_pipeline(config, device)
    schedule = _schedule(config, pipe)

    dense = run_pipeline(pipe, call, config, device, "dense", progress)
    again = run_pipeline(pipe, call, config, device, "dense again (control)", progress) if config.control else None
    num_layers = len(pipe.transformer.blocks)
    layers = sorted({0, num_layers - 1} if num_layers > RECORDED_LAYERS else range(num_layers))
    folder = Path(tempfile.mkdtemp(prefix="fpsattn_demo_"))
    try:
        with warnings.catch_warnings():
            # Nobody trained these weights: that they were not trained with the preset says nothing.
            if config.model is None:
                warnings.filterwarnings("ignore", r"fpsattention\.apply: the preset 'paper'")
            handle = fps.apply(pipe, schedule)
        with handle:
            with handle.record(dir=folder, layers=layers):
                sparse = run_pipeline(pipe, call, config, device, "FPSAttention", progress)
            ran = handle.report()
        records = _split(folder, schedule, config, device, progress)
        masks = _masks(folder, schedule, pipe.transformer.config.num_attention_heads, device)
    finally:
        shutil.rmtree(folder, ignore_errors=True)

    video = compare_videos(sparse.frames.astype("float32"), dense.frames.astype("float32"))
    report: dict[str, Any] = {
        "settings": {**asdict(config), "device": device},
        "model": config.model or "tiny Wan, weights set by hand and by seed, not trained",
        "environment": environment(device),
        "schedule": schedule.to_dict(),
        "quality": {"video": video, "latents": compare(sparse.latents, dense.latents)},
        "control": None if again is None else {
            "video": compare_videos(again.frames.astype("float32"), dense.frames.astype("float32")),
            "latents": compare(again.latents, dense.latents),
        },
        "levels": _by_level(records),
        "captures": records,
        "ran": {**ran.to_dict(), "notes": ran.notes()},
        "masks_drawn": list(masks),
        # The first run pays for what happens once in a process: the control, where there is one, is the fair one to compare with.
        "seconds": {"dense": (again or dense).seconds, "FPSAttention": sparse.seconds},
    }  # fmt: skip
    draw(config, schedule, masks, dense.frames, sparse.frames, report)
    report["seconds"]["everything"] = time.perf_counter() - begin
    save_json(out / "report.json", report)
    write_report(out / "report.md", report)
    return report


def _schedule(config: DemoConfig, pipe: Any) -> Schedule:
    if config.preset in PRESETS:
        schedule = Schedule.preset(config.preset, float(getattr(pipe.scheduler.config, "flow_shift", None) or 5.0))
    else:
        schedule = Schedule.resolve(config.preset)
    if config.model is None and schedule.tile is None:
        schedule = replace(schedule, tile=TILE)
    return schedule


def _split(
    folder: Path, schedule: Schedule, config: DemoConfig, device: str, progress: Progress
) -> list[dict[str, Any]]:
    captures = find_captures(folder)
    done = 0

    def on_step(_capture: Any) -> None:
        nonlocal done
        done += 1
        progress("error split", done, len(captures))

    return analyze_captures(
        captures, schedule, max_rows=config.max_rows, seed=config.seed, device=device, on_step=on_step
    )


def _masks(folder: Path, schedule: Schedule, heads: int, device: str) -> dict[str, Any]:
    """A block mask of every level that has one: where it reads q and k, that of the first capture at the level."""
    captures, masks = find_captures(folder), {}
    for name, level in schedule.levels.items():
        at_level = [c for c in captures if schedule.at(c.sigma, c.layer).name == name] if level.dynamic else captures
        if level.precision == "bf16" or not at_level or (level.pattern is not None and level.pattern.pattern.permutes):
            continue
        q, k, v = (x.to(device) for x in at_level[0].load())
        of = at_level[0]
        masks[name] = level_mask(
            schedule, level, of.grid, heads, of.layer, of.text_len, of.text_position, tensors=(q, k, v), exact=of.exact
        )
    return masks


def _by_level(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over the captures of each level, in the order in which levels ran."""
    levels = []
    ordered = sorted(records, key=lambda record: -record["sigma"])
    for name in dict.fromkeys(record["level"] for record in ordered):
        rows = [record for record in ordered if record["level"] == name]
        entry = {key: rows[0].get(key) for key in ("level", "precision", "granularity", "density")}
        entry["sigmas"] = sorted({row["sigma"] for row in rows}, reverse=True)
        for part in PARTS:
            found = [row[part] for row in rows if part in row]
            if found:
                entry[part] = {key: sum(f[key] for f in found) / len(found) for key in ("rel_l1", "cosine")}
        levels.append(entry)
    return levels
