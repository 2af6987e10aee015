"""``fpsattn verify``: reads the receipt in a video and checks it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .output import JsonOption, print_json, print_table, stdout

WRONG = 1  # exit status where a check fails


def command(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A video that handle.write_receipt() was called on.")],
    schedule: Annotated[
        str | None, typer.Option(help="Preset or schedule file: also check that this is what ran.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Read the receipt of a video: schedule, densities, precisions, fallbacks; exit status 1 where it does not fit the file."""
    from ..integrations.receipt import read, schedule_hash
    from ..schedule import Schedule

    wanted = None if schedule is None else schedule_hash(Schedule.resolve(schedule))
    receipt, faults = read(file)
    if wanted is not None and wanted != receipt["schedule_sha256"]:
        faults.append(f"another schedule than {schedule} ran")
    if as_json:
        print_json({"valid": not faults, "faults": faults, "receipt": receipt})
    else:
        console = stdout()
        rows = [
            [
                row["model"],
                row["level"],
                row["precision"],
                row["granularity"],
                f"{row['density']:.3f}",
                str(row["calls"]),
            ]
            for row in receipt["levels"]
        ]
        print_table(console, "what ran", ("model", "level", "precision", "scales", "density", "calls"), rows)
        preset = receipt["schedule"].get("provenance", {}).get("preset")
        named = f" (preset {preset})" if preset else ""
        console.print(
            f"schedule {receipt['schedule_sha256'][:16]}{named}, density {receipt['density']:.3f}", markup=False
        )
        for key, what in (("fallbacks", "ran dense"), ("dense_models", "stayed dense"), ("replaced", "ran without the schedule"), ("nonfinite", "not finite")):  # fmt: skip
            for name, value in receipt[key].items():
                console.print(f"{what}: {name} ({value})", markup=False)
        for fault in faults:
            console.print(f"WRONG: {fault}", markup=False)
        if not faults:
            console.print("the receipt fits the file", markup=False)
    if faults:
        raise typer.Exit(WRONG)
