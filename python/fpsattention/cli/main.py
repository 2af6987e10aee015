"""`fpsattn`: demo, doctor, plan, analyze. Tables go to stdout, progress and errors to stderr; `--json` prints one JSON object.

Exit status: 0 done, 1 the doctor found the installation broken, 2 bad input or a missing package. Everything heavy is
imported inside the commands.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from ..demo.demo import Progress

app = typer.Typer(
    name="fpsattn",
    help="FP8 + 3D-tile-sparse attention for video diffusion transformers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]
_STYLES = {"ok": "green", "info": "cyan", "warn": "yellow", "fail": "bold red"}


def _print_json(value: Any) -> None:
    from ..analysis.metrics import jsonable

    sys.stdout.write(json.dumps(jsonable(value), indent=2, allow_nan=False) + "\n")


def _out() -> Console:
    return Console(soft_wrap=False)


@contextmanager
def _errors(as_json: bool) -> Iterator[None]:
    """This library's errors become one line on stderr (and, with --json, `{"error": ...}`) and exit status 2."""
    from ..errors import BuildError, ConfigError, UnsupportedError

    try:
        yield
    except (BuildError, ConfigError, UnsupportedError) as error:
        if as_json:
            _print_json({"error": str(error)})
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error


@contextmanager
def _progress(quiet: bool) -> Iterator[Progress]:
    """A callback (what, done, total) that draws one bar per `what` on stderr."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description:<24}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), disable=quiet) as bars:
        tasks: dict[str, Any] = {}

        def update(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, total=total)

        yield update


def parse_sizes(text: str, what: str) -> tuple[int, int, int]:
    """Three positive integers out of `21x45x80` or `21,45,80`; `what` names them in the error ("plan: grid")."""
    from ..errors import ConfigError

    if not re.fullmatch(r"\d+([xX,])\d+\1\d+", text.strip()):
        raise ConfigError(f"fpsattention.{what} {text!r}, wanted three sizes T, H, W such as 21x45x80 or 21,45,80")
    t, h, w = (int(size) for size in re.split("[xX,]", text.strip()))
    if min(t, h, w) < 1:
        raise ConfigError(f"fpsattention.{what} {text!r}, wanted sizes of at least 1")
    return t, h, w


def _version(value: bool) -> None:
    if value:
        from .. import __version__

        typer.echo(f"fpsattn {__version__}")
        raise typer.Exit()


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """FP8 + 3D-tile-sparse attention for video diffusion transformers."""


# ------------------------------------------------------------------------------------------------------------ doctor


@app.command()
def doctor(as_json: JsonOption = False) -> None:
    """Say what is installed, what works, what is missing, and the command that mends it."""
    from .doctor import examine

    report = examine()
    if as_json:
        _print_json(report.to_dict())
        raise typer.Exit(report.exit_code)
    console = _out()
    table = Table(title="fpsattn doctor", show_lines=False)
    for name in ("check", "status", "finding"):
        table.add_column(name, overflow="fold")
    for check in report.checks:
        table.add_row(check.name, f"[{_STYLES[check.status]}]{check.status}[/]", _escape(check.detail))
    console.print(table)
    for check in report.checks:
        if check.fix:
            console.print(f"[{_STYLES[check.status]}]{check.status}[/] {check.name}: ", end="")
            console.print(check.fix, markup=False, highlight=False, soft_wrap=True)  # a command must copy as one line
    console.print(report.verdict, style="bold green" if report.usable else "bold red", soft_wrap=True)
    raise typer.Exit(report.exit_code)


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)


# -------------------------------------------------------------------------------------------------------------- plan


@app.command()
def plan(
    grid: Annotated[str, typer.Argument(help="Token grid T x H x W, e.g. 21x45x80 (Wan 720p, 81 frames).")],
    tile: Annotated[str | None, typer.Option(help="Tile in tokens, e.g. 6,8,8. Default: the planner's choice.")] = None,
    window: Annotated[
        str | None, typer.Option(help="Sliding window in tiles, e.g. 3,3,6. Default: everything.")
    ] = None,
    text_len: Annotated[int, typer.Option(help="Text tokens of the same sequence.")] = 0,
    text_position: Annotated[str, typer.Option(help="suffix or prefix.")] = "suffix",
    png: Annotated[Path | None, typer.Option(help="Draw the plan into this PNG file.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Show how a token grid is cut into tiles, and what a window attends."""
    with _errors(as_json):
        sizes = parse_sizes(grid, "plan: grid")
        tile_sizes = parse_sizes(tile, "plan: tile") if tile else None
        window_sizes = parse_sizes(window, "plan: window") if window else None

        from ..layout.masks import dense_mask, sliding_tile_mask
        from ..layout.tiles import plan as make_plan

        layout = make_plan(sizes, tile_sizes, text_len, text_position)
        mask = sliding_tile_mask(layout, window_sizes) if window_sizes else dense_mask(layout)
        summary = _plan_summary(layout, mask, window_sizes)
        if png is not None:
            from ..analysis.plots import plot_plan

            shown = "x".join(map(str, window_sizes)) if window_sizes else "everything"
            title = f"{'x'.join(map(str, sizes))} = {layout.num_tokens:,} tokens, tile {'x'.join(map(str, layout.tile))}, window {shown}"
            summary["png"] = str(plot_plan(mask, png, title))
        if as_json:
            _print_json(summary)
            return
        console = _out()
        console.print(layout.describe(), highlight=False)
        shown = "x".join(map(str, window_sizes)) + " tiles" if window_sizes else "all tiles"
        console.print(
            f"window {shown}: density {summary['density']:.4f}, KV blocks per tile {summary['kv_blocks_per_tile'][0]} to "
            f"{summary['kv_blocks_per_tile'][1]} of {layout.num_blocks}",
            highlight=False,
        )
        console.print(f"tables {summary['table_bytes'] / 2**20:.2f} MiB with the backward's transpose", highlight=False)
        console.print(_sketch(mask))
        if png is not None:
            console.print(f"picture: {png}", highlight=False)


