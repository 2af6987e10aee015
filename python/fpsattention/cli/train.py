"""``fpsattn train``: the trainer on the command line. Its options are the fields of :class:`~fpsattention.training.TrainConfig`."""

from __future__ import annotations

import dataclasses
import inspect
import json
import shutil
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from ..errors import ConfigError
from ..training.config import TrainConfig, load_recipe
from .output import JsonOption, make_folder


def command(context: typer.Context, synthetic: bool, recipe: str | None, as_json: bool, **options: Any) -> None:
    """Fine-tune a Wan transformer through the FP8 sparse forward."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from ..analysis.optional import require
    from ..schedule import Schedule
    from ..training.data import synthetic_folder, write_synthetic

    # Arguments first: nothing is loaded, made or written before they hold.
    if recipe is not None:
        given = {name for name in options if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"}
        options |= {name: value for name, value in load_recipe(recipe).items() if name not in given}
    output = Path(options["output"])
    if (options["data"] is None) != synthetic:
        raise ConfigError("fpsattention.train: --data and --synthetic: expected exactly one of them")
    options["data"] = str(synthetic_folder(output, seed=options["seed"])) if synthetic else options["data"]
    options["schedule"] = None if options["schedule"] == "none" else options["schedule"]
    config = TrainConfig(**options)
    if config.schedule is not None:
        Schedule.resolve(config.schedule)
    if not synthetic and not Path(config.data).is_dir():
        raise ConfigError(f"fpsattention.train: data '{config.data}', expected a folder of *.safetensors files")
    if output.exists() and not output.is_dir():
        raise ConfigError(f"fpsattention.train: output '{output}' is a file, expected a folder or a new name")
    config.resume_from()
    for package in ("diffusers", "safetensors", *(["peft"] if config.lora_rank else [])):
        require(package, "train", "train")
    processes = require("accelerate", "train", "train").PartialState()
    make_folder(output)

    from ..training.trainer import summary, train

    if synthetic:
        with processes.main_process_first():
            if not (data := Path(config.data)).exists():
                unfinished = data.with_name(
                    f"{data.name}.tmp"
                )  # an interrupted run leaves no half of a data set under its name
                shutil.rmtree(unfinished, ignore_errors=True)
                write_synthetic(unfinished, seed=config.seed).rename(data)
    console = Console(stderr=True, quiet=as_json or not processes.is_main_process)
    columns = (
        TextColumn("step"),
        MofNCompleteColumn(),
        BarColumn(),
        TimeRemainingColumn(),
        TextColumn("loss {task.fields[loss]}"),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("train", total=config.steps, loss="-")
        result = train(config, on_step=lambda step, loss: progress.update(task, completed=step + 1, loss=f"{loss:.4f}"))
    if not processes.is_main_process:
        return
    text = summary(result)
    if as_json:
        typer.echo(text)
    else:
        tail = json.loads(text)["loss_last_20"]
        shown = tail if tail is None else round(tail, 4)
        typer.echo(f"{config.steps} steps, mean loss of the last 20: {shown}; all in {output}")


def _signature() -> inspect.Signature:
    """An option per field of TrainConfig, and what only the command line has."""

    def parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
        return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)

    hints = get_type_hints(TrainConfig)
    parameters = [parameter("context", typer.Context, inspect.Parameter.empty)]
    for setting in dataclasses.fields(TrainConfig):
        kind, default, names = hints[setting.name], setting.default, []
        if kind is bool:
            names = ["--" + setting.name.replace("_", "-")]  # no --no-...: the default is off
        if setting.name == "data":
            kind, default = str | None, None
        if default is dataclasses.MISSING:
            default = inspect.Parameter.empty
        option = typer.Option(
            *names, help=setting.metadata["help"], show_default=default is not None and default is not False
        )
        parameters.append(parameter(setting.name, Annotated[kind, option], default))
    synthetic = typer.Option("--synthetic", help="Make and use a small data set of moving shapes instead of --data.")
    parameters.insert(2, parameter("synthetic", Annotated[bool, synthetic], False))
    recipe = typer.Option(help="Settings to start from: 'paper' or a JSON file. Options given here win over it.")
    parameters.append(parameter("recipe", Annotated[str | None, recipe], None))
    parameters.append(parameter("as_json", JsonOption, False))
    return inspect.Signature(parameters)


command.__signature__ = _signature()  # type: ignore[attr-defined]  # typer reads it
command.__annotations__ = {name: p.annotation for name, p in command.__signature__.parameters.items()}  # type: ignore[attr-defined]
