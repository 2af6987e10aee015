"""``fpsattn compare``: attention methods side by side on one model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .output import JsonOption, make_folder, print_json, print_table, progress_bars, stdout
from .plan import parse_sizes


def command(
    out: Annotated[
        Path, typer.Option(help="Folder for runs, videos and the report; runs found there are kept.")
    ] = Path("fpsattn_compare"),
    methods: Annotated[
        str,
        typer.Option(help="Comma-separated: bf16, sage, sparge, svg, sta, naive, fps-fp8, fps, fps-pseudo, paper-fp8."),
    ] = "sage,sparge,svg,sta,fps-fp8,fps",
    schedule: Annotated[str, typer.Option(help="FPSAttention's: preset or file.")] = "paper",
    sta_density: Annotated[float, typer.Option("--sta-density", help="Of STA's window.")] = 0.2,
    granularity: Annotated[
        str, typer.Option(help="Scales of fps-fp8 and paper-fp8: tile, or T,H,W tokens, whole tiles.")
    ] = "tile",
    model: Annotated[
        str | None, typer.Option(help="Folder or hub id of Wan weights. Default: a tiny model, offline.")
    ] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="Repeat for several.")] = None,
    negative_prompt: Annotated[str, typer.Option("--negative-prompt", help="For --model.")] = "",
    seeds: Annotated[str, typer.Option(help="Comma-separated.")] = "0",
    height: Annotated[int, typer.Option(help="Pixels, a multiple of 16.")] = 192,
    width: Annotated[int, typer.Option(help="Pixels, a multiple of 16.")] = 320,
    num_frames: Annotated[int, typer.Option("--num-frames", help="4k + 1.")] = 33,
    num_inference_steps: Annotated[int, typer.Option("--num-inference-steps", help="Denoising steps.")] = 6,
    guidance_scale: Annotated[float, typer.Option("--guidance-scale", help="Classifier-free guidance.")] = 2.0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    jobs: Annotated[int, typer.Option(help="Processes that share the (prompt, seed) pairs.")] = 1,
    max_rows: Annotated[int, typer.Option("--max-rows", help="Query tokens of the error split; 0: none.")] = 1024,
    as_json: JsonOption = False,
) -> None:
    """Compare attention methods on one model: quality, density, error by cause; resumable."""
    from ..compare.harness import DEFAULT_PROMPTS, CompareConfig, run_compare
    from ..errors import ConfigError
    from ..schedule import Schedule

    try:
        numbers = tuple(int(seed) for seed in seeds.split(","))
    except ValueError:
        raise ConfigError(f"fpsattention.compare: seeds {seeds!r}, expected comma-separated whole numbers") from None
    config = CompareConfig(
        out=out, methods=tuple(methods.split(",")), schedule=schedule, sta_density=sta_density, model=model,
        granularity=granularity if granularity == "tile" else parse_sizes(granularity, "compare: granularity"), prompts=tuple(prompt or DEFAULT_PROMPTS), negative_prompt=negative_prompt, seeds=numbers, height=height, width=width,
        num_frames=num_frames, num_inference_steps=num_inference_steps, guidance_scale=guidance_scale, device=device, jobs=jobs,
        max_rows=max_rows,
    )  # fmt: skip
    Schedule.resolve(schedule)
    make_folder(out)
    with progress_bars(quiet=as_json) as progress:
        report = run_compare(config, progress)
    if as_json:
        print_json(report)
        return
    _show(report, out)


def _show(report: dict[str, Any], out: Path) -> None:
    from ..analysis.markdown import fixed

    columns = {
        "PSNR (dB)": ("psnr_db", 2), "SSIM": ("ssim", 4), "LPIPS": ("lpips", 4), "latent L1": ("latent_rel_l1", 4),
        "subject": ("subject", 4), "density": ("density", 3), "predicted x": ("predicted_attention_speedup", 2),
    }  # fmt: skip
    rows = []
    for row in report["table"]:
        dense = row["method"] == "dense"  # what the others are compared with
        cells = [
            "" if dense and key in ("psnr_db", "ssim", "lpips", "latent_rel_l1") else fixed(row[key], digits)
            for key, digits in columns.values()
        ]
        rows.append([row["label"], *cells])
    console = stdout()
    title = "against the dense run of the same prompt and seed"
    print_table(console, title, ("method", *columns), rows, fold="method")
    console.print(
        "predicted x: attention alone over dense BF16, computed from density and assumed rates, not measured",
        markup=False,
    )
    console.print(f"written: {out}/report.md, report.json, pictures, vbench/", markup=False)
