"""SQLAlchemy engines whose sessions are bounded in time, and whose connection errors are ours."""

from __future__ import annotations

import os
import re
import select
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import URL, CreateEnginePlugin, Engine, create_engine, event
from sqlalchemy.dialects import plugins
from sqlalchemy.exc import ArgumentError, InvalidatePoolError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from storage.database.certificates import refused_by_clock
from storage.database.errors import (
    AuthenticationError,
    InvalidURLError,
    NoDatabaseError,
    NotLetInError,
    NotReadyError,
    StorageError,
    UnreachableError,
)
from storage.database.foreign import json_column
from storage.database.pooler import connect
from storage.database.url import FILE_PARAMETER, mask_url, parse_url, read_password
from storage.database.variables import hidden, in_the_way, is_embedded

if TYPE_CHECKING:
    from sqlalchemy.engine import Dialect, ExceptionContext
    from sqlalchemy.engine.interfaces import DBAPIConnection
    from sqlalchemy.pool import ConnectionPoolEntry

CONNECTIONS_PER_PROCESS: Final = 2

# A dead network is noticed after 10 + 3 * 5 seconds when idle, after 30 with data under way.
_CONNECT_ARGS: Final[dict[str, str | int]] = {
    "client_encoding": "utf8",  # the database's own, or PGCLIENTENCODING, may lack what names are written in
    "connect_timeout": 5,  # seconds, for each address that the host's name has
    "keepalives": 1,
    "keepalives_idle": 10,  # seconds
    "keepalives_interval": 5,  # seconds
    "keepalives_count": 3,
    "tcp_user_timeout": 30_000,  # milliseconds; libpq ignores it where the system has none (macOS)
}
_IDLE_S: Final = 1.0
"""After how long in the pool a connection is tried before it is used, in case the network has dropped it."""

FREE_SPACE: Final = "free space there: what waits for the database goes on by itself"
DISK_FULL: Final = "53100"

_SESSION_SETTINGS: Final = {
    "TimeZone": "UTC",
    "statement_timeout": "60s",
    "lock_timeout": "10s",
    "idle_in_transaction_session_timeout": "60s",
}


def open_engine(url: str | URL, *, read_only: bool = False, application_name: str = "tuner") -> Engine:
    """Make an engine of at most two connections; nothing is connected yet.

    Parameters in the URL's query win over our settings. With `read_only` each transaction refuses writes;
    that guards against accidents, a database role guards against people.
    Connecting raises UnreachableError, AuthenticationError or InvalidURLError; errors of statements are
    SQLAlchemy's own. Raises InvalidURLError.
    """
    parsed = parse_url(url)
    try:
        return create_engine(parsed, **engine_options(parsed, read_only, application_name))
    except ArgumentError as error:
        raise InvalidURLError(f"cannot use {mask_url(parsed)}: {_one_line(error)}") from None


def engine_options(url: URL, read_only: bool, application_name: str) -> dict[str, Any]:
    """Return `open_engine`'s keyword arguments of create_engine, for code that makes its engine itself."""
    connect_args = {name: value for name, value in _CONNECT_ARGS.items() if name not in url.query}
    if "application_name" not in url.query:
        connect_args["application_name"] = application_name
    connect_args["options"] = _server_options(url, read_only)
    return {
        "connect_args": connect_args,
        "json_deserializer": json_column,
        "max_overflow": CONNECTIONS_PER_PROCESS - 1,
        "plugins": [_PLUGIN],
        "pool_size": 1,
        "use_native_hstore": False,  # saves one query a connection: it would look for the hstore type
    }


def _server_options(url: URL, read_only: bool) -> str:
    ours = [f"-c {name}={value}" for name, value in _SESSION_SETTINGS.items()]
    given = url.query.get("options") or ("" if is_embedded(url.query.get("host")) else os.environ.get("PGOPTIONS", ""))
    theirs = [given] if isinstance(given, str) else list(given)
    # The last setting of a name wins in PostgreSQL: theirs over ours, read_only over all.
    last = ["-c default_transaction_read_only=on"] if read_only else []
    return " ".join(filter(None, [*ours, *theirs, *last]))


def is_full(error: BaseException | None) -> bool:
    """Whether the server has no room on its disk."""
    return getattr(error, "pgcode", None) == DISK_FULL


def full_disk(shown: str, reason: str) -> str:
    """Return what to say of it."""
    return f"the server's disk is full at {shown}: {reason}; {FREE_SPACE}"


def is_outage(error: BaseException) -> bool:
    """Whether the same call may succeed later: the server was away, or a conflict made it roll back.

    So is being let in no more: passwords change under those who were, who read theirs again at each connection.
    Whoever opens a database for the first time asks nothing of this, and fails. Looks through errors that wrap
    another, as Optuna's do.
    """
    if isinstance(error, NotLetInError):
        return True
    if isinstance(error, AuthenticationError | NoDatabaseError):
        return False
    if isinstance(error, UnreachableError | OperationalError | PoolTimeoutError):
        return True
    return error.__cause__ is not None and is_outage(error.__cause__)


