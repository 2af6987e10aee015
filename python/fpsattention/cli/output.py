"""How commands print: results to stdout, progress to stderr; JSON; tables that lose nothing however narrow the terminal is."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from ..demo.config import Progress

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]
_UNLIMITED = 10_000  # columns: a pipe or a file has no width
_QUIET_SECONDS = 1.0  # work that takes longer is announced


def print_json(value: Any) -> None:
    from ..analysis.metrics import jsonable

    sys.stdout.write(json.dumps(jsonable(value), indent=2, allow_nan=False) + "\n")


def stdout() -> Console:
    console = Console(highlight=False, soft_wrap=True)
    return console if console.is_terminal else Console(highlight=False, soft_wrap=True, width=_UNLIMITED)


def print_table(
    console: Console, title: str, columns: Sequence[str], rows: Sequence[Sequence[str | Text]], fold: str | None = None
) -> None:
    """Columns of their natural width, numbers to the right; only ``fold``, a column of sentences, is folded to fit the terminal.

    Where the terminal is narrower still, it breaks the lines: rich would cut the cells.
    """
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for index, name in enumerate(columns):
        cells = [str(row[index]) for row in rows]
        number = all(cell.replace(".", "").replace("-", "").isdigit() for cell in cells)
        if name == fold:
            table.add_column(name, overflow="fold", min_width=20)
        else:
            width = max(map(len, (*cells, *name.split())))
            table.add_column(
                "\n".join(name.split()), justify="right" if number else "left", min_width=width, overflow="fold"
            )
    for row in rows:
        table.add_row(*row)
    natural = console.measure(table).minimum
    console.print(table, width=max(console.width, natural), soft_wrap=False, no_wrap=None, crop=False)


@contextmanager
def progress_bars(quiet: bool) -> Iterator[Progress]:
    """A callback (what, done, total) that draws one bar per ``what`` on stderr."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description:<24}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), disable=quiet) as bars:
        tasks: dict[str, Any] = {}

        def update(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, total=total)

        yield update


@contextmanager
def working(what: str, quiet: bool) -> Iterator[None]:
    """Says on stderr what is going on, and for how long, if it takes more than a second."""
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    bar = Progress(SpinnerColumn(), TextColumn(what), TimeElapsedColumn(), console=console, transient=True)

    def begin() -> None:
        if console.is_terminal:
            bar.add_task(what, total=None)
            bar.start()
        else:
            console.print(f"{what} ...", highlight=False, soft_wrap=True)

    timer = threading.Timer(_QUIET_SECONDS, begin)
    timer.daemon = True
    if not quiet:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()
        if bar.live.is_started:
            bar.stop()


def make_folder(path: Path) -> Path:
    """Create a folder for results, and find out before any work whether files can be made there. OSError where not."""
    path.mkdir(parents=True, exist_ok=True)
    probe = path / ".fpsattn"
    probe.touch()
    probe.unlink()
    return path
