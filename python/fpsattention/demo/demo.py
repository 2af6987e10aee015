"""`fpsattn demo`: one Wan pipeline, dense and with FPSAttention, from the same seed; videos, pictures, numbers.

By default the pipeline is the tiny one of `evaluation.tiny_wan` (set weights, no network); `model` runs real Wan weights
through the same path. Three runs: dense, dense again (the control: it must score "identical", or the comparison means
nothing), and FPSAttention. The q, k, v of the FPSAttention run are recorded, and the error of every attention call in them
is split into quantization and sparsity (`evaluation.analysis`).
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..analysis.captures import PARTS, analyze_captures, find_captures, level_mask, save_json
from ..analysis.metrics import compare, compare_videos
from ..analysis.optional import require
from ..errors import ConfigError

if TYPE_CHECKING:
    import numpy as np
    import torch

#: progress(what, done, total)
Progress = Callable[[str, int, int], None]

HUB_ID = r"[\w-][\w.-]*/[\w-][\w.-]*"  # owner/name
FPS = 16  # frames per second of the videos, as Wan's
RECORDED_LAYERS = 2  # first and last layer of a model are recorded
DENSE_PROMPT = "A red fox runs through fresh snow at sunrise, cinematic"


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
    prompt: str = DENSE_PROMPT
    negative_prompt: str = ""
    control: bool = True
    max_rows: int = 1024  # query tokens per head looked at when the error is split

    def __post_init__(self) -> None:
        if self.height < 16 or self.width < 16 or self.height % 16 or self.width % 16:
            raise ConfigError(
                f"fpsattention.demo: size {self.height}x{self.width}, wanted height and width that are multiples of 16"
            )
        if self.num_frames < 1 or self.num_frames % 4 != 1:
            raise ConfigError(
                f"fpsattention.demo: num_frames {self.num_frames}, wanted 4k + 1 (1, 5, 9, ..., 33, ..., 81)"
            )
        if self.num_inference_steps < 1:
            raise ConfigError(f"fpsattention.demo: num_inference_steps {self.num_inference_steps}, wanted at least 1")
        if self.device not in ("auto", "cpu", "cuda"):
            raise ConfigError(f"fpsattention.demo: device {self.device!r}, wanted 'auto', 'cpu' or 'cuda'")
        if self.model is not None and not Path(self.model).is_dir() and not re.fullmatch(HUB_ID, self.model):
            raise _no_model(self.model, "is neither a folder here nor the form of a hub id")

    @classmethod
    def small(cls, **changes: Any) -> DemoConfig:
        """The smallest demo that still has phases and tiles: seconds, for continuous integration."""
        return cls(**{"height": 96, "width": 160, "num_frames": 17, "num_inference_steps": 4, **changes})


@dataclass
class Run:
    """Result of one pipeline run."""

    frames: np.ndarray  # [F, H, W, 3] in [0, 1]
    latents: torch.Tensor
    seconds: float
    parts: dict[str, float]  # quantize, attention, rest


class _Stopwatch:
    """Seconds spent in named parts; waits for the device around each, so parts do not overlap."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.seconds = {"quantize": 0.0, "attention": 0.0}

    def now(self) -> float:
        import torch

        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        start = self.now()
        yield
        self.seconds[name] += self.now() - start


