"""What a slot's process is to those around it, before it has imported anything."""

from __future__ import annotations

import io
import signal
import sys
from typing import Any, Final

from tuner.exits import OF_SIGNAL, handle_until_fork
from tuner.slot import stacks

AS_READ: Final[dict[str, Any]] = {"encoding": "utf-8", "errors": "backslashreplace", "line_buffering": True}
"""How the worker reads what is printed: as UTF-8, a line at a time, whatever the locale."""


def prepare() -> None:
    """Have signals and prints go as the worker expects it of a slot."""
    listen()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(**AS_READ)


def listen() -> None:
    """Take signals as a slot does: those to end it are the worker's, and one has it write where its threads are."""
    # A scheduler sends its signals to all processes: the worker, which gets them too, drains its slots. Not ignored,
    # which what the objective starts would inherit.
    handle_until_fork([number for number in OF_SIGNAL if number != signal.SIGINT], lambda *_: None)
    stacks.write_on_request()  # of a worker that finds its trial hanging
