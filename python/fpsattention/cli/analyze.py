"""``fpsattn analyze``: the error on recorded q, k, v, by cause."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import ConfigError
from .output import JsonOption, make_folder, print_json, print_table, progress_bars, stdout

PARTS = ("quantization", "sparsity", "total")


def command(
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
    from ..analysis.captures import analyze_captures, find_captures, save_json
    from ..analysis.optional import require
    from ..schedule import Schedule

    if rows < 0:
        raise ConfigError(f"fpsattention.analyze: rows {rows}, expected 0 (all) or more")
    if device not in ("cpu", "cuda"):
        raise ConfigError(f"fpsattention.analyze: device {device!r}, expected 'cpu' or 'cuda'")
    resolved = Schedule.resolve(schedule)
    if level is not None and level not in resolved.levels:
        raise ConfigError(
            f"fpsattention.analyze: level {level!r}, expected one of {', '.join(map(repr, resolved.levels))}"
        )
    captures = find_captures(folder)
    for module in ("matplotlib.figure", "safetensors"):
        require(module, "analyze")
    target = make_folder(out or folder / "analysis")
    done = 0
    with progress_bars(quiet=as_json) as progress:

        def on_step(_capture: Any) -> None:
            nonlocal done
            done += 1
            progress("captures", done, len(captures))

        progress("captures", 0, len(captures))
        records = analyze_captures(
            captures, resolved, level=level, max_rows=rows or None, seed=seed, device=device, on_step=on_step
        )
    pictures = _draw(records, resolved, level, target)
    result = {
        "schedule": resolved.to_dict(),
        "level": level,
        "captures": records,
        "pictures": list(map(str, pictures)),
    }
    save_json(target / "analysis.json", result)
    if as_json:
        print_json(result)
        return
    _show(records, target)


def _draw(records: list[dict[str, Any]], schedule: Any, level: str | None, target: Path) -> list[Path]:
    from ..analysis import plots
    from ..analysis.captures import error_series

    pictures = []
    for model in dict.fromkeys(record["model"] for record in records):
        mine = [record for record in records if record["model"] == model]
        prefix = f"{model}_" if model else ""
        phases = [(1.0, 0.0, level)] if level else [(p.high, p.low, p.level) for p in schedule.in_sigma().phases]
        title = f"Error of one attention call{f', {model}' if model else ''} (mean over layers)"
        pictures.append(
            plots.plot_error_vs_sigma(error_series(mine), phases, target / f"{prefix}error_vs_sigma.png", title)
        )
        for part in PARTS:
            values = {(r["layer"], r["sigma"]): r[part]["rel_l1"] if part in r else 0.0 for r in mine}
            path = target / f"{prefix}{part}_by_layer.png"
            pictures.append(plots.plot_layer_heatmap(values, path, f"{part} error by layer and sigma"))
    return pictures


def _show(records: list[dict[str, Any]], target: Path) -> None:
    """A table per model: that column would not fit into 80 with the others."""
    console = stdout()
    for model in dict.fromkeys(record["model"] for record in records):
        rows = []
        for record in (r for r in records if r["model"] == model):
            errors = [f"{record[p]['rel_l1']:.4f}" if p in record else "0" for p in PARTS]
            cosine = f"{record['total']['cosine']:.5f}" if "total" in record else "1"
            name, density = record["level"], f"{record['density']:.3f}"
            rows.append([str(record["layer"]), f"{record['sigma']:.4f}", name, density, *errors, cosine])
        title = f"{model or 'model'}: relative L1 against dense full-precision attention"
        print_table(console, title, ("layer", "sigma", "level", "density", *PARTS, "total cosine"), rows)
    console.print(f"written: {target}/analysis.json and pictures", markup=False)
