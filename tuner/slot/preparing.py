"""What a slot's process is to those around it, and what it imports, before it is one."""

from __future__ import annotations

import io
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final

from tuner.exits import OF_SIGNAL, handle_until_fork
from tuner.imports import quick_imports
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


def import_torch() -> None:
    """Import what slots need, whatever the objective."""
    with quick_imports():
        from tuner.slot import slot  # noqa: F401


def import_objective(reference: str) -> None:
    """Import the objective; what is wrong with it is told when the slot needs it, or by the worker before."""
    from tuner.errors import TunerError
    from tuner.study.registry import find_objective, is_objective_class

    with quick_imports(), _printing_to_stderr(), suppress(TunerError):
        if is_objective_class(find_objective(reference).load()):
            import torchmetrics  # noqa: F401 - plain functions need none of it


@contextmanager
def _printing_to_stderr() -> Iterator[None]:
    """Send what an objective prints to stderr: stdout is for the slot's events."""
    # By their numbers: an objective may put something of its own in the place of sys.stdout, or close it.
    stdout = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        with suppress(OSError, ValueError, AttributeError):
            sys.stdout.flush()
        os.dup2(stdout, 1)
        os.close(stdout)
