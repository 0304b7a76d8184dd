"""libpq's variables of the environment: which there are, connecting without them, and naming those in the way."""

from __future__ import annotations

import os
import threading
from collections.abc import Container, Iterable, Iterator
from contextlib import contextmanager
from typing import Final

MARK: Final = "connected-to-without-variables"
"""A file of this name lies beside the socket of an embedded server, which no variable is meant for."""

# By variable, the parameter that wins over it; those of None win themselves, or change a session after it was made.
_PARAMETERS: Final[dict[str, str | None]] = {
    "PGAPPNAME": "application_name",
    "PGCHANNELBINDING": "channel_binding",
    "PGCLIENTENCODING": "client_encoding",
    "PGCONNECT_TIMEOUT": "connect_timeout",
    "PGDATABASE": "dbname",
    "PGDATESTYLE": None,
    "PGGEQO": None,
    "PGGSSDELEGATION": "gssdelegation",
    "PGGSSENCMODE": "gssencmode",
    "PGGSSLIB": "gsslib",
    "PGHOST": "host",
    "PGHOSTADDR": "hostaddr",
    "PGKRBSRVNAME": "krbsrvname",
    "PGLOADBALANCEHOSTS": "load_balance_hosts",
    "PGMAXPROTOCOLVERSION": "max_protocol_version",
    "PGMINPROTOCOLVERSION": "min_protocol_version",
    "PGOAUTHCAFILE": "oauth_ca_file",
    "PGOAUTHDEBUG": None,
    "PGOPTIONS": "options",
    "PGPASSFILE": "passfile",
    "PGPASSWORD": "password",
    "PGPORT": "port",
    "PGREQUIREAUTH": "require_auth",
    "PGREQUIREPEER": "requirepeer",
    "PGREQUIRESSL": "sslmode",
    "PGSERVICE": "service",
    "PGSERVICEFILE": "servicefile",
    "PGSSLCERT": "sslcert",
    "PGSSLCERTMODE": "sslcertmode",
    "PGSSLCOMPRESSION": "sslcompression",
    "PGSSLCRL": "sslcrl",
    "PGSSLCRLDIR": "sslcrldir",
    "PGSSLKEY": "sslkey",
    "PGSSLMAXPROTOCOLVERSION": "ssl_max_protocol_version",
    "PGSSLMINPROTOCOLVERSION": "ssl_min_protocol_version",
    "PGSSLMODE": "sslmode",
    "PGSSLNEGOTIATION": "sslnegotiation",
    "PGSSLROOTCERT": "sslrootcert",
    "PGSSLSNI": "sslsni",
    "PGSYSCONFDIR": None,
    "PGTARGETSESSIONATTRS": "target_session_attrs",
    "PGTZ": None,
    "PGUSER": "user",
}
_hiding = threading.Lock()


def is_embedded(host: object) -> bool:
    """Whether the host, as libpq is given it, is the socket directory of an embedded server."""
    return isinstance(host, str) and host.startswith("/") and os.path.exists(os.path.join(host, MARK))


@contextmanager
def hidden() -> Iterator[None]:
    """Keep libpq's variables from what is connected to in the block.

    No parameter says that a service, a time zone or a style of dates is not to be taken from them. `os.environ` stays
    as it is, for what runs in other threads; nothing is changed where none of the variables is set.
    """
    found = {name: value for name, value in os.environ.items() if name in _PARAMETERS}
    if not found:
        yield
        return
    with _hiding:
        for name in found:
            os.unsetenv(name)
        try:
            yield
        finally:
            for name, value in found.items():
                os.putenv(name, value)


def in_the_way(given: Container[str], among: Iterable[str] = tuple(_PARAMETERS)) -> str:
    """Return a clause for an error: which of the variables took part; `given` are the parameters given."""
    names = [name for name in among if name in os.environ and _PARAMETERS[name] not in given]
    return f"; variables of the environment took part: {', '.join(names)}" if names else ""
