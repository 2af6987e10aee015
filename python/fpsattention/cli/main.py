"""`fpsattn`: demo, doctor, plan, models, estimate, analyze, compare, tune, train, evaluate, verify. Results go to stdout, progress and errors to stderr; `--json` prints one JSON object.

Exit status: 0 done, 1 the doctor found the installation broken, 2 bad input, a missing package or what the system refused
(`contract.py`), 130 interrupted. Everything heavy is imported inside the commands.
"""

from __future__ import annotations

from typing import Annotated

import typer

from . import analyze, compare, demo, doctor, estimate, evaluate, models, plan, train, tune, verify
from .contract import Cli

app = typer.Typer(
    name="fpsattn",
    cls=Cli,
    help="FP8 + 3D-tile-sparse attention for video diffusion transformers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: rich's panels cut long names of options at 80 columns
    context_settings={
        "help_option_names": ["-h", "--help"],
        "token_normalize_func": lambda name: name.replace(
            "_", "-"
        ),  # --num_frames, as diffusers writes it, is --num-frames
    },
)


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


for module, short_help in {  # of fpsattn --help, a line of 80 columns each
    doctor: "Say what is installed, what works, and what is missing.",
    plan: "Show how a grid is cut into tiles, and what a window attends.",
    models: "List the model families that a schedule can be applied to.",
    estimate: "Estimate a denoising step and a video, part by part.",
    demo: "Run a Wan pipeline dense and with FPSAttention from one seed.",
    analyze: "Split the error on recorded q, k, v by cause.",
    compare: "Compare attention methods on one model.",
    tune: "Find the cheapest schedule whose output keeps a bound.",
    train: "Fine-tune a Wan transformer through the FP8 sparse forward.",
    evaluate: "Loss under a schedule against dense, with and without adapters.",
    verify: "Read the receipt of a video, and whether it fits the file.",
}.items():
    app.command(module.__name__.rpartition(".")[2], short_help=short_help)(module.command)
