"""Errors that a user can mend; the command line shows each as one line on stderr."""

from __future__ import annotations


class TunerError(Exception):
    """The command failed; the message says what was wanted, what was found and what to do."""

    exit_code: int = 1


class UsageError(TunerError):
    """The command was given something it cannot mean."""

    exit_code = 2


class WorkerInterrupted(Exception):  # noqa: N818 - a request, like KeyboardInterrupt
    """The worker was asked to stop by SIGINT or SIGTERM, and has stopped."""
