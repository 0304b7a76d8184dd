"""Whose trial's a line is that a slot's process prints: what it prints is marked where a trial begins and ends."""

from __future__ import annotations

import os
import sys
from contextlib import suppress

_MARK = "\x1etrial "


def mark(trial: int | None) -> None:
    """Say that what is printed from here on is of this trial, or of none. To stderr, as prints go: in their order."""
    with suppress(OSError, ValueError, AttributeError):  # nobody reads it, or the objective did away with it
        sys.stdout.flush()
        sys.stderr.flush()
    with suppress(OSError):
        os.write(2, f"{_MARK}{'-' if trial is None else trial}\n".encode())


def read(line: str, trial: int | None) -> tuple[str | None, int | None]:
    """Return what was printed, None for nothing, and of which trial the next line is if this one is of `trial`."""
    text, found, number = line.partition(_MARK)
    if not found:
        return line, trial
    return text or None, int(number) if number.isdigit() else None
