"""Which embedded databases a user has, wherever their data directories were."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from storage.embedded import server as embedded
from storage.embedded.server import EmbeddedServer
from storage.files import read_own, require_own

if TYPE_CHECKING:
    from collections.abc import Iterator


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
