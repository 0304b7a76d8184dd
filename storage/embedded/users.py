"""Who uses a server, and for how long it may go unused: a lock that its processes share, and a setting in a file.

A process that starts or joins a server holds the lock until it ends; who ends the server takes it alone, so that
nobody who is about to connect loses it.
"""

from __future__ import annotations

import fcntl
import math
import os
import re
import subprocess
import sys
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from storage.database.errors import EmbeddedServerError
from storage.database.variables import hidden
from storage.embedded.postmaster import try_lock, wait_until
from storage.files import open_lock, read_own

if TYPE_CHECKING:
    from collections.abc import Iterator

    from psycopg2.extensions import connection as Connection  # noqa: N812 - a class

IDLE_EXIT: Final = "15m"
"""For how long a server goes unused before it ends itself, unless TUNER_DB_IDLE_EXIT or its starter says otherwise."""

_UNITS_S: Final = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}
_CARETAKER: Final = "tuner watcher"
_USE: Final = """\
SELECT count(*) FILTER (WHERE pid <> pg_backend_pid() AND application_name <> %(caretaker)s),
    (SELECT sum(sessions) FROM pg_stat_database WHERE datname <> 'postgres')
FROM pg_stat_activity WHERE backend_type IN ('client backend', 'walsender')"""
_held: dict[Path, int] = {}  # by lock file, its descriptor


@dataclass(frozen=True, kw_only=True)
class Use:
    """How a server is being used: sessions there are, and ever were, and when it was joined last."""

    sessions: int
    sessions_so_far: int
    joined_at: int  # nanoseconds


def open_session(admin_url: str) -> Connection:
    """Return a session for looking after a server, which is no use of it."""
    import psycopg2

    with hidden():
        session = psycopg2.connect(admin_url, dbname="postgres", application_name=_CARETAKER)
    session.autocommit = True
    return session


def look(session: Connection, lock: Path) -> Use:
    """Return how the server is being used."""
    with session.cursor() as cursor:
        cursor.execute(_USE, {"caretaker": _CARETAKER})
        sessions, sessions_so_far = cursor.fetchone()
    return Use(sessions=sessions, sessions_so_far=sessions_so_far, joined_at=lock.stat().st_mtime_ns)


def checked_idle_exit(text: str) -> str:
    """Return the setting as it was given. Raises EmbeddedServerError if it is no time."""
    if text != "never" and re.fullmatch(r"\d+(\.\d+)?[smhd]?", text) is None:
        raise EmbeddedServerError(f"an idle server ends after a time such as 90s, 15m or 2h, or never; got {text!r}")
    return text


def read_idle_exit_s(setting: Path) -> float:
    """Return after how many seconds a server ends that goes unused, infinity for never."""
    text = ""
    with suppress(FileNotFoundError):
        text = read_own(setting).decode(errors="replace").strip()
    match = re.fullmatch(r"([\d.]+)([smhd]?)", text)
    return math.inf if match is None else float(match[1]) * _UNITS_S[match[2]]


def register(lock: Path, timeout_s: float) -> None:
    """Be one of the server's users until this process ends: nobody ends a server for idleness that has any.

    Waits while one that was idle is being ended.
    """
    descriptor = _held.get(lock)
    while descriptor is None or not _is_file(descriptor, lock):
        if descriptor is not None:  # the database that it was for was deleted
            del _held[lock]
            os.close(descriptor)
        descriptor = _shared(lock, timeout_s)
        _held[lock] = descriptor
    os.utime(descriptor)


@contextmanager
def alone(lock: Path) -> Iterator[bool]:
    """Keep others from becoming users within the block; yields whether there are none."""
    descriptor = open_lock(lock)
    try:
        yield try_lock(descriptor)
    finally:
        os.close(descriptor)


def have_a_watcher(lock: Path, data_dir: Path, home: Path) -> None:
    """Start the process that ends a server once it is idle (`storage.embedded.watcher`), unless one holds the lock."""
    descriptor = open_lock(lock)
    try:
        if not try_lock(descriptor):
            return
        path = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
        python = [sys.executable, "-P", "-m", "storage.embedded.watcher"]
        # By a shell that ends at once: nobody here waits for the end of a process that outlives us.
        subprocess.run(
            ["/bin/sh", "-c", '"$@" </dev/null >/dev/null 2>&1 &', "sh", *python, data_dir, home, str(descriptor)],
            check=False,
            cwd="/",
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
            pass_fds=[descriptor],
            start_new_session=True,
        )
    finally:
        os.close(descriptor)


def _shared(lock: Path, timeout_s: float) -> int:
    descriptor = open_lock(lock)

    def is_taken() -> bool:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    if not wait_until(is_taken, timeout_s):
        os.close(descriptor)
        raise EmbeddedServerError(
            f"another process has been ending the idle database of {lock.parent} for {timeout_s:.0f} seconds; try again"
        )
    return descriptor


def _is_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
