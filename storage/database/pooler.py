"""Poolers, as PgBouncer is one: each transaction may get another session of the server, which others had before.

So the settings of a session of ours go with each of its transactions, in the request of its first statement, and end
with it. Nothing else of ours outlives a transaction.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Final

import psycopg2
from psycopg2.extensions import TRANSACTION_STATUS_IDLE, connection, cursor

# PgBouncer's words, for all options or for one setting in them, and those of Amazon's proxy.
_TAKES_NO_OPTIONS: Final = re.compile(r"unsupported startup parameter\w*( in options)?: |support command-line options")
_SETTING: Final = re.compile(r"(?<!\S)(?:-c\s*|--)([\w.-]+)=((?:\\.|[^\s\\])*)")
_LIBPQ: Final = "server closed the connection unexpectedly"
# What a session begins its transactions with, by what one that has begun is told.
_OF_TRANSACTION: Final = {"default_transaction_read_only": "transaction_read_only"}


def connect(given: Callable[..., connection], parameters: dict[str, Any]) -> connection:
    """Connect by `given` with libpq's parameters, whose `options` count whatever stands before the server.

    Raises what psycopg2 does, also where a pooler has no session to give, or none for transactions.
    """
    session, has_options = _connect(given, parameters)
    session.autocommit = True
    # A pooler has a process of its own making to tell of, as the server's is another for each transaction.
    told: int = session.info.backend_pid
    if not has_options or _ask(session, "SELECT pg_backend_pid()") != told:
        settings = _settings(str(parameters["options"]))
        _ask(session, f"BEGIN;{settings}")
        _ask(session, "ROLLBACK")
        session.cursor_factory = partial(_cursor, settings)
    session.autocommit = False
    return session


def _connect(given: Callable[..., connection], parameters: dict[str, Any]) -> tuple[connection, bool]:
    """Return a session, and whether it was asked for with all options."""
    try:
        return given(**parameters), True
    except psycopg2.OperationalError as error:
        if not _TAKES_NO_OPTIONS.search(str(error)):
            raise
    # What is no setting stays: some services have the name of a database's host there.
    rest = " ".join(_SETTING.sub("", str(parameters["options"])).split())
    return given(**{**parameters, "options": rest}), False


def _ask(session: connection, query: str) -> Any:
    with session.cursor() as asked, _with_reason(session):
        asked.execute(query)
        return (asked.fetchone() or (None,))[0] if asked.description else None


@contextmanager
def _with_reason(session: connection) -> Iterator[None]:
    """Raise with what the pooler said before it ended the session, which psycopg2 passes over."""
    try:
        yield
    except psycopg2.OperationalError as error:
        said, ended, _ = (session.info.error_message or "").partition(_LIBPQ)
        if error.pgcode is None and said and ended:
            raise psycopg2.OperationalError(said) from error
        raise


def _settings(options: str) -> str:
    """Return the statement that makes the settings of options those of a transaction."""
    settings = {}
    for name, value in _SETTING.findall(options):
        underscored = name.replace("-", "_")
        settings[_OF_TRANSACTION.get(underscored, underscored)] = re.sub(r"\\(.)", r"\1", value)
    calls = (f"set_config({_quoted(name)}, {_quoted(value)}, true)" for name, value in settings.items())
    return f"SELECT {', '.join(calls)};"


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "''")
    return f"E'{escaped}'"


class _Cursor(cursor):  # type: ignore[misc]  # psycopg2 tells no types
    """Sends the settings with the first statement of each transaction."""

    settings: str

    def execute(self, query: Any, values: Any = None) -> None:
        with _with_reason(self.connection):
            super().execute(self._with_settings(query, values is not None), values)

    def executemany(self, query: Any, rows: Any) -> None:
        with _with_reason(self.connection):
            super().executemany(self._with_settings(query, True), rows)

    def copy_expert(self, sql: Any, file: Any, size: int = 8192) -> None:
        with _with_reason(self.connection):
            super().copy_expert(self._with_settings(sql, False), file, size)

    def _with_settings(self, query: Any, has_values: bool) -> Any:
        if self.connection.info.transaction_status != TRANSACTION_STATUS_IDLE:
            return query
        return (self.settings.replace("%", "%%") if has_values else self.settings) + query


def _cursor(settings: str, *arguments: Any, **named: Any) -> _Cursor:
    made = _Cursor(*arguments, **named)
    made.settings = settings
    return made
