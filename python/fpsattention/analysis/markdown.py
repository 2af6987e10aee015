"""Markdown tables and numbers for reports."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A markdown table; columns that hold numbers only are right-aligned. A bar or a line break in a cell is replaced."""
    cells = [[str(cell).replace("|", "/").replace("\n", " ") for cell in row] for row in rows]
    numeric = [all(row[i][:1].isdigit() or row[i] in ("", "-") for row in cells) for i in range(len(head))]
    lines = ["| " + " | ".join(head) + " |", "|" + "|".join(" ---: " if n else " --- " for n in numeric) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in cells)])


def counted(number: int, what: str) -> str:
    """``1 seed``, ``2 seeds``."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def significant(value: Any, digits: int = 3) -> str:
    """``digits`` significant digits without exponent; '-' for what is no finite number."""
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        return "-"
    return f"{value:.0f}" if abs(value) >= 10 ** (digits - 1) else f"{value:.{digits}g}"


def fixed(value: float | None, digits: int) -> str:
    """``digits`` decimals; '-' for None and NaN, 'identical' for an infinite ratio of signal to noise."""
    if value is None or math.isnan(value):
        return "-"
    return "identical" if math.isinf(value) else f"{value:.{digits}f}"
