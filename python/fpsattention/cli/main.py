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
    context_settings={"help_option_names": ["-h", "--help"]},
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


app.command("doctor")(doctor.command)
app.command("plan")(plan.command)
app.command("models")(models.command)
app.command("estimate")(estimate.command)
app.command("demo")(demo.command)
app.command("analyze")(analyze.command)
app.command("compare")(compare.command)
app.command("tune")(tune.command)
app.command("train")(train.command)
app.command("evaluate")(evaluate.command)
app.command("verify")(verify.command)
