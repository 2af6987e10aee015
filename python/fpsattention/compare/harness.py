"""``fpsattn compare``: one model, methods x prompts x seeds, always against the dense run of the same prompt and seed.

Layout of ``out``::

    runs/p0-s0/dense/        result.json, frames.npy (uint8), latents.pt
    runs/p0-s0/<method>/     result.json, latents.pt
    vbench/<method>/<prompt>-<index>.mp4     what VBench evaluates: one folder per method, index = position of the seed
    errors.json              error of recorded attention calls by cause, method and sigma
    report.md report.json *.png

A run whose ``result.json`` carries the same key (everything that decides its result) is not repeated, so an interrupted comparison goes on where it
stopped.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError

if TYPE_CHECKING:
    import numpy as np
    import torch

    from ..schedule import Schedule
    from .methods import Method

#: progress(what, done, total)
Progress = Callable[[str, int, int], None]
DEFAULT_PROMPTS = ("A red fox runs through fresh snow at sunrise, cinematic",)


@dataclass(frozen=True)
class CompareConfig:
    """Settings; with the defaults (tiny pipeline, six methods) minutes on two CPU cores."""

    out: Path = Path("fpsattn_compare")
    methods: tuple[str, ...] = ("sage", "sparge", "svg", "sta", "fps-fp8", "fps")
    schedule: str = "paper"
    sta_density: float = 0.2
    granularity: str | tuple[int, int, int] = "tile"  # of fps-fp8 and paper-fp8
    model: str | None = None  # None: the tiny pipeline
    prompts: tuple[str, ...] = DEFAULT_PROMPTS
    negative_prompt: str = ""
    seeds: tuple[int, ...] = (0,)
    height: int = 192
    width: int = 320
    num_frames: int = 33
    num_inference_steps: int = 6
    guidance_scale: float = 2.0
    device: str = "auto"
    jobs: int = 1  # processes; each runs whole (prompt, seed) pairs
    max_rows: int = 1024  # query tokens per head looked at when the error is split; 0: the split is left out

    def __post_init__(self) -> None:
        if not self.prompts or not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ConfigError(
                f"fpsattention.compare: {len(self.prompts)} prompts and seeds {self.seeds}, expected at least one of each, seeds all different"
            )
        if self.jobs < 1 or self.max_rows < 0:
            raise ConfigError(
                f"fpsattention.compare: jobs {self.jobs}, max_rows {self.max_rows}, expected >= 1 and >= 0"
            )
        self.demo(0, 0)  # sizes and device are checked there

    def demo(self, prompt: int, seed: int) -> Any:
        """The pipeline's settings for one item, as ``fpsattn demo`` takes them."""
        from ..demo.config import DemoConfig

        return DemoConfig(
            out=self.out, preset=self.schedule, height=self.height, width=self.width, num_frames=self.num_frames,
            num_inference_steps=self.num_inference_steps, guidance_scale=self.guidance_scale, seed=seed, device=self.device,
            model=self.model, prompt=self.prompts[prompt], negative_prompt=self.negative_prompt,
        )  # fmt: skip

    def key(self, method: Method, prompt: int, seed: int) -> str:
        """Of everything that decides a run's result."""
        from .. import __version__

        names = (
            "model",
            "negative_prompt",
            "height",
            "width",
            "num_frames",
            "num_inference_steps",
            "guidance_scale",
            "device",
        )
        settings = {name: getattr(self, name) for name in names}
        settings |= {"prompt": self.prompts[prompt], "seed": seed, "method": method.describe(), "version": __version__}
        return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:16]


@dataclass
class _Loaded:
    """A pipeline, loaded once per process."""

    pipe: Any
    device: str
    schedule: Schedule
    methods: list[Method]


