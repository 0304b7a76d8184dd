"""How work reaches the database: in one statement, one transaction or one snapshot, and what its errors become."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, Protocol, TypeVar

import psycopg2.errors
from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DataError, DBAPIError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from storage.errors import InvalidWriteError, StorageError, UnreachableError
from storage.url import mask_url

T = TypeVar("T")

_ROLLED_BACK_TRIES: Final = 10
_ROLLED_BACK_PAUSE_S: Final = 0.05


class Retry(Protocol):
    """Calls again while the database is away."""

    def __call__(self, call: Callable[[], T], /) -> T:
        """Return `call()`."""


class Sessions:
    """Runs work on connections of an engine.

    What the server certainly rolled back - a deadlock, a serialization failure - is done again. A lost connection
    leaves open whether a write was committed: `retry`, if there is one, sees the work that may be done twice.
    Raises UnreachableError for a connection that was lost or a statement that took too long, StorageError for what
    else the server refused.
    """

    def __init__(self, engine: Engine, retry: Retry | None = None) -> None:
        self._engine = engine
        self._autocommit = engine.execution_options(isolation_level="AUTOCOMMIT")
        self._repeatable = engine.execution_options(isolation_level="REPEATABLE READ")
        self._retry = retry

    def statement(self, work: Callable[[Connection], T]) -> T:
        """Run work of single statements, each its own transaction, and each of which may be done twice."""

        def once() -> T:
            with self._autocommit.connect() as conn:
                return work(conn)

        return self._patiently(once)

    def snapshot(self, work: Callable[[Connection], T]) -> T:
        """Run queries that all see the same moment."""

        def once() -> T:
            with self._repeatable.begin() as conn:
                return work(conn)

        return self._patiently(once)

    def transaction(self, work: Callable[[Connection], T], *, twice: bool = False) -> T:
        """Run work in one transaction; `twice` says that doing it again after a commit does no harm."""

        def once() -> T:
            with self._engine.begin() as conn:
                return work(conn)

        return self._patiently(once) if twice else self._again_if_rolled_back(once)

    def _patiently(self, once: Callable[[], T]) -> T:
        if self._retry is None:
            return self._again_if_rolled_back(once)
        return self._retry(lambda: self._again_if_rolled_back(once))

    def _again_if_rolled_back(self, once: Callable[[], T]) -> T:
        pause = threading.Event()
        for _ in range(_ROLLED_BACK_TRIES - 1):
            try:
                with self._explained():
                    return once()
            except _RolledBackError:
                pause.wait(_ROLLED_BACK_PAUSE_S * random.random())  # noqa: S311
        with self._explained():
            return once()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except DBAPIError as error:
            raise explained(error, mask_url(self._engine.url)) from error
        except PoolTimeoutError as error:
            raise UnreachableError(
                f"all connections of this process to {mask_url(self._engine.url)} stayed busy: {error}"
            ) from error


class _RolledBackError(StorageError):
    """The server rolled the transaction back, so that it may be run again."""


def explained(error: DBAPIError, shown: str) -> Exception:
    """Return our error for a driver's; `shown` is the masked URL."""
    original = error.orig
    reason = " ".join(str(original).split())
    if isinstance(original, psycopg2.errors.SerializationFailure | psycopg2.errors.DeadlockDetected):
        return _RolledBackError(f"{shown} rolled a transaction back {_ROLLED_BACK_TRIES} times: {reason}; try again")
    if isinstance(original, psycopg2.errors.LockNotAvailable):
        return UnreachableError(
            f"another session keeps what was to be written in {shown} locked: {reason}; pg_stat_activity shows it"
        )
    if isinstance(original, psycopg2.errors.QueryCanceled):
        return UnreachableError(f"{shown} took too long: {reason}; the server may be overloaded, try again")
    if isinstance(original, psycopg2.errors.ReadOnlySqlTransaction):
        return StorageError(f"{shown} is open read-only here: {reason}")
    if isinstance(error, DataError):
        return InvalidWriteError(f"{shown} cannot hold what was to be written: {reason}")
    if error.connection_invalidated or isinstance(error, OperationalError):
        return UnreachableError(f"lost the connection to {shown}: {reason}; try again once the server is back")
    return StorageError(f"{shown} refused: {reason}")
