"""Starts a slot: `python -m tuner.slot.start [OBJECTIVE]`.

It imports torch, and the objective that its worker was given on the command line, while the worker does the same and
makes sure of the study: the slot can begin as soon as it is configured.
"""

from __future__ import annotations

import io
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from tuner.imports import uncollected
from tuner.slot import stacks


def main() -> None:
    """Import what the slot will need, then run it (`tuner.slot.slot.main`)."""
    # A scheduler sends SIGTERM to all processes: the worker, which gets it too, drains its slots. Not ignored, which
    # what the objective starts would inherit.
    signal.signal(signal.SIGTERM, lambda *_: None)
    os.register_at_fork(after_in_child=lambda: signal.signal(signal.SIGTERM, signal.SIG_DFL))
    stacks.write_on_request()  # of a worker that finds its trial hanging
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # the worker reads UTF-8, a line at a time, whatever the locale
            stream.reconfigure(encoding="utf-8", errors="backslashreplace", line_buffering=True)
    with uncollected():
        from tuner.slot import slot

        for reference in sys.argv[1:]:
            _import_objective(reference)
    slot.main()


def _import_objective(reference: str) -> None:
    """Import the objective; what is wrong with it is told when the slot needs it, or by the worker before."""
    from tuner.errors import TunerError
    from tuner.study.registry import find_objective, is_objective_class

    with _printing_to_stderr(), suppress(TunerError):
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


if __name__ == "__main__":
    main()