def run_compare(config: CompareConfig, progress: Progress = lambda what, done, total: None) -> dict[str, Any]:
    """Run what is missing, write the report, and return it."""
    from ..analysis.optional import require
    from .report import write_report

    for module in ("diffusers", "imageio.v2", "imageio_ffmpeg", "matplotlib", "skimage.metrics", "safetensors"):
        require(module, "compare")
    begin = time.perf_counter()
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    loaded = _load(config)  # bad names and models end here
    items = [(prompt, seed) for prompt in range(len(config.prompts)) for seed in config.seeds]
    total = len(items) * (len(loaded.methods) + 1)
    done = 0

    def one_done() -> None:
        nonlocal done
        done += 1
        progress("runs", done, total)

    progress("runs", 0, total)
    if config.jobs == 1 or len(items) == 1:
        for prompt, seed in items:
            _run_item(config, loaded, prompt, seed, one_done)
    else:
        _in_processes(config, items, one_done)
    errors = _split_errors(config, loaded, progress) if config.max_rows else {}
    report = _collect(config, loaded, items)
    report["errors"] = errors
    report["seconds"] = time.perf_counter() - begin
    write_report(out, report)
    return report


def _load(config: CompareConfig) -> _Loaded:
    from ..demo.pipeline import load_pipeline, resolve_device
    from .methods import choose

    schedule = _schedule(config)
    chosen = choose(list(config.methods), schedule, config.sta_density, config.granularity)
    demo = config.demo(0, config.seeds[0])
    device = resolve_device(config.device)
    pipe, _ = load_pipeline(replace(demo, seed=0), device)
    return _Loaded(pipe, device, schedule, chosen)


def _schedule(config: CompareConfig) -> Schedule:
    """FPSAttention's; the tiny grid needs a tile of its own, for all methods."""
    from ..demo.tiny_wan import TILE
    from ..schedule import Schedule

    schedule = Schedule.resolve(config.schedule)
    for level in schedule.levels.values():
        if level.pattern is not None and level.pattern.pattern.permutes:
            raise ConfigError(
                f"fpsattention.compare: level {level.name!r} has the pattern {level.pattern.name}, which permutes tokens, expected patterns that make "
                "a mask of tiles: fpsattn demo runs it"
            )
    return replace(schedule, tile=TILE) if config.model is None and schedule.tile is None else schedule