def _plan_summary(layout: Any, mask: Any, window: tuple[int, int, int] | None) -> dict[str, Any]:
    tables = [
        layout.token_of_slot, layout.slot_of_token, layout.tile_of_block, layout.tile_block_offsets,
        mask.kv_num_blocks, mask.kv_indices, *mask.transpose(),
    ]  # fmt: skip
    counts = mask.kv_num_blocks
    return {
        "grid": list(layout.grid),
        "tile": list(layout.tile),
        "tile_grid": list(layout.tile_grid),
        "window": list(window) if window else None,
        "text_len": layout.text_len,
        "num_tokens": layout.num_tokens,
        "num_tiles": layout.num_tiles,
        "num_blocks": layout.num_blocks,
        "num_slots": layout.num_slots,
        "utilization": layout.utilization,
        "density": float(mask.density),
        "kv_blocks_per_tile": [int(counts.min()), int(counts.max())],
        "table_bytes": sum(table.numel() * table.element_size() for table in tables),
    }


def _sketch(mask: Any, columns: int = 64, rows: int = 20) -> Any:
    """The block mask in characters: the darker, the more of a cell is attended; `o` where a query tile's own blocks are."""
    import numpy as np
    from rich.text import Text

    from ..analysis.plots import mask_image

    image = mask_image(mask)
    rows, columns = min(rows, image.shape[0]), min(columns, image.shape[1])
    row_edges = np.linspace(0, image.shape[0], rows + 1).astype(int)
    column_edges = np.linspace(0, image.shape[1], columns + 1).astype(int)
    text = Text("block mask: rows are query tiles, columns key/value blocks; o own tile, darker attends more\n")
    for top, bottom in zip(row_edges, row_edges[1:], strict=False):
        for left, right in zip(column_edges, column_edges[1:], strict=False):
            cell = image[top:bottom, left:right]
            share = float((cell > 0).mean())
            if (cell == 2).any():
                text.append("o", style="yellow")
            elif (cell == 3).any():
                text.append("t", style="green")
            else:
                text.append(
                    "\u00b7\u2591\u2592\u2593\u2588"[0 if share == 0 else 1 + min(int(share * 4), 3)], style="blue"
                )
        text.append("\n")
    return text