def _timed_ops(watch: _Stopwatch) -> Any:
    """A dispatch mode that times self-attention: `fpsattn::attention`, run as its two halves, and torch's own.

    `fpsattn::attention` is by definition `quantize` followed by `forward`, so the halves give the same bits.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    from ..ops.reference import Quantized

    names = ("softmax_scale", "granularity", "smooth_k", "pow2_scales", "k_mean_stride", "k_mean", "v_absmax")

    class Timed(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            namespace, _, op = func.name().partition("::")
            op = op.split(".")[0]
            if namespace == "fpsattn" and op == "attention":
                return self._halves(torch.ops.fpsattn, func, args, kwargs)
            if namespace == "aten" and op.startswith("_scaled_dot_product") and args[0].shape[2] == args[1].shape[2]:
                with watch.part("attention"):
                    return func(*args, **kwargs)
            return func(*args, **kwargs)

        @staticmethod
        def _halves(ops: Any, func: Any, args: Any, kwargs: Any) -> Any:
            given = {
                argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)
            } | kwargs
            options = {name: given[name] for name in names if name in given and name != "softmax_scale"}
            q, k, v = given["q"], given["k"], given["v"]
            tables = [given[name] for name in ("token_of_slot", "tile_of_block", "kv_num_blocks", "kv_indices")]
            with watch.part("quantize"):
                quantized = Quantized(
                    *ops.quantize(q, k, v, given["token_of_slot"], given["tile_block_offsets"], **options)
                )
            with watch.part("attention"):
                out, lse, row_max, row_sum = ops.forward(
                    *quantized.operands, *tables, num_tokens=q.shape[2], softmax_scale=given["softmax_scale"],
                    out_dtype=q.dtype, q_k_mean=quantized.q_k_mean,
                )  # fmt: skip
            return (out, lse, *quantized.operands, row_max, row_sum)

    return Timed()


def resolve_device(name: str) -> str:
    """ "cpu" or "cuda"; "auto" takes a Hopper GPU where the kernels can run, else the CPU."""
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "fpsattention.demo: device 'cuda', but torch sees no GPU: run fpsattn doctor, or use --device cpu"
        )
    if name != "auto":
        return name
    from ..ops.core import sm90_missing

    hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
    return "cuda" if hopper and sm90_missing() is None else "cpu"


def _no_model(model: str, what: str) -> ConfigError:
    return ConfigError(
        f"fpsattention.demo: model {model!r} {what}, wanted a folder or hub id of a diffusers Wan text-to-video pipeline such as "
        "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    )


def load_pipeline(config: DemoConfig, device: str) -> tuple[Any, dict[str, Any]]:
    """The pipeline on its device, and the model's part of its call."""
    import torch

    if config.model is None:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    diffusers = require("diffusers", "demo")
    if config.model is None:
        from .tiny_wan import tiny_inputs, tiny_pipeline

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
            raise _no_model(config.model, f"cannot be loaded ({str(error).splitlines()[0]})") from error
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
    import numpy as np
    import torch

    total = config.num_inference_steps
    last: dict[str, torch.Tensor] = {}

    def on_step(_pipe: Any, step: int, _timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        last["latents"] = values["latents"]
        progress(what, step + 1, total)
        return values

    progress(what, 0, total)
    watch = _Stopwatch(device)
    start = watch.now()
    with torch.no_grad(), _timed_ops(watch):
        frames = pipe(
            **call, height=config.height, width=config.width, num_frames=config.num_frames,
            num_inference_steps=total, guidance_scale=config.guidance_scale, output_type="np",
            generator=torch.Generator().manual_seed(config.seed), callback_on_step_end=on_step,
        ).frames[0]  # fmt: skip
    seconds = watch.now() - start
    parts = {**watch.seconds, "rest": seconds - sum(watch.seconds.values())}
    return Run(np.asarray(frames), last["latents"].float().cpu(), seconds, parts)


def write_video(path: Path, frames: np.ndarray) -> Path:
    """H.264 in MP4; frames [F, H, W, 3] in [0, 1], sizes multiples of 16."""
    import numpy as np

    imageio = require("imageio.v2", "demo")
    require("imageio_ffmpeg", "demo")
    pixels = (np.clip(frames, 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8)
    imageio.mimwrite(str(path), list(pixels), format="FFMPEG", fps=FPS, codec="libx264", quality=8)
    return path


def check_packages() -> None:
    """BuildError, before minutes are spent, if a package that the demo needs is missing."""
    for module in ("diffusers", "imageio.v2", "imageio_ffmpeg", "matplotlib", "skimage.metrics", "safetensors"):
        require(module, "demo")


def run_demo(config: DemoConfig, progress: Progress = lambda what, done, total: None) -> dict[str, Any]:
    """Run everything, write all files to `config.out`, and return the report (also `report.json`)."""
    check_packages()
    import fpsattention as fps

    from ..analysis.report import environment, write_report
    from ..schedule import Schedule

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
            if (
                config.model is None
            ):  # nobody trained these weights: that they were not trained with the preset says nothing
                warnings.filterwarnings("ignore", r"fpsattention\.apply: the preset 'paper'")
            handle = fps.apply(pipe, schedule)
        with handle:
            with handle.record(dir=folder, layers=layers):
                sparse = run_pipeline(pipe, call, config, device, "FPSAttention", progress)
            ran = handle.report().to_dict()
        records = _split(folder, schedule, config, device, progress)
    finally:
        shutil.rmtree(folder, ignore_errors=True)

    write_video(out / "dense.mp4", dense.frames)
    write_video(out / "fps.mp4", sparse.frames)
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
        "ran": ran,
        # The first run pays for what happens once in a process: the control, where there is one, is the fair one to compare with.
        "seconds": {"dense": (again or dense).parts, "FPSAttention": sparse.parts, "everything": time.perf_counter() - begin},
    }  # fmt: skip
    _draw(out, config, schedule, pipe, dense, sparse, report)
    report["seconds"]["everything"] = time.perf_counter() - begin
    save_json(out / "report.json", report)
    write_report(out / "report.md", report)
    return report


def _schedule(config: DemoConfig, pipe: Any) -> Any:
    from ..schedule import Schedule
    from ..schedule.presets import PRESETS

    if config.preset in PRESETS:
        schedule = Schedule.preset(config.preset, float(getattr(pipe.scheduler.config, "flow_shift", None) or 5.0))
    else:
        schedule = Schedule.resolve(config.preset)
    if config.model is None and schedule.tile is None:
        from .tiny_wan import TILE

        schedule = replace(schedule, tile=TILE)
    return schedule


def _split(folder: Path, schedule: Any, config: DemoConfig, device: str, progress: Progress) -> list[dict[str, Any]]:
    captures = find_captures(folder)
    done = 0

    def on_step(_capture: Any) -> None:
        nonlocal done
        done += 1
        progress("error split", done, len(captures))

    return analyze_captures(
        captures, schedule, max_rows=config.max_rows, seed=config.seed, device=device, on_step=on_step
    )


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


def error_series(records: list[dict[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    """Points of `plot_error_vs_sigma`: relative L1 of quantization, sparsity and total, mean over the layers of a sigma."""
    series: dict[str, list[tuple[float, float]]] = {}
    for part in ("quantization", "sparsity", "total"):
        for sigma in sorted({record["sigma"] for record in records}, reverse=True):
            found = [r[part]["rel_l1"] if part in r else 0.0 for r in records if r["sigma"] == sigma]
            series.setdefault(part, []).append((sigma, sum(found) / len(found)))
    return series


def _draw(
    out: Path, config: DemoConfig, schedule: Any, pipe: Any, dense: Run, sparse: Run, report: dict[str, Any]
) -> None:
    from ..analysis import plots

    records = report["captures"]
    grid, heads = tuple(records[0]["grid"]), pipe.transformer.config.num_attention_heads
    masks = {
        name: level_mask(schedule, level, grid, heads)
        for name, level in schedule.levels.items()
        if level.precision == "fp8"
    }
    if masks:
        layout = next(iter(masks.values())).layout
        title = f"Block masks on grid {'x'.join(map(str, grid))}, tile {'x'.join(map(str, layout.tile))} tokens"
        plots.plot_block_masks(masks, out / "block_mask.png", title)
    phases = [(phase.high, phase.low, phase.level) for phase in schedule.phases]
    name = Path(config.preset).name
    plots.plot_error_vs_sigma(
        error_series(records), phases, out / "error_vs_sigma.png", f'Error of one attention call, schedule "{name}"'
    )
    video = report["quality"]["video"]
    plots.plot_side_by_side(
        dense.frames, sparse.frames, out / "side_by_side.png",
        f"Same seed, {config.num_inference_steps} steps: mean PSNR {video['psnr_db']:.1f} dB, SSIM {video['ssim']:.3f}",
        video["psnr_db_per_frame"],
    )  # fmt: skip
    runs = {name: report["seconds"][name] for name in ("dense", "FPSAttention")}
    plots.plot_time_split(runs, out / "time_split.png", f"Where the time went ({report['environment']['device']})")
