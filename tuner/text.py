"""Values as people read them in a terminal: numbers, params, times, columns; nothing of a database drives it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any


def number_text(value: float | None) -> str:
    """Return a number in at most six digits, `-` for none."""
    return "-" if value is None else f"{value:.6g}"


def params_text(params: dict[str, Any]) -> str:
    """Return params in one line, for people."""
    return " ".join(f"{name}={number_text(v) if isinstance(v, float) else v}" for name, v in params.items()) or "-"


def duration(seconds: float) -> str:
    """Return 75 as 1:15 and 3700 as 1:01:40."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def printable(text: str) -> str:
    """Return text of the database without characters that would move the cursor or forge a line."""
    if text.isprintable():  # a call for nearly all of 50,000 lines, not one for each of their characters
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def table(names: Sequence[str], rows: Sequence[Sequence[Any]]) -> Iterator[str]:
    """Yield columns, the last one as wide as it is: a line a row, so that grep and awk work."""
    texts = [list(names), *([printable(str(cell)) for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in texts) for column in range(len(names) - 1)]
    for row in texts:
        yield "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]).rstrip()