# -------------------------------------------------------------------------------------------------------------- demo


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for videos, pictures and reports.")] = Path("fpsattn_demo"),
    preset: Annotated[str, typer.Option(help="paper, training_free, fp8, dense, or a schedule file.")] = "paper",
    small: Annotated[
        bool, typer.Option("--small", help="The smallest useful size (96x160, 17 frames, 4 steps).")
    ] = False,
    height: Annotated[int | None, typer.Option(help="Pixels, a multiple of 16.  [default: 256]")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels, a multiple of 16.  [default: 384]")] = None,
    num_frames: Annotated[
        int | None, typer.Option("--num-frames", "--num_frames", help="4k + 1.  [default: 33]")
    ] = None,
    num_inference_steps: Annotated[
        int | None,
        typer.Option("--num-inference-steps", "--num_inference_steps", help="Denoising steps.  [default: 6]"),
    ] = None,
    guidance_scale: Annotated[
        float | None,
        typer.Option("--guidance-scale", "--guidance_scale", help="Classifier-free guidance.  [default: 2]"),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of weights (tiny model) and noise.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    model: Annotated[
        str | None, typer.Option(help="Folder or hub id of real Wan weights. Default: a tiny model, offline.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="For --model.")] = None,
    negative_prompt: Annotated[
        str | None, typer.Option("--negative-prompt", "--negative_prompt", help="For --model.")
    ] = None,
    control: Annotated[bool, typer.Option(help="Repeat the dense run; it must be identical.")] = True,
    as_json: JsonOption = False,
) -> None:
    """Run a Wan pipeline dense and with FPSAttention from one seed; write videos, pictures and a report."""
    with _errors(as_json):
        from ..demo.demo import DemoConfig, run_demo

        given = {
            "height": height, "width": width, "num_frames": num_frames, "num_inference_steps": num_inference_steps,
            "guidance_scale": guidance_scale, "model": model, "prompt": prompt, "negative_prompt": negative_prompt,
        }  # fmt: skip
        changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        changes |= {"out": out, "preset": preset, "seed": seed, "device": device, "control": control}
        config = DemoConfig.small(**changes) if small else DemoConfig(**changes)
        with _progress(quiet=as_json) as progress:
            report = run_demo(config, progress)
        if as_json:
            _print_json(report)
            return
        _show_demo(report, out)


def _show_demo(report: dict[str, Any], out: Path) -> None:
    console = _out()
    table = Table(title="error of one attention call against dense full precision (relative L1)")
    table.add_column("level")
    for name in ("density", "quantization", "sparsity", "total", "total cosine"):
        table.add_column(name, justify="right")
    for level in report["levels"]:
        errors = [f"{level[p]['rel_l1']:.4f}" if p in level else "0" for p in ("quantization", "sparsity", "total")]
        cosine = f"{level['total']['cosine']:.5f}" if "total" in level else "1"
        table.add_row(level["level"], f"{level['density']:.3f}", *errors, cosine)
    console.print(table)
    video, control = report["quality"]["video"], report["control"]
    quality = "identical" if video["identical"] else f"PSNR {video['psnr_db']:.2f} dB, SSIM {video['ssim']:.4f}"
    console.print(f"FPSAttention against dense, same seed: {quality}", highlight=False)
    if control is not None:
        same = control["latents"]["identical"] and control["video"]["identical"]
        console.print(
            f"control (dense run again): {'identical' if same else '[bold red]not identical[/]'}", highlight=False
        )
    console.print(f"{report['seconds']['everything']:.1f} s on {report['environment']['device']}", highlight=False)
    console.print(f"written: {out}/report.md, dense.mp4, fps.mp4 and pictures", highlight=False, soft_wrap=True)


# ----------------------------------------------------------------------------------------------------------- analyze


@app.command()
def analyze(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="What Handle.record(dir=DIR) wrote.")],
    schedule: Annotated[str, typer.Option(help="Preset or schedule file that says the level at each sigma.")] = "paper",
    level: Annotated[str | None, typer.Option(help="Try this level of the schedule at every sigma instead.")] = None,
    rows: Annotated[int, typer.Option(help="Query tokens per head to look at (0: all).")] = 2048,
    seed: Annotated[int, typer.Option(help="Chooses them.")] = 0,
    out: Annotated[
        Path | None, typer.Option(help="Folder for pictures and analysis.json. Default: DIR/analysis.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    as_json: JsonOption = False,
) -> None:
    """Split the error on recorded q, k, v into quantization and sparsity, per layer and sigma."""
    with _errors(as_json):
        from ..analysis.captures import analyze_captures, find_captures, save_json
        from ..errors import ConfigError
        from ..schedule import Schedule

        if rows < 0:
            raise ConfigError(f"fpsattention.analyze: rows {rows}, wanted 0 (all) or more")
        if device not in ("cpu", "cuda"):
            raise ConfigError(f"fpsattention.analyze: device {device!r}, wanted 'cpu' or 'cuda'")
        captures = find_captures(folder)
        resolved = Schedule.resolve(schedule)
        done = 0
        with _progress(quiet=as_json) as progress:

            def on_step(_capture: Any) -> None:
                nonlocal done
                done += 1
                progress("captures", done, len(captures))

            records = analyze_captures(
                captures, resolved, level=level, max_rows=rows or None, seed=seed, device=device, on_step=on_step
            )
        target = out or folder / "analysis"
        pictures = _draw_analysis(records, resolved, level, target)
        result = {
            "schedule": resolved.to_dict(),
            "level": level,
            "captures": records,
            "pictures": list(map(str, pictures)),
        }
        save_json(target / "analysis.json", result)
        if as_json:
            _print_json(result)
            return
        _show_analysis(records, target)


def _draw_analysis(records: list[dict[str, Any]], schedule: Any, level: str | None, target: Path) -> list[Path]:
    from ..analysis import plots
    from ..demo.demo import error_series

    pictures = []
    for model in dict.fromkeys(record["model"] for record in records):
        mine = [record for record in records if record["model"] == model]
        prefix = f"{model}_" if model else ""
        phases = [(1.0, 0.0, level)] if level else [(p.high, p.low, p.level) for p in schedule.phases]
        title = f"Error of one attention call{f', {model}' if model else ''} (mean over layers)"
        pictures.append(
            plots.plot_error_vs_sigma(error_series(mine), phases, target / f"{prefix}error_vs_sigma.png", title)
        )
        for part in ("quantization", "sparsity", "total"):
            values = {(r["layer"], r["sigma"]): r[part]["rel_l1"] if part in r else 0.0 for r in mine}
            path = target / f"{prefix}{part}_by_layer.png"
            pictures.append(plots.plot_layer_heatmap(values, path, f"{part} error by layer and sigma"))
    return pictures


def _show_analysis(records: list[dict[str, Any]], target: Path) -> None:
    console = _out()
    table = Table(title="relative L1 against dense full-precision attention of the same q, k, v")
    columns = ("model", "layer", "sigma", "level", "density", "quantization", "sparsity", "total", "total cosine")
    for name in columns:
        table.add_column(name, justify="left" if name in ("model", "level") else "right")
    for record in records:
        errors = [f"{record[p]['rel_l1']:.4f}" if p in record else "0" for p in ("quantization", "sparsity", "total")]
        cosine = f"{record['total']['cosine']:.5f}" if "total" in record else "1"
        table.add_row(
            record["model"],
            str(record["layer"]),
            f"{record['sigma']:.4f}",
            record["level"],
            f"{record['density']:.3f}",
            *errors,
            cosine,
        )
    console.print(table)
    console.print(f"written: {target}/analysis.json and pictures", highlight=False, soft_wrap=True)


def _register_train() -> None:
    from .train import register  # light: torch and accelerate are imported when it runs

    register(app)


_register_train()
