"""Which embedded databases a user has, wherever their data directories were."""

from __future__ import annotations

import os
import re
import socket
import stat
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from storage.database.variables import MARK
from storage.embedded import server as embedded
from storage.embedded.server import EmbeddedServer
from storage.files import read_own, require_own

if TYPE_CHECKING:
    from collections.abc import Iterator

_STARTING_S: Final = 600.0
_CONNECT_TIMEOUT_S: Final = 1.0


@dataclass(frozen=True, kw_only=True)
class EmbeddedDatabase:
    """A database of this user."""

    data_dir: Path | None  # None where a tuner made it that did not note this
    home: Path  # where its files lie
    size: int  # bytes
    running: bool

    @property
    def name(self) -> Path:
        """The data directory, or else where the files lie."""
        return self.data_dir or self.home

    @property
    def server(self) -> EmbeddedServer:
        """The database's server."""
        return EmbeddedServer(self.name, home=self.home)


def databases() -> list[EmbeddedDatabase]:
    """Return the databases of this user, as far as they are still there, by name; changes nothing."""
    return sorted(map(_look, _homes()), key=lambda database: database.name)


def find(directory: Path) -> EmbeddedServer:
    """Return the server of a data directory, or of a home as `databases` tells it."""
    wanted = Path(os.path.realpath(directory))
    found = (database for database in databases() if wanted in (database.data_dir, database.home))
    return next((database.server for database in found), EmbeddedServer(wanted))


def left_sockets() -> list[Path]:
    """Return the directories for sockets, apart from a database's files, of databases of this user that are gone."""
    # Listed first: a database is noted before it has such a directory.
    places = list(Path("/tmp").glob(f"tuner-{os.geteuid()}-*"))  # noqa: S108 - as `socket_directory` has it
    if (runtime := Path(os.environ.get("XDG_RUNTIME_DIR", ""))).is_absolute():
        places += runtime.glob("tuner-*")
    keys = {home.name if os.geteuid() == 0 else EmbeddedServer(home).key for home in _homes()}
    found = {place: re.fullmatch(r"tuner-(?:\d+-)?([0-9a-f]{12})", place.name) for place in places}
    return sorted(place for place, key in found.items() if key and key[1] not in keys and _is_left(place))


def _is_left(sockets: Path) -> bool:
    """Whether a directory is one of ours, and nobody listens in it."""
    try:
        found = os.lstat(sockets)
        if not stat.S_ISDIR(found.st_mode) or found.st_mode & 0o077 or not (sockets / MARK).exists():
            return False
    except OSError:  # another user's
        return False
    if time.time() - found.st_mtime < _STARTING_S:
        return False
    for path in sockets.glob(".s.PGSQL.*"):
        with suppress(OSError), socket.socket(socket.AF_UNIX) as client:
            client.settimeout(_CONNECT_TIMEOUT_S)
            client.connect(str(path))
            return False
    return True


def _homes() -> Iterator[Path]:
    for home in embedded.SHARED_DIRECTORY.glob("*") if os.geteuid() == 0 else _noted():
        with suppress(PermissionError):
            require_own(home)
            if (home / "postgresql" / "PG_VERSION").exists():
                yield home


def _noted() -> Iterator[Path]:
    for note in embedded.notes().glob("*"):
        with suppress(OSError):  # such as one that is not ours
            yield Path(os.fsdecode(read_own(note)))


def _look(home: Path) -> EmbeddedDatabase:
    data_dir: Path | None = home
    if os.geteuid() == 0:
        note = home / embedded.NOTE
        data_dir = Path(note.read_text()) if note.exists() else None
    server = EmbeddedServer(data_dir or home, home=home)
    return EmbeddedDatabase(data_dir=data_dir, home=home, size=_size(home), running=server.status().running)


def _size(directory: Path) -> int:
    total = 0
    for place, _, names in os.walk(directory):
        for name in names:
            with suppress(FileNotFoundError):  # a server that runs removes files
                total += os.lstat(os.path.join(place, name)).st_blocks * 512
    return total
