"""Starts slots: `python -m tuner.slot.start OBJECTIVE [REQUESTS]`.

It imports torch, and the objective that its worker was given on the command line, while the worker makes sure of the
study. Then it is a slot, which begins as soon as it is configured; or, with the descriptor of a socket, the process
that slots are forked from (`tuner.slot.nursery`).
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from tuner.imports import quick_imports
from tuner.slot.preparing import prepare


def main() -> None:
    """Import what a slot will need, then be one (`tuner.slot.slot.main`), or fork them (`tuner.slot.nursery.serve`)."""
    reference, *requests = sys.argv[1:]
    prepare()
    with quick_imports():
        from tuner.slot import slot

        _import_objective(reference)
    if requests:
        from tuner.slot import nursery

        nursery.serve(socket.socket(fileno=int(requests[0])))
    else:
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
