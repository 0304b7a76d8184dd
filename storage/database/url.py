"""Storage URLs: which we take, how we show them, where their passwords come from."""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import unquote

from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError

from storage.database.errors import InvalidURLError, StorageError
from storage.database.private import read_private

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_DRIVER = "postgresql+psycopg2"
_ACCEPTED_SCHEMES = frozenset({"postgresql", "postgres", _DRIVER})
_WANTED = "tuner stores studies in PostgreSQL only: postgresql://user@host/database"
# libpq's parameters that are no secrets. Of any other the value is masked: `Password` is a slip of the finger.
_SHOWN_PARAMETERS = frozenset(
    {
        *("host", "hostaddr", "port", "dbname", "user", "passfile", "service", "options", "application_name"),
        *("connect_timeout", "client_encoding", "target_session_attrs", "load_balance_hosts", "require_auth"),
        *("sslmode", "sslnegotiation", "sslrootcert", "sslcert", "sslkey", "sslcrl", "sslcrldir", "sslsni"),
        *("ssl_min_protocol_version", "ssl_max_protocol_version", "channel_binding", "gssencmode", "krbsrvname"),
        *("keepalives", "keepalives_idle", "keepalives_interval", "keepalives_count", "tcp_user_timeout"),
    }
)
_MASK = "***"
FILE_PARAMETER = "tuner_password_file"
"""The parameter of our own that `with_password_file` adds; libpq never sees it."""


def parse_url(url: str | URL) -> URL:
    """Check a storage URL and normalise it to SQLAlchemy's postgresql+psycopg2.

    Raises InvalidURLError, whose message and exception chain never hold any of the URL's secrets.
    """
    if isinstance(url, URL):
        parsed = url
    else:
        scheme, separator, _ = url.partition("://")
        if not separator:
            # Not shown: it may be a URL whose scheme was forgotten, password and all.
            raise InvalidURLError(f"{_WANTED}; got something without '://'")
        if scheme not in _ACCEPTED_SCHEMES:
            raise InvalidURLError(f"{_WANTED}; got {scheme[:40]!a}")
        try:
            parsed = make_url(url)
        except (ArgumentError, ValueError):
            # The original error quotes what it took for the port, which may be a piece of the password.
            raise InvalidURLError(
                f"{_WANTED}; the port of this one is not a number (in a password write '@' as %40)"
            ) from None
    if parsed.drivername not in _ACCEPTED_SCHEMES:
        raise InvalidURLError(f"{_WANTED}; got {parsed.drivername!a}")
    return _checked(parsed.set(drivername=_DRIVER))


def mask_url(url: str | URL) -> str:
    """Show a URL without its secrets, as postgresql://tuner:***@db/tuner; never raises."""
    try:
        parsed = parse_url(url)
    except InvalidURLError:
        scheme = url.drivername if isinstance(url, URL) else url.partition("://")[0]
        return f"{scheme if scheme in _ACCEPTED_SCHEMES else ''}://{_MASK}"
    query = {
        name: value if name in _SHOWN_PARAMETERS else _MASK
        for name, value in parsed.query.items()
        if name != FILE_PARAMETER
    }
    shown = parsed.set(drivername="postgresql", query=query)
    # Slashes and asterisks need no escape in a query, and paths of sockets read better with them.
    return shown.render_as_string(hide_password=True).replace("%2F", "/").replace("%2A", "*")


def with_password_file(url: str | URL, password_file: Path) -> URL:
    """Have each connection take its password from a private file, as that is then, without one trailing newline.

    The file must be private: see `read_private`.
    Raises InvalidURLError if the URL has a password already, StorageError for the file.
    """
    parsed = parse_url(url)
    if parsed.password is not None:
        raise InvalidURLError(
            f"{mask_url(parsed)} has a password already; drop it or the password file {password_file}"
        )
    read_password(password_file)
    return parsed.update_query_dict({FILE_PARAMETER: str(password_file.absolute())})


def _checked(url: URL) -> URL:
    if url.host and url.host.lower().startswith("%2f"):  # libpq's own way to write a socket directory
        query = {**url.query, "host": unquote(url.host)}
        url = URL.create(_DRIVER, url.username, url.password, None, url.port, url.database, query)
    if url.host and "@" in url.host:
        raise InvalidURLError(f"{_WANTED}; this one has two '@': in a password write '@' as %40")
    if not url.database:
        raise InvalidURLError(f"{_WANTED}; this one names no database")
    if url.port is not None and not 0 < url.port < 65536:
        raise InvalidURLError(f"{_WANTED}; a port is between 1 and 65535, got {url.port}")
    for part in _parts(url):
        if "\0" in part or not _encodable(part):
            raise InvalidURLError(f"{_WANTED}; this one holds a NUL or bytes that are not UTF-8")
    return url


def _parts(url: URL) -> Iterator[str]:
    yield from (part for part in (url.username, url.password, url.host, url.database) if part is not None)
    for name, value in url.query.items():
        yield name
        yield from (value,) if isinstance(value, str) else value


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_password(path: Path) -> str:
    """Return the password that a private file holds, as `with_password_file` wants it. Raises StorageError."""
    password = read_private(path, "password file")
    if not password or not password.isprintable():
        raise StorageError(f"the password file {path} must hold the password alone, on one line")
    return password
