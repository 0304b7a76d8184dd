"""Where a server is reached: its URL, and the address that it listens on if it does."""

from __future__ import annotations

import ipaddress
from typing import TYPE_CHECKING
from urllib.parse import quote

from storage.database.errors import EmbeddedServerError
from storage.embedded.cluster import DATABASE

if TYPE_CHECKING:
    from storage.embedded.postmaster import Postmaster


def url(server: Postmaster, role: str) -> str:
    """Return the URL of the server for a role, as libpq reads it too."""
    directory = quote(str(server.socket_directory), safe="/")
    return f"postgresql://{role}@/{DATABASE}?host={directory}&port={server.port}"


def loopback(listen: str) -> tuple[str, int]:
    """Return the host and port of a loopback address. Raises EmbeddedServerError for another."""
    host, _, port = listen.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    try:
        is_loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_loopback = False
    if not is_loopback or not port.isdecimal() or not 0 < int(port) < 65536:
        raise EmbeddedServerError(
            f"the embedded database listens on loopback addresses only, as 127.0.0.1:5433, got {listen!a}; "
            "for other machines run a PostgreSQL of your own (docker compose up)"
        )
    return host, int(port)


def shown(host: str, port: int) -> str:
    """Return an address as people write it."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
