"""Where a server is reached: its sockets, its URL, and the address that it listens on if it does."""

from __future__ import annotations

import ipaddress
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import quote

from storage.database.errors import EmbeddedServerError
from storage.embedded.cluster import DATABASE
from storage.files import require_own

if TYPE_CHECKING:
    from storage.embedded.accounts import Account
    from storage.embedded.postmaster import Postmaster

_SOCKET_PATH_MAX_BYTES: Final = 90  # the kernel's limit is 108 on Linux, 104 on macOS


def socket_directory(home: Path, key: str, account: Account) -> Path:
    """Return where a server that is about to start has its sockets; `key` names it among the user's servers.

    It is still to be made or checked. Who joins the server takes the place from its pid file: it may be another one by
    then.
    """
    near = home / "socket"
    if _is_fit(near):
        return near
    # Not gettempdir(): what TMPDIR names may be as long. And XDG_RUNTIME_DIR goes with the user's last session, which a
    # server outlives.
    place = Path(f"/tmp/tuner-{os.geteuid()}-{key}")  # noqa: S108  (checked by private_directory)
    runtime = Path(os.environ.get("XDG_RUNTIME_DIR", ""))
    short = runtime / f"tuner-{key}"
    if account.is_us and _is_anothers(place, account) and runtime.is_absolute() and _is_fit(short):
        with suppress(OSError):
            require_own(runtime)
            if runtime.is_dir():
                return short
    return place


def _is_anothers(place: Path, account: Account) -> bool:
    """Whether somebody else has taken a name where everybody may."""
    try:
        return os.lstat(place).st_uid != account.uid
    except FileNotFoundError:
        return False


def _is_fit(sockets: Path) -> bool:
    """Whether PostgreSQL takes a directory for its sockets."""
    longest = os.fsencode(sockets / ".s.PGSQL.65535")
    # PostgreSQL takes a list of directories, so a comma or a quote would need quoting of its own.
    return len(longest) <= _SOCKET_PATH_MAX_BYTES and re.fullmatch(rb"[\w./+-]+", longest) is not None


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
