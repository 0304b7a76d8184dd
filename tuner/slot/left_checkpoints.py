"""Checkpoints on this machine whose study was deleted from another one, and by what it is known that it was.

Each machine notes for which database it has worked on which study, by an empty directory `databases/DATABASE/STUDY`
in the data directory, beside `checkpoints/STUDY`. What one database alone has been noted for, and does not know any
more, nobody needs. What is not noted at all, as by an earlier version, may be any database's.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from storage.coordination import studies
from storage.database.identity import identity
from storage.files import own_directory
from tuner.study.joining import directory_name

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sqlalchemy import Engine

    from tuner.study.joining import AnyStudy

Whose = Literal["needed", "deleted", "another's", "unknown"]


@dataclass(frozen=True, kw_only=True)
class KeptCheckpoints:
    """The checkpoints of one study on this machine.

    `whose`: of a study that the database has; of one that it had, and no other database; of another one; or not known.
    """

    path: Path
    whose: Whose


def note(engine: Engine, study: AnyStudy, data_dir: Path) -> None:
    """Note that the study's checkpoints here are of this database. Nothing is noted where nothing can be written."""
    if (ours := identity(engine)) is not None:
        _note(data_dir, ours, study.directory)


def look(engine: Engine | None, data_dir: Path) -> list[KeptCheckpoints]:
    """Return what checkpoints are here, and whose; those of the database's studies that are not noted are noted now.

    Without a database nothing is known to be needed, or deleted.
    """
    with suppress(OSError):
        # Listed before the database is asked: whatever is created meanwhile is in its answer.
        found = sorted(path for path in (data_dir / "checkpoints").iterdir() if path.is_dir() and not path.is_symlink())
        noted = _noted(data_dir)
        ours, known = (None, set()) if engine is None else (identity(engine), _known(engine))
        kept = []
        for path in found:
            databases = noted.get(path.name, set())
            if path.name in known and ours is not None and not databases:
                _note(data_dir, ours, path.name)
            kept.append(KeptCheckpoints(path=path, whose=_whose(path.name, known, databases, ours)))
        return kept
    return []


def drop(engine: Engine, data_dir: Path) -> list[Path]:
    """Delete the checkpoints of studies that were deleted from this database, and return where they were.

    What cannot be deleted stays for the next time.
    """
    dropped = []
    noted, ours = _noted(data_dir), identity(engine)  # before the studies are asked for
    for name in noted.keys() - _known(engine):
        if noted[name] == {ours} and not (data_dir / "checkpoints" / name).exists():
            forget(name, data_dir)
    for kept in look(engine, data_dir):
        if kept.whose == "deleted":
            with suppress(OSError):
                remove(kept.path, data_dir)
                dropped.append(kept.path)
    return dropped


def remove(path: Path, data_dir: Path) -> None:
    """Delete a study's checkpoints, and what was noted of them. Raises OSError."""
    with suppress(FileNotFoundError):  # another worker here was as quick
        shutil.rmtree(path)
    forget(path.name, data_dir)


def forget(directory: str, data_dir: Path) -> None:
    """Forget what was noted of the study with checkpoints in a directory of this name."""
    for place in _databases(data_dir):
        with suppress(OSError):
            (place / directory).rmdir()
        with suppress(OSError):  # of other studies something is noted
            place.rmdir()


def _whose(name: str, known: set[str], databases: set[str], ours: str | None) -> Whose:
    if name in known:
        return "needed"
    if not databases:
        return "unknown"
    return "deleted" if databases == {ours} else "another's"


def _known(engine: Engine) -> set[str]:
    return {directory_name(study_id, created_at) for study_id, created_at in studies.created(engine)}


def _note(data_dir: Path, database: str, directory: str) -> None:
    with suppress(OSError):
        own_directory(data_dir / "databases" / database / directory)


def _noted(data_dir: Path) -> Mapping[str, set[str]]:
    """Return for each study's directory which databases it was noted for."""
    found: dict[str, set[str]] = {}
    for place in _databases(data_dir):
        with suppress(OSError):
            for name in os.listdir(place):
                found.setdefault(name, set()).add(place.name)
    return found


def _databases(data_dir: Path) -> Iterator[Path]:
    with suppress(OSError):  # there are none, or something else has the name
        yield from (place for place in (data_dir / "databases").iterdir() if place.is_dir())
