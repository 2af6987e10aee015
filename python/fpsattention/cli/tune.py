"""``fpsattn tune``: a schedule for one model, from a bound on what its output may lose."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .output import JsonOption, make_folder, print_json, print_table, progress_bars, stdout


def command(
    target: Annotated[
        str, typer.Option(help="psnr=DECIBELS of the video, rel_l1=SHARE of the latents, or density=SHARE.")
    ] = "psnr=30",
    budget: Annotated[str, typer.Option(help="Time: 20m, 1.5h, 90s.")] = "20m",
    out: Annotated[
        Path, typer.Option(help="Folder; a run found there goes on, or is replaced where settings differ.")
    ] = Path("fpsattn_tune"),
    small: Annotated[bool, typer.Option("--small", help="The smallest useful size of the tiny model.")] = False,
    model: Annotated[
        str | None, typer.Option(help="Folder or hub id of Wan weights. Default: a tiny model, offline.")
    ] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="For --model; repeat. Calibration.")] = None,
    held_out: Annotated[str | None, typer.Option("--held-out", help="For --model: prompt of the verification.")] = None,
    negative_prompt: Annotated[str, typer.Option("--negative-prompt", help="For --model.")] = "",
    height: Annotated[int | None, typer.Option(help="Pixels, a multiple of 16.  [default: 192]")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels, a multiple of 16.  [default: 320]")] = None,
    num_frames: Annotated[int | None, typer.Option("--num-frames", help="4k + 1.  [default: 33]")] = None,
    num_inference_steps: Annotated[
        int | None, typer.Option("--num-inference-steps", help="Denoising steps.  [default: 8]")
    ] = None,
    guidance_scale: Annotated[float, typer.Option("--guidance-scale", help="Classifier-free guidance.")] = 2.0,
    phases: Annotated[int | None, typer.Option(help="Equal shares of the steps.  [default: 4]")] = None,
    rows: Annotated[int, typer.Option(help="Query tokens per head at which errors are measured.")] = 512,
    sensitivity: Annotated[
        str, typer.Option(help="gradient, or none: no backward pass, all layers count alike.")
    ] = "gradient",
    per_layer: Annotated[bool, typer.Option("--per-layer", help="One window for all heads of a layer.")] = False,
    pattern: Annotated[
        list[str] | None, typer.Option(help="A pattern with a ratio (topk_mean), tried beside windows; repeat.")
    ] = None,
    hadamard: Annotated[bool, typer.Option("--hadamard", help="Try windows with rotated q and k, too.")] = False,
    pareto: Annotated[
        str, typer.Option(help="Comma-separated costs: also run presets, patterns and this tuning there.")
    ] = "",
    seed: Annotated[int, typer.Option(help="Of weights (tiny model), noise and choices.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    as_json: JsonOption = False,
) -> None:
    """Find the cheapest schedule for a model whose output keeps a bound; resumable, verified on a held-out prompt and seed."""
    from ..demo.config import DemoConfig
    from ..errors import ConfigError
    from ..tuning.settings import Target, TuneSettings, seconds

    goal = Target.of(target)
    sizes = {"height": 96, "width": 160, "num_frames": 17, "num_inference_steps": 4} if small else {"height": 192, "width": 320, "num_frames": 33, "num_inference_steps": 8}  # fmt: skip
    given = {"height": height, "width": width, "num_frames": num_frames, "num_inference_steps": num_inference_steps}
    sizes |= {name: value for name, value in given.items() if value is not None}
    try:
        costs = tuple(float(part) for part in pareto.split(",") if part)
    except ValueError:
        raise ConfigError(f"fpsattention.tune: pareto {pareto!r}, expected comma-separated numbers") from None
    demo = DemoConfig(out=out, model=model, device=device, seed=seed, guidance_scale=guidance_scale, **sizes)  # type: ignore[arg-type]
    settings = TuneSettings(
        out=out, budget=seconds(budget), phases=phases or (2 if small else 4), rows=rows, sensitivity=sensitivity, per_head=not per_layer,
        patterns=tuple(pattern or ()), hadamard=hadamard,
        tile=None if model else ((2, 3, 5) if small else (3, 4, 5)), seed=seed,
    )  # fmt: skip
    if model is None and (prompt or held_out):
        raise ConfigError("fpsattention.tune: prompt, expected --model with it: the tiny model reads no text")
    make_folder(out)
    with progress_bars(quiet=as_json) as progress:
        from ..demo.pipeline import load_pipeline, resolve_device
        from ..tuning.pictures import draw
        from ..tuning.tuner import PROMPTS, make_items, run_tune

        pipe, _ = load_pipeline(demo, resolve_device(device))
        prompts: list[Any] = list(prompt or PROMPTS)
        if model is None:
            prompts = [_tiny_call(demo, seed + 101 * i) for i in range(2 if small else 3)]
        call: dict[str, Any] = {**sizes, "guidance_scale": guidance_scale}
        if model is not None:
            call["negative_prompt"] = negative_prompt or None
        items = make_items(prompts, held_out, call, seed)

        def say(text: str) -> None:
            if not as_json:
                typer.echo(text, err=True)

        result = run_tune(pipe, goal, settings, items, progress, say, costs)
        draw(out, result.report)
    if as_json:
        print_json(
            {k: v for k, v in result.report.items() if k not in ("tries", "frontier")} | {"held_out": result.held_out}
        )
        return
    _show(result, out)


def _tiny_call(demo: Any, scene_seed: int) -> dict[str, Any]:
    from ..demo.pipeline import resolve_device
    from ..demo.tiny_wan import tiny_inputs

    inputs = tiny_inputs(demo.seed, demo.height, demo.width, demo.num_frames, scene_seed)
    return {name: x.to(resolve_device(demo.device)) for name, x in inputs.items()}


def _show(result: Any, out: Path) -> None:
    console = stdout()
    rows = [
        [
            str(cell["layer"]),
            str(cell["phase"]),
            (cell["granularity"] or "bf16") + (", rotated" if cell["hadamard"] else ""),
            f"{cell['density']:.3f}",
            _windows(cell),
        ]
        for cell in result.report["cells"]
    ]
    print_table(console, "what was chosen", ("layer", "phase", "scales", "density", "windows"), rows)
    verdict = "holds" if result.reached else "does not hold"
    console.print(
        f"density {result.density:.3f}, cost {result.cost:.3f}: {result.held_out} on the held-out run, the bound {verdict}",
        markup=False,
    )
    for note in result.notes:
        console.print(f"note: {note}", markup=False)
    console.print(f"written: {out}/schedule.json, tune.json and pictures", markup=False)


def _windows(cell: dict[str, Any]) -> str:
    if cell["pattern"]:
        return f"{cell['pattern']['name']} {cell['pattern']['ratio']:g}"
    shown = ["x".join(map(str, window)) for window in cell["windows"]]
    return (
        "all"
        if not shown
        else shown[0]
        if len(set(shown)) == 1
        else " ".join(shown[:6]) + (" ..." if len(shown) > 6 else "")
    )