class _ConnectionErrors(CreateEnginePlugin):
    """Maps the errors of connecting, on our engines and on those that Optuna makes from our options."""

    def update_url(self, url: URL) -> URL:
        return url  # to be given by every plugin; ours takes nothing from the URL

    def engine_created(self, engine: Engine) -> None:
        url = engine.url

        def explain(context: ExceptionContext) -> StorageError | None:
            if context.sqlalchemy_exception is None:
                return None
            if context.connection is None:
                return _connection_error(context.original_exception, url)
            if context.is_disconnect:
                reason = _one_line(context.original_exception)
                if is_full(context.original_exception):  # it ends all sessions if it cannot write its own log
                    return UnreachableError(full_disk(mask_url(url), reason))
                return _explanation(reason, url) or UnreachableError(
                    f"lost the connection to {mask_url(url)}: {reason}; check that the server runs"
                )
            return None

        event.listen(engine, "do_connect", _connect)
        event.listen(engine, "handle_error", explain)
        _listen_to_pool(engine)


def _connect(
    dialect: Dialect, _: ConnectionPoolEntry, args: tuple[str, ...], parameters: dict[str, Any]
) -> DBAPIConnection:
    """Connect with the password that its file holds now, and to an embedded server without libpq's variables."""
    given = {name: value for name, value in parameters.items() if name != FILE_PARAMETER}
    if FILE_PARAMETER in parameters:
        try:
            given["password"] = read_password(Path(parameters[FILE_PARAMETER]))
        except StorageError as error:  # it was good when the command started: somebody is writing it, as a rule
            raise NotLetInError(str(error)) from error
    if is_embedded(given.get("host")):
        with hidden():
            return dialect.connect(*args, **given)
    session: DBAPIConnection = connect(partial(dialect.connect, *args), given)
    return session


def _listen_to_pool(engine: Engine) -> None:
    """Hand out connections only if they look alive, and take them back as they were made.

    Not by `pool_pre_ping`: asking the server before each statement doubles what a distant one costs.
    """
    dialect = engine.dialect

    def note_use(_: object, record: ConnectionPoolEntry) -> None:
        record.info["used_at"] = time.monotonic()

    def ping(connection: DBAPIConnection, record: ConnectionPoolEntry, _: object) -> None:
        try:
            if time.monotonic() - record.info["used_at"] > _IDLE_S or _has_something_to_say(connection):
                dialect.do_ping(connection)
        except dialect.loaded_dbapi.Error as error:
            raise InvalidatePoolError from error  # the pool connects anew, and then tells that attempt's error

    def forget_isolation(connection: DBAPIConnection | None, _: object) -> None:
        # SQLAlchemy sets the server's own isolation level by its name, and then psycopg2 sends a SET whenever
        # autocommit goes off: a report took four requests, and one lost after it made a call fail that was done.
        if connection is not None and not connection.closed:
            connection.set_session(isolation_level="DEFAULT", autocommit=False)

    event.listen(engine, "connect", note_use)
    event.listen(engine, "checkout", ping)
    event.listen(engine, "checkin", forget_isolation)
    event.listen(engine, "checkin", note_use)


def _has_something_to_say(idle: Any) -> bool:
    """Whether the server sent something that nobody asked for: that it ended the session, as a rule."""
    poll = select.poll()
    poll.register(idle, select.POLLIN)
    return bool(poll.poll(0))


_PLUGIN: Final = "tuner_connection_errors"
plugins.register(_PLUGIN, __name__, _ConnectionErrors.__name__)

