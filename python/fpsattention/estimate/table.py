"""The table of one forward: what ``fpsattn estimate`` prints of predictions, and the GPU suite of what it measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Time:
    """ms of a part; ``floor``: at the datasheet's peaks, None where that is not known; ``kind``: "predicted" or "measured"."""

    ms: float
    floor: float | None
    kind: str


def render(columns: Mapping[str, Mapping[str, Time]]) -> list[str]:
    """Lines of at most 80 characters: a row per part, and for every column its floor and its time in ms.

    The first column is what the others' speed-up is over.
    """
    first = next(iter(columns))
    parts = list(columns[first])
    width = 21
    lines = [f"{'ms':<16}" + "".join(f"{name[:width]:>{width}}" for name in columns)]
    kinds = {name: "/".join(dict.fromkeys(time.kind for time in column.values())) for name, column in columns.items()}
    lines.append(f"{'':<16}" + "".join(f"{f'floor {kinds[name]}':>{width}}" for name in columns))
    for part in parts:
        lines.append(f"{part:<16}" + "".join(_cell(column.get(part), width) for column in columns.values()))
    totals = {name: _sum(column) for name, column in columns.items()}
    lines.append(f"{'forward':<16}" + "".join(_cell(total, width) for total in totals.values()))
    speedups = [totals[first].ms / total.ms if total.ms else float("nan") for total in totals.values()]
    lines.append(f"{'speed-up':<16}" + "".join(f"{f'{speedup:.2f}x':>{width}}" for speedup in speedups))
    return lines


def _sum(column: Mapping[str, Time]) -> Time:
    floors = [time.floor for time in column.values()]
    floor = None if any(x is None for x in floors) else sum(x for x in floors if x is not None)
    return Time(sum(time.ms for time in column.values()), floor, "")


def _cell(time: Time | None, width: int) -> str:
    if time is None or time.ms == 0:
        return f"{'-':>{width}}"
    floor = "-" if time.floor is None else f"{time.floor:.1f}"
    return f"{floor:>{width - 11}}{time.ms:>11.1f}"
