"""What a command's exit code tells who started it: a shell, a service manager or a scheduler.

The one table of codes; docs/command-line.md says what each is for.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from enum import IntEnum
from types import FrameType
from typing import Any, Final

from storage.database.errors import AuthenticationError, InvalidURLError, InvalidWriteError, UnreachableError
from tuner.errors import AskedToStop, StudyFailedError, TunerError, UsageError

Handler = Callable[[int, FrameType | None], object]


class ExitCode(IntEnum):
    """The codes; from 128 on as a shell counts signals, 75 as EX_TEMPFAIL of sysexits.h."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    UNREACHABLE = 3
    NOT_LET_IN = 4
    STUDY_FAILED = 5
    AGAIN = 75
    HUNG_UP = 129
    INTERRUPTED = 130
    TERMINATED = 143


OF_SIGNAL: Final = {
    signal.SIGINT: ExitCode.INTERRUPTED,
    signal.SIGTERM: ExitCode.TERMINATED,
    signal.SIGHUP: ExitCode.HUNG_UP,
    signal.SIGUSR1: ExitCode.AGAIN,
    signal.SIGUSR2: ExitCode.AGAIN,
}
"""The signals that ask a command to stop, and what it ends with then."""

TOGETHER_S = 0.1
"""Signals that come so soon after one another are one request: `timeout`, for one, signals the worker and then its
whole process group."""

_OF_ERROR: Final[tuple[tuple[type[Exception], ExitCode], ...]] = (  # most specific first
    (UsageError, ExitCode.USAGE),
    (InvalidURLError, ExitCode.USAGE),
    (InvalidWriteError, ExitCode.USAGE),
    (StudyFailedError, ExitCode.STUDY_FAILED),
    (AuthenticationError, ExitCode.NOT_LET_IN),
    (UnreachableError, ExitCode.UNREACHABLE),
)


def handle_until_fork(numbers: Iterable[signal.Signals], handler: Handler) -> dict[signal.Signals, Any]:
    """Handle these signals but in children that are forked, and return what did so before; ignored ones stay so."""
    taken = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in taken}

    def reset() -> None:
        for number in taken:
            if signal.getsignal(number) is handler:
                signal.signal(number, signal.SIG_DFL)

    os.register_at_fork(after_in_child=reset)
    return before


@contextmanager
def signals_as_requests() -> Iterator[None]:
    """Raise AskedToStop at a signal that asks to stop, but for Ctrl-C's; a later one ends the process at once.

    Without a handler a container's first process would not notice SIGTERM, and SIGUSR1 would not be read as a request.
    """
    asked_at: float | None = None

    def ask(number: int, _: FrameType | None) -> None:
        nonlocal asked_at
        if asked_at is None:
            asked_at = time.monotonic()
            raise AskedToStop(OF_SIGNAL[signal.Signals(number)])
        if time.monotonic() - asked_at >= TOGETHER_S:
            os._exit(OF_SIGNAL[signal.Signals(number)])

    before = handle_until_fork([number for number in OF_SIGNAL if number != signal.SIGINT], ask)
    try:
        yield
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) is ask:  # a dashboard that was ended ignores them from then on
                signal.signal(number, handler)


def exit_code(error: BaseException) -> ExitCode:
    """Return what a command ends with that failed by this error."""
    if isinstance(error, TunerError) and error.exit_code is not None:
        return ExitCode(error.exit_code)
    return next((code for kind, code in _OF_ERROR if isinstance(error, kind)), ExitCode.FAILED)
