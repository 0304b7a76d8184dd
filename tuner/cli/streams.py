"""The standard streams as every command may use them: all three are there, and take whatever text."""

from __future__ import annotations

import io
import os
import sys

from tuner.text import printable


def open_streams() -> None:
    """Have what was closed (`>&-`) read and write nothing, and characters that an encoding lacks written as escapes.

    A file that is opened later would have the number of a closed stream, and get what is meant for that.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # it has the lowest number, this one
    sys.stdin = sys.stdin or os.fdopen(0, closefd=False)
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def flush_streams() -> None:
    """Write what is left; where nothing can be written any more, Python does not try and complain again at its end."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def say(*lines: str, err: bool = False) -> None:
    """Print lines for people, on stderr with `err`; nothing in one moves the cursor or ends it.

    Names, values and messages are whatever somebody wrote into the database.
    """
    stream = sys.stderr if err else sys.stdout
    for line in lines:
        print(printable(line), file=stream)
    stream.flush()
