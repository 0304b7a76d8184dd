"""Files that hold a secret: read only if nobody can read them who should not."""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING, Final

from storage.database.errors import StorageError

if TYPE_CHECKING:
    from pathlib import Path

MAX_BYTES: Final = 4096
_ROOT: Final = 0


def read_private(path: Path, what: str) -> str:
    """Return the text of a private file without one trailing newline; `what` names it in errors.

    It must be regular, owned by us or by root, and closed to all others: mode 0600 or 0400. Its group may read it
    (0440, 0640) if that is one of ours or root's, as Kubernetes with an fsGroup and credentials of systemd have it.
    Raises StorageError, which never holds anything of the content.
    """
    try:
        # O_NONBLOCK: opening a FIFO would otherwise wait for its writer.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            _check(os.fstat(file.fileno()), f"the {what} {path}", path)
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise StorageError(f"cannot read the {what} {path}: {error.strerror}") from error
    if len(content) > MAX_BYTES:
        raise StorageError(f"the {what} {path} must hold one secret, not {MAX_BYTES} bytes and more")
    try:
        return content.decode().removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError:
        raise StorageError(f"the {what} {path} must be UTF-8 text") from None


def _check(found: os.stat_result, named: str, path: Path) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise StorageError(f"{named} must be a regular file")
    if found.st_uid not in {os.geteuid(), _ROOT}:
        raise StorageError(f"{named} must belong to you or root, not to uid {found.st_uid}")
    mode = stat.S_IMODE(found.st_mode)
    if mode & 0o037:
        raise StorageError(f"{named} has mode {mode:04o}; run: chmod 600 {path}")
    # With an access list, as systemd's credentials have one, the group's bits tell the most that anybody of it may.
    if mode & 0o040 and found.st_gid not in {os.getegid(), *os.getgroups(), _ROOT}:
        raise StorageError(
            f"{named} has mode {mode:04o} and is its group's too, gid {found.st_gid}, which is none of yours;"
            f" run: chmod 600 {path}"
        )
