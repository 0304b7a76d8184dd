"""What a PostgreSQL server leaves for others to see: its pid file, its socket, a lock while it lives."""

from __future__ import annotations

import fcntl
import os
import socket
import stat
import struct
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from storage.database.errors import EmbeddedServerError
from storage.files import UntrustedError, open_lock, read_own

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_POLL_INTERVAL_S = 0.02
_CONNECT_TIMEOUT_S = 1.0


@dataclass(frozen=True, kw_only=True)
class Postmaster:
    """A server as its pid file tells; it may have died since."""

    pid: int
    port: int
    socket_directory: Path
    listen_address: str  # the first TCP address, empty without TCP
    ready: bool  # accepts sessions, or did when it wrote the file

    @property
    def socket(self) -> Path:
        return self.socket_directory / f".s.PGSQL.{self.port}"


def read_postmaster(cluster: Path, owner: int) -> Postmaster | None:
    """Read the pid file of a cluster; None if there is none, or one not written to its end yet.

    Raises UntrustedError, an OSError, for one that `owner`, the cluster's, has not written.
    """
    try:
        lines = read_own(cluster / "postmaster.pid", owner=owner).decode(errors="replace").splitlines()
    except FileNotFoundError:
        return None
    # pid, data directory, start time, port, socket directory, listen address, shared memory, status
    if len(lines) < 8 or not (lines[0].isdecimal() and lines[3].isdecimal()):
        return None
    return Postmaster(
        pid=int(lines[0]),
        port=int(lines[3]),
        socket_directory=Path(lines[4]),
        listen_address=lines[5],
        ready=lines[7].strip() == "ready",
    )


def listener_pid(server: Postmaster, owner: int) -> int | None:
    """Connect to the server's socket and return the pid that listens there; None if nobody does.

    The kernel tells the pid (0 for a process of another container). macOS does not, and gives the pid file's.
    Raises UntrustedError, an OSError, where somebody else listens than `owner`, or could.
    """
    try:
        found = os.lstat(server.socket_directory)
    except FileNotFoundError:
        return None
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != owner or found.st_mode & 0o022:
        raise UntrustedError(f"{server.socket_directory} is not a directory of uid {owner} alone")
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(_CONNECT_TIMEOUT_S)
        try:
            client.connect(str(server.socket))
        except OSError:
            return None
        if sys.platform == "linux":
            credentials = client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
            pid, uid, _ = struct.unpack("3i", credentials)
            if uid != owner:
                raise UntrustedError(f"the server at {server.socket} is uid {uid}'s and not uid {owner}'s")
            return int(pid)
        else:  # noqa: RET505  (mypy takes the plain form for unreachable code)
            return server.pid


@contextmanager
def exclusive(lock: Path, timeout_s: float, *, create: bool = True) -> Iterator[int]:
    """Hold a lock file, waiting for its holder until the deadline; yields the descriptor.

    The lock ends with the block, or with the last process that inherited the descriptor.
    """
    descriptor = open_lock(lock, create=create)
    try:
        if not wait_until(lambda: try_lock(descriptor), timeout_s):
            raise EmbeddedServerError(
                f"another process has held {lock} for {timeout_s:.0f} seconds; wait for the 'tuner' "
                "that starts or stops the database, or end it, and try again"
            )
        yield descriptor
    finally:
        os.close(descriptor)


def is_held(lock: Path) -> bool:
    """Whether some process holds the lock file. The answer stands only while nobody else may take it."""
    try:
        descriptor = open_lock(lock, create=False)
    except FileNotFoundError:
        return False
    try:
        return not try_lock(descriptor)
    finally:
        os.close(descriptor)


def wait_until(condition: Callable[[], bool], timeout_s: float) -> bool:
    """Poll a condition, at least once, until it holds or the time is over; returns whether it held."""
    deadline = time.monotonic() + timeout_s
    pause = threading.Event()
    while not condition():
        if time.monotonic() >= deadline:
            return False
        pause.wait(_POLL_INTERVAL_S)
    return True


def try_lock(descriptor: int) -> bool:
    """Take the lock of an open file if nobody holds it; returns whether it was taken."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