# libpq gives no SQLSTATE for a connection that failed, so its words decide; most specific first. A server
# that speaks another language falls through to UnreachableError, with the server's words.
_UNVERIFIED: Final = "certificate verify failed"
_EXPLANATIONS: Final[tuple[tuple[str, type[StorageError], str, str], ...]] = (
    (
        r"the database system is (starting up|shutting down|in recovery|not yet accepting)",
        NotReadyError,
        "not ready yet at",
        "try again in a moment",
    ),
    (
        r"No space left on device",
        UnreachableError,
        "the server's disk is full at",
        FREE_SPACE,
    ),
    (
        r"too many clients|remaining connection slots|too many connections for",
        NotReadyError,
        "no free connection at",
        f"a tuner process takes {CONNECTIONS_PER_PROCESS}, so raise max_connections above {CONNECTIONS_PER_PROCESS} x "
        "processes, or start fewer",
    ),
    (
        r"\(max_\w*client_conn\w*\)",
        NotReadyError,
        "no free connection at",
        f"a tuner process takes {CONNECTIONS_PER_PROCESS}, so raise the pooler's max_client_conn above "
        f"{CONNECTIONS_PER_PROCESS} x processes, or start fewer",
    ),
    (
        r"query_wait_timeout",
        NotReadyError,
        "no free connection at",
        "the pooler had none to its server in time: check that the server runs and lets the pooler in, or raise its "
        "default_pool_size",
    ),
    (
        r"statement pooling mode",
        StorageError,
        "cannot use",
        "the pooler ends sessions that begin a transaction: set its pool_mode to transaction",
    ),
    (
        r"unsupported startup parameter",
        InvalidURLError,
        "cannot use",
        "leave it out, or name it in the pooler's ignore_startup_parameters",
    ),
    (
        r"invalid (connection option|integer value|port number|require_auth method|\"?\w+\"? value:)"
        r'|value ".*" (is )?invalid|definition of service|service file',
        InvalidURLError,
        "cannot use",
        "correct the URL's parameters, and leave out those of other programs (pgbouncer=true, schema=...): a pooler is "
        "noticed without, and options=-c search_path=NAME names a schema",
    ),
    (
        r"server certificate for|server's certificate",
        AuthenticationError,
        "not trusted:",
        "write the host in the URL as the server's certificate has it, or give the server a certificate whose "
        "subjectAltName has that name",
    ),
    (
        _UNVERIFIED,
        AuthenticationError,
        "not trusted:",
        "sslrootcert in the URL has to name the file with the certificate of the authority that issued the server's; "
        "see also that it has not expired",
    ),
    (
        r"root certificate file",
        AuthenticationError,
        "not trusted:",
        "name the file with the certificate of the authority that issued the server's in the URL: sslrootcert=",
    ),
    (
        r"server does not support SSL",
        AuthenticationError,
        "no TLS at",
        "give the server a certificate (ssl = on), or take sslmode=disable to one that only this machine reaches",
    ),
    (
        r"channel binding|authentication method requirement",
        AuthenticationError,
        "not trusted:",
        "channel_binding and require_auth in the URL have to allow what the server does",
    ),
    (
        r"no pg_hba\.conf entry.*no encryption",
        AuthenticationError,
        "not let in at",
        "the server may want TLS: sslmode=verify-full and sslrootcert= in the URL; else check its pg_hba.conf",
    ),
    (
        r"authentication failed|no password supplied|no pg_hba\.conf entry|pg_hba\.conf rejects"
        r'|role ".*" (does not exist|is not permitted to log in)|permission denied for database|no such user',
        NotLetInError,
        "not let in at",
        "check the user name and the password (PGPASSWORD, PGPASSFILE or a password file), and the server's "
        "pg_hba.conf",
    ),
    (
        r'database ".*" does not exist|no such database',
        NoDatabaseError,
        "no such database at",
        "create it (createdb), or correct the name",
    ),
    (
        r"server_login_retry|cannot connect to server",
        NotReadyError,
        "not ready yet at",
        "the pooler cannot log in to its server: check that this runs and lets the pooler in, whose log says more",
    ),
)
_HINT: Final = re.compile(r"\s*(Is the server running[^?]*\?|Either provide the file[^.]*verification\.)")


def _connection_error(error: BaseException, url: URL) -> StorageError:
    shown, reason = mask_url(url), _one_line(error)
    variables = _variables(url)
    if _UNVERIFIED in reason and (by_clock := refused_by_clock(url)) is not None:
        return AuthenticationError(
            f"not trusted: {shown}: {by_clock}; set the clock if it is wrong, else renew the certificate{variables}"
        )
    return _explanation(reason, url) or UnreachableError(
        f"cannot reach PostgreSQL at {shown}: {reason}; check that the server runs, and its host and port{variables}"
    )


def _explanation(reason: str, url: URL) -> StorageError | None:
    """Return the error that one of _EXPLANATIONS makes of the words of libpq, the server or a pooler."""
    for pattern, kind, what, remedy in _EXPLANATIONS:
        if re.search(pattern, reason):
            return kind(f"{what} {mask_url(url)}: {reason}; {remedy}{_variables(url)}")
    return None


def _variables(url: URL) -> str:
    return "" if is_embedded(url.query.get("host")) else in_the_way(_parameters(url))


def _parameters(url: URL) -> set[str]:
    """Return the names of libpq's parameters that we give it for this URL."""
    of_url = {"user": url.username, "password": url.password, "host": url.host, "port": url.port}
    given = {"application_name", "dbname", *_CONNECT_ARGS, *url.query, *(name for name in of_url if of_url[name])}
    return given | {"password"} if FILE_PARAMETER in url.query else given


def _one_line(error: BaseException) -> str:
    return " ".join(_HINT.sub("", str(error)).split())