def _in_processes(config: CompareConfig, items: Sequence[tuple[int, int]], one_done: Callable[[], None]) -> None:
    import multiprocessing

    import torch

    threads = max(1, torch.get_num_threads() // config.jobs)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(config.jobs, mp_context=context) as pool:
        futures = [pool.submit(_in_process, config, prompt, seed, threads) for prompt, seed in items]
        for future in as_completed(futures):
            for _ in range(future.result()):
                one_done()


def _in_process(config: CompareConfig, prompt: int, seed: int, threads: int) -> int:
    import torch

    torch.set_num_threads(threads)
    count = 0

    def one_done() -> None:
        nonlocal count
        count += 1

    _run_item(config, _load(config), prompt, seed, one_done)
    return count


# Runs --------------------------------------------------------------------------------------------------------------------


def _run_item(config: CompareConfig, loaded: _Loaded, prompt: int, seed: int, one_done: Callable[[], None]) -> None:
    import numpy as np

    from .methods import methods

    folder = Path(config.out) / "runs" / f"p{prompt}-s{seed}"
    dense = methods(loaded.schedule)["dense"]
    _run(config, loaded, dense, prompt, seed, folder, None)
    one_done()
    reference = np.load(folder / "dense" / "frames.npy")
    for method in loaded.methods:
        _run(config, loaded, method, prompt, seed, folder, reference)
        one_done()


def _run(
    config: CompareConfig,
    loaded: _Loaded,
    method: Method,
    prompt: int,
    seed: int,
    folder: Path,
    reference: np.ndarray | None,
) -> None:
    import numpy as np
    import torch

    from ..analysis.captures import save_json
    from ..analysis.metrics import compare, compare_videos
    from ..demo.pictures import write_video
    from .running import attention_by
    from .temporal import lpips_distance, temporal_metrics

    target, key = folder / method.name, config.key(method, prompt, seed)
    if _result(target).get("key") == key:
        return
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    demo = config.demo(prompt, seed)
    begin = time.perf_counter()
    with attention_by(loaded.pipe, method, loaded.schedule.tile) as counted, torch.no_grad():
        frames, latents = _generate(loaded, demo, prompt)
    seconds = time.perf_counter() - begin
    pixels = (np.clip(frames, 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8)
    result: dict[str, Any] = {
        "key": key, "seconds": seconds, "calls": counted.calls, "density": counted.density,
        "attention_flops": counted.flops, "dense_attention_flops": counted.dense_flops, "ran": sorted(counted.ran), "temporal": temporal_metrics(pixels),
    }  # fmt: skip
    torch.save(latents, target / "latents.pt")
    if reference is None:
        np.save(target / "frames.npy", pixels)
    else:
        result["video"] = compare_videos(pixels, reference)
        dense_latents = torch.load(folder / "dense" / "latents.pt", weights_only=True)
        result["latents"] = compare(latents, dense_latents)
        distance, result["lpips_by"] = lpips_distance()
        result["lpips"] = distance(pixels, reference) if callable(distance) else None
    video = Path(config.out) / "vbench" / method.name
    video.mkdir(parents=True, exist_ok=True)
    write_video(video / f"{_file_name(config.prompts[prompt])}-{config.seeds.index(seed)}.mp4", frames)
    save_json(target / "result.tmp", result)
    (target / "result.tmp").rename(target / "result.json")  # whole, or not there


def _file_name(prompt: str) -> str:
    """VBench finds a video by its prompt; what no file system takes is replaced."""
    return re.sub(r'[/\\\0<>:"|?*]', "_", prompt)[:180]


def _generate(loaded: _Loaded, demo: Any, prompt: int) -> tuple[np.ndarray, torch.Tensor]:
    import numpy as np
    import torch

    if demo.model is None:
        from ..demo.tiny_wan import tiny_inputs

        call: dict[str, Any] = tiny_inputs(demo.seed + 7919 * prompt, demo.height, demo.width, demo.num_frames)
        call = {name: x.to(loaded.device) for name, x in call.items()}
    else:
        call = {"prompt": demo.prompt, "negative_prompt": demo.negative_prompt or None}
    last: dict[str, torch.Tensor] = {}

    def on_step(_pipe: Any, _step: int, _timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        last["latents"] = values["latents"]
        return values

    frames = loaded.pipe(
        **call, height=demo.height, width=demo.width, num_frames=demo.num_frames, num_inference_steps=demo.num_inference_steps,
        guidance_scale=demo.guidance_scale, output_type="np", generator=torch.Generator().manual_seed(demo.seed),
        callback_on_step_end=on_step,
    ).frames[0]  # fmt: skip
    return np.asarray(frames), last["latents"].float().cpu()


def _result(folder: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        return found
    except (OSError, json.JSONDecodeError):
        return {}


# Errors by cause and sigma -----------------------------------------------------------------------------------------------


def _split_errors(config: CompareConfig, loaded: _Loaded, progress: Progress) -> dict[str, list[dict[str, Any]]]:
    """Error of each method on q, k, v that the dense run of the first item recorded, per layer and sigma."""
    import torch

    import fpsattention as fps

    from ..analysis.captures import find_captures, save_json
    from .methods import methods
    from .running import dense_schedule

    path = Path(config.out) / "errors.json"
    dense = methods(loaded.schedule)["dense"]
    base = config.key(dense, 0, config.seeds[0]) + f"-{config.max_rows}"
    kept = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    kept = kept if kept.get("base") == base else {"base": base, "methods": {}}
    keys = {method.name: config.key(method, 0, config.seeds[0]) for method in loaded.methods}
    todo = [m for m in loaded.methods if kept["methods"].get(m.name, {}).get("key") != keys[m.name]]
    if todo:
        demo = config.demo(0, config.seeds[0])
        num_layers = len(loaded.pipe.transformer.blocks)
        layers = sorted({0, num_layers - 1})
        dense_only = fps.apply(loaded.pipe, dense_schedule(loaded.schedule.tile))
        with TemporaryDirectory(prefix="captures", dir=config.out) as folder:
            with dense_only as handle, handle.record(dir=folder, layers=layers), torch.no_grad():
                _generate(loaded, demo, 0)
            captures = find_captures(folder)
            for done, method in enumerate(todo):
                progress("error split", done, len(todo))
                rows = [_error(method, capture, loaded, config) for capture in captures]
                kept["methods"][method.name] = {"key": keys[method.name], "rows": rows}
                save_json(path, kept)
        progress("error split", len(todo), len(todo))
    return {method.name: kept["methods"][method.name]["rows"] for method in loaded.methods}


def _error(method: Method, capture: Any, loaded: _Loaded, config: CompareConfig) -> dict[str, Any]:
    """Relative L1 against dense FP32: what rounding does alone, what skipping does alone, and both."""
    import torch

    from ..analysis.captures import choose_tiles, tile_tokens
    from ..analysis.metrics import compare
    from ..layout.masks import dense_mask
    from ..layout.tiles import plan
    from ..schedule.scheduler import step_sigmas
    from .methods import Context
    from .numerics import EXACT, blockwise_attention

    layout = plan(capture.grid, loaded.schedule.tile, capture.text_len, capture.text_position)
    trajectory = tuple(step_sigmas(loaded.pipe.scheduler, config.num_inference_steps))
    context = Context(layout, capture.layer, capture.sigma, None, trajectory, capture.exact)
    q, k, v = (x.float().transpose(1, 2).contiguous() for x in capture.load())
    rows = torch.cat([tile_tokens(layout)[tile] for tile in choose_tiles(layout, config.max_rows)])
    reference = torch.nn.functional.scaled_dot_product_attention(q[:, :, rows], k, v)
    entry: dict[str, Any] = {"layer": capture.layer, "sigma": capture.sigma, "density": 1.0, "selected_density": 1.0}
    if method.is_dense(context):
        return entry | dict.fromkeys(("quantization", "sparsity", "total"), 0.0)
    full, mask = dense_mask(layout), method.mask(q, k, v, context)

    def error(out: torch.Tensor) -> float:
        return float(compare(out[:, :, rows], reference)["rel_l1"])

    entry["density"] = mask.density
    entry["selected_density"] = method.selected_density(q, k, v, context)
    entry["quantization"] = error(method.attention(q, k, v, full, context))
    if method.compensate:
        entry["sparsity"] = None  # the pseudo-keys are part of the op
    else:
        entry["sparsity"] = error(blockwise_attention(q, k, v, mask, EXACT)[0])
    entry["total"] = error(method.attention(q, k, v, mask, context))
    return entry


# Report ------------------------------------------------------------------------------------------------------------------


def _collect(config: CompareConfig, loaded: _Loaded, items: Sequence[tuple[int, int]]) -> dict[str, Any]:
    from ..analysis.environment import environment
    from .methods import methods

    rows: dict[str, list[dict[str, Any]]] = {}
    chosen = [methods(loaded.schedule, config.sta_density)["dense"], *loaded.methods]
    for method in chosen:
        for prompt, seed in items:
            result = _result(Path(config.out) / "runs" / f"p{prompt}-s{seed}" / method.name)
            rows.setdefault(method.name, []).append({"prompt": prompt, "seed": seed, **result})
    settings = {**asdict(config), "out": str(config.out), "device": loaded.device}
    return {
        "settings": settings,
        "model": config.model or "tiny Wan, weights set by hand and by seed, not trained",
        "environment": environment(loaded.device),
        "methods": {m.name: {"label": m.label, "source": m.source, "bits": m.bits, **m.describe()} for m in chosen},
        "runs": rows,
    }
