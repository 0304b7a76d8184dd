"""What a slot's process is to those around it, before it has imported anything."""

from __future__ import annotations

import io
import signal
import sys

from tuner.exits import OF_SIGNAL, handle_until_fork
from tuner.slot import stacks


def prepare() -> None:
    """Make of this process one that signals and its worker find as they expect a slot to be."""
    # A scheduler sends its signals to all processes: the worker, which gets them too, drains its slots. Not ignored,
    # which what the objective starts would inherit.
    handle_until_fork([number for number in OF_SIGNAL if number != signal.SIGINT], lambda *_: None)
    stacks.write_on_request()  # of a worker that finds its trial hanging
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and not stream.closed:  # the worker reads UTF-8, a line at a time
            stream.reconfigure(encoding="utf-8", errors="backslashreplace", line_buffering=True)
