"""Errors that a user can mend; the command line shows each as one line on stderr."""

from __future__ import annotations

import os


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message."""
    return str(error).strip().partition("\n")[0]


def is_debugging() -> bool:
    """Whether tracebacks are wanted, by --debug or TUNER_DEBUG."""
    return os.environ.get("TUNER_DEBUG", "").lower() in {"1", "true", "yes"}


class TunerError(Exception):
    """The command failed; the message says what was wanted, what was found and what to do.

    `exit_code` is what a slot that refused ended with; without one `tuner.exits` goes by the class.
    """

    def __init__(self, message: str, exit_code: int | None = None) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class UsageError(TunerError):
    """The command was given something it cannot mean."""


class StudyFailedError(TunerError):
    """The study ended by its failures: to run the same again would change nothing."""


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


class AskedToStop(BaseException):
    """The command was asked to stop, as a rule by a signal, and is to end with this code.

    A worker has given its trials back.
    """

    def __init__(self, exit_code: int) -> None:
        super().__init__(exit_code)
        self.exit_code = exit_code
