"""How work reaches the database: in one statement, one transaction or one snapshot, and what its errors become."""

from __future__ import annotations

import logging
import random
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final, Protocol, TypeVar

import psycopg2.errors
from sqlalchemy import Connection, Engine, Row, bindparam, text
from sqlalchemy.dialects.postgresql import UUID
from sqlalchemy.exc import DataError, DBAPIError, OperationalError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from storage.database.engine import full_disk, is_full, is_outage
from storage.database.errors import BusyError, InvalidWriteError, StorageError, UnreachableError
from storage.database.outages import Told
from storage.database.url import mask_url
from storage.database.variables import in_the_way

T = TypeVar("T")

OUTAGE_S: Final = 600.0
"""How long a call waits for a database that went away."""

_FIRST_PAUSE_S: Final = 0.1
_LONGEST_PAUSE_S: Final = 5.0
_ROLLED_BACK_TRIES: Final = 10
_ROLLED_BACK_PAUSE_S: Final = 0.05

_OUT_OF_RESOURCES: Final = ("53", "58")
"""Classes of SQLSTATE: memory, limits, and errors of the server's own files. It answers, so that it was not lost."""

_log = logging.getLogger(__name__)


class Retry(Protocol):
    """Calls again while the database is away."""

    def __call__(self, call: Callable[[], T], /) -> T:
        """Return `call()`."""


class Backoff:
    """Calls again while the database is away, with growing pauses, each shortened at random.

    Gives up after `limit_s` seconds, or once `stop` is set, and raises what the last call did. `notice` is told of
    the first error of an outage, and of the first by which we are not let in; they are logged where there is none.
    """

    def __init__(
        self,
        limit_s: float = OUTAGE_S,
        *,
        stop: threading.Event | None = None,
        notice: Callable[[Exception], None] | None = None,
        is_away: Callable[[BaseException], bool] = is_outage,
    ) -> None:
        self._limit_s = limit_s
        self._stop = stop or threading.Event()
        self._notice = notice or _log_outage
        self._is_away = is_away
        self._of_thread = threading.local()

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Within the block, make each call of this thread once, whatever the limit."""
        self._of_thread.at_once = True
        try:
            yield
        finally:
            self._of_thread.at_once = False

    def __call__(self, call: Callable[[], T], /) -> T:
        """Return `call()`. Raises at once what is no outage."""
        if getattr(self._of_thread, "at_once", False):
            return call()
        pause_s, gives_up_at, told = _FIRST_PAUSE_S, None, Told()
        while True:
            try:
                return call()
            except (StorageError, SQLAlchemyError) as error:
                if not self._is_away(error):
                    raise
                if gives_up_at is None:
                    gives_up_at = time.monotonic() + self._limit_s
                if told.is_news(error):
                    self._notice(error)
                left_s = gives_up_at - time.monotonic()
                if left_s <= 0 or self._stop.wait(min(left_s, pause_s * random.uniform(0.5, 1.0))):  # noqa: S311
                    raise
            pause_s = min(pause_s * 2, _LONGEST_PAUSE_S)


def is_away(error: BaseException) -> bool:
    """Whether the server could not be reached; not that others keep it busy, whose wait had its own limit."""
    return is_outage(error) and not isinstance(error, BusyError)


class Sessions:
    """Runs work on connections of an engine.

    What the server certainly rolled back - a deadlock, a serialization failure - is done again. So is, through
    `retry`, what met a server that was away, without ever being done twice: see `transaction`.
    Raises UnreachableError for a connection that was lost, BusyError for a statement that took too long, and
    StorageError for what else the server refused.
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

    def transaction(self, work: Callable[[Connection], T]) -> T:
        """Run work in one transaction that is committed exactly once.

        A connection lost during COMMIT leaves open whether the server did it. The transaction itself says so: with
        what it writes goes the id of this call, which is unique in the database. Begun again, it finds that id there,
        or may write it, which settles that nothing else of it is there either, whatever the server went through
        meanwhile. Its own number would not do: a server that crashed gives out again those that reached no disk.
        """
        operation = uuid.uuid4()
        begun: Row[Any] | None = None
        results: list[T] = []  # of those whose COMMIT was sent, the last of which may have been done

        def once() -> T:
            nonlocal begun
            with self._autocommit.connect() as conn:
                if begun is not None:
                    conn.execute(_END, dict(begun._mapping))
                with _transaction(conn, operation) as this:
                    if this is None:
                        return results[-1]
                    begun = this
                    results.append(work(conn))
                return results[-1]

        return self._patiently(once)

    def forget_operations(self) -> None:
        """Drop the ids of operations that nobody asks for any more: a call gives up long before."""
        self.statement(lambda conn: conn.execute(_FORGET))

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
            raise BusyError(
                f"all connections of this process to {mask_url(self._engine.url)} stayed busy: {error}"
            ) from error


