"""``fpsattn train``: the trainer on the command line. ``register`` adds it to the application."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ..training.config import TrainConfig, load_recipe

DEFAULTS = TrainConfig(data="", output="")


def train_command(
    context: typer.Context,
    output: Annotated[Path, typer.Option(help="Folder for weights, checkpoints, loss.csv and the schedule.")],
    data: Annotated[Path | None, typer.Option(help="Folder of precomputed latents (*.safetensors).")] = None,
    synthetic: Annotated[
        bool, typer.Option("--synthetic", help="Make and use a small data set of moving shapes.")
    ] = False,
    model: Annotated[
        str | None, typer.Option(help="Wan transformer or pipeline, path or hub id. Default: a tiny random one.")
    ] = None,
    schedule: Annotated[
        str, typer.Option(help="Preset or schedule file; 'none' trains dense (the baseline).")
    ] = "paper",
    recipe: Annotated[
        str | None, typer.Option(help="Settings to start from: 'paper' or a JSON file. Options given here win over it.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = DEFAULTS.steps,
    batch_size: Annotated[int, typer.Option(help="Samples per process and micro-batch.")] = DEFAULTS.batch_size,
    gradient_accumulation_steps: Annotated[
        int, typer.Option(help="Micro-batches per step.")
    ] = DEFAULTS.gradient_accumulation_steps,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")] = DEFAULTS.learning_rate,
    warmup_steps: Annotated[int, typer.Option(help="Steps of linear learning-rate warm-up.")] = DEFAULTS.warmup_steps,
    plateau_patience: Annotated[
        int, typer.Option(help="Steps without progress before it is halved.")
    ] = DEFAULTS.plateau_patience,
    weight_decay: Annotated[float, typer.Option(help="Of AdamW.")] = DEFAULTS.weight_decay,
    max_grad_norm: Annotated[float, typer.Option(help="Gradients are clipped to it.")] = DEFAULTS.max_grad_norm,
    adam_eps: Annotated[float, typer.Option(help="Epsilon of AdamW.")] = DEFAULTS.adam_eps,
    ema_decay: Annotated[
        float, typer.Option(help="Moving average of the weights, which is what is saved; 0: none.")
    ] = DEFAULTS.ema_decay,
    prompt_dropout: Annotated[
        float, typer.Option(help="Share of samples trained with the empty prompt.")
    ] = DEFAULTS.prompt_dropout,
    lora_rank: Annotated[int, typer.Option(help="0 trains all weights.")] = DEFAULTS.lora_rank,
    mixed_precision: Annotated[str, typer.Option(help="no or bf16.")] = DEFAULTS.mixed_precision,
    sigma_sampling: Annotated[str, typer.Option(help="uniform or logit_normal.")] = DEFAULTS.sigma_sampling,
    flow_shift: Annotated[float, typer.Option(help="Flow shift of the sampler trained for.")] = DEFAULTS.flow_shift,
    sparsity_warmup_steps: Annotated[
        int, typer.Option(help="Steps until full sparsity.")
    ] = DEFAULTS.sparsity_warmup_steps,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, more compute.")
    ] = False,
    validate_every: Annotated[int, typer.Option(help="Steps between validations; 0: never.")] = DEFAULTS.validate_every,
    checkpoint_every: Annotated[
        int, typer.Option(help="Steps between checkpoints; 0: never.")
    ] = DEFAULTS.checkpoint_every,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the last checkpoint in --output.")] = False,
    seed: Annotated[int, typer.Option()] = DEFAULTS.seed,
    debug: Annotated[
        bool, typer.Option("--debug", help="Name the layer whose values or gradients are not finite.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON only.")] = False,
) -> None:
    """Fine-tune a Wan transformer through the FP8 sparse forward."""
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from ..analysis.optional import require
    from ..errors import BuildError, ConfigError
    from ..training.data import write_synthetic
    from ..training.trainer import summary, train

    try:
        processes = require("accelerate", "train", "train").PartialState()
        for package in ("diffusers", "safetensors", *(["peft"] if lora_rank else [])):
            require(package, "train", "train")
    except BuildError as error:
        Console(stderr=True).print(f"[red]{escape(str(error))}[/red]", highlight=False, soft_wrap=True)
        raise typer.Exit(1) from None
    console = Console(stderr=True, quiet=as_json or not processes.is_main_process)
    settings: dict[str, Any] = {k: v for k, v in locals().items() if k in TrainConfig.__dataclass_fields__}
    try:
        if (data is None) != synthetic:
            raise ConfigError("fpsattention.train: --data and --synthetic: expected exactly one of them")
        if synthetic:
            data = output / "synthetic_latents"
            with processes.main_process_first():
                if not data.exists():
                    write_synthetic(data, seed=seed)
        if recipe is not None:
            given = {n for n in settings if getattr(context.get_parameter_source(n), "name", "") != "DEFAULT"}
            settings |= {name: value for name, value in load_recipe(recipe).items() if name not in given}
        chosen = settings["schedule"]
        settings |= {"data": str(data), "output": str(output), "schedule": None if chosen == "none" else chosen}
        config = TrainConfig(**settings)
        columns = (
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TimeRemainingColumn(),
            TextColumn("loss {task.fields[loss]}"),
        )
        with Progress(*columns, console=console) as progress:
            task = progress.add_task("train", total=config.steps, loss="-")
            result = train(
                config, on_step=lambda step, loss: progress.update(task, completed=step + 1, loss=f"{loss:.4f}")
            )
    except (ConfigError, FloatingPointError) as error:
        console.quiet = False
        console.print(f"[red]{escape(str(error))}[/red]", highlight=False, soft_wrap=True)
        raise typer.Exit(1) from None
    text = summary(result)
    if as_json:
        if processes.is_main_process:
            print(text)
    else:
        tail = json.loads(text)["loss_last_20"]
        console.print(
            f"{config.steps} steps, mean loss of the last 20: {tail if tail is None else round(tail, 4)}; all in {output}"
        )


def register(app: typer.Typer) -> None:
    app.command("train")(train_command)
