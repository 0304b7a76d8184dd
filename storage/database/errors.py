"""What can go wrong between us and the database, as types; every message shows its URL masked."""

from __future__ import annotations


class StorageError(Exception):
    """The study database could not do what was asked; the message says what to do."""


class InvalidURLError(StorageError):
    """The URL is malformed, or names something else than a PostgreSQL database."""


class UnreachableError(StorageError):
    """No session with the server: it is down, too slow, full, refuses us, or lacks the database."""


class AuthenticationError(UnreachableError):
    """The server answers, but does not let this role in, or does not prove that it is the one we want."""


class NotLetInError(AuthenticationError):
    """The server does not take the role or its password, or the password cannot be read: soon they may be right."""


class NoDatabaseError(UnreachableError):
    """The server answers but has no database of that name."""


class NotReadyError(UnreachableError):
    """The server is there, but has no connection free, or is starting or stopping: soon it may let us in."""


class BusyError(UnreachableError):
    """The server is there, but others kept what was needed locked or busy for longer than a session waits."""


class SchemaVersionError(StorageError):
    """The tables of this database belong to another version of tuner or Optuna."""


class StudyNotFoundError(StorageError):
    """No study of that name in this database."""


class StudyExistsError(StorageError):
    """A study of that name is already in this database."""


class EmbeddedServerError(StorageError):
    """The embedded PostgreSQL could not be created, started, joined or stopped."""


class LeaseLostError(StorageError):
    """The lease on a trial is no longer ours: whoever holds the trial now is the one to write to it."""


class StudyHaltedError(StorageError):
    """The study was stopped or paused: its trials are to be given back, and no more are handed out."""


class LiveTrialsError(StorageError):
    """Workers run trials of the study, which may not go under their hands."""


class TrialNotRunningError(StorageError):
    """The study has no running trial of that number."""


class TrialNotWaitingError(StorageError):
    """The study has no waiting trial of that number."""


class InvalidWriteError(ValueError):
    """What was to be written is nothing that the tables can hold; nothing was sent to the database."""