@contextmanager
def _transaction(conn: Connection, operation: uuid.UUID) -> Iterator[Row[Any] | None]:
    """Begin a transaction of an operation and tell its number; commit it, or roll it back if the block raises.

    None if the operation is in the database already. While another transaction has it under way, this waits.
    In statements of our own, since the driver's would take one request to begin and another for the first statement.
    """
    this = conn.execute(_BEGIN, {"operation": operation}).one_or_none()
    try:
        yield this
    except BaseException:
        if not conn.invalidated:
            conn.execute(_ROLLBACK)
        raise
    conn.execute(_COMMIT)


_BEGIN: Final = text(
    "BEGIN; INSERT INTO tuner_operations (operation_id) VALUES (:operation) ON CONFLICT DO NOTHING"
    " RETURNING pg_current_xact_id()::text AS xid, pg_backend_pid() AS backend"
).bindparams(bindparam("operation", type_=UUID))
_COMMIT: Final = text("COMMIT")
_ROLLBACK: Final = text("ROLLBACK")
# A transaction that waits for a client that is gone. By its number as well: after a restart of the server another
# session may have the backend's pid.
_END: Final = text(
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
    " WHERE pid = :backend AND backend_xid::text = (CAST(:xid AS bigint) % 4294967296)::text"
)


_FORGET: Final = text("DELETE FROM tuner_operations WHERE committed_at < now() - interval '1 day'")


class _RolledBackError(StorageError):
    """The server rolled the transaction back, so that it may be run again."""


def explained(error: DBAPIError, shown: str) -> Exception:
    """Return our error for a driver's; `shown` is the masked URL."""
    original = error.orig
    reason = " ".join(str(original).split())
    if isinstance(original, psycopg2.errors.SerializationFailure | psycopg2.errors.DeadlockDetected):
        return _RolledBackError(f"{shown} rolled a transaction back {_ROLLED_BACK_TRIES} times: {reason}; try again")
    if isinstance(original, psycopg2.errors.LockNotAvailable):
        return BusyError(
            f"another session keeps what was to be written in {shown} locked: {reason}; pg_stat_activity shows it"
        )
    if isinstance(original, psycopg2.errors.QueryCanceled):
        return BusyError(f"{shown} took too long: {reason}; the server may be overloaded, try again")
    if isinstance(original, psycopg2.errors.ReadOnlySqlTransaction):
        return StorageError(
            f"{shown} takes no writes from this session: {reason}; it may be a standby, or the database or the role be "
            f"set read-only: name the server that takes them{in_the_way((), ['PGOPTIONS'])}"
        )
    if isinstance(error, DataError):
        return InvalidWriteError(f"{shown} cannot hold what was to be written: {reason}")
    if is_full(original):
        return UnreachableError(full_disk(shown, reason))
    if not error.connection_invalidated and (getattr(original, "pgcode", None) or "").startswith(_OUT_OF_RESOURCES):
        return UnreachableError(f"the server at {shown} could not do it: {reason}; its own log says more")
    if error.connection_invalidated or isinstance(error, OperationalError):
        return UnreachableError(f"lost the connection to {shown}: {reason}; try again once the server is back")
    return StorageError(f"{shown} refused: {reason}")


def _log_outage(error: Exception) -> None:
    _log.warning("%s; trying again", " ".join(str(error).split()))
