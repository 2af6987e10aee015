"""``fpsattn evaluate``: the gap of a model under a schedule, before and after an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .output import JsonOption, print_json, print_table, stdout, working


def command(
    data: Annotated[str, typer.Option(help="Folder of latents; its last samples are taken.")],
    model: Annotated[
        str | None, typer.Option(help="Wan transformer: folder or hub id. Default: the tiny random one.")
    ] = None,
    schedule: Annotated[str, typer.Option(help="Preset or schedule file.")] = "paper",
    adapter: Annotated[str | None, typer.Option(help="LoRA folder of fpsattn train: also with it, and merged.")] = None,
    other: Annotated[str | None, typer.Option(help="Another LoRA, on top.")] = None,
    samples: Annotated[int, typer.Option(help="How many.")] = 8,
    flow_shift: Annotated[float, typer.Option("--flow-shift", help="Where a preset's phases lie.")] = 3.0,
    as_json: JsonOption = False,
) -> None:
    """Loss under a schedule against dense: before, with an adapter, merged, with another adapter on top."""
    from ..analysis.optional import require
    from ..errors import ConfigError
    from ..schedule import Schedule

    chosen = Schedule.resolve(schedule).with_flow_shift(flow_shift)
    if samples < 1:
        raise ConfigError(f"fpsattention.evaluate: samples {samples}, expected at least 1")
    for name, folder in (("data", data), ("adapter", adapter), ("other", other)):
        if folder is not None and not Path(folder).is_dir():
            raise ConfigError(f"fpsattention.evaluate: {name} '{folder}', expected a folder")
    for package in ("diffusers", "accelerate", *(["peft"] if adapter or other else [])):
        require(package, "evaluate", "train")
    from ..training.data import LatentFolder
    from ..training.evaluate import evaluate
    from ..training.model import load_transformer, tiny_transformer

    with working("evaluating", as_json):
        folder_data = LatentFolder(data)
        transformer = load_transformer(model) if model else tiny_transformer(folder_data)
        gaps = evaluate(transformer, folder_data, chosen, adapter=adapter, other=other, samples=samples)
    if as_json:
        print_json({"gaps": [{**vars(gap), "percent": gap.percent} for gap in gaps]})
        return
    rows = [[g.name, f"{g.loss:.4f}", f"{g.dense:.4f}", f"{g.base:.4f}", f"{g.percent:.2f}"] for g in gaps]
    columns = ("weights", "under the schedule", "dense", "dense before", "gap (%)")
    print_table(stdout(), f"loss (flow matching, the last {samples} samples)", columns, rows)
