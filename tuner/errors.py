"""Errors that a user can mend; the command line shows each as one line on stderr."""

from __future__ import annotations

import os

EXIT_FAILED, EXIT_USAGE, EXIT_UNREACHABLE, EXIT_INTERRUPTED = 1, 2, 3, 130


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message."""
    return str(error).strip().partition("\n")[0]


def is_debugging() -> bool:
    """Whether tracebacks are wanted, by --debug or TUNER_DEBUG."""
    return os.environ.get("TUNER_DEBUG", "").lower() in {"1", "true", "yes"}


class TunerError(Exception):
    """The command failed; the message says what was wanted, what was found and what to do."""

    exit_code: int = EXIT_FAILED

    def __init__(self, message: str, exit_code: int | None = None) -> None:
        super().__init__(message)
        if exit_code is not None:
            self.exit_code = exit_code


class UsageError(TunerError):
    """The command was given something it cannot mean."""

    exit_code = EXIT_USAGE


class FormatError(TunerError):
    """A format cannot hold the model; the message says why, and where in the user's code."""


class BrokenDeviceError(TunerError):
    """The device does not do what it should, whatever the trial."""


class DataError(ValueError):
    """The data of an objective cannot be trained on; the message says which split and why."""


class ObjectiveError(Exception):
    """A method of an objective returned what cannot be used; the message says what was wanted and what was got."""


class SharedPlaceError(Exception):
    """A checkpoint could not be read from, or written to, the place that other machines reach."""


class WorkerInterrupted(Exception):  # noqa: N818 - a request, like KeyboardInterrupt
    """The worker was asked to stop by SIGINT, SIGTERM or SIGHUP, and has stopped."""
