"""What was left on this machine, whose it is, and what becomes of it when somebody cleans up.

Gone for certain is what nobody can want: checkpoints of studies that were deleted from the database, embedded databases
whose data directory is gone, directories for the sockets of databases that are gone. What another database, or a later
start, may still want goes only if that is asked for.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from storage.database.errors import EmbeddedServerError
from storage.database.sessions import Sessions
from storage.embedded.listing import databases, left_sockets
from tuner.slot import left_checkpoints
from tuner.slot.spool import Spool

if TYPE_CHECKING:
    from sqlalchemy import Engine

Fate = Literal["goes", "asked", "stays"]
"""Whether it is deleted, is if everything is asked for, or is not."""

_CHECKPOINTS: Final[dict[left_checkpoints.Whose, tuple[str, Fate]]] = {
    "needed": ("of a study of this database", "stays"),
    "deleted": ("of a study that was deleted", "goes"),
    "another's": ("of another database's study", "asked"),
    "unknown": ("of a database that is not known", "asked"),
}


@dataclass(frozen=True, kw_only=True)
class Left:
    """Something that was left: its bytes on the disk, when it was changed last, in seconds of the epoch, its fate."""

    what: str
    whose: str
    path: Path
    size: int
    changed: float
    fate: Fate
    remove: Callable[[], object]


def look(engine: Engine | None, data_dir: Path) -> list[Left]:
    """Return what was left on this machine; deletes nothing. `engine` is None where there is no database."""
    return [*_checkpoints(engine, data_dir), *_results(engine, data_dir), *_databases(), *_sockets(), *_caches()]


def _checkpoints(engine: Engine | None, data_dir: Path) -> Iterator[Left]:
    for kept in left_checkpoints.look(engine, data_dir):
        whose, fate = _CHECKPOINTS[kept.whose]
        remove = partial(left_checkpoints.remove, kept.path, data_dir)
        yield _left("checkpoints", whose, kept.path, fate, remove)


def _results(engine: Engine | None, data_dir: Path) -> Iterator[Left]:
    for path, study, is_wanted in Spool(data_dir).waiting(None if engine is None else Sessions(engine)):
        whose = f"of study {study}" if study else "of no study that can be told"
        told = f"{whose}, for its next worker here" if is_wanted else f"{whose}, which this database does not take"
        yield _left("result", told, path, "stays" if is_wanted else "asked", path.unlink)


def _databases() -> Iterator[Left]:
    for found in databases():
        if found.data_dir is not None and not found.data_dir.exists():
            whose = f"of {found.data_dir}, which is gone"
            yield _left("database", whose, found.home, "goes", found.server.delete)


def _sockets() -> Iterator[Left]:
    for path in left_sockets():
        yield _left("sockets", "of a database that is gone", path, "goes", partial(shutil.rmtree, path))


def _caches() -> Iterator[Left]:
    with suppress(FileNotFoundError):
        for path in sorted(Path(tempfile.gettempdir()).glob("tuner-torchinductor-*")):
            if path.is_dir() and not path.is_symlink() and path.stat().st_uid == os.geteuid():
                whose = "compiled by --compile, for the next time"
                yield _left("cache", whose, path, "asked", partial(shutil.rmtree, path))


def _left(what: str, whose: str, path: Path, fate: Fate, remove: Callable[[], object]) -> Left:
    size, changed = 0, 0.0
    for each in (path, *path.rglob("*")):
        with suppress(OSError):  # it has just gone
            found = each.lstat()
            size += found.st_blocks * 512
            changed = max(changed, found.st_mtime)
    return Left(what=what, whose=whose, path=path, size=size, changed=changed, fate=fate, remove=remove)


def remove(left: Left) -> str | None:
    """Delete it, and return why it stays where it does."""
    try:
        left.remove()
    except EmbeddedServerError as error:
        return str(error)
    except OSError as error:
        return f"{left.path} stays: {error.strerror or error}"
    return None
