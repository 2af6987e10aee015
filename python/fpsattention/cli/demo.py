"""``fpsattn demo``: one pipeline, dense and with FPSAttention."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .output import JsonOption, make_folder, print_json, print_table, progress_bars, stdout


def command(
    out: Annotated[Path, typer.Option(help="Folder for videos, pictures and reports.")] = Path("fpsattn_demo"),
    preset: Annotated[
        str, typer.Option("--preset", "--schedule", help="paper, training_free, fp8, dense, or a schedule file.")
    ] = "paper",
    small: Annotated[
        bool, typer.Option("--small", help="The smallest useful size (96x160, 17 frames, 4 steps).")
    ] = False,
    height: Annotated[int | None, typer.Option(help="Pixels, a multiple of 16.  [default: 256]")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels, a multiple of 16.  [default: 384]")] = None,
    num_frames: Annotated[int | None, typer.Option("--num-frames", help="4k + 1.  [default: 33]")] = None,
    num_inference_steps: Annotated[
        int | None, typer.Option("--num-inference-steps", help="Denoising steps.  [default: 6]")
    ] = None,
    guidance_scale: Annotated[
        float | None, typer.Option("--guidance-scale", help="Classifier-free guidance.  [default: 2]")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of weights (tiny model) and noise.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    model: Annotated[
        str | None, typer.Option(help="Folder or hub id of real Wan weights. Default: a tiny model, offline.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="For --model.")] = None,
    negative_prompt: Annotated[str | None, typer.Option("--negative-prompt", help="For --model.")] = None,
    control: Annotated[bool, typer.Option(help="Repeat the dense run; it must be identical.")] = True,
    as_json: JsonOption = False,
) -> None:
    """Run a Wan pipeline dense and with FPSAttention from one seed; write videos, pictures and a report."""
    from ..demo.config import DemoConfig, check_packages
    from ..schedule import Schedule

    given = {
        "height": height, "width": width, "num_frames": num_frames, "num_inference_steps": num_inference_steps,
        "guidance_scale": guidance_scale, "model": model, "prompt": prompt, "negative_prompt": negative_prompt,
    }  # fmt: skip
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    changes |= {"out": out, "preset": preset, "seed": seed, "device": device, "control": control}
    config = DemoConfig.small(**changes) if small else DemoConfig(**changes)
    Schedule.resolve(preset)
    check_packages()
    make_folder(out)
    with progress_bars(quiet=as_json) as progress:
        progress("loading", 0, 1)
        from ..demo.demo import run_demo

        def show(what: str, done: int, total: int) -> None:
            progress("loading", 1, 1)
            progress(what, done, total)

        report = run_demo(config, show)
    if as_json:
        print_json(report)
        return
    _show(report, out)


def _show(report: dict[str, Any], out: Path) -> None:
    console = stdout()
    parts = ("quantization", "sparsity", "total")
    rows = []
    for level in report["levels"]:
        errors = [f"{level[p]['rel_l1']:.4f}" if p in level else "0" for p in parts]
        cosine = f"{level['total']['cosine']:.5f}" if "total" in level else "1"
        rows.append([level["level"], f"{level['density']:.3f}", *errors, cosine])
    title = "one attention call against dense: relative L1, cosine"
    print_table(console, title, ("level", "density", *parts, "total cosine"), rows)
    video, control = report["quality"]["video"], report["control"]
    quality = "identical" if video["identical"] else f"PSNR {video['psnr_db']:.2f} dB, SSIM {video['ssim']:.4f}"
    console.print(f"FPSAttention against dense, same seed: {quality}")
    if control is not None:
        same = control["latents"]["identical"] and control["video"]["identical"]
        console.print(f"control (dense run again): {'identical' if same else '[bold red]not identical[/]'}")
    console.print(f"{report['seconds']['everything']:.1f} s on {report['environment']['device']}")
    console.print(f"written: {out}/report.md, dense.mp4, fps.mp4 and pictures", markup=False)
