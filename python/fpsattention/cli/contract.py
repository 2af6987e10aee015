"""What every command keeps to: exit statuses, one ``error:`` line, ``{"error": ...}`` with ``--json``, a word on Ctrl-C."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

import typer
from typer.core import TyperGroup

from ..errors import BuildError, ConfigError, UnsupportedError

BAD_INPUT, INTERRUPTED = 2, 130  # 130: 128 + SIGINT, as shells have it


class _Interrupted(Exception):
    """KeyboardInterrupt, under a name that no version of typer or click turns into something else."""


class Cli(TyperGroup):
    """The group of all commands. Whatever a user can cause ends in :data:`BAD_INPUT`; other exceptions are faults of this package
    and keep their traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise _Interrupted from error

    def main(self, args: Sequence[str] | None = None, *others: Any, **extra: Any) -> Any:
        args = list(sys.argv[1:] if args is None else args)
        try:
            extra["standalone_mode"] = False  # exceptions come back, and exit statuses are returned
            status = super().main(args, *others, **extra)
        except (_Interrupted, KeyboardInterrupt, typer.Abort):
            typer.echo("interrupted", err=True)
            status = INTERRUPTED
        except BrokenPipeError:  # the reader, head for example, has seen enough
            sys.stdout = None  # type: ignore[assignment]  # nothing is left to be flushed at exit
            status = 1
        except Exception as error:
            text = _message(error)
            if text is None:
                raise
            if text:
                if "--json" in args:
                    typer.echo(json.dumps({"error": text}, indent=2))
                typer.echo(f"error: {text}", err=True)
            status = BAD_INPUT
        sys.exit(status if isinstance(status, int) else 0)


def _message(error: Exception) -> str | None:
    """One line about something that a user caused; empty: all has been said; None: it is not of that kind."""
    if isinstance(error, (ConfigError, UnsupportedError, BuildError, FloatingPointError)):
        text = str(error)
    elif isinstance(error, ModuleNotFoundError) and (error.name or "fpsattention").partition(".")[0] != "fpsattention":
        text = f"the package {error.name!r} is not installed: fpsattn doctor says how to install it"
    elif isinstance(error, OSError):
        text = f"{error.strerror or type(error).__name__}: {error.filename}" if error.filename else str(error)
    elif isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # the second is torch's
        text = f"out of memory: {error}" if str(error) else "out of memory"
    elif hasattr(error, "format_message"):  # click's own, wherever this version of typer keeps it
        if type(error).__name__ == "NoArgsIsHelpError":
            typer.echo(error.format_message())
            return ""
        text = error.format_message()
    else:
        return None
    return " ".join(text.split())
